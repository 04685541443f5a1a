"""The latent space made visible: neighbour graph, Leiden, UMAP, t-SNE. faiss, igraph, umappp and openTSNE do it.

One path for all sizes: what changes with the number of cells is how neighbours are found (all pairs, or the nearest
cells of an inverted file), how long Leiden goes on, and what the UMAP starts from. Each is a decision on record.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_core.config import ClusterConfig
from scvi_core.files import Decisions, UserError
from scvi_core.log import log

if TYPE_CHECKING:
    from igraph import Graph
    from scipy.sparse import csr_matrix

EXACT_CELLS = 20_000  # up to here every pair of cells is compared, and Leiden goes on until nothing improves
RECALL = 0.95  # share of the true neighbours that a search of part of the cells must find
ITERATIONS = 5  # of Leiden, beyond EXACT_CELLS
LANDMARKS = 5_000  # cells whose own UMAP gives all cells their places to start from, beyond twice as many
EPOCHS = 100  # of the UMAP from landmarks: with 200, 2 % more of the neighbours stay near, in twice the time
TSNE_CELLS = 10_000  # t-SNE by `auto` up to here: about a minute of one core
STABILITY_CELLS = 10_000  # cells clustered again and again, at most: some seconds
STABILITY_SEEDS = 4
STABILITY_RESOLUTIONS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
STABLE = 0.95  # adjusted Rand index between seeds from which their clusters are the same but for some cells
BLOCK = 20_000  # cells at a time, where intermediate arrays are wider than a row of neighbours


def cluster(
    latent_nk: np.ndarray, config: ClusterConfig, seed: int, threads: int, decisions: Decisions
) -> pd.DataFrame:
    """Clusters and two-dimensional coordinates of cells.

    Parameters
    ----------
    latent_nk : (cells, latent) float32.
    config : neighbours, resolutions, which pictures.
    seed : of all of them.
    threads : of the search for neighbours and of the UMAP from landmarks; the result is the same for any number.

    Returns
    -------
    pandas.DataFrame
        A row a cell: cluster (text; 0 is the largest), umap_1, umap_2, tsne_1, tsne_2 (float32, NaN where not asked
        for), and cluster_r{resolution} for every resolution after the first.

    Raises
    ------
    UserError
        When there are not more cells than neighbours, or a cell has no finite place.
    """
    n_cells = len(latent_nk)
    if n_cells <= config.n_neighbors:
        raise UserError(
            f"cluster.n_neighbors: {config.n_neighbors} neighbours of {n_cells} cells; lower it below the cell count"
        )
    latent_nk = np.ascontiguousarray(latent_nk, dtype=np.float32)
    strange = int((~np.isfinite(latent_nk).all(axis=1)).sum())
    if strange:
        raise UserError(f"latent space: {strange:,} of {n_cells:,} cells have values that are not finite; train again")
    perplexity = _tsne_perplexity(n_cells, config, decisions)
    near_nk, distance_nk = neighbors(latent_nk, config.n_neighbors - 1, seed, threads, decisions)
    graph, weights = _graph(connectivities(near_nk, distance_nk))
    iterations = -1 if n_cells <= EXACT_CELLS else ITERATIONS
    out = {}
    for name, resolution in zip(config.columns, config.resolutions, strict=True):
        out[name] = leiden(graph, weights, resolution, iterations, seed)
        until = "until nothing improves" if iterations < 0 else f"{iterations} iterations"
        text = f"Leiden clusters at resolution {resolution:g}, {config.n_neighbors} neighbours, {until}"
        decisions.add(name, len(set(out[name])), text)
    if config.stability:
        _stability(graph, weights, latent_nk, config, seed, threads, decisions)
    del graph, weights
    empty = np.full((n_cells, 2), np.nan, dtype=np.float32)
    umap = empty
    if config.umap:
        start = None if n_cells <= 2 * LANDMARKS else _landmark_places(latent_nk, config, seed, threads, decisions)
        log.info("cluster: UMAP of %s cells begins", f"{n_cells:,}")
        umap = layout(near_nk, distance_nk, start, config.umap_min_dist, seed, threads)
    tsne = empty if perplexity is None else _tsne(latent_nk, perplexity, seed)
    coordinates = {"umap_1": umap[:, 0], "umap_2": umap[:, 1], "tsne_1": tsne[:, 0], "tsne_2": tsne[:, 1]}
    return pd.DataFrame(out | coordinates)


def neighbors(
    latent_nk: np.ndarray, k: int, seed: int, threads: int, decisions: Decisions
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other cells of each cell, by Euclidean distance.

    Up to ``EXACT_CELLS`` cells all pairs are compared. Beyond, cells are grouped around 4 √n centres, and those of the
    centres nearest to a cell are compared: as many centres as a sample of cells needs to find ``RECALL`` of its true
    neighbours.

    Parameters
    ----------
    latent_nk : (cells, latent) float32, contiguous.
    k : how many; fewer than there are cells.

    Returns
    -------
    near_nk, distance_nk : (cells, k) int32 and float32; nearest first, equal distances by position.
    """
    import faiss

    n_cells, n_latent = latent_nk.shape
    before = faiss.omp_get_max_threads()
    exact = faiss.IndexFlatL2(n_latent)
    faiss.omp_set_num_threads(1)  # sums of the centres depend on how they are split
    if n_cells <= EXACT_CELLS:
        exact.add(latent_nk)
        index = exact
    else:
        n_centres = int(min(4 * n_cells**0.5, n_cells / 40))  # faiss asks for 39 cells a centre
        index = faiss.IndexIVFFlat(exact, n_latent, n_centres)
        index.cp.seed, index.cp.verbose = seed, False
        rng = np.random.default_rng(seed)
        index.train(latent_nk[np.sort(rng.choice(n_cells, min(n_cells, 40 * n_centres), replace=False))])
        index.add(latent_nk)
    faiss.omp_set_num_threads(threads)
    if n_cells > EXACT_CELLS:
        some = np.sort(rng.choice(n_cells, 500, replace=False))
        index.nprobe = n_centres
        true = index.search(latent_nk[some], k + 1)[1]
        index.nprobe, recall = 8, 0.0
        while recall < RECALL:
            index.nprobe *= 2
            found = index.search(latent_nk[some], k + 1)[1]
            recall = np.mean([len(np.intersect1d(a, b)) / (k + 1) for a, b in zip(found, true, strict=True)])
        text = f"approximate, among the cells of {index.nprobe} of {n_centres} centres: {recall:.1%} of the true"
        decisions.add("neighbors", "inverted file", f"{text} neighbours of {len(some)} cells are found")
    near_nk = np.empty((n_cells, k), np.int32)
    distance_nk = np.empty((n_cells, k), np.float32)
    for at in range(0, n_cells, BLOCK):
        rows = np.arange(at, min(at + BLOCK, n_cells))
        found = index.search(latent_nk[rows], k + 1)[1]
        # a cell is among its own neighbours, unless k others lie on the same spot: then the last goes
        others = found != rows[:, None]
        others[others.all(1), -1] = False
        near = found[others].reshape(-1, k)
        # faiss takes distances from products of float32, in which near cells lose digits
        gap = np.sqrt(((latent_nk[rows, None].astype(np.float64) - latent_nk[near]) ** 2).sum(-1))
        order = np.lexsort((near, gap))
        near_nk[rows] = np.take_along_axis(near, order, 1)
        distance_nk[rows] = np.take_along_axis(gap, order, 1)
    faiss.omp_set_num_threads(before)
    return near_nk, distance_nk


def connectivities(near_nk: np.ndarray, distance_nk: np.ndarray) -> csr_matrix:
    """UMAP's weights of the neighbour graph (McInnes, Healy & Melville 2018, algorithms 3 and 4).

    The weight of a neighbour at distance d is exp(-(d - rho) / sigma), where rho is the distance to the nearest one,
    and sigma such that a cell's weights sum to log2(k + 1). Two directions a and b are joined as a + b - ab. Equal to
    scanpy's ``connectivities`` with k + 1 neighbours (a test says so).

    Parameters
    ----------
    near_nk, distance_nk : (cells, k), of :func:`neighbors`.

    Returns
    -------
    (cells, cells) float32 CSR, symmetric.
    """
    from scipy.sparse import csr_matrix

    n_cells, k = near_nk.shape
    weight_nk = np.empty((n_cells, k), np.float32)
    floor = 1e-3 * distance_nk.mean(dtype=np.float64)
    for at in range(0, n_cells, BLOCK):
        d = distance_nk[at : at + BLOCK].astype(np.float64)
        rho = np.where(d > 0, d, np.inf).min(1, keepdims=True)
        rho[np.isinf(rho)] = 0
        beyond = np.maximum(d - rho, 0)
        low, high, sigma = np.zeros_like(rho), np.full_like(rho, np.inf), np.ones_like(rho)
        for _ in range(64):  # bisection
            above = np.exp(-beyond / sigma).sum(1, keepdims=True) > np.log2(k + 1)
            high, low = np.where(above, sigma, high), np.where(above, low, sigma)
            sigma = np.where(np.isinf(high), 2 * sigma, (low + high) / 2)
        # as the paper's implementation: no sigma below a thousandth of the mean distance
        sigma = np.maximum(sigma, np.where(rho > 0, 1e-3 * d.sum(1, keepdims=True) / (k + 1), floor * k / (k + 1)))
        weight_nk[at : at + BLOCK] = np.exp(-beyond / sigma)
    ends = np.arange(0, n_cells * k + 1, k)
    one_way = csr_matrix((weight_nk.ravel(), near_nk.ravel(), ends), shape=(n_cells, n_cells))
    other_way = one_way.T.tocsr()
    both = one_way.multiply(other_way)
    weights = (one_way + other_way - both).tocsr()
    weights.eliminate_zeros()
    weights.sort_indices()
    return weights


def _graph(weights: csr_matrix) -> tuple[Graph, np.ndarray]:
    """An igraph graph of symmetric weights, each edge once, and the edges' weights."""
    import igraph

    rows = np.repeat(np.arange(weights.shape[0], dtype=np.int32), np.diff(weights.indptr))
    once = weights.indices > rows
    edges = np.empty((int(once.sum()), 2), np.int64)
    edges[:, 0], edges[:, 1] = rows[once], weights.indices[once]
    values = weights.data[once]
    del rows, once  # igraph copies the edges several times: this is where memory is highest
    return igraph.Graph(n=weights.shape[0], edges=memoryview(edges)), values


def leiden(graph: Graph, weights: np.ndarray, resolution: float, iterations: int, seed: int) -> np.ndarray:
    """Leiden clusters (Traag et al. 2019) by modularity; (cells,) texts, "0" is the largest."""
    import random

    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden(
            objective_function="modularity", weights=weights, resolution=resolution, n_iterations=iterations
        )
    finally:
        igraph.set_random_number_generator(random)
    member = np.asarray(found.membership)
    _, first, sizes = np.unique(member, return_index=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[member].astype(str).astype(object)


def _stability(
    graph: Graph,
    weights: np.ndarray,
    latent_nk: np.ndarray,
    config: ClusterConfig,
    seed: int,
    threads: int,
    decisions: Decisions,
) -> None:
    """Cluster anew by other seeds, at the resolutions asked for and others, and say which stays the same.

    Leiden begins with a random order of cells. What hangs on it is no structure of the data: so the finest resolution
    at which seeds agree is suggested. It says nothing of whether clusters are cell types.
    """
    from sklearn.metrics import adjusted_rand_score

    n_cells, of = len(latent_nk), ""
    if n_cells > STABILITY_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(n_cells, STABILITY_CELLS, replace=False))
        some = np.ascontiguousarray(latent_nk[rows])
        near, distance = neighbors(some, min(config.n_neighbors, len(some)) - 1, seed, threads, Decisions("cluster"))
        graph, weights = _graph(connectivities(near, distance))
        of = f", of {STABILITY_CELLS:,} random cells"
    found = {}
    for resolution in sorted({*STABILITY_RESOLUTIONS, *config.resolutions}):
        members = [leiden(graph, weights, resolution, ITERATIONS, seed + i) for i in range(STABILITY_SEEDS)]
        pairs = [adjusted_rand_score(a, b) for a, b in combinations(members, 2)]
        n_clusters = int(np.median([len(set(of_seed)) for of_seed in members]))
        found[f"{resolution:g}"] = {"clusters": n_clusters, "agreement": round(float(np.mean(pairs)), 3)}
    text = f"mean adjusted Rand index between the clusters of {STABILITY_SEEDS} seeds, by resolution{of}"
    decisions.add("stability", found, text)
    stable = [r for r, at in found.items() if at["agreement"] >= STABLE]
    best = stable[-1] if stable else max(found, key=lambda r: found[r]["agreement"])
    why = f"the finest of these at which seeds agree (adjusted Rand index {STABLE} or more)"
    if not stable:
        why = f"seeds agree nowhere (adjusted Rand index {STABLE}), and here the most"
    decisions.add("suggested resolution", float(best), f"{why}: {found[best]['clusters']} clusters")


def layout(
    near_nk: np.ndarray, distance_nk: np.ndarray, start: np.ndarray | None, min_dist: float, seed: int, threads: int
) -> np.ndarray:
    """UMAP of cells whose neighbours are known, by umappp; (cells, 2) float32.

    Parameters
    ----------
    near_nk, distance_nk : (cells, k), of :func:`neighbors`.
    start : (cells, 2) places to start from, near where cells end; None: spectral, or at random where the graph falls
        into parts.
    min_dist : how tightly cells are packed.
    """
    import scranpy
    from knncolle import FindKnnResults

    known = FindKnnResults(index=near_nk.astype(np.uint32), distance=distance_nk.astype(np.float64))
    places = scranpy.run_umap(
        known,
        min_dist=min_dist,
        initialize_method="spectral" if start is None else "none",
        initial_coordinates=None if start is None else np.ascontiguousarray(start, np.float64),
        num_epochs=None if start is None else EPOCHS,  # umappp's own: 500 up to 10,000 cells, falling to 200
        initialize_seed=seed,
        optimize_seed=seed,
        num_threads=1 if start is None else threads,  # the spectral start's bits depend on how its sums are split
    )
    return np.asarray(places, np.float32)


def _landmark_places(
    latent_nk: np.ndarray, config: ClusterConfig, seed: int, threads: int, decisions: Decisions
) -> np.ndarray:
    """Where each cell of a large atlas starts: amid its three nearest landmarks, in the landmarks' own UMAP.

    A spectral start does not scale, and a random one loses how groups lie to each other.
    """
    import faiss

    rows = np.sort(np.random.default_rng(seed).choice(len(latent_nk), LANDMARKS, replace=False))
    landmarks = np.ascontiguousarray(latent_nk[rows])
    near, distance = neighbors(landmarks, min(config.n_neighbors, LANDMARKS) - 1, seed, threads, decisions)
    places = layout(near, distance, None, config.umap_min_dist, seed, 1)
    index = faiss.IndexFlatL2(latent_nk.shape[1])
    index.add(landmarks)
    nearest = np.concatenate([index.search(latent_nk[at : at + BLOCK], 3)[1] for at in range(0, len(latent_nk), BLOCK)])
    text = f"cells start amid their 3 nearest of {LANDMARKS:,} random cells, which have a UMAP of their own"
    decisions.add("umap_start", "landmarks", text)
    return places[nearest].mean(axis=1)


def _tsne_perplexity(n_cells: int, config: ClusterConfig, decisions: Decisions) -> float | None:
    """The perplexity of the t-SNE to draw; None where none is drawn."""
    if config.tsne == "auto" and n_cells > TSNE_CELLS:
        text = f"cluster.tsne: auto draws none of more than {TSNE_CELLS:,} cells, as it is slow; true draws it"
        decisions.add("tsne", "off", text)
        return None
    perplexity, most = config.tsne_perplexity, (n_cells - 1) / 3
    if config.tsne and perplexity > most:
        decisions.add("tsne_perplexity", round(most, 1), f"{perplexity:g} is too many for {n_cells} cells")
    return min(perplexity, most) if config.tsne else None


def _tsne(latent_nk: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Coordinates by openTSNE, (cells, 2) float32. One thread: sums of forces depend on how they are split."""
    from openTSNE import TSNE, affinity
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    k = max(1, min(len(latent_nk) - 1, int(3 * perplexity)))  # as openTSNE itself
    known = PrecomputedNeighbors(*neighbors(latent_nk, k, seed, 1, Decisions("cluster")))
    near = affinity.PerplexityBasedNN(knn_index=known, perplexity=perplexity, n_jobs=1)
    # principal components are the start where there are two
    start = "pca" if latent_nk.shape[1] > 1 and np.ptp(latent_nk, axis=0).any() else "random"
    tsne = TSNE(perplexity=perplexity, initialization=start, random_state=seed, n_jobs=1)
    return np.asarray(tsne.fit(latent_nk, affinities=near), dtype=np.float32)
