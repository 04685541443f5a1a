import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _samples import sample, split, write_sample
from scipy.stats import median_abs_deviation

from scvi_core.config import QcConfig
from scvi_core.files import UserError
from scvi_core.preprocess import qc as module
from scvi_core.preprocess import samples
from scvi_core.preprocess.doublets import doublet_rate, doublet_threshold, score_doublets
from scvi_core.preprocess.limits import PCT_MITO_FLOOR
from scvi_core.preprocess.qc import FLAGS, in_group

COLUMNS = [
    "cell_id", "barcode", "sample", "batch", "n_counts", "n_genes", "pct_mito", "pct_ribo", "pct_hb", "pct_top50",
    "doublet_score", "predicted_doublet", "flags", "keep", "reason", "s_score", "g2m_score", "cycle_phase",
]  # fmt: skip
QUIET = QcConfig(doublets=False)


def qc(adata, config, seed):
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder) / "counts.h5ad", adata)
        return module.qc(Path(folder) / "counts.h5ad", config, seed)


def cells(n=120, g=300, mean=3.0, seed=0, mito=3):
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 2 * mean, g) * rng.lognormal(0, 0.3, (n, 1))
    names = [f"MT-{i}" for i in range(mito)] + [f"G{i}" for i in range(g - mito)]
    rate[:, :mito] = 2.0
    return rng.poisson(rate), names


def decided(decisions, what):
    return next(d for d in decisions if d.what == what)


@pytest.mark.parametrize(
    "group, yes, no",
    [
        ("mitochondrial", "MT-ND1 mt-Cytb Mt-co1 MT-TL1 mt:ND1", "MTOR MTND1P23 MTRNR2L1 MT1X GMT-1"),
        (
            "ribosomal",
            "RPS2 RPL13A Rps3a1 RPS4X RPS4Y1 RPL36AL RPLP0 RPSA Rps27rt RPL7L1 RPL21P28 RPL22L1",
            "RPS6KA1 RPS6KB1 RPS6KL1 RPS19BP1 MRPS2 MRPL10 RPN1 RPP14 RPL34-AS1 RPL34-DT RPSAX",
        ),
        ("haemoglobin", "HBA1 HBA2 HBB HBD HBE1 HBG2 HBM HBQ1 HBZ Hba-a1 Hbb-bs Hbb.bt Hbq1b", "HBEGF HBP1 HBS1L"),
        (
            "immunoglobulin",
            "IGHM IGHD IGHE IGHA1 IGHG2 Ighg2b IGHGP IGHV1-2 IGHJ4 IGHD1-26 IGKC IGKV3-20 IGLC2 IGLV1-40",
            "IGHMBP2 IGLL1 IGLON5 IGF1 IGSF8 IGKX",
        ),
        (
            "tcr",
            "TRAC TRBC1 TRDC TRGC2 TRAV1-2 TRAJ10 TRBV20-1 TRBD1 TRBJ2-7 TRGV9 TRDV1 Trbc2 TRGJP Tcrg-V1",
            "TRADD TRAF1 TRAK1 TRABD TRDN TRDMT1 TRAP1 TRAPPC1 TRAM1 TCF7",
        ),
    ],
)
def test_gene_groups(group, yes, no):
    for names, expected in ((yes.split(), True), (no.split(), False)):
        found = in_group(group, np.array(names), np.array(names))
        assert (found == expected).all(), [n for n, f in zip(names, found, strict=True) if f != expected]


def test_mitochondrial_ids_without_names(real_data):
    import h5py

    with h5py.File(real_data("pbmc_1k_citeseq.h5")) as file:
        ids, names = (file["matrix/features"][key][:].astype(str) for key in ("id", "name"))
    by_name = in_group("mitochondrial", names, names)
    assert by_name.sum() == 13
    assert (in_group("mitochondrial", ids, ids) == by_name).all()


def test_metrics_equal_scanpy():
    import scanpy as sc

    X, names = cells()
    X[0] = 0
    X[1, 5] = 200  # sums pass what 8 bits hold
    names[4:9] = ["RPS2", "RPL3", "HBB", "RPS6KA1", "HBEGF"]
    frame, decisions = qc(sample(X, gene_names=names), QUIET, 0)
    assert list(frame.columns) == COLUMNS
    var = pd.DataFrame({"mito": False, "ribo": False, "hb": False}, index=[str(i) for i in range(X.shape[1])])
    var.iloc[:3, 0] = var.iloc[4:6, 1] = var.iloc[6, 2] = True
    # dense: scanpy then needs no compilation
    obs, _ = sc.pp.calculate_qc_metrics(ad.AnnData(X, var=var), qc_vars=["mito", "ribo", "hb"], percent_top=[50])
    assert (frame["n_counts"] == obs["total_counts"].to_numpy()).all() and frame["n_counts"].dtype == np.int64
    assert (frame["n_genes"] == obs["n_genes_by_counts"].to_numpy()).all() and frame["n_genes"].dtype == np.int32
    for ours, theirs in (("mito", "mito"), ("ribo", "ribo"), ("hb", "hb"), ("top50", "in_top_50_genes")):
        np.testing.assert_allclose(frame[f"pct_{ours}"], np.nan_to_num(obs[f"pct_counts_{theirs}"]), rtol=1e-6)
        assert frame[f"pct_{ours}"].dtype == np.float32
    assert frame["flags"][0] == "low_counts,low_genes" and frame["reason"][0] == frame["flags"][0]
    assert not frame["keep"][0] and frame["doublet_score"].isna().all() and not frame["predicted_doublet"].any()
    assert decided(decisions, "ribosomal_genes").n_genes == 2
    assert decided(decisions, "cells_kept").n_cells == (~frame["keep"]).sum()


def test_metrics_do_not_depend_on_chunks(monkeypatch):
    X, names = cells(mean=30)
    X[3] = 0
    X[4, 7] = 70_000  # counts past 16 bits, and rows longer than a chunk
    whole, _ = qc(sample(X, gene_names=names), QUIET, 0)
    for stored in (1, 1000):
        monkeypatch.setattr(samples, "CHUNK", stored)
        pd.testing.assert_frame_equal(qc(sample(X, gene_names=names), QUIET, 0)[0], whole)
    top = -np.sort(-X, axis=1)[:, :50].sum(axis=1)
    np.testing.assert_allclose(whole["pct_top50"], 100 * top / np.maximum(X.sum(axis=1), 1), rtol=1e-6)


def test_thresholds_are_median_and_scaled_mad():
    X, names = cells(seed=1)
    X[7] *= 40
    X[8, :3] += 3000
    frame, decisions = qc(sample(X, gene_names=names), QcConfig(doublets=False, n_mads=4, max_pct_mito=90), 0)
    log = np.log1p(frame["n_counts"])
    limit = np.expm1(np.median(log) + 4 * median_abs_deviation(log, scale="normal"))
    made = decided(decisions, "high_counts.mad")
    assert made.value == pytest.approx(limit, rel=1e-6) and made.n_cells == (frame["n_counts"] > limit).sum() >= 1
    assert "high_counts" in frame["flags"][7] and "high_mito" in frame["flags"][8]
    mito = decided(decisions, "high_mito.mad")
    assert mito.value == PCT_MITO_FLOOR and "raised to the floor" in mito.reason
    assert all(set(text.split(",")) <= {*FLAGS, ""} for text in frame["flags"])


def test_fixed_limits_come_on_top():
    X, names = cells(seed=2)
    config = QcConfig(doublets=False, max_pct_mito=1, max_counts=1000, max_pct_hb=0.5, drop=("high_counts",))
    names[5] = "HBB"
    frame, decisions = qc(sample(X, gene_names=names), config, 0)
    assert ((frame["pct_mito"] > 1) == frame["flags"].str.contains("high_mito")).all()
    assert decided(decisions, "high_hb.max_pct_hb").n_cells == frame["flags"].str.contains("high_hb").sum() > 0
    assert (frame["keep"] == ~frame["flags"].str.contains("high_counts")).all()
    assert set(frame["reason"]) == {"", "high_counts"}


def test_zero_mad_and_no_mitochondrial_genes_are_said():
    X = np.full((60, 120), 4)
    frame, decisions = qc(sample(X), QUIET, 0)
    assert frame["keep"].all()
    assert decided(decisions, "low_counts/high_counts.mad").value is None
    assert "no threshold" in decided(decisions, "mitochondrial_genes").reason
    assert not [d for d in decisions if d.what.startswith("high_mito")]


def test_empty_droplets_do_not_set_the_median():
    X, names = cells(seed=3)
    droplets = np.zeros((500, X.shape[1]), dtype=int)
    droplets[:, 5] = 2
    alone, _ = qc(sample(X, gene_names=names), QUIET, 0)
    for config in (QUIET, QUIET.model_copy(update={"cells": "all"})):
        frame, decisions = qc(sample(np.vstack([X, droplets]), gene_names=names), config, 0)
        assert list(frame["flags"][:120]) == list(alone["flags"]) and not frame["keep"][120:].any()
        assert set(frame["reason"][120:]) == ({"empty"} if config is QUIET else {"low_counts,low_genes"})
    assert decided(decisions, "mad_cells").value == 120


def test_nothing_left_names_sample_threshold_and_remedy():
    X, names = cells()
    with pytest.raises(UserError, match=r"sample a: .*low_counts.*120 of 120.*qc\.min_counts"):
        qc(sample(X, gene_names=names), QcConfig(doublets=False, min_counts=10**6), 0)


def test_doublets():
    rng = np.random.default_rng(0)
    kinds = rng.gamma(0.3, 4, (3, 400))
    X = rng.poisson(kinds[np.arange(300) % 3])
    for i in range(10):
        X[i] = rng.poisson(kinds[i % 3] + kinds[(i + 1) % 3])
    X[299] = 0
    config = QcConfig(min_counts=10, drop=("low_counts", "doublet"))
    frame, decisions = qc(sample(X), config, 3)
    again, _ = qc(sample(X), config, 3)
    pd.testing.assert_frame_equal(frame, again)
    assert frame["doublet_score"].dtype == np.float32 and frame["predicted_doublet"].dtype == bool
    assert np.isnan(frame["doublet_score"][299]) and frame["doublet_score"][:299].notna().all()
    assert frame["predicted_doublet"][:10].sum() >= 8 and frame["predicted_doublet"][10:].sum() <= 4
    assert (frame["reason"][frame["predicted_doublet"]] == "doublet").all()
    assert decided(decisions, "doublet.threshold").n_cells == frame["predicted_doublet"].sum()


def planted(n, n_doublets, seed=0, n_genes=400):
    """Cells of four types, the first `n_doublets` of them sums of two cells of different types."""
    rng = np.random.default_rng(seed)
    kinds = rng.gamma(0.3, 4, (4, n_genes))
    kind = np.append(np.arange(n) % 4, (np.arange(n_doublets) + rng.integers(1, 4, n_doublets)) % 4)
    X = rng.poisson(kinds[kind] * rng.lognormal(0, 0.3, (len(kind), 1)))
    X[:n_doublets] += X[n:]
    return X[:n]


def test_too_few_cells_for_doublets_is_said():
    for X in (planted(99, 5), planted(400, 20)[:, :40]):
        frame, decisions = qc(sample(X), QcConfig(min_counts=1, min_genes=1), 0)
        assert decided(decisions, "doublets").value == "undecidable" and decided(decisions, "doublets").warning
        assert frame["doublet_score"].isna().all() and not frame["predicted_doublet"].any()


def test_expected_doublets():
    _, decisions = qc(sample(planted(400, 0)), QcConfig(min_counts=1), 0)
    assert decided(decisions, "doublets_expected").value == 0.0032
    frame, decisions = qc(sample(planted(400, 40)), QcConfig(min_counts=1, expected_doublet_rate=0.1), 0)
    assert decided(decisions, "doublets_expected").value == 0.1
    assert 35 <= frame["predicted_doublet"].sum() <= 50


def test_an_expected_rate_that_cannot_be_is_refused_and_an_odd_one_warned_of():
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=r"less than 0\.5"):
        QcConfig(expected_doublet_rate=0.6)
    frame, decisions = qc(sample(planted(1100, 20)), QcConfig(min_counts=1, expected_doublet_rate=0.3), 0)
    assert decided(decisions, "doublets_expected").warning and frame["keep"].all()


def test_large_samples_are_scored_in_groups_that_memory_holds(monkeypatch):
    """Groups of at most GROUP_CELLS, all cells scored once, and the same however many a reading gathers."""
    X = planted(1500, 90)
    config = QcConfig(min_counts=1, expected_doublet_rate=0.06)
    monkeypatch.setattr(module, "GROUP_CELLS", 400)
    monkeypatch.setattr(samples, "CHUNK", 10_000)
    frame, decisions = qc(sample(X), config, 0)
    assert decided(decisions, "doublet_groups").value == 4
    for gathered in (1, 2 * np.count_nonzero(X) // 3):
        monkeypatch.setattr(module, "GATHERED", gathered)
        pd.testing.assert_frame_equal(qc(sample(X), config, 0)[0], frame)
    called = frame["predicted_doublet"]
    assert called[:90].mean() >= 0.8 and called[90:].mean() < 0.02


def test_doublet_scores_do_not_depend_on_threads():
    from threadpoolctl import threadpool_limits

    counts = sp.csr_matrix(planted(300, 20).astype(np.uint8))
    one = score_doublets(counts, 0.06, True, 0)
    with threadpool_limits(2):
        two = score_doublets(counts, 0.06, True, 0)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert not (score_doublets(counts, 0.06, True, 1)[0] == one[0]).all()


@pytest.mark.parametrize("rate", [0.02, 0.06, 0.12])
def test_doublet_rate_and_threshold(rate):
    rng = np.random.default_rng(0)
    cells, artificial = rng.beta(2, 8, 2000), rng.beta(8, 2, 2000)
    cells[: int(2000 * rate)] = rng.beta(8, 2, int(2000 * rate))
    artificial[:500] = rng.beta(2, 8, 500)  # of one type
    found = doublet_rate(cells, artificial)  # of which some are of one type, too
    assert 0.7 * rate < found * 0.75 < 1.3 * rate
    assert 0.7 * rate < (cells > doublet_threshold(cells, artificial, found)).mean() < 1.3 * rate
    blind = rng.beta(2, 2, 1000), rng.beta(2, 2, 1000)  # scores say nothing: what is known decides
    assert (blind[0] > doublet_threshold(*blind, rate)).mean() < 1.5 * rate


@pytest.mark.parametrize("n_doublets", [0, 24, 72])
def test_as_many_are_called_as_are_planted(n_doublets):
    frame, decisions = qc(sample(planted(1200, n_doublets)), QcConfig(min_counts=1, cell_cycle=False), 0)
    called = frame["predicted_doublet"]
    assert called[:n_doublets].sum() >= 0.7 * n_doublets and called[n_doublets:].sum() <= 10
    assert decided(decisions, "doublets_estimated").value == pytest.approx(n_doublets / 1200 / 0.75, abs=0.02)


def test_qc_needs_none_of_the_large_libraries():
    import subprocess
    import sys

    code = "import sys, scvi_core.cli, scvi_core.preprocess.qc, scvi_core.report.figures as _; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numba", "scanpy", "sklearn", "mlflow"} & set(loaded)


def test_real_mouse_marrow(real_data):
    data = ad.read_h5ad(real_data("hemato_tusi.h5ad"))
    frame, decisions = qc(split(data, "batch")[0], QUIET, 0)
    assert frame["keep"].mean() > 0.8 and frame["pct_mito"].median() > 0
    assert decided(decisions, "mitochondrial_genes").value >= 13
    assert decided(decisions, "haemoglobin_genes").value >= 5
