"""Raw droplets made by code: cells of four types, some small, among droplets of ambient RNA."""

import numpy as np
import pytest
import scipy.sparse as sp
from _samples import sample, write_sample
from scipy.stats import dirichlet_multinomial

from scvi_core.config import QcConfig
from scvi_core.files import UserError
from scvi_core.preprocess import droplets, samples
from scvi_core.preprocess.droplets import ambient_profile, ambient_share, barcode_ranks, discoveries, log_likelihood
from scvi_core.preprocess.qc import qc

PLAIN = QcConfig(doublets=False, cell_cycle=False, min_counts=100, min_genes=10)
GENES, EMPTY = 600, 4000


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(droplets, "SIMULATED", 4000)


def raw(seed=0, n=240, share=0.1, small=300, least=1):
    """(counts, whether a droplet has a cell, share of ambient counts of each): a third of the cells is small."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.4, 1, (4, GENES)) * (rng.random((4, GENES)) < 0.6)
    rates /= rates.sum(axis=1, keepdims=True)
    ambient = rates.mean(axis=0)
    total = np.where(np.arange(n) % 3 == 0, small, 4000) * rng.lognormal(0, 0.1, n)
    own = rng.poisson(rates[np.arange(n) % 4] * total[:, None] * (1 - share))
    soup = rng.poisson(ambient * total[:, None] * share)
    empty = rng.multinomial(np.minimum(rng.geometric(1 / 25, EMPTY) + 100 * (rng.random(EMPTY) < 0.05), 280), ambient)
    empty = empty[empty.sum(axis=1) >= least]
    return np.vstack([own + soup, empty]), np.arange(n + len(empty)) < n, soup.sum() / (own + soup).sum()


def judged(tmp_path, X, config=PLAIN):
    write_sample(tmp_path / "counts.h5ad", sample(X))
    frame, made = qc(tmp_path / "counts.h5ad", config, 0)
    return frame, {d.what: d for d in made}


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_cells_are_told_and_the_ambient_share_with_them(tmp_path, monkeypatch, share):
    X, truth, ambient = raw(share=share)
    frame, made = judged(tmp_path, X)
    called = ~frame["flags"].str.contains("empty").to_numpy()
    assert called[truth].mean() >= 0.95 and (called & ~truth).sum() <= 0.01 * called.sum()
    assert made["droplets_with_cells"].value == called.sum()
    assert made["ambient_share"].value == pytest.approx(ambient, abs=0.02)
    assert len(made["ambient_genes"].value) == 10
    assert frame["reason"][truth == False].eq("empty").mean() > 0.99  # noqa: E712
    monkeypatch.setattr(samples, "CHUNK", 20_000)  # read in other parts
    again, told = judged(tmp_path, X)
    assert (again["flags"] == frame["flags"]).all() and told["ambient_share"] == made["ambient_share"]


def test_cells_alone_are_no_raw_droplets(tmp_path):
    X, truth, _ = raw()
    X = X[truth]
    frame, made = judged(tmp_path, X)
    assert made["barcodes"].value == "cells" and frame["keep"].all() and "ambient_share" not in made
    assert barcode_ranks(np.random.default_rng(0).poisson(20, 5000)) is None  # all empty, or a plate of poor cells
    with pytest.raises(UserError, match=r"sample a: qc\.cells is raw, but .* unfiltered"):
        judged(tmp_path, X, PLAIN.model_copy(update={"cells": "raw"}))


def test_a_preview_counts_the_empty_droplets(tmp_path, capsys):
    from scvi_core.cli import app

    X, truth, _ = raw()
    write_sample(tmp_path / "counts.h5ad", sample(X))
    app(
        ["qc", str(tmp_path / "counts.h5ad"), "--preview", "--config", '{"qc": {"doublets": false}}'],
        standalone_mode=False,
    )
    frame, _ = judged(tmp_path, X, QcConfig(doublets=False))
    n_empty = int(frame["flags"].eq("empty").sum())
    assert 0.99 < n_empty / (~truth).sum() < 1.01
    assert f"of {len(X):,} barcodes, {n_empty:,} of them empty droplets, would be kept" in capsys.readouterr().out


def test_a_sample_that_is_all_empty_is_one_line(tmp_path):
    X, truth, _ = raw()
    with pytest.raises(UserError, match=r"no cell is left after QC; low_counts .* \d+ counts .* leave the sample out"):
        judged(tmp_path, X[~truth], QcConfig(doublets=False, min_counts=10_000))  # times 0.06: a panel


def test_every_barcode_is_a_cell_where_the_configuration_says_so(tmp_path):
    X, _, _ = raw()
    frame, made = judged(tmp_path, X, PLAIN.model_copy(update={"cells": "all"}))
    assert not frame["flags"].str.contains("empty").any() and "qc.cells" in made["barcodes"].reason


def test_a_cut_matrix_is_warned_of(tmp_path):
    X, truth, _ = raw(small=4000)
    X[~truth] *= 4  # empty droplets of 100 counts and more, and none of fewer
    X = X[truth | (X.sum(axis=1) > 101)]
    frame, made = judged(tmp_path, X * np.where(np.arange(len(X)) < 240, 10, 1)[:, None])
    assert made["ambient_share"].value is None and made["ambient_share"].warning
    assert not frame["flags"][:240].str.contains("empty").any()


def test_likelihood_is_dirichlet_multinomial():
    rng = np.random.default_rng(0)
    profile = ambient_profile(np.array([50, 30, 1, 0, 0]))
    assert profile.sum() == pytest.approx(1) and profile[3] == profile[4] > 0
    counts = rng.multinomial(12, profile, 6)
    expected = [dirichlet_multinomial(50 * profile, 12).logpmf(row) for row in counts]
    np.testing.assert_allclose(log_likelihood(sp.csr_matrix(counts), profile, 50.0), expected)


def test_p_values_of_ambient_droplets_are_uniform():
    rng = np.random.default_rng(0)
    profile = rng.dirichlet(np.full(80, 0.5))
    gain = np.log(0.9 * rng.dirichlet(np.full(80, 0.5), 3) / profile + 0.1)
    counts = sp.csr_matrix(np.stack([rng.multinomial(n, rng.dirichlet(200 * profile)) for n in range(20, 220)]))
    fit = log_likelihood(counts, profile, 200.0)
    total = np.asarray(counts.sum(axis=1)).ravel()
    for given in ((fit, np.full(200, -np.inf)), (np.full(200, np.inf), (counts @ gain.T).max(axis=1))):
        p = droplets.empty_p_values(*given, total, profile, 200.0, gain, 0) / 2  # one of both
        assert 0.02 <= (p < 0.1).mean() <= 0.2 and 0.35 <= (p < 0.5).mean() <= 0.65


def test_discoveries_are_benjamini_and_hochbergs():
    p = np.array([0.041, 0.001, 0.02, 0.5, 0.011])
    assert discoveries(p, 0.05).tolist() == [False, True, True, False, True]
    assert not discoveries(np.ones(3), 0.05).any()


def test_ambient_share_of_two_species():
    """Human and mouse cells in one run: what a cell has of the other's genes is ambient."""
    rng = np.random.default_rng(0)
    genes = rng.dirichlet(np.ones(400), 2)
    profile = np.concatenate([0.6 * genes[0], 0.4 * genes[1]])
    for share in (0.02, 0.1, 0.3):
        own = np.zeros((2, 800))
        own[0, :400], own[1, 400:] = genes
        sums = rng.poisson(2e5 * ((1 - share) * own + share * profile))
        by_cluster, found = ambient_share(sums, rng.poisson(5e5 * profile), 0)
        np.testing.assert_allclose([*by_cluster, found], share, atol=0.02)
