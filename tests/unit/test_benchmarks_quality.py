"""What benchmarks/quality.py measures with code of its own, against brute force, scipy and sums over all counts."""

import argparse
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, special, stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality


def test_entropy_of_mixing_is_that_of_the_neighbours():
    rng = np.random.default_rng(0)
    latent, batch = rng.standard_normal((60, 3)), rng.choice(["a", "b", "c"], 60)
    expected = []
    for i in range(60):
        near = np.argsort(((latent - latent[i]) ** 2).sum(1))[1:11]  # the first is the cell itself
        _, n = np.unique(batch[near], return_counts=True)
        expected.append(stats.entropy(n))
    assert quality.entropy_of_mixing(latent, batch, 10) == pytest.approx(np.mean(expected))


def test_entropy_of_mixing_of_batches_apart_is_zero_and_of_mixed_ones_that_of_their_shares():
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], [1000, 500])
    mixed = rng.standard_normal((1500, 2))
    assert quality.entropy_of_mixing(mixed + 100 * batch[:, None], batch) == 0
    most = special.entr([2 / 3, 1 / 3]).sum()
    assert most - 0.03 < quality.entropy_of_mixing(mixed, batch) < most


def test_corrupted_takes_a_share_of_the_nonzeros_and_empties_no_cell():
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.0, (200, 50)).astype(np.float32)
    dense[0] = 0
    dense[0, 3] = 7  # one count only
    X = sparse.csr_matrix(dense)
    taken = 0
    for seed in range(20):
        kept, rows, columns, true = quality.corrupted(X, 0.1, seed)
        assert 0.09 * X.nnz < len(true) <= 0.1 * X.nnz
        assert (true > 0).all() and (dense[rows, columns] == true).all()
        assert (kept.toarray()[rows, columns] == 0).all()
        again = kept.toarray()
        again[rows, columns] = true
        assert (again == dense).all()
        assert kept[0, 3] == 7
        taken += np.bincount(rows, minlength=200)
    assert (taken[1:] > 0).all()
    first, second = (quality.corrupted(X, 0.1, 0)[1] for _ in range(2))
    assert (first == second).all()


def test_factor_analysis_likelihood_is_a_probability_of_counts():
    """One gene: y is normal with variance w² + noise, which scipy integrates; the counts' probabilities sum to one."""
    mean, loading, noise = np.array([0.8]), np.array([[0.5]]), np.array([0.3])
    of_y = stats.norm(mean[0], np.sqrt(0.5**2 + 0.3))
    rng = np.random.default_rng(0)
    found = np.array(
        [quality.factor_log_likelihood(np.array([float(x)]), mean, loading, noise, 20_000, rng) for x in range(12)]
    )
    edges = np.concatenate([[-np.inf], np.log(np.arange(12) + 1.5)])
    np.testing.assert_allclose(np.exp(found), np.diff(of_y.cdf(edges)), rtol=0.03)


def test_factor_analysis_likelihood_of_genes_that_share_factors():
    """Two genes, two factors: the probability of a rectangle under scipy's bivariate normal."""
    mean, loadings, noise = np.array([0.5, 1.2]), np.array([[0.4, -0.3], [0.1, 0.6]]), np.array([0.2, 0.1])
    x = np.array([1.0, 3.0])
    low, high = np.log(x + 0.5), np.log(x + 1.5)
    of_y = stats.multivariate_normal(mean, loadings.T @ loadings + np.diag(noise))
    found = quality.factor_log_likelihood(x, mean, loadings, noise, 50_000, np.random.default_rng(0))
    assert found == pytest.approx(np.log(of_y.cdf(high, lower_limit=low)), abs=0.02)


def test_log_between_holds_in_both_tails():
    low, high = np.array([-40.0, 39.0, -1.0, -np.inf]), np.array([-39.0, 40.0, 1.0, 5.0])
    near = stats.norm.logcdf(-39)  # what lies beyond 40 does not count
    expected = [near, near, np.log(0.6826894921370859), stats.norm.logcdf(5)]
    np.testing.assert_allclose(quality._log_between(low, high), expected, rtol=1e-12)


def test_agreement_is_spearmans_label_by_label():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 30))
    changes = {"ours": (["a", "b"], x), "peer": (["a", "b"], np.stack([np.exp(x[0]), -x[1]]))}
    (one,) = quality._agreements("some", 0, changes)
    assert one["methods"] == ["ours", "peer"]
    assert one["spearman"] == pytest.approx({"a": 1.0, "b": -1.0})


def test_labels_and_batches_that_are_not_there():
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", None, "b", "nan"])}, index=list("wxyz"))
    labels = quality._labels(obs, "cell_type")
    assert labels.notna().tolist() == [True, False, True, False]
    assert quality._labels(obs, "other").notna().sum() == 0
    assert quality._batch(obs, "batch").unique().tolist() == ["all"]


def test_tables_have_dashes_where_nothing_was_found():
    dataset = {"name": "some", "n_cells": 10, "n_batches": 1, "n_labels": 0, "entropy_of_batches": 0.0}
    rows = [
        {"dataset": "some", "method": "ours", "seed": 0, "log_p": -10.0, "nelbo": 11.0, "imputation": 1.0},
        {"dataset": "some", "method": "ours", "seed": 1, "log_p": -12.0, "nelbo": 11.0, "imputation": 1.0},
        {"dataset": "some", "method": "pca", "seed": 0, "imputation": 2.0},
        {"dataset": "some", "method": "harmony", "seed": 0},
    ]
    text = quality._texts(rows, [], [dataset], {"scvi-core": "1"})
    assert "| scvi-core 1 | -11.0 (-12.0 to -10.0) | 11.0 | 1.000 |" in text
    assert "| PCA | - | - | 2.000 |" in text
    assert "Harmony" not in text and "ASW" not in text


def test_a_method_whose_package_is_missing_is_left_out_and_said_so(capsys):
    options = argparse.Namespace(peer_python=sys.executable, methods=["pca", "harmony"], tasks=["imputation"])
    quality.METHODS["harmony"], kept = ("Harmony", ("no-such-package",), ("embedding",)), quality.METHODS["harmony"]
    try:
        versions = quality._installed(options)
    finally:
        quality.METHODS["harmony"] = kept
    assert options.methods == ["pca"] and "scanpy" in versions
    assert "Harmony is left out: pip install no-such-package" in capsys.readouterr().err


def test_scores_without_labels_or_without_batches(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"batch": rng.choice(["a", "b"], 80)}, [f"c{i}" for i in range(80)])
    ad.AnnData(sparse.csr_matrix((80, 3), dtype=np.float32), obs).write_h5ad(tmp_path / "counts.h5ad")
    np.savez(tmp_path / "space.npz", latent=rng.standard_normal((80, 2)))
    spec = {"counts": str(tmp_path / "counts.h5ad"), "batch_key": "batch", "label": "cell_type", "seed": 0}
    assert set(quality._scores(spec, "space.npz")) == {"entropy"}
    assert quality._scores(spec | {"batch_key": "other"}, "space.npz") == {}
