"""Limits on a sample's cells that tell the damaged: few counts or genes, a mitochondrial share high for their kind.

What merely differs from most cells is flagged, too, and may be a type: large cells have many counts, those that secrete
spend half of their RNA on a few genes, and heart muscle is full of mitochondria.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_core.config import QcConfig
from scvi_core.files import Decisions
from scvi_core.preprocess.samples import read_chunks

if TYPE_CHECKING:
    import pandas as pd

# A sample of healthy cells can have a median mitochondrial share of 1 % and a MAD of 0.3 %: 5 MADs would then
# drop living cells at 3 %. Below 5 % nearly every tissue of man and mouse counts as healthy (Osorio & Cai,
# Bioinformatics 2021), so the MAD threshold never goes under it; qc.max_pct_mito may.
PCT_MITO_FLOOR = 5.0
PCT_MITO_HIGH = 20.0  # of the median cell: heart, kidney and liver have that, and so have dying cells
SMALLEST = 0.05  # of the median's counts or genes: platelets beside monocytes have a twentieth, and are whole
WHOLE = 10_000  # genes with a count that a sample of whole transcriptomes has; a panel measures fewer
NUCLEUS = 0.5  # of a cell's RNA, roughly, and more of its genes
# medians of nuclei, in per cent: more of the RNA that stays in them, few ribosomal proteins, hardly any mitochondria
NUCLEI = {"pct_nuclear": 1.5, "pct_ribo": 10.0, "pct_mito": 1.0}
PCT_HB_RED = 50.0  # haemoglobin in a red cell, which has a few dozen genes and is whole

LIKE = 8  # cells that a cell is like: a type of ten has them
SEEN = 4000  # cells of either kind, below and above the mitochondrial limit, to find them among
NEAREST = 32
KIND_GENES = 1350  # the most counted but the mitochondrial
KIND_COMPONENTS = 20


def limits(
    frame: pd.DataFrame, n_measured: int, mitochondria: bool, config: QcConfig, decisions: Decisions, sample: str
) -> tuple[dict[str, np.ndarray], float | None]:
    """Which cells of one sample lie beyond each limit.

    Limits lie at median ± ``n_mads`` scaled median absolute deviations (of log1p for counts and genes; upper side only
    for shares), with the fixed limits of `config` on top. Medians and MADs are over the barcodes that pass the fixed
    lower limits, so that empty droplets do not set them.

    Parameters
    ----------
    frame : a row a cell: ``n_counts``, ``n_genes``, ``pct_mito``, ``pct_ribo``, ``pct_hb``, ``pct_top50`` and
        ``pct_nuclear``; shares in per cent.
    n_measured : genes with a count. A panel's, and nuclei's, fixed lower limits are scaled down.
    mitochondria : whether any mitochondrial gene is known.

    Returns
    -------
    flags : (cells,) bool each.
    pct_mito : the limit by MADs on the mitochondrial share, None where there is none.
    """
    from scipy.stats import median_abs_deviation

    flags: dict[str, np.ndarray] = {}
    scale = _scale(frame, n_measured, mitochondria, config, decisions, sample)
    fewest = {"n_counts": config.min_counts * scale, "n_genes": config.min_genes * scale}
    red = (frame["pct_hb"] > PCT_HB_RED).to_numpy()
    cells = (frame["n_counts"] >= fewest["n_counts"]).to_numpy()
    cells &= (frame["n_genes"] >= fewest["n_genes"]).to_numpy() | red

    def apply(flag: str, column: str, limit: float, side: int, name: str, why: str) -> None:
        values = frame[column].to_numpy()
        beyond = values < limit if side < 0 else values > limit
        if flag == "low_genes" and (beyond & red).any():
            why += f"; not {int((beyond & red).sum())} red cells, over {PCT_HB_RED:g} % haemoglobin"
            beyond &= ~red
        flags[flag] = flags.get(flag, np.zeros(len(frame), dtype=bool)) | beyond
        word = "below" if side < 0 else "above"
        text = f"{column} {word} it is flagged; {why}"
        decisions.add(f"{flag}.{name}", round(limit, 4), text, n_cells=int(beyond.sum()), sample=sample)

    def by_mad(column: str, sides: dict[int, str], log: bool = False, floor: float | None = None) -> float | None:
        values = frame[column].to_numpy()[cells].astype(np.float64)
        if not values.size:
            return None
        middle = float(np.median(values))
        values = np.log1p(values) if log else values
        median, mad = float(np.median(values)), float(median_abs_deviation(values, scale="normal"))
        name = f"log1p({column})" if log else column
        if mad == 0 and floor is None:
            text = f"{name} has MAD 0 around {median:.4g}: not applied"
            decisions.add(f"{'/'.join(sides.values())}.mad", None, text, sample=sample)
            return None
        for side, flag in sides.items():
            limit = median + side * config.n_mads * mad
            limit = float(np.expm1(limit)) if log else min(limit, 100.0)  # shares are per cent
            why = f"median {median:.4g} {'-' if side < 0 else '+'} {config.n_mads:g} x scaled MAD {mad:.4g} of {name}"
            if floor is not None and limit < floor:
                why, limit = f"{why} = {limit:.4g}, raised to the floor of {floor:g} %", floor
            if side < 0 and limit > SMALLEST * middle:
                why += f" = {limit:.4g}, lowered to {SMALLEST:g} of the median, which small cells may have"
                limit = SMALLEST * middle
            apply(flag, column, limit, side, "mad", why)
        return limit

    pct_mito = None
    if not cells.all():
        text = "medians and MADs are over the cells that pass the fixed lower limits"
        decisions.add("mad_cells", int(cells.sum()), text, sample=sample)
    apply("low_counts", "n_counts", fewest["n_counts"], -1, "min_counts", "fixed limit")
    apply("low_genes", "n_genes", fewest["n_genes"], -1, "min_genes", "fixed limit")
    by_mad("n_counts", {-1: "low_counts", 1: "high_counts"}, log=True)
    by_mad("n_genes", {-1: "low_genes", 1: "high_genes"}, log=True)
    by_mad("pct_top50", {1: "high_top50"})
    if config.max_counts is not None:
        apply("high_counts", "n_counts", config.max_counts, 1, "max_counts", "fixed limit")
    if mitochondria:
        pct_mito = by_mad("pct_mito", {1: "high_mito"}, floor=PCT_MITO_FLOOR)
        median = float(np.median(frame["pct_mito"].to_numpy()[cells])) if cells.any() else 0.0
        if config.max_pct_mito is not None:
            apply("high_mito", "pct_mito", config.max_pct_mito, 1, "max_pct_mito", "fixed limit")
        elif median > PCT_MITO_HIGH:
            text = (
                "the median mitochondrial share, per cent: a tissue rich in mitochondria (heart, kidney, liver), or "
                "most cells are dying, which the sample's own spread does not show; if so, set qc.max_pct_mito"
            )
            decisions.add("mitochondrial_share", round(median, 1), text, sample=sample, warn=True)
    if config.max_pct_hb is not None:
        apply("high_hb", "pct_hb", config.max_pct_hb, 1, "max_pct_hb", "fixed limit")
    return flags, pct_mito


def _scale(
    frame: pd.DataFrame, n_measured: int, mitochondria: bool, config: QcConfig, decisions: Decisions, sample: str
) -> float:
    """By what the fixed lower limits are multiplied: 1 for whole cells, whole transcriptomes."""
    scale, panel, taken = (
        min(1.0, n_measured / WHOLE),
        n_measured < WHOLE / 2,
        "qc.min_counts and qc.min_genes are taken",
    )
    if scale < 1:
        text = f"genes have a count, where a whole transcriptome has {WHOLE:,} or more: {taken} times {scale:.3g}"
        decisions.add("panel" if panel else "genes_measured", n_measured, text, sample=sample, n_genes=n_measured)
    cells = frame[frame["n_counts"] >= NUCLEUS * config.min_counts]
    if panel or not mitochondria or not len(cells):
        return scale
    medians = {column: float(cells[column].median()) for column in NUCLEI}
    few = all(medians[column] < NUCLEI[column] for column in ("pct_ribo", "pct_mito"))
    if not few or medians["pct_nuclear"] < NUCLEI["pct_nuclear"]:
        return scale
    shown = ", ".join(f"{column} {value:.2g}" for column, value in medians.items())
    text = (
        "much RNA that stays in nuclei (MALAT1 ...), few ribosomal proteins, hardly any mitochondria (medians, "
        f"per cent: {shown}): {taken} times {NUCLEUS * scale:.3g}; mitochondria mean cytoplasm stuck to a nucleus"
    )
    decisions.add("nuclei", True, text, sample=sample)
    return NUCLEUS * scale


def rich_in_mitochondria(
    h5ad: Path, frame: pd.DataFrame, good: np.ndarray, limit: float, genes: np.ndarray, seed: int
) -> np.ndarray:
    """Cells beyond the mitochondrial limit that have no more than others of their kind: whole, so not to be dropped.

    Damage lets the cytoplasm's RNA out and keeps the mitochondria: it multiplies the odds of mitochondrial counts. A
    cell's kind are the ``LIKE`` cells nearest to it by all other genes. Its odds may exceed theirs by the factor by
    which the sample's limit exceeds the sample's median, if they have half of the sample's other counts or more, as
    damaged cells that resemble each other do not.

    Parameters
    ----------
    h5ad, frame : one file's cells, of which `good` (bool) are one sample's that pass the lower limits.
    limit : on their mitochondrial share, per cent.
    genes : positions of the genes to compare by, none of them mitochondrial.
    seed : of the cells drawn where there are many.

    Returns
    -------
    (cells,) bool, some of those beyond the limit.
    """
    from scipy.sparse import vstack
    from sklearn.neighbors import NearestNeighbors
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    spared = np.zeros(len(frame), dtype=bool)
    rng = np.random.default_rng(seed)
    beyond = (frame["pct_mito"] > limit).to_numpy()
    ordinary, high = np.flatnonzero(good & ~beyond), np.flatnonzero(good & beyond)
    if len(high) <= LIKE or not len(ordinary):
        return spared
    seen = [np.sort(rng.permutation(rows)[:SEEN]) for rows in (ordinary, high)]
    rows = np.union1d(high, seen[0])
    wanted = np.zeros(len(frame), dtype=bool)
    wanted[rows] = True
    counts = vstack([counts[:, genes].astype(np.float32) for _, counts in read_chunks(h5ad, wanted)], format="csr")
    share = frame["pct_mito"].to_numpy(np.float64) / 100
    other = frame["n_counts"].to_numpy(np.float64) * (1 - share)
    odds = np.log((share + 1e-3) / (1 - share + 1e-3))
    target = np.median(other[ordinary])
    counts.data = np.log1p(counts.data * np.repeat(target / np.maximum(other[rows], 1), np.diff(counts.indptr)))
    pool = np.searchsorted(rows, np.concatenate(seen))
    weight = np.repeat([len(ordinary) / len(seen[0]), len(high) / len(seen[1])], [len(s) for s in seen])
    with threadpool_limits(1):
        x_ng = counts[pool].toarray()
        x_ng -= x_ng.mean(axis=0)
        axes_kg = randomized_svd(x_ng, min(KIND_COMPONENTS, *x_ng.shape), n_iter=4, random_state=seed)[2]
        z_nk = counts @ axes_kg.T
        at = np.searchsorted(rows, high)
        k = min(NEAREST, len(pool))
        near = (
            NearestNeighbors(n_neighbors=k, algorithm="brute")
            .fit(z_nk[pool])
            .kneighbors(z_nk[at], return_distance=False)
        )
    # of drawn cells each stands for several: the nearest that make up LIKE cells count, and itself does not
    counted = np.where(pool[near] == at[:, None], 0, weight[near])
    before = np.cumsum(counted, axis=1) - counted
    counted = np.clip(LIKE - before, 0, counted)
    like = rows[pool[near]]
    allowed = np.log(limit / (100 - limit)) - np.median(odds[good]) if limit < 100 else np.inf
    usual = odds[high] <= _weighted_median(odds[like], counted) + allowed
    spared[high[usual & (_weighted_median(other[like], counted) >= target / 2)]] = True
    return spared


def _weighted_median(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each row."""
    order = np.argsort(values, axis=1, kind="stable")
    total = np.cumsum(np.take_along_axis(weight, order, 1), axis=1)
    first = (total >= total[:, -1:] / 2).argmax(axis=1)
    return np.take_along_axis(values, order[np.arange(len(values)), first][:, None], 1)[:, 0]
