import dataclasses
import json
import re
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from _data import brief, cells, packed
from test_report import Page, write_atlas

import scvi_core as sv
from scvi_core import criticism, report
from scvi_core.config import CriticismConfig, ModelConfig, load_config
from scvi_core.counts import Schema, pack
from scvi_core.criticism import CHECKS, FILES, agree, choose_cells, coverage, criticise, interval, markers, moments
from scvi_core.files import Decisions, UserError, read_json, sha256_file, write_json
from scvi_core.model import build
from scvi_core.posterior import posterior_predictive
from scvi_core.report import figures, style

CONFIG = CriticismConfig()


def counts_like(n=300, g=60, seed=0, shape=2.0):
    """Sparse counts with empty genes and cells, and a gene seen once."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(shape, 0.3, (n, g)) * rng.lognormal(0, 1, g))
    x[:, 3], x[5], x[:, 4] = 0, 0, 0
    x[7, 4] = 1
    return x


def test_moments_against_numpy():
    x = counts_like()
    found = moments(sp.csr_matrix(x))
    for level, axis, n in (("gene", 0, 300), ("cell", 1, 60)):
        got = found[level]
        np.testing.assert_array_equal(got["total"], x.sum(axis))
        np.testing.assert_allclose(got["mean"], x.mean(axis))
        np.testing.assert_allclose(got["variance"], x.var(axis, ddof=1), atol=1e-12)
        np.testing.assert_allclose(got["zero_fraction"], (x == 0).mean(axis), atol=1e-12)
        some = x.sum(axis) > 0
        np.testing.assert_allclose(got["cv"][some], scipy.stats.variation(x, axis, ddof=1)[some])
        np.testing.assert_allclose(got["cv"][~some], np.sqrt(n))
    assert found["gene"]["cv"][3] == found["gene"]["cv"].max() == pytest.approx(found["gene"]["cv"][4])
    large = np.zeros((4, 2), dtype=np.int32)
    large[:, 0] = 2_000_000_000  # its square is beyond 64 bits of the counts' type
    assert moments(sp.csr_matrix(large))["gene"]["variance"][0] == 0


@pytest.mark.parametrize("n_replicates", [19, 20, 39, 100])
def test_the_interval_holds_what_it_says(n_replicates):
    """Data and replicates from one distribution: the share of data inside is that of `coverage`, whatever it is."""
    rng = np.random.default_rng(0)
    values = rng.standard_t(3, (n_replicates + 1, 20_000))
    low, high = interval(values[1:])
    inside = ((values[0] >= low) & (values[0] <= high)).mean()
    assert abs(inside - coverage(n_replicates)) < 4 * np.sqrt(0.1 / 20_000) and 0.89 < coverage(n_replicates) < 0.93


def test_markers_against_scanpy():
    import scanpy as sc

    adata = ad.AnnData(sp.csr_matrix(counts_like(), dtype=np.float64))
    kind = np.array(["a", "b", "c"])[np.arange(300) % 7 % 3]
    groups = {name: np.flatnonzero(kind == name) for name in "abc"}
    lfc_kg, t_kg = markers(adata.X, groups)
    adata.obs["kind"] = pd.Categorical(kind)
    sc.pp.normalize_total(adata, 1e4)
    sc.pp.log1p(adata)
    sc.tl.rank_genes_groups(adata, "kind", method="t-test")
    y = adata.X.toarray()
    for k, name in enumerate("abc"):
        table = sc.get.rank_genes_groups_df(adata, name).set_index("names")
        expected = table.loc[adata.var_names, "scores"].to_numpy()
        np.testing.assert_allclose(t_kg[k], np.nan_to_num(expected), rtol=1e-4, atol=1e-5)
        mine = kind == name
        np.testing.assert_allclose(lfc_kg[k], (y[mine].mean(0) - y[~mine].mean(0)) / np.log(2), atol=1e-9)


def test_halves_share_no_cell_and_split_every_group():
    groups = {"a": np.arange(0, 21), "b": np.arange(30, 80, 2)}
    (one, mine), (two, yours) = criticism.halve(101, groups, 0)
    assert sorted([*one, *two]) == list(range(101)) and abs(len(one) - len(two)) <= 1
    for name, rows in groups.items():
        assert sorted([*one[mine[name]], *two[yours[name]]]) == list(rows)
        assert abs(len(mine[name]) - len(yours[name])) <= 1


def test_agreement_against_scipy():
    rng = np.random.default_rng(0)
    a, b = ((rng.normal(size=(3, 200)).round(1), rng.normal(size=(3, 200))) for _ in range(2))
    correlation, overlap = agree(a, b)
    for k in range(3):
        assert correlation[k] == pytest.approx(scipy.stats.spearmanr(a[0][k], b[0][k])[0])
        tops = [set(np.argsort(-t[k])[:20]) for _, t in (a, b)]
        assert overlap[k] == len(tops[0] & tops[1]) / 20
    assert all((part == 1).all() or np.allclose(part, 1) for part in agree(a, a))


# ---- verdicts: a right model is good, a wrong one is not


def known(likelihood, n=450, g=200, theta=1.0, logit_pi=-30.0):
    """A decoder set by hand: z of two kinds of cells, by gene 0; it moves genes 1 to 20 up, 21 to 40 down."""
    rng = np.random.default_rng(0)
    kind = np.arange(n) % 3 // 2
    x = rng.poisson(4, (n, g)) + 1
    x[:, 0] = np.array([0, 7])[kind]
    obs = pd.DataFrame({"kind": np.array(["none", "high"])[kind]}, index=[f"c{i}" for i in range(n)])
    adata = ad.AnnData(sp.csr_matrix(x), obs, pd.DataFrame(index=[f"G{i}" for i in range(g)]))
    counts = pack(adata, Schema.of(adata, None))
    model = build(ModelConfig(likelihood=likelihood, n_latent=1, n_hidden=1), g, 1, 0, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in (model.encoder.layers[0], model.decoder[0]):
            layer.norm.running_var.fill_(1 - 1e-3)
            layer.norm.weight.fill_(1)
            layer.linear.weight.fill_(1) if layer is model.decoder[0] else None
        model.encoder.layers[0].linear.weight_gh[0, 0] = 1
        model.encoder.mean.weight[0, 0] = 1
        model.encoder.log_variance.bias.fill_(-9)
        model.rho.weight[1:21, 0], model.rho.weight[21:41, 0] = 0.7, -0.7
        model.rho.bias.copy_(torch.linspace(1.5, -1.5, g))
        if likelihood != "poisson":
            model.log_theta_sg.fill_(float(np.log(theta)))
        if likelihood == "zinb":
            model.dropout_logit.bias.fill_(logit_pi)
    return model, counts, obs["kind"].to_numpy(dtype=object)


def against(model, counts, data, group, monkeypatch, seed=1):
    """Criticise `model`, whose replicates are of `counts`, as if `data` had been measured."""
    monkeypatch.setattr(criticism, "_matrix", lambda _: data)
    ids = [f"G{i}" for i in range(counts.n_genes)]
    made = Decisions("criticism")
    found = criticise(model, counts, map(str, range(len(counts))), ids, ids, group, CONFIG, seed, made)
    return found, {c["check"]: c for c in found.summary["checks"]}


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_data_of_the_model_itself_are_good(likelihood, monkeypatch):
    model, counts, group = known(likelihood, logit_pi=-1.5)
    data = posterior_predictive(model, counts, seed=99)
    found, checks = against(model, counts, data, group, monkeypatch)
    assert {c["verdict"] for c in checks.values()} == {"good"}, checks
    assert list(checks) == [*(c.name for c in CHECKS), "de_lfc", "de_top"]
    for name in ("mean", "variance", "zero_fraction", "cv"):
        assert abs(checks[name]["within"] - coverage(20)) < 0.09 and checks[name]["value"] < 0.1
    assert abs(checks["de_top"]["value"] - 1) < 0.1 and len(found.groups) == 2


def test_poisson_on_overdispersed_counts_is_not(monkeypatch):
    model, counts, group = known("nb", theta=1.0)
    data = posterior_predictive(model, counts, seed=99)
    wrong, _, _ = known("poisson")
    _, checks = against(wrong, counts, data, group, monkeypatch)
    assert checks["variance"]["verdict"] == "poor" and checks["cv"]["verdict"] == "poor"
    assert (
        "too small a variance" in checks["variance"]["sentence"] and "too large" not in checks["variance"]["sentence"]
    )
    assert checks["mean"]["verdict"] == "good"
    assert checks["zero_fraction"]["verdict"] == "poor" and "too few zeros" in checks["zero_fraction"]["sentence"]


def test_dropout_that_the_model_has_not_is_seen(monkeypatch):
    model, counts, group = known("zinb", theta=5.0, logit_pi=-0.5)
    data = posterior_predictive(model, counts, seed=99)
    wrong, _, _ = known("nb", theta=5.0)
    _, checks = against(wrong, counts, data, group, monkeypatch)
    assert checks["zero_fraction"]["verdict"] == "poor" and "too few zeros" in checks["zero_fraction"]["sentence"]
    assert checks["cell_total"]["verdict"] == "poor" and "too many counts" in checks["cell_total"]["sentence"]
    assert checks["cell_total"]["bias"] == pytest.approx(np.log2(1 + np.exp(-0.5)), abs=0.08)
    assert "The typical cell's is" in checks["cell_total"]["sentence"]


def test_markers_that_the_model_has_not_are_seen(monkeypatch):
    model, counts, group = known("nb", theta=2.0)
    data = posterior_predictive(model, counts, seed=99)
    with torch.no_grad():
        model.rho.weight.zero_()  # all kinds of cells alike
    _, checks = against(model, counts, data, group, monkeypatch)
    assert checks["de_lfc"]["verdict"] == "poor" and "Least alike: group" in checks["de_lfc"]["sentence"]
    assert checks["de_top"]["verdict"] == "poor"


def test_the_miss_of_a_gene_is_named_and_on_file(monkeypatch):
    model, counts, group = known("nb", theta=2.0)
    data = posterior_predictive(model, counts, seed=99).tolil()
    data[:, 42] = 0  # never seen, though the model expects it
    data[:, 50] = 9
    found, checks = against(model, counts, data.tocsr(), group, monkeypatch)
    genes = found.genes.set_index("gene_id")
    assert (
        genes.loc[["G42", "G50"], ["zero_fraction_missed", "judged"]].all(None) and not genes.loc["G7", "mean_missed"]
    )
    assert checks["zero_fraction"]["verdict"] == "good"
    text = checks["zero_fraction"]["sentence"]
    assert re.search(r"too few zeros for \d+% of genes \(most of all G42.* and too many .*\(most of all G50", text)


def test_rare_genes_and_small_groups_are_left_out_and_said_so(monkeypatch):
    model, counts, group = known("nb", theta=2.0)
    with torch.no_grad():
        model.rho.bias[5] = -30
    data = posterior_predictive(model, counts, seed=99)
    group = group.copy()
    group[:5], group[10:40] = "few", None
    monkeypatch.setattr(criticism, "_matrix", lambda _: data)
    made, ids = Decisions("criticism"), [f"G{i}" for i in range(200)]
    found = criticise(model, counts, map(str, range(450)), ids, ids, group, CONFIG, 0, made)
    said = {d.what: d.value for d in made}
    assert said["groups left out"] == ["few"] and said["genes not judged"] == 1
    assert list(found.groups["group"]) == ["high", "none"] and not found.genes["judged"][5]
    alone = criticise(model, counts, map(str, range(450)), ids, ids, np.full(450, "1", object), CONFIG, 0, made)
    assert len(alone.groups) == len(alone.de) == 0 and len(alone.summary["checks"]) == len(CHECKS)
    one = dataclasses.replace(counts, indptr_n=counts.indptr_n[:2])
    with pytest.raises(UserError, match="1 cells to examine"):
        criticise(model, one, ["a"], ids, ids, group[:1], CONFIG, 0, made)


def test_which_cells_are_examined():
    made, config = Decisions("criticism"), CriticismConfig(n_cells=100)
    held = np.arange(0, 5000, 4)
    rows = choose_cells(5000, held, config, 0, made)
    assert len(rows) == 100 and set(rows) <= set(held) and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, choose_cells(5000, held, config, 0, made))
    rows = choose_cells(500, np.arange(50), CONFIG, 0, made)
    assert np.array_equal(rows, np.arange(500)) and "most of them trained on" in made[-1].reason


# ---- from files to files, and on the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checks of a brief fit, as the command writes them."""
    adata = cells(n=120, g=40)
    model = sv.fit(adata, batch_key="batch", train=brief(max_epochs=2), device="cpu", progress=False)
    _schema, counts = packed(adata)
    group = adata.obs["kind"].to_numpy(dtype=object)
    rest = (adata.obs_names, model.gene_ids, model.gene_names, group, CONFIG, 0, Decisions("criticism"))
    out = tmp_path_factory.mktemp("criticism")
    for name in ("one", "two"):
        criticise(model.network, counts, *rest).save(out / name)
    return out


def test_same_bytes_and_whole(folder):
    assert sorted(p.name for p in (folder / "one").iterdir()) == sorted(FILES)
    for name in FILES:
        assert sha256_file(folder / "one" / name) == sha256_file(folder / "two" / name), name
    genes = pd.read_parquet(folder / "one" / "genes.parquet")
    assert list(genes.columns[:3]) == ["gene_id", "gene_name", "judged"] and len(genes) == 40
    assert (genes["variance_low"] <= genes["variance_predicted"]).all()
    assert not genes.isna().any(axis=None) and len(pd.read_parquet(folder / "one" / "cells.parquet")) == 120
    assert len(pd.read_parquet(folder / "one" / "de.parquet")) == 3 * 40


def test_figure_has_fixed_bytes(folder, monkeypatch):
    monkeypatch.setattr(style, "DPI", 40)
    (folder / "three").mkdir(exist_ok=True)
    shutil.copytree(folder / "one", folder / "three" / "criticism", dirs_exist_ok=True)
    found = report.read_criticism(folder / "three")
    drawn = [figures.png(figures.criticism_figure(found, theme=theme)) for theme in ("light", "light", "dark")]
    assert drawn[0] == drawn[1] != drawn[2]
    none = {**found, "de": found["de"].head(0)}  # a single group: nothing to compare
    assert figures.criticism_figure(none)
    assert report.read_criticism(folder) is None


def test_page_has_the_section_where_there_are_checks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"picture")  # drawn, not rendered
    atlas = tmp_path / "atlas"
    config = write_atlas(atlas)
    shutil.copytree(folder / "one", atlas / "criticism")
    checks = read_json(atlas / "criticism/checks.json", "criticism")
    checks["checks"][0] |= {"verdict": "poor", "sentence": "The model predicts <b>no</b> zeros."}
    write_json(atlas / "criticism/checks.json", checks, checksum=True)
    report.build_report(atlas, config)
    text = (atlas / "report.html").read_text()
    assert "Does the model describe the data?" in text and "#criticism" in Page(text).links
    summary = text[text.index('<section id="summary">') : text.index('<section id="qc">')]
    assert "Zeros by gene: The model predicts &lt;b&gt;no&lt;/b&gt; zeros." in summary
    assert (atlas / "figures/criticism.png").exists()
    files = json.loads((atlas / "manifest.json").read_text())["files"]
    assert {f"criticism/{name}" for name in FILES} <= set(files)
    assert json.loads((atlas / "metrics.json").read_text())["criticism"]["zero_fraction"]["verdict"] == "poor"
    off = load_config(config.model_dump(mode="json") | {"criticism": {"enabled": False}})
    report.build_report(atlas, off)
    assert "Does the model describe the data?" not in (atlas / "report.html").read_text()
    assert not (atlas / "figures/criticism.png").exists()
    assert "criticism/checks.json" not in json.loads((atlas / "manifest.json").read_text())["files"]
