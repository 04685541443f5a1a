"""Cell types: coarse labels, calibration, label sets, novelty, the interface and the bundle."""

import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from _data import brief, packed
from _data import cells as small
from _samples import sample, stored, write
from typer.testing import CliRunner

import scvi_core as sv
from scvi_core import celltypes, scanvi, stream
from scvi_core.celltypes import _conformal, _softmax_regression, _temperature, ece_of, softmax
from scvi_core.cli import app
from scvi_core.config import AnnotateConfig, ModelConfig, Sample, check_columns, load_config
from scvi_core.counts import Schema
from scvi_core.files import UserError, write_parquet
from scvi_core.labels import Known, Taxonomy
from scvi_core.model import Noise, build
from scvi_core.preprocess.store import read_store, write_store
from scvi_core.stream import open_counts

EDGES = [("T", "lymphoid"), ("B", "lymphoid"), ("lymphoid", "cell"), ("NK", "cell")]
HOW = {"model": ModelConfig(n_hidden=16, n_latent=3), "train": brief(max_epochs=8), "progress": False}


def cells(n=240, **more):
    return small(n, g=30, n_batches=3, rate=4.0, **more)


@pytest.fixture(scope="module")
def fitted():
    adata = cells()
    return adata, sv.fit(adata, batch_key="batch", label_key="kind", label_tree=EDGES, **HOW)


# ---- parts


def test_coarse_labels_cost_little_and_are_used_as_such():
    """Three types on a line, labelled as leaves or, half of them, as a node of two: the same borders are found."""
    rng = np.random.default_rng(0)
    y_n = rng.integers(0, 3, 900)
    x_n1 = y_n[:, None] * 3.0 + rng.normal(size=(900, 1))
    x_nf = np.hstack([x_n1, np.abs(x_n1 - 3)])
    allowed_ny = np.eye(3, dtype=bool)[y_n]
    coarse_ny = allowed_ny.copy()
    coarse = (rng.random(900) < 0.5) & (y_n < 2)
    coarse_ny[coarse] = [True, True, False]
    found = []
    for each_ny in (allowed_ny, coarse_ny):
        weight_yf, bias_y = _softmax_regression(x_nf, each_ny, np.ones(900))
        found.append(((x_nf @ weight_yf.T + bias_y).argmax(1) == y_n).mean())
    assert found[0] > 0.92 and found[1] > found[0] - 0.02


def test_the_gradient_of_the_classifiers_loss():
    """At the minimum it is zero: no small step in any direction lowers the loss, written here anew."""
    rng = np.random.default_rng(1)
    x_nf, allowed_ny, w_n = rng.normal(size=(80, 4)), rng.random((80, 3)) < 0.6, rng.random(80)
    allowed_ny[np.arange(80), rng.integers(0, 3, 80)] = True
    weight_yf, bias_y = _softmax_regression(x_nf, allowed_ny, w_n)

    def loss(weight_yf, bias_y):
        p_ny = softmax(x_nf @ weight_yf.T + bias_y)
        fit = -(w_n / w_n.sum() * np.log((p_ny * allowed_ny).sum(1))).sum()
        return fit + 0.5 * celltypes.L2 * (weight_yf**2).sum()

    least = loss(weight_yf, bias_y)
    for _ in range(20):
        way = rng.normal(size=weight_yf.shape) * 0.05
        assert loss(weight_yf + way, bias_y) > least - 1e-6


def test_temperature_undoes_what_was_multiplied():
    rng = np.random.default_rng(0)
    logit_ny = rng.normal(size=(20_000, 4)) * 2
    truth_n = np.array([rng.choice(4, p=p) for p in softmax(logit_ny)])
    assert _temperature(logit_ny * 3, truth_n) == pytest.approx(3, rel=0.05)
    confidence_n = softmax(logit_ny).max(1)
    right_n = logit_ny.argmax(1) == truth_n
    assert ece_of(confidence_n, right_n)[0] < 0.015
    assert ece_of(np.sqrt(confidence_n), right_n)[0] > 0.1


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_conformal_sets_cover_what_they_promise(coverage):
    """Over many draws of 200 cells to calibrate on, new cells are covered as often as asked, and little more."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        true_n = rng.beta(5, 1, 400)
        covered.append((true_n[200:] >= _conformal(true_n[:200], coverage)).mean())
    assert coverage - 0.005 < np.mean(covered) < coverage + 0.01


# ---- scANVI with a taxonomy


def test_an_inner_label_says_no_more_than_it_does():
    """Its cross-entropy is - log of the sum over its leaves, its bound that of a model with those leaves alone."""
    taxonomy = Taxonomy.of({"T", "B", "NK", "lymphoid"}, EDGES)
    _, counts = packed(cells(20), (), ())
    config = ModelConfig(n_hidden=8, n_latent=3, dropout=0.0, encoder_norm="none", decoder_norm="none")
    base = build(config, 30, 3, 0, 0)
    model = scanvi.like(base, taxonomy.reach_vy).eval()
    minibatch = counts.gather(torch.arange(20))
    place = {name: v for v, name in enumerate(taxonomy.names)}

    def terms(label):
        minibatch.label_n = torch.full((20,), place.get(label, -1))
        return model.label_terms(minibatch, Noise(0))

    with torch.no_grad():
        log_p_ny = torch.log_softmax(model.logits(model.encode(minibatch).mean_nk), 1)
        of = {label: terms(label) for label in (*taxonomy.leaves, "lymphoid", "cell", None)}
    two = torch.logsumexp(log_p_ny[:, [place["B"], place["T"]]], 1)
    assert torch.allclose(of["lymphoid"]["cross_entropy"], -two, atol=1e-6)
    assert torch.allclose(of["cell"]["cross_entropy"], torch.zeros(20), atol=1e-6)
    assert torch.allclose(of[None]["cross_entropy"], torch.zeros(20), atol=1e-6)
    for name in ("prior", "kl_u", "kl_y"):  # of all leaves: whatever is said of them
        assert torch.allclose(of["cell"][name], of[None][name], atol=1e-5)
        assert torch.equal(of["T"][name], of[None][name])  # a leaf's cells, as scANVI's
        assert not torch.allclose(of["lymphoid"][name], of[None][name], atol=1e-3)


@pytest.mark.parametrize("method", ["two-stage", "joint"])
def test_scanvi_is_trained_and_kept(method, tmp_path):
    adata = cells(120)
    annotate = AnnotateConfig(method=method)
    model = sv.fit(adata, batch_key="batch", label_key="kind", annotate=annotate, **HOW)
    assert isinstance(model.network, scanvi.SCANVI)
    model.save(tmp_path / "model")
    again = sv.load(tmp_path / "model")
    pd.testing.assert_frame_equal(again.annotate(adata), model.annotate(adata))
    assert (model.annotate(adata)["label"] == adata.obs["kind"]).mean() > 0.8


# ---- the interface


def test_columns_index_and_laws(fitted):
    adata, model = fitted
    calls, leaves = model.annotate(adata), model.label_probabilities(adata)
    assert list(calls) == celltypes.CALLS and calls.index.equals(adata.obs_names)
    assert (calls["label"] == adata.obs["kind"]).mean() > 0.9
    np.testing.assert_allclose(leaves.sum(1), 1)
    assert np.array_equal(leaves.max(1), calls["probability"]) and (leaves.idxmax(axis=1) == calls["label"]).all()
    nodes = model.label_probabilities(adata, level="all")
    assert list(nodes) == ["B", "NK", "T", "lymphoid", "cell"]
    for child, parent in EDGES:
        assert (nodes[parent] >= nodes[child] - 1e-12).all()
    np.testing.assert_allclose(nodes["cell"], 1)
    under = {"lymphoid": {"B", "T"}, "cell": {"B", "T", "NK"}}
    for _, call in calls.iterrows():
        assert set(call["label_set"]) <= under.get(call["safe_label"], {call["safe_label"]})
    assert calls["novelty"].between(0, 1).all()
    with pytest.raises(UserError, match="level: 'leaves'"):
        model.label_probabilities(adata, level="leaves")
    table = model.annotator.table()
    assert table["n_cells"].tolist() == [*adata.obs["kind"].value_counts().sort_index(), 0, 0]


def test_the_same_bytes_and_a_fingerprint_that_knows_the_labels(fitted, tmp_path):
    adata, model = fitted
    again = sv.fit(adata, batch_key="batch", label_key="kind", label_tree=EDGES, **HOW)
    for name, each in (("one", model), ("two", again)):
        each.save(tmp_path / name)
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    bare = sv.fit(adata, batch_key="batch", **HOW)
    flat = sv.fit(adata, batch_key="batch", label_key="kind", **HOW)
    assert len({model.fingerprint, bare.fingerprint, flat.fingerprint}) == 3
    assert np.array_equal(model.latent(adata), bare.latent(adata))  # the embedding is scVI's
    loaded = sv.load(tmp_path / "one")
    pd.testing.assert_frame_equal(loaded.annotate(adata), model.annotate(adata))
    with pytest.raises(UserError, match="fitted without labels"):
        bare.annotate(adata)


def test_cells_without_the_batch_column_are_said_to_be_of_one(fitted, caplog):
    adata, model = fitted
    bare, same = adata.copy(), adata.copy()
    del bare.obs["batch"]
    same.obs["batch"] = "one"
    assert model.annotate(bare).equals(model.annotate(same))
    assert "adata has no column 'batch': novelty takes all" in caplog.text


def test_a_process_first_call_gives_the_bytes_of_its_second():
    """The libraries whose threads are limited are those that are loaded: so they are, before."""
    code = """
import scvi_core.celltypes as celltypes
from threadpoolctl import threadpool_info
with celltypes._one_thread():
    import faiss, scipy.linalg, scipy.optimize, scipy.sparse.linalg
    found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
assert len(found) > 2 and set(found.values()) == {1}, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tags_of_a_registered_version(fitted, tmp_path):
    from scvi_core.registry import _version_tags

    _, model = fitted
    model.save(tmp_path / "model")
    tags = _version_tags(json.loads((tmp_path / "model/model.json").read_text()), "atlas", None, {})
    assert tags["labels"] == "B, NK, T" and len(tags["taxonomy_sha256"]) == 64
    assert float(tags["held_out_macro_f1"]) == pytest.approx(model.annotator.quality.macro_f1, abs=1e-4)
    assert float(tags["held_out_ece"]) == pytest.approx(model.annotator.quality.ece, abs=1e-4)


def test_held_out_figures_are_those_of_batches_it_did_not_see(fitted):
    """Annotated by hand, each batch by a model of the others, as many are right, to within a cell or two."""
    adata, model = fitted
    right = 0
    for batch in ("b0", "b1", "b2"):
        hidden = adata.copy()
        hidden.obs["kind"] = adata.obs["kind"].where(adata.obs["batch"] != batch, "unknown")
        calls = sv.fit(hidden, batch_key="batch", label_key="kind", label_tree=EDGES, **HOW).annotate(adata)
        here = adata.obs["batch"] == batch
        right += (calls["label"] == adata.obs["kind"])[here].sum()
    quality = model.annotator.quality
    assert quality.held_out == "batch" and quality.n_folds == 3 and quality.n_cells == 240
    assert quality.accuracy * 240 == pytest.approx(right, abs=3)
    assert 0.88 <= quality.coverage <= 0.93


def test_cells_of_an_unknown_type_look_novel():
    adata = cells(400)
    known = adata[adata.obs["kind"] != "NK"].copy()
    model = sv.fit(known, batch_key="batch", label_key="kind", **HOW)
    novelty, new = model.annotate(adata)["novelty"], (adata.obs["kind"] == "NK").to_numpy()
    assert np.median(novelty[new]) > np.median(novelty[~new]) + 0.1


def test_labels_missing_anywhere_one_cell_of_a_label_and_a_label_of_one_batch(caplog):
    caplog.set_level(logging.INFO, "scvi_core")
    adata = cells()
    kind = adata.obs["kind"].astype(object).to_numpy()
    kind[::7], kind[5], kind[6] = None, "rare", "unknown"
    kind[adata.obs["batch"] == "b1"] = "unknown"
    kind[5] = "rare"
    adata.obs["kind"] = kind
    calls = sv.fit(adata, batch_key="batch", label_key="kind", **HOW).annotate(adata)
    assert calls["label"].iloc[5] == "rare" and calls["label"].notna().all()
    assert "have no value" in caplog.text and "have a label of one batch alone" in caplog.text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"label_key": "kindd"}, "no cell column 'kindd'; did you mean 'kind'"),
        ({"label_tree": EDGES}, "label_tree: given without label_key"),
        ({"annotate": AnnotateConfig()}, "annotate: given without label_key"),
        ({"label_key": "kind", "label_tree": [("T", "x")]}, "2 labels of the cells are not in it"),
        ({"label_key": ["kind"]}, r"label_key: \['kind'\]; give one text"),
        ({"label_key": "kind", "unknown_label": 0}, "unknown_label: 0; give one text, or None"),
        ({"label_key": "batch"}, "0 labelled cells have a label that is in another batch"),
        ({"label_key": "kind", "annotate": {"coverage": 2}}, "annotate: a dict; give a AnnotateConfig"),
    ],
)
def test_bad_arguments(change, match):
    with pytest.raises(UserError, match=match):
        sv.fit(cells(30), batch_key="batch", **change, **HOW)


def test_labels_in_one_batch_and_no_word_for_unknown(tmp_path, caplog):
    caplog.set_level(logging.INFO, "scvi_core")
    adata = cells()
    adata.obs["kind"] = adata.obs["kind"].astype(object).where(adata.obs["batch"] == "b0", None)
    model = sv.fit(adata, batch_key="batch", label_key="kind", unknown_label=None, **HOW)
    assert "labels are in one batch alone" in caplog.text and "on cells of a fold that was held out" in caplog.text
    model.save(tmp_path / "model")
    assert sv.load(tmp_path / "model").annotator.config.unknown is None


def test_a_large_set_is_thinned_by_label(monkeypatch):
    adata = cells()
    monkeypatch.setattr(celltypes, "MOST_CELLS", 90)
    known = Known.of(adata.obs, AnnotateConfig(label="kind"), ())
    rows = celltypes._some(known.node_n, np.random.default_rng(0))
    assert 60 < len(rows) <= 90 and np.ptp(np.bincount(known.node_n[rows])) <= 1
    model = sv.fit(adata, batch_key="batch", label_key="kind", **HOW)
    assert (model.annotate(adata)["label"] == adata.obs["kind"]).mean() > 0.8
    assert dataclasses.asdict(model.annotator.quality)["n_cells"] <= 90


# ---- the steps of a build


def test_from_a_store_to_three_tables_and_the_table_of_cells(tmp_path):
    """train, annotate and cells, as a build calls them; what they say is what a notebook is told."""
    adata = cells()
    parts = []
    for i in range(3):
        mine = adata[adata.obs["batch"] == f"b{i}"]
        parts.append(sample(mine.X, f"s{i}", f"b{i}", adata.var_names, cell_type=mine.obs["kind"].to_numpy()))
    genes = pd.DataFrame({"gene_id": adata.var_names, "gene_name": adata.var_names, "selected": True})
    store, tree = tmp_path / "counts.zarr", tmp_path / "tree.tsv"
    write_store(store, *write(tmp_path / "samples", parts), genes, ("cell_type",))
    tree.write_text("".join(f"{child}\t{parent}\n" for child, parent in EDGES))
    how = {"label": "cell_type", "tree": str(tree)}
    train = {"max_epochs": 8, "batch_size": 16, "learning_rate": 5e-3}
    model = {"n_hidden": 16, "n_latent": 3}
    config = json.dumps({"annotate": how, "train": train, "model": model, "threads": 1, "device": "cpu"})
    run = CliRunner()

    def call(*arguments):
        done = run.invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output + str(done.exception)

    names = "annotation.parquet", "label_probabilities.parquet", "labels.parquet"
    call("train", "--store", store, "--out", tmp_path / "model", "--config", config)
    for folder in (tmp_path, tmp_path / "again"):
        folder.mkdir(exist_ok=True)
        asked = zip(("--out", "--probabilities", "--labels"), names, strict=True)
        where = [part for option, name in asked for part in (option, folder / name)]
        call("annotate", "--store", store, "--model", tmp_path / "model", "--config", config, *where)
    assert all((tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    calls, leaves, labels = (pd.read_parquet(tmp_path / name) for name in names)
    assert list(calls) == ["cell_id", *celltypes.CALLS] and list(leaves) == ["cell_id", "B", "NK", "T"]
    assert labels["label"].tolist() == ["B", "NK", "T", "lymphoid", "cell"] and labels["n_cells"].sum() == 240
    whole = read_store(store)
    told = sv.load(tmp_path / "model").annotate(whole)
    assert told["label"].tolist() == calls["label"].tolist()
    np.testing.assert_allclose(told["novelty"], calls["novelty"], atol=1e-6)

    clusters = pd.DataFrame({"cell_id": whole.obs_names, "cluster": "0", "umap_1": 0.0, "umap_2": 0.0})
    write_parquet(tmp_path / "clusters.parquet", clusters)
    given = "--clusters", tmp_path / "clusters.parquet", "--annotation", tmp_path / "annotation.parquet"
    call("cells", "--store", store, "--out", tmp_path / "cells.parquet", *given)
    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert table["label"].tolist() == calls["label"].tolist() and {"safe_label", "novelty"} <= set(table)


def test_a_configuration_whose_columns_clash_is_one_line():
    rows = [Sample(sample="a", path="a.h5ad", batch="a", metadata={"label": "x"})]
    with pytest.raises(UserError, match=r"annotate.label is set, .* rename 'label'"):
        check_columns(load_config({"annotate": {"label": "label"}}), rows)
    rows = [Sample(sample="a", path="a.h5ad", batch="a", metadata={"kind": "x"})]
    with pytest.raises(UserError, match=r"annotate.label: no cell column 'kid'; did you mean 'kind'"):
        check_columns(load_config({"annotate": {"label": "kid"}}), rows)
    for annotate, match in (
        ({"tree": "t.tsv"}, "without annotate.label"),
        ({"label": "kind", "tree": "no"}, "no file"),
    ):
        with pytest.raises(UserError, match=match):
            check_columns(load_config({"annotate": annotate}), rows)
    check_columns(load_config({"annotate": {"label": "kind"}, "de": {"groupby": "label"}}), rows)


def test_a_store_larger_than_memory_gives_the_same_annotator(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 80)
    adata = cells(120)
    path = stored(tmp_path, adata)
    there = read_store(path, counts=False)
    schema = Schema.of(there, "batch")
    kind = adata.obs["kind"].to_numpy()
    obs = pd.DataFrame({"kind": np.concatenate([kind[0::2], kind[1::2]])})
    known = Known.of(obs, AnnotateConfig(label="kind"), EDGES)
    z_nk, told = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32), []
    for memory_gb in (8.0, 1.5e-6):
        counts = open_counts(path, there, schema, memory_gb)
        annotator = celltypes.learn(lambda _: z_nk, counts, known.node_n, known.taxonomy, known.config, 0)
        told.append(annotator.probabilities(z_nk, counts, there.obs["batch"]))
    assert all(np.array_equal(one, other) for one, other in zip(*told, strict=True))
