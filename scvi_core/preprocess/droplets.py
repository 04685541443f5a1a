"""Raw droplets: which hold a cell, and the ambient RNA that is in all of them. :func:`find_cells` is the whole of it.

In the way of EmptyDrops (Lun et al., Genome Biology 20:63, 2019): droplets of few counts hold ambient RNA alone and
give its profile; those of many counts hold cells; between them a droplet holds a cell where ambient RNA would seldom
give such counts: such as fit the profile badly, or fit that of a kind of cell much better. And of SoupX (Young &
Behjati, GigaScience 9, 2020): genes that a kind of cell does not express tell which share of its counts is ambient.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import gammaln

from scvi_core.preprocess.samples import read_chunks

TOP_CELLS = 50  # by rank: surely cells, if there are any
EMPTY = 0.02  # of their counts: droplets below have no cell in most chemistries
MOST_EMPTY = 0.5  # share of barcodes like that which makes a matrix a raw one
FEWEST = 200  # of them
SMALLER = 5  # times as many droplets may hold a tenth of what large cells have
LOWER = 100  # counts: droplets of fewer, or as many, give the ambient profile
SIMULATED = 10_000
TOGETHER = 500  # simulated at a time
VARIED = 2000  # droplets of ambient RNA that tell how much it varies
KINDS = 10  # clusters of surely cells
OF_KINDS = 3000  # cells that they are made of
KIND_GENES = 1000
OWN = 0.9  # of a cluster's profile that is not ambient, where cells are looked for by it
FDR = 0.01
LOWEST = 0.01  # of the ambient counts: genes that hold so many, the lowest of a cluster, tell its share
FEWEST_EXPECTED = 20  # counts of such a gene, were all ambient
FEWEST_AMBIENT = 50  # counts of such a gene in empty droplets
ENOUGH_EXPECTED = 200  # of all of them


@dataclasses.dataclass(frozen=True)
class Curve:
    """The barcode-rank curve of a raw matrix.

    Attributes
    ----------
    lower : droplets of at most so many counts are ambient RNA alone.
    sure : droplets of more counts hold cells.
    """

    lower: int
    sure: float


@dataclasses.dataclass(frozen=True)
class Droplets:
    """What is known of a sample's droplets.

    Attributes
    ----------
    curve : of barcode ranks.
    cell : (droplets,) bool, which hold one.
    tested, called : how many were told by their genes, and how many of these hold one.
    ambient_g : (genes,) counts of droplets that hold ambient RNA alone.
    cluster : (droplets,) int8 of each cell, -1 of the others. share_c : (clusters,) ambient share of their counts.
    share : of the sample; both NaN where they cannot be told, as :func:`ambient_share` says.
    """

    curve: Curve
    cell: np.ndarray
    tested: int
    called: int
    ambient_g: np.ndarray
    cluster: np.ndarray
    share_c: np.ndarray
    share: float


def find_cells(h5ad: Path, rows: np.ndarray, n_counts: np.ndarray, curve: Curve, seed: int) -> Droplets:
    """Tell cells from empty droplets, in four readings of parts of the file.

    Parameters
    ----------
    h5ad : counts.h5ad. rows : the droplets of one sample in it. n_counts : (droplets of the file,) their counts.
    curve : as :func:`barcode_ranks` gives it.
    seed : of what is drawn.
    """
    mine = np.zeros(len(n_counts), dtype=bool)
    mine[rows] = True
    rng = np.random.default_rng(seed)
    low = np.flatnonzero(mine & (n_counts > 0) & (n_counts <= curve.lower))
    varied = low[np.sort(np.argsort(-n_counts[low], kind="stable")[:VARIED])]
    ambient_g, some = 0, []
    for at, counts in read_chunks(h5ad, _mask(low, len(mine))):
        ambient_g = ambient_g + np.asarray(counts.sum(axis=0, dtype=np.int64)).ravel()
        some.append(counts[np.isin(at, varied)])
    cell = mine & (n_counts > curve.sure)
    test = np.flatnonzero(mine & (n_counts > curve.lower) & ~cell)
    cluster, called = np.full(len(mine), -1, dtype=np.int8), 0
    if not len(low) or not ambient_g.any():  # cut at some count: nothing tells what ambient RNA is like
        n_genes = next(read_chunks(h5ad, _mask(rows[:1], len(mine))))[1].shape[1]
        cell[rows] = n_counts[rows] > min(curve.sure, 2 * n_counts[rows].min())
        return Droplets(curve, cell, 0, 0, np.zeros(n_genes, np.int64), cluster, np.full(1, np.nan), np.nan)
    profile_g = ambient_profile(ambient_g)
    alpha = dispersion(vstack(some, format="csr"), profile_g)
    sure = np.sort(rng.permutation(np.flatnonzero(cell))[:OF_KINDS])
    kind_cg = _kinds(vstack([c for _, c in read_chunks(h5ad, _mask(sure, len(mine)))], format="csr"), profile_g, seed)
    gain_cg = _gain(kind_cg, profile_g, ambient_g)
    if len(test):
        found = [
            (log_likelihood(counts, profile_g, alpha), (counts @ gain_cg.T).max(axis=1))
            for _, counts in read_chunks(h5ad, _mask(test, len(mine)))
        ]
        fit, gain = (np.concatenate(values) for values in zip(*found, strict=True))
        p = empty_p_values(fit, gain, n_counts[test], profile_g, alpha, gain_cg, seed)
        cell[test[discoveries(p, FDR)]] = True
        called = int(cell[test].sum())
    sums_cg = np.zeros(kind_cg.shape, dtype=np.int64)
    for at, counts in read_chunks(h5ad, cell):
        cluster[at] = (counts @ gain_cg.T).argmax(axis=1)
        for c in np.unique(cluster[at]):
            sums_cg[c] += np.asarray(counts[cluster[at] == c].sum(axis=0, dtype=np.int64)).ravel()
    return Droplets(curve, cell, len(test), called, ambient_g, cluster, *ambient_share(sums_cg, ambient_g, seed))


def _mask(rows: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[rows] = True
    return mask


def _gain(kind_cg: np.ndarray, profile_g: np.ndarray, ambient_g: np.ndarray) -> np.ndarray:
    """(clusters, genes) log ratio of a cell's profile to the ambient one; genes too rare to know it are as one."""
    rare = ambient_g < FEWEST_AMBIENT
    ratio_cg = kind_cg / profile_g
    if rare.any():
        ratio_cg[:, rare] = (kind_cg[:, rare].sum(axis=1) / profile_g[rare].sum())[:, None]
    return np.log(OWN * ratio_cg + 1 - OWN)


def _kinds(counts_ng: csr_matrix, profile_g: np.ndarray, seed: int) -> np.ndarray:
    """(clusters, genes) shares of the counts in clusters of cells, none of them 0."""
    from sklearn.cluster import KMeans
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    counts_ng = counts_ng.astype(np.float64)
    genes = np.sort(np.argsort(-np.asarray(counts_ng.sum(axis=0)).ravel(), kind="stable")[:KIND_GENES])
    x_ng = counts_ng[:, genes].toarray().astype(np.float32)
    total = np.maximum(x_ng.sum(axis=1, keepdims=True), 1)
    x_ng = np.log1p(x_ng / total * np.median(total))
    x_ng -= x_ng.mean(axis=0)
    n_clusters = int(np.clip(len(x_ng) // 20, 1, KINDS))
    with threadpool_limits(1):
        u, s, _ = randomized_svd(x_ng, min(20, *x_ng.shape), n_iter=4, random_state=seed)
        label = KMeans(n_clusters, n_init=4, random_state=seed).fit_predict(u * s)
    sums_cg = np.stack([np.asarray(counts_ng[label == c].sum(axis=0)).ravel() for c in range(n_clusters)])
    return (sums_cg + profile_g) / (sums_cg.sum(axis=1, keepdims=True) + 1)


def barcode_ranks(n_counts: np.ndarray) -> Curve | None:
    """The curve of a sample's barcodes, None where these are cells alone.

    In a raw matrix most barcodes have less than ``EMPTY`` of the counts that the largest have; cells of one sample
    seldom do.

    Parameters
    ----------
    n_counts : (barcodes,) integers.
    """
    total = np.sort(n_counts[n_counts > 0])[::-1]
    if not len(total):
        return None
    top = total[min(TOP_CELLS, len(total) // 20)]
    few = n_counts < max(EMPTY * top, 2)
    if few.sum() < max(FEWEST, MOST_EMPTY * len(n_counts)):
        return None
    lower = int(np.clip(EMPTY * top, 5, LOWER))
    knee = _knee(total[total > lower])
    above = total[total > knee]
    tenth = np.quantile(above, 0.99) / 10 if len(above) else knee  # as Cell Ranger takes cells
    # many more droplets from a tenth on than from the knee are no cells, but ambient RNA in plenty
    sure = tenth if lower < tenth < knee and (total > tenth).sum() <= SMALLER * len(above) else knee
    return Curve(lower, float(sure))


def _knee(total: np.ndarray) -> float:
    """Counts where the curve of log counts over log rank lies highest above the line between its ends."""
    if len(total) < 3:
        return np.inf
    rank, first = np.log(np.arange(1, len(total) + 1)), np.flatnonzero(np.diff(total, append=-1))
    x, y = rank[first], np.log(total[first].astype(np.float64))  # one point a number of counts, at its last rank
    after = x >= np.log(min(10, len(total)))  # the few largest are doublets and debris
    x, y = x[after], y[after]
    if len(x) < 3:
        return np.inf
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / max(x[-1] - x[0], 1e-9)
    return float(np.exp(y[np.argmax(y - line)]))


def ambient_profile(sums_g: np.ndarray) -> np.ndarray:
    """(genes,) shares of ambient RNA, from its counts; those never seen share what Good & Turing's estimate leaves."""
    sums_g = sums_g.astype(np.float64)
    total, unseen = sums_g.sum(), sums_g == 0
    left = np.clip((sums_g == 1).sum() / max(total, 1), 1 / max(total, 1), 0.1) if unseen.any() else 0.0
    share = sums_g / max(total, 1) * (1 - left)
    share[unseen] = left / max(unseen.sum(), 1)
    return share / share.sum()


def dispersion(counts_ng: csr_matrix, profile_g: np.ndarray) -> float:
    """Concentration alpha of the Dirichlet-multinomial by which droplets of ambient RNA vary, most likely one."""
    from scipy.optimize import minimize_scalar

    if counts_ng.nnz == 0:
        return np.inf
    found = minimize_scalar(
        lambda log: -log_likelihood(counts_ng, profile_g, np.exp(log)).sum(), bounds=(np.log(10), np.log(1e6)),
        method="bounded", options={"xatol": 0.05},
    )  # fmt: skip
    return float(np.exp(found.x))


def log_likelihood(counts_ng: csr_matrix, profile_g: np.ndarray, alpha: float) -> np.ndarray:
    """(droplets,) log probability of each droplet's counts, given their total, as ambient RNA."""
    total = np.asarray(counts_ng.sum(axis=1), dtype=np.float64).ravel()
    counts, mean = counts_ng.data.astype(np.float64), alpha * profile_g[counts_ng.indices]
    terms = gammaln(counts + mean) - gammaln(mean) - gammaln(counts + 1)
    row = np.repeat(np.arange(len(total)), np.diff(counts_ng.indptr))
    return np.bincount(row, terms, len(total)) + gammaln(total + 1) + gammaln(alpha) - gammaln(total + alpha)


def empty_p_values(
    fit: np.ndarray,
    gain: np.ndarray,
    n_counts: np.ndarray,
    profile_g: np.ndarray,
    alpha: float,
    gain_cg: np.ndarray,
    seed: int,
) -> np.ndarray:
    """(droplets,) p-values of holding ambient RNA alone.

    ``SIMULATED`` droplets are drawn count by count, by Pólya's urn, up to the largest total; each droplet is compared
    with all of them at its own total: how often is the fit to the ambient profile as bad, how often the gain by the
    profile of the best cluster as large. The smaller of both counts, doubled.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(n_counts, kind="stable")
    totals, starts = np.unique(n_counts[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    of_total = {int(total): order[a:b] for total, a, b in zip(totals, starts, ends, strict=True)}
    as_bad, as_good = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    last, n_genes = int(totals[-1]), len(profile_g)
    cumulative = np.cumsum(profile_g)
    row, gain_gc = np.arange(TOGETHER), np.ascontiguousarray(gain_cg.T)
    for _ in range(SIMULATED // TOGETHER):
        drawn = np.empty((TOGETHER, last), dtype=np.int32)
        seen = np.zeros((TOGETHER, n_genes), dtype=np.int32)
        drawn_fit, drawn_gain = np.zeros(TOGETHER), np.zeros((TOGETHER, len(gain_cg)))
        for t in range(last):
            gene = np.searchsorted(cumulative, rng.random(TOGETHER) * cumulative[-1], side="right")
            again = rng.random(TOGETHER) * (alpha + t) >= alpha  # as one that was drawn before
            if again.any():
                gene[again] = drawn[row[again], rng.integers(max(t, 1), size=int(again.sum()))]
            count = seen[row, gene]
            drawn_fit += np.log((alpha * profile_g[gene] + count) / (count + 1) * ((t + 1) / (alpha + t)))
            drawn_gain += gain_gc[gene]
            seen[row, gene] = count + 1
            drawn[:, t] = gene
            if (of := of_total.get(t + 1)) is not None:
                as_bad[of] += np.searchsorted(np.sort(drawn_fit), fit[of], side="right")
                best = np.sort(drawn_gain.max(axis=1))
                as_good[of] += TOGETHER - np.searchsorted(best, gain[of], side="left")
    return np.minimum(2 * (np.minimum(as_bad, as_good) + 1) / (SIMULATED + 1), 1)


def discoveries(p: np.ndarray, fdr: float) -> np.ndarray:
    """Which p-values pass Benjamini and Hochberg's procedure."""
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= fdr * np.arange(1, len(p) + 1) / max(len(p), 1))
    found = np.zeros(len(p), dtype=bool)
    found[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return found


def ambient_share(sums_cg: np.ndarray, ambient_g: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Which share of each cluster's counts is ambient RNA, and of the sample's.

    A cluster has at least its ambient share of every gene, and of genes that it does not express no more. Those that
    are lowest against the profile in one random half of all counts are such genes, if any are; the other half tells
    the share, so that the choice does not lower it. A cluster may express some of every gene that is ambient: the
    sample's share is that of clusters with little, a quarter of the counts being in clusters of less.

    Parameters
    ----------
    sums_cg : (clusters, genes) counts. ambient_g : (genes,) counts of droplets that hold ambient RNA alone.
    seed : of the halves.

    Returns
    -------
    share_c : (clusters,) 0 .. 1, NaN where too few counts tell.
    share : of the sample, NaN where no cluster tells.
    """
    rng = np.random.default_rng(seed)
    sums_cg, ambient_g = np.asarray(sums_cg, dtype=np.int64), np.asarray(ambient_g, dtype=np.int64)
    halves = rng.binomial(ambient_g, 0.5)
    halves = [half / max(half.sum(), 1) for half in (halves, ambient_g - halves)]
    share_c = np.full(len(sums_cg), np.nan)
    for c, sums_g in enumerate(sums_cg):
        first = rng.binomial(sums_g, 0.5)
        second, by_first, by_second = sums_g - first, *(half * sums_g.sum() / 2 for half in halves)
        tested = np.flatnonzero((by_first >= FEWEST_EXPECTED) & (ambient_g >= FEWEST_AMBIENT))
        order = tested[np.argsort(first[tested] / by_first[tested], kind="stable")]
        chosen = order[: 1 + int(np.searchsorted(np.cumsum(by_first[order]), LOWEST * sums_g.sum() / 2))]
        if by_second[chosen].sum() >= ENOUGH_EXPECTED:
            share_c[c] = min(second[chosen].sum() / by_second[chosen].sum(), 1.0)
    told = np.flatnonzero(np.isfinite(share_c))
    if not len(told):
        return share_c, np.nan
    order = told[np.argsort(share_c[told], kind="stable")]
    counts = np.cumsum(sums_cg[order].sum(axis=1))
    return share_c, float(share_c[order[np.searchsorted(counts, counts[-1] / 4)]])
