import anndata as ad
import numpy as np
import pandas as pd
import pytest
from _samples import sample, split, write

from scvi_core.config import GenesConfig, InputConfig
from scvi_core.files import UserError
from scvi_core.preprocess import samples as sample_files
from scvi_core.preprocess.genes import select_genes

COLUMNS = [
    "gene_id", "gene_name", "n_samples", "n_cells", "mean", "variance", "variances_norm", "highly_variable_rank",
    "highly_variable_nbatches", "note", "selected",
]  # fmt: skip


def make(n=80, g=200, name="a", batch="b", seed=0, **more):
    rng = np.random.default_rng(seed)
    rate = np.random.default_rng(99).gamma(0.4, 3, g) * rng.gamma(1.5, 1, (n, g))
    return sample(rng.poisson(rate * rng.lognormal(0, 0.5, (n, 1))), name, batch, **more)


def run(folder, adatas, keeps=None, how="intersection", **config):
    h5ads, qcs = write(folder, adatas, keeps)
    return select_genes(h5ads, qcs, InputConfig(genes=how), GenesConfig(**config))


def decided(decisions, what):
    return [d for d in decisions if d.what == what]


def assert_equals_scanpy(folder, adatas, keeps, how="intersection", **config):
    import scanpy as sc

    frame, _ = run(folder, adatas, keeps, how, **config)
    config = GenesConfig(**config)
    kept = [a[np.asarray(keep)] for a, keep in zip(adatas, keeps, strict=True)]
    whole = ad.concat(kept, join="inner" if how == "intersection" else "outer", fill_value=0)[:, frame["gene_id"]]
    whole = whole.copy()
    whole.obs["batch"] = whole.obs["batch"].astype(str)
    sc.pp.filter_genes(whole, min_cells=config.min_cells)
    sc.pp.highly_variable_genes(
        whole,
        flavor="seurat_v3",
        n_top_genes=int(frame["selected"].sum()),
        batch_key="batch" if config.per_batch else None,
        span=config.span,
    )
    ours = frame[frame["note"] != "below min_cells"].set_index("gene_id")
    assert list(ours.index) == list(whole.var_names)
    for mine, theirs in (
        ("mean", "means"),
        ("variance", "variances"),
        ("variances_norm", "variances_norm"),
        ("highly_variable_rank", "highly_variable_rank"),
        ("highly_variable_nbatches", "highly_variable_nbatches"),
        ("selected", "highly_variable"),
    ):
        if theirs in whole.var:  # bit for bit
            np.testing.assert_array_equal(ours[mine], whole.var[theirs], err_msg=mine)
    return frame


@pytest.mark.parametrize("per_batch", [True, False])
def test_equals_scanpy(tmp_path, monkeypatch, per_batch):
    monkeypatch.setattr(sample_files, "CHUNK", 700)  # many chunks
    rng = np.random.default_rng(5)
    # a batch of two samples, a batch of one, and a sample of two batches
    adatas = [
        make(90, name="s1", batch="y", seed=1),
        make(60, name="s2", batch="x", seed=2),
        make(70, name="s3", batch="y", seed=3),
        make(50, name="s4", batch=np.tile(["x", "z"], 25), seed=4),
    ]
    keeps = [rng.random(a.n_obs) < 0.8 for a in adatas]
    frame = assert_equals_scanpy(tmp_path, adatas, keeps, n_top=40, min_cells=5, per_batch=per_batch, span=0.4)
    assert list(frame.columns) == COLUMNS and frame["selected"].sum() == 40
    assert (frame["n_samples"] == 4).all() and (frame["note"] == "below min_cells").any()


def test_equals_scanpy_on_union(tmp_path):
    ids = np.array([f"G{i}" for i in range(260)])
    adatas = [
        make(name="s1", batch="x", seed=1, gene_ids=ids[:200]),
        make(name="s2", batch="y", seed=2, gene_ids=np.random.default_rng(0).permutation(ids[60:])),
    ]
    keeps = [np.ones(a.n_obs, bool) for a in adatas]
    frame = assert_equals_scanpy(tmp_path, adatas, keeps, "union", n_top=50)
    assert list(frame["gene_id"][:200]) == list(ids[:200])
    assert list(frame["gene_id"][200:]) == [g for g in adatas[1].var_names if g not in set(ids[:200])]
    assert sorted(frame["n_samples"].unique()) == [1, 2]


@pytest.mark.parametrize("name", ["baron_human_pancreas.h5ad", "sc_mixology_5batches.h5ad"])
def test_equals_scanpy_on_real_data(tmp_path, real_data, name):
    rng = np.random.default_rng(0)
    adatas = split(ad.read_h5ad(real_data(name)), "batch")
    frame = assert_equals_scanpy(tmp_path, adatas, [rng.random(a.n_obs) < 0.9 for a in adatas])
    assert frame["selected"].sum() == 2000


def test_intersection_counts_what_is_lost(tmp_path):
    ids = [f"G{i}" for i in range(220)]
    adatas = [make(name="s1", gene_ids=ids[:200]), make(name="s2", gene_ids=ids[20:], seed=1)]
    frame, decisions = run(tmp_path, adatas)
    assert list(frame["gene_id"]) == ids[20:200]
    assert [(d.sample, d.n_genes) for d in decided(decisions, "genes_lost")] == [("s1", 20), ("s2", 20)]
    _, decisions = run(tmp_path, adatas, how="union")
    assert [(d.sample, d.n_genes) for d in decided(decisions, "genes_filled")] == [("s1", 20), ("s2", 20)]


def test_samples_that_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match=r"Ensembl ids in sample s1 and symbols in sample s2.*input\.gene_ids: symbol"):
        run(tmp_path, [make(name="s1", kind="ensembl"), make(name="s2")])
    other = make(name="s2", gene_ids=[f"M{i}" for i in range(200)], organism="mouse")
    with pytest.raises(UserError, match=r"no gene is in all 2 samples.*G0.*M0.*human \(s1\), mouse \(s2\)"):
        run(tmp_path, [make(name="s1"), other])


def test_single_cell_batch_and_empty_sample(tmp_path):
    adatas = [make(name="s1"), make(name="s2", batch="lone")]
    one = np.arange(80) == 3
    with pytest.raises(UserError, match="batch 'lone': a single cell is kept"):
        run(tmp_path, adatas, [~one, one])
    with pytest.raises(UserError, match="sample s2: no cell is kept"):
        run(tmp_path, adatas, [~one, one & False])


def test_tables_of_another_run_are_refused(tmp_path):
    h5ads, qcs = write(tmp_path, [make(name="s1"), make(60, name="s2")])
    with pytest.raises(UserError, match="its cells are not those of"):
        select_genes(h5ads, qcs[::-1], InputConfig(), GenesConfig())
    with pytest.raises(UserError, match="run ingest again"):
        select_genes([qcs[0]], [qcs[0]], InputConfig(), GenesConfig())


def test_n_top(tmp_path):
    frame, decisions = run(tmp_path, [make()])
    passing = int((frame["note"] == "").sum())
    assert frame["selected"].sum() == passing < 200 and decided(decisions, "n_top")[0].value == passing
    frame, _ = run(tmp_path, [make()], n_top="all")
    assert (frame["selected"] == (frame["note"] == "")).all()
    with pytest.raises(UserError, match=rf"genes\.n_top: 199 genes asked for, but only {passing}"):
        run(tmp_path, [make()], n_top=199)


def named():
    names = [f"N{i}" for i in range(200)]
    names[3:9] = ["MT-ND1", "MT-CO1", "RPS3", "CD3E", "CD3E", "IGHM"]
    return make(gene_names=names)


def test_include_and_exclude(tmp_path):
    plain, _ = run(tmp_path, [named()], n_top=30)
    best = plain.sort_values("highly_variable_rank")["gene_id"].to_numpy()
    frame, decisions = run(
        tmp_path, [named()], n_top=30, include=("CD3E", "G9"), exclude=("@mitochondrial", "/^RPS/", best[0], "@tcr")
    )
    frame = frame.set_index("gene_id")
    assert frame["selected"].sum() == 30
    assert (
        frame.loc[["G6", "G7", "G9"], "selected"].all() and (frame.loc[["G6", "G7", "G9"], "note"] == "included").all()
    )
    assert not frame.loc[["G3", "G4", "G5", best[0]], "selected"].any()
    assert frame.loc["G5", "note"] == "excluded: /^RPS/" and np.isnan(frame.loc["G5", "highly_variable_rank"])
    assert [d.n_genes for d in decided(decisions, "included")] == [2, 1]
    assert [d.n_genes for d in decided(decisions, "excluded")] == [2, 1, 1, 0]
    assert "matches no gene" in decided(decisions, "excluded")[3].reason
    # the rest are ranked as in a matrix without the excluded genes
    rest = named()[:, [g for g in frame.index if not frame.loc[g, "note"].startswith("excluded")]].copy()
    without, _ = run(tmp_path, [rest], n_top=30)
    mine = frame.loc[without["gene_id"], "highly_variable_rank"]
    np.testing.assert_array_equal(mine, without["highly_variable_rank"])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"include": ("cd3e",)}, r"genes\.include: no gene 'cd3e'; did you mean 'CD3E'\?"),
        ({"exclude": ("MT-ND2",)}, r"genes\.exclude: no gene 'MT-ND2'; did you mean 'MT-ND1'\?"),
        ({"exclude": ("@mito",)}, "no gene group '@mito'; there are @mitochondrial"),
        ({"include": ("/(/",)}, "not a regular expression"),
        ({"include": ("CD3E",), "exclude": ("/CD3/",)}, r"'CD3E' and genes\.exclude '/CD3/' both match gene CD3E"),
        ({"include": ("/^N1/",), "n_top": 5}, r"genes\.n_top: 5 asked for, but genes\.include names"),
        ({"min_cells": 1000}, r"genes\.min_cells: no gene is detected in 1000"),
    ],
)
def test_bad_lists(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, [named()], **config)


def test_lost_gene_in_include_says_union(tmp_path):
    ids = [f"G{i}" for i in range(201)]
    with pytest.raises(UserError, match=r"no gene 'G200'; not every sample has it; input\.genes: union"):
        run(tmp_path, [make(name="s1"), make(g=201, name="s2", gene_ids=ids)], include=("G200",))


@pytest.mark.parametrize("g", [2, 5, 300])
def test_where_loess_fails_it_falls_back_and_says_so(tmp_path, g):
    adata = make(g=g)
    if g == 300:  # shallow: all genes but a few of one mean, so that local fits are singular
        X = np.zeros((80, g), int)
        for gene in range(290):
            X[np.random.default_rng(gene).choice(80, 3, replace=False), gene] = 1
        X[:, 290:] = np.random.default_rng(0).poisson(np.arange(1, 11), (80, 10))
        adata = sample(X)
    frame, decisions = run(tmp_path, [adata], min_cells=1)
    assert decided(decisions, "mean_variance_trend") and frame["variances_norm"].notna().all()


def test_batch_without_variation_has_no_say(tmp_path):
    flat = sample(np.ones((10, 200), int), "s2", "flat")
    alone, _ = run(tmp_path, [make(name="s1")], n_top=20)
    frame, decisions = run(tmp_path, [make(name="s1"), flat], n_top=20, min_cells=11)
    assert any("no gene varies" in d.reason for d in decided(decisions, "mean_variance_trend"))
    assert frame["highly_variable_nbatches"].max() == 1 and set(alone.columns) == set(frame.columns)
    with pytest.raises(UserError, match="one same count"):
        run(tmp_path, [flat])


def test_same_input_same_frame(tmp_path):
    first, second = (run(tmp_path, [make(name="s1"), make(name="s2", batch="c", seed=1)], n_top=50)[0] for _ in "ab")
    pd.testing.assert_frame_equal(first, second)


def test_an_id_gives_way_to_the_name_that_another_sample_has(tmp_path):
    names = [f"N{i}" for i in range(200)]
    without = make(name="a", batch="a")  # its ids stand for names
    frame, decisions = run(tmp_path, [without, make(name="b", batch="b", seed=1, gene_names=names)], n_top=30)
    assert list(frame["gene_name"]) == names and not decided(decisions, "gene_names")
    other = make(name="c", batch="c", seed=2, gene_names=["M0", *names[1:]])
    frame, decisions = run(tmp_path, [make(name="b", batch="b", gene_names=names), without, other], n_top=30)
    assert list(frame["gene_name"]) == names and decided(decisions, "gene_names")[0].n_genes == 1
