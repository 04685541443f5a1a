"""Doublets, droplets that held two cells: artificial ones are made, and a classifier learns to tell them from cells.

In scDblFinder's way (Germain, Lun, Garcia Meixide, Macnair & Robinson, F1000Research 10:979, 2021), with what is
already at hand here: :func:`score_doublets` is the whole of it, read it first. A doublet of two cells of one type looks
like a large cell and is not found by any such method.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import bdtrc

N_COMPONENTS = 20
N_NEIGHBORS = (3, 10, 15, 20, 25, 50)
N_COEXPRESSED = 500  # genes whose pairs enter the co-expression score
ARTIFICIAL = 0.8  # artificial doublets a cell
FEWEST_ARTIFICIAL = 1500
ROUNDS = 3
UNSURE = 0.1  # share of cells by which a rate that goes by their number may be off
CLEAR = 0.4  # share of artificial doublets by whose scores the rate is told
HIGHEST_RATE = 0.4


def score_doublets(counts_ng: csr_matrix, expected: float, known: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each cell looks like a doublet of two others.

    Parameters
    ----------
    counts_ng : (cells, genes) counts of a capture, of genes seen in many cells.
    expected, known : share of cells that are doublets, and whether that is more than a guess.
    seed : of the pairs and of the randomised singular value decomposition.

    Returns
    -------
    cells : (cells,) float64 scores in 0 .. 1, higher for doublets.
    artificial : (artificial doublets,) the same of the artificial ones.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(seed)
    n = counts_ng.shape[0]
    counts_ng = counts_ng.astype(np.float32)  # exact to 16 million; two cells' sum in 8 bits would wrap round
    first = rng.integers(n, size=max(FEWEST_ARTIFICIAL, int(ARTIFICIAL * n)))
    second = (first + rng.integers(1, n, size=len(first))) % n  # never the same cell
    counts_ng = vstack([counts_ng, counts_ng[first] + counts_ng[second]], format="csr")
    artificial = np.arange(counts_ng.shape[0]) >= n
    with threadpool_limits(1):  # sums in one order: the same scores for any number of threads
        features, score = _features(counts_ng, artificial, rng)
        for _ in range(ROUNDS):
            # cells that pass for doublets would teach the trees that doublets are cells
            scores = score[~artificial], score[artificial]
            limit = doublet_threshold(*scores, expected, 0 if known else UNSURE)
            if not known:
                limit = min(limit, doublet_threshold(*scores, doublet_rate(*scores)))
            learn = artificial | (score <= limit)
            trees = HistGradientBoostingClassifier(
                learning_rate=0.1, max_iter=60, max_depth=4, l2_regularization=1, early_stopping=False, random_state=0
            )
            score = trees.fit(features[learn], artificial[learn]).predict_proba(features)[:, 1]
    return score[~artificial], score[artificial]


def _features(counts_ng: csr_matrix, artificial: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What the trees see of each row, and a first score that needs no learning."""
    from sklearn.neighbors import NearestNeighbors
    from sklearn.utils.extmath import randomized_svd

    library, n_genes = np.asarray(counts_ng.sum(axis=1)).ravel(), np.diff(counts_ng.indptr)
    x_ng = counts_ng.toarray()
    coexpression = _coexpression(x_ng > 0, artificial)
    x_ng *= (np.median(library[~artificial]) / np.maximum(library, 1))[:, None]
    np.log1p(x_ng, out=x_ng)
    x_ng -= x_ng.mean(axis=0)
    seed = int(rng.integers(2**31))
    axes_kg = randomized_svd(x_ng, min(N_COMPONENTS, *x_ng.shape), n_iter=4, random_state=seed)[2]
    z_nk = x_ng @ axes_kg.T

    k = min(max(N_NEIGHBORS), len(z_nk) - 1)
    distance, neighbor = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(z_nk).kneighbors(z_nk)
    own = neighbor == np.arange(len(z_nk))[:, None]
    own[~own.any(axis=1), -1] = True  # among copies of itself a cell may not be listed
    near, distance = artificial[neighbor[~own].reshape(-1, k)], distance[~own].reshape(-1, k)
    shares = np.cumsum(near, axis=1)[:, [m - 1 for m in N_NEIGHBORS if m <= k]] / [m for m in N_NEIGHBORS if m <= k]
    weight = np.sqrt(np.arange(k, 0, -1)) / np.maximum(distance, 1e-6)
    weighted = (weight * near).sum(axis=1) / weight.sum(axis=1)
    nearest = [np.where(kind, distance, distance[:, -1:]).min(axis=1) for kind in (near, ~near)]
    features = [shares, weighted, *nearest, coexpression, np.log1p(library), n_genes, z_nk]
    return np.column_stack(features).astype(np.float32), (coexpression / max(coexpression.max(), 1e-12) + weighted) / 2


def _coexpression(seen_ng: np.ndarray, artificial: np.ndarray) -> np.ndarray:
    """Sum over pairs of genes seen together that cells rarely show together: cxds of Bais & Kostka (2020).

    Were two genes, seen in shares p and q of the cells, independent, the cells that show just one of them would be
    binomial with p (1 - q) + q (1 - p). A pair weighs -log of the chance of as many or more.
    """
    share = seen_ng[~artificial].mean(axis=0)
    genes = np.argsort(-share * (1 - share), kind="stable")[:N_COEXPRESSED]
    seen_ng = seen_ng[:, genes].astype(np.float32)
    cells_ng = seen_ng[~artificial]
    n, share = len(cells_ng), share[genes]
    total, both = cells_ng.sum(axis=0, dtype=np.float64), (cells_ng.T @ cells_ng).astype(np.float64)
    just_one = total[:, None] + total - 2 * both
    expected = share[:, None] * (1 - share) + share * (1 - share)[:, None]
    weight = -np.log(np.maximum(bdtrc(just_one - 1, n, expected), 1e-300))  # bdtrc: of more than its first argument
    weight[just_one < 1] = 0
    np.fill_diagonal(weight, 0)
    return np.einsum("ng,ng->n", seen_ng @ weight.astype(np.float32), seen_ng)


def doublet_rate(cells: np.ndarray, artificial: np.ndarray) -> float:
    """Share of cells that are doublets, told by the scores that :func:`score_doublets` gives.

    Cells that are doublets score as artificial ones do, the others hardly ever as the clearest of these. So the share
    of cells above a score, over that of artificial doublets, comes down to the rate as the score goes up.
    """
    scores = np.quantile(artificial, np.linspace(0, 1 - CLEAR, 200)) - 1e-9  # of equal scores, all are above
    cells_above, artificial_above = _above(cells, scores), _above(artificial, scores)
    at_least = (cells_above + 1 / len(cells)) / np.maximum(artificial_above, 1 / len(artificial))
    return float(min(at_least.min(), HIGHEST_RATE))


def doublet_threshold(cells: np.ndarray, artificial: np.ndarray, rate: float, unsure: float = 0) -> float:
    """The score above which a cell is called a doublet.

    It minimises the share of artificial doublets at or below it, plus the share of cells above it, as if none were a
    doublet, plus twice the squared deviation of the latter from what the rate and the artificial doublets above it let
    expect, in units of the rate.

    Parameters
    ----------
    cells, artificial : scores, as :func:`score_doublets` gives.
    rate : share of cells that are doublets.
    unsure : by how much it may be off, which makes deviations from it cheaper.
    """
    candidates = np.unique(np.quantile(np.concatenate([cells, artificial]), np.linspace(0, 1, 2001)))
    called, caught = _above(cells, candidates), _above(artificial, candidates)
    return float(candidates[np.argmin(1 - caught + called + 2 * ((called - rate * caught) / (rate + unsure)) ** 2)])


def _above(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Share of `values` above each limit."""
    return 1 - np.searchsorted(np.sort(values), limits, side="right") / len(values)
