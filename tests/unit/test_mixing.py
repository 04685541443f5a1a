"""Mixing of batches: by hand, as chance has it, and against scib-metrics where it is installed."""

import numpy as np
import pandas as pd
import pytest

from scvi_core import mixing as mix


def test_effective_number_of_levels_by_hand():
    weights = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    simpson = mix.simpson(weights, np.array([[0, 1, 1], [0, 1, 2]]), 3)
    np.testing.assert_allclose(1 / simpson, [2, 3])  # 1 / (0.5² + 0.5²), 1 / (3 · (1/3)²)


def test_weights_have_the_perplexity():
    distance = np.sort(np.random.default_rng(0).gamma(2, 3, (20, 90)), axis=1)
    p = mix.perplex(distance, 30)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(np.exp(-(p * np.log(p)).sum(1)), 30, rtol=1e-6)
    assert (np.diff(p, axis=1) <= 0).all()
    same = mix.perplex(np.full((1, 9), 2.0), 3)  # all on one spot
    np.testing.assert_allclose(same, 1 / 9)


def cells(shift, seed=0):
    """Two clusters far apart; in the first, batches of unequal sizes lie `shift` from each other."""
    rng = np.random.default_rng(seed)
    batch = np.array(["a"] * 300 + ["b"] * 100 + ["a"] * 200 + ["c"] * 10)
    cluster = np.array(["0"] * 400 + ["1"] * 210)
    z = rng.normal(size=(610, 4)).astype("float32")
    z[cluster == "1"] += 50
    z[:, 0] += shift * (batch == "b")
    return z, pd.Series(batch), pd.Series(cluster)


def test_chance_is_one_and_apart_is_zero_whatever_the_sizes():
    by_chance = mix.mixing(*cells(0), seed=0, threads=1)
    assert by_chance.score == pytest.approx(1, abs=0.05)
    assert list(by_chance.by_cluster) == ["0"]  # ten cells of another batch say nothing
    apart = mix.mixing(*cells(20), seed=0, threads=1)
    assert apart.score == pytest.approx(0, abs=0.02) and apart.ilisi == pytest.approx(0, abs=0.02)
    between = mix.mixing(*cells(2), seed=0, threads=1)
    assert 0.1 < between.score < 0.9 and between == mix.mixing(*cells(2), seed=0, threads=2)


def test_no_cluster_of_two_batches():
    z, batch, _ = cells(0)
    assert mix.mixing(z, batch, batch, seed=0, threads=1).score is None


def test_lisi_is_that_of_scib_metrics():
    scib = pytest.importorskip("scib_metrics")
    from scib_metrics.nearest_neighbors import NeighborsResults

    z, batch, _ = cells(1)
    codes = pd.factorize(batch)[0]
    weights, near = mix._weights(z, 0, 1)
    ours = 1 / mix.simpson(weights, codes[near], 3)
    gap = np.sqrt(((z[:, None].astype(float) - z[near]) ** 2).sum(-1))
    # scib-metrics counts a cell among its own neighbours and leaves it out again
    results = NeighborsResults(np.c_[np.arange(610), near], np.c_[np.zeros(610), gap].astype("float32"))
    theirs = scib.lisi_knn(results, codes, perplexity=30)
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
