"""How well batches are mixed in the latent space: who a cell's neighbours are, against who they would be by chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from scvi_core.cluster import neighbors
from scvi_core.files import Decisions
from scvi_core.tables import natural

PERPLEXITY = (
    30  # the number of neighbours that count, of three times as many that are looked at (Korsunsky et al. 2019)
)
CELLS = 10_000  # cells looked at, at most
LEAST = 30  # cells of a cluster, and of all its batches but the largest, to speak of mixing


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How batches are mixed.

    Attributes
    ----------
    ilisi : median over cells of the effective number of batches among a cell's neighbours (LISI; Korsunsky et al.,
        Nature Methods 2019), scaled so that 0 is one batch and 1 all of them equally, as scIB does.
    by_cluster : cluster: share of neighbours, weighted as LISI does, that are of another batch than they would be if
        drawn twice, over that of randomly shuffled batches. Within the cluster: 1 is as by chance, 0 apart.
    score : mean of `by_cluster` over cells; None where no cluster has enough cells of two batches.
    n_cells : cells looked at.
    """

    ilisi: float
    by_cluster: dict[str, float]
    score: float | None
    n_cells: int


def mixing(latent_nk: np.ndarray, batch: pd.Series, cluster: pd.Series, seed: int, threads: int) -> Mixing:
    """Measure how batches are mixed, among all cells and within each cluster.

    A cluster's own composition is what chance is: a cell type that few batches have does not count as badly mixed, nor
    one that batches have in unequal numbers.

    Parameters
    ----------
    latent_nk : (cells, latent) float32.
    batch, cluster : (cells,) texts.
    seed : of the ``CELLS`` cells that are drawn where there are more.
    threads : of the search for neighbours; it changes no number.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(latent_nk))[:CELLS])
    z_nk = np.ascontiguousarray(latent_nk[rows], dtype=np.float32)
    codes_n, names = pd.factorize(batch.to_numpy()[rows].astype(str))
    groups = cluster.to_numpy()[rows].astype(str)
    weights_nk, near_nk = _weights(z_nk, seed, threads)
    lisi_n = 1 / simpson(weights_nk, codes_n[near_nk], len(names))
    by_cluster, n_cells = {}, {}
    for name in sorted(set(groups.tolist()), key=natural):
        inside = np.flatnonzero(groups == name)
        sizes_b = np.bincount(codes_n[inside], minlength=len(names))
        if len(inside) < LEAST or len(inside) - sizes_b.max() < LEAST:
            continue
        weights_nk, near_nk = _weights(np.ascontiguousarray(z_nk[inside]), seed, threads)
        apart_n = 1 - simpson(weights_nk, codes_n[inside][near_nk], len(names))
        # of two cells drawn without putting back; a neighbour and itself are never apart
        chance = 1 - (sizes_b * (sizes_b - 1.0)).sum() / (len(inside) * (len(inside) - 1.0))
        by_cluster[name] = float(apart_n.mean() / (chance * (1 - (weights_nk**2).sum(1))).mean())
        n_cells[name] = len(inside)
    score = float(np.average([*by_cluster.values()], weights=[*n_cells.values()])) if by_cluster else None
    return Mixing(float((np.median(lisi_n) - 1) / (len(names) - 1)), by_cluster, score, len(rows))


def _weights(z_nk: np.ndarray, seed: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of each cell and their weights: exp(-beta x distance), with beta such that their perplexity is given.

    Returns
    -------
    weights_nk : (cells, k) float64, each row sums to 1. near_nk : (cells, k) positions.
    """
    k = min(3 * PERPLEXITY, len(z_nk) - 1)
    near_nk, distance_nk = neighbors(z_nk, k, seed, threads, Decisions("report"))
    return perplex(distance_nk.astype(np.float64), k // 3), near_nk


def perplex(distance_nk: np.ndarray, perplexity: int) -> np.ndarray:
    """Weights of neighbours by distance whose entropy is log(perplexity), row by row; (cells, k), sums are 1."""
    gap_nk = distance_nk - distance_nk[:, :1]
    low, high, beta = np.zeros((len(gap_nk), 1)), np.full((len(gap_nk), 1), np.inf), np.ones((len(gap_nk), 1))
    for _ in range(64):  # bisection; entropy falls as beta rises
        p_nk = np.exp(-beta * gap_nk)
        sum_n = p_nk.sum(1, keepdims=True)
        entropy_n = np.log(sum_n) + beta * (gap_nk * p_nk).sum(1, keepdims=True) / sum_n
        above = entropy_n > np.log(perplexity)
        low, high = np.where(above, beta, low), np.where(above, high, beta)
        beta = np.where(np.isinf(high), np.minimum(2 * beta, 1e100), (low + high) / 2)  # the same spot: any will do
    return p_nk / sum_n


def simpson(weights_nk: np.ndarray, codes_nk: np.ndarray, n_levels: int) -> np.ndarray:
    """Chance that two of a cell's neighbours, drawn by weight, are of one level; (cells,)."""
    share_nb = np.zeros((len(codes_nk), n_levels))
    np.add.at(share_nb, (np.arange(len(codes_nk))[:, None], codes_nk), weights_nk)
    return (share_nb**2).sum(1)
