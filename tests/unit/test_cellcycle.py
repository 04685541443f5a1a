"""Scores of the cell cycle against scanpy's, which it computes on all counts at once."""

import numpy as np
import pytest
import scanpy as sc
from _samples import sample, write_sample

from scvi_core.config import QcConfig
from scvi_core.preprocess import samples as sample_files
from scvi_core.preprocess.cellcycle import FEWEST, G2M_PHASE, S_PHASE
from scvi_core.preprocess.qc import in_group
from scvi_core.preprocess.qc import qc as judge

OLD = {"MLF1IP", "FAM64A", "HN1"}  # names of three genes that have others today
S, G2M = (sorted({*of} - OLD) for of in (S_PHASE, G2M_PHASE))
QUIET = QcConfig(doublets=False, drop=(), min_counts=0, min_genes=0)


def cycling(n=300, g=500, seed=0):
    """Counts of cells by turns in G1, S and G2M, whose genes rise threefold there; and the genes' names."""
    rng = np.random.default_rng(seed)
    names = np.array([*S, *G2M, *(f"GENE{i}" for i in range(g))])
    rate = rng.lognormal(-0.5, 1, len(names)) * rng.lognormal(0, 0.3, (n, 1))
    phase = np.arange(n) % 3
    for k, of in ((1, S), (2, G2M)):
        rate[np.ix_(phase == k, np.isin(names, of))] *= 3
    return rng.poisson(rate), names, np.array(["G1", "S", "G2M"])[phase]


def scored(tmp_path, X, names, config=QUIET):
    adata = sample(X, gene_ids=[f"G{i}" for i in range(len(names))], gene_names=names)
    write_sample(tmp_path / "counts.h5ad", adata)
    return (*judge(tmp_path / "counts.h5ad", config, 0), adata)


@pytest.mark.parametrize("capitals", [str.upper, str.capitalize], ids=["human", "mouse"])
def test_same_scores_as_scanpy(tmp_path, capitals, monkeypatch):
    monkeypatch.setattr(sample_files, "CHUNK", 5_000)
    X, names, phase = cycling()
    names = np.array([capitals(name) for name in names])
    frame, _, adata = scored(tmp_path, X, names)
    adata.var_names = names
    adata.X = adata.X.astype(np.float64)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    for column, of in (("s_score", S), ("g2m_score", G2M)):
        sc.tl.score_genes(adata, [capitals(g) for g in of], ctrl_size=10**6, score_name=column)
        np.testing.assert_allclose(frame[column], adata.obs[column], atol=1e-5)
    for column, of in (("s_score", "S"), ("g2m_score", "G2M")):
        assert frame[column][phase == of].min() > frame[column][phase != of].median()
    lowest = frame[["s_score", "g2m_score"]].max(axis=1) <= 0
    assert (frame["cycle_phase"][lowest] == "G1").all() and not (frame["cycle_phase"][~lowest] == "G1").any()


def test_cells_that_are_dropped_are_not_scored(tmp_path):
    X, names, _ = cycling(60)
    X[:5] = 0
    frame, _, _ = scored(tmp_path, X, names, QcConfig(doublets=False, min_counts=1, min_genes=1, n_mads=50))
    assert not frame["keep"][:5].any() and frame["s_score"][:5].isna().all() and (frame["cycle_phase"][:5] == "").all()
    assert frame["s_score"][5:].notna().all() and frame["cycle_phase"][5:].isin(["G1", "S", "G2M"]).all()
    assert frame["s_score"].dtype == np.float32


@pytest.mark.parametrize("why", ["few genes", "off"])
def test_not_scored_is_said(tmp_path, why):
    X, names, _ = cycling(60)
    few = np.isin(names, S[FEWEST - 1 :]) if why == "few genes" else np.zeros(len(names), bool)
    config = QUIET.model_copy(update={"cell_cycle": why != "off"})
    frame, made, _ = scored(tmp_path, X[:, ~few], names[~few], config)
    assert frame[["s_score", "g2m_score"]].isna().all(axis=None) and (frame["cycle_phase"] == "").all()
    told = [d for d in made if d.what == "cell_cycle_genes"]
    assert [d.value["S"] for d in told] == ([] if why == "off" else [FEWEST - 1])


def test_the_genes_as_a_group():
    names = np.array(["MKI67", "Mki67", "MKI67P", "pcna", "INS", "HMN1"])
    assert in_group("cell_cycle", names, names).tolist() == [True, True, False, True, False, False]
