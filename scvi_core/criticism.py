"""Model criticism: counts that the model makes, held against the counts as measured (posterior predictive checks).

A replicate is a data set that the fitted model makes of the same cells (:func:`posterior_predictive`). Where a summary
of the real counts lies among those of the replicates, the model has caught it; where it lies outside, the model has
missed it (Gelman, Meng and Stern, Statistica Sinica 1996; Lopez et al., Nature Methods 2018, use these checks). With
enough cells every model is seen to be wrong, so a gene counts as missed only where the miss also matters:
:data:`CHECKS` says from when on. :func:`criticise` is the way in.

Suffixes: r replicates, n cells, g genes, k groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scvi_core.config import CriticismConfig
from scvi_core.counts import Counts, unsigned
from scvi_core.files import Decisions, UserError, replacing, write_json, write_parquet
from scvi_core.log import log, progress
from scvi_core.model import SCVI
from scvi_core.normalise import log_normalised
from scvi_core.posterior import posterior_predictive
from scvi_core.tables import natural

FILES = ("checks.json", "genes.parquet", "cells.parquet", "groups.parquet", "de.parquet")
MIN_SEEN = 10  # a gene is judged if as many cells have it, in the data or in the replicates: fewer say nothing
MIN_GROUP = 20  # cells of the smallest group compared, for the same reason
HELD_OUT = 1000  # with fewer held-out cells genes and groups would be too noisy to judge: all cells are taken then
TOP = 50  # genes that are a group's markers: as many as one looks at
SPLITS = 5  # of the data in two halves
INTERVAL = 0.9  # of the replicates, which the data should lie in

# A right model is outside the interval for a tenth of the genes by chance, and for fewer beyond the tolerance too. More
# than 15 % are no chance; beyond twice that the fault is the model's and no longer some genes'.
GOOD, POOR = 0.15, 0.3
# Two replicates do not agree fully with one another, as counts are noisy, and neither do two halves of the data. What
# the data and a replicate share, over the better of these two, is about 1 under a right model. (Halves are there for a
# model that tells no group from another: its replicates agree on nothing, with the data or among themselves.)
GOOD_DE, POOR_DE = 0.9, 0.75


@dataclasses.dataclass(frozen=True)
class Check:
    """One property of the counts that the model should have.

    Attributes
    ----------
    name, title : in files, and for readers.
    level : whether a value belongs to a gene, over cells, or to a cell, over genes.
    statistic : column of :func:`moments`.
    tolerance : how far the typical replicate may be off before it matters: a difference, or the log2 of a ratio.
    ratio : which of the two.
    subject : what the numbers are, in a sentence.
    low, high : what the model predicts where its value is too small, and too large.
    matters : what a miss means for those who use the atlas.
    """

    name: str
    title: str
    level: str
    statistic: str
    tolerance: float
    ratio: bool
    subject: str
    low: str
    high: str
    matters: str


# Tolerances were set on real UMI counts of pancreas and of cell lines: with them, fits of a ZINB model by the default
# recipe are good by gene, and Poisson models, which cannot have more variance than mean, are not.
FIFTH, QUARTER, THIRD = (float(np.log2(ratio)) for ratio in (1.2, 1.25, 4 / 3))
CHECKS = (
    Check(
        "zero_fraction", "Zeros by gene", "gene", "zero_fraction",
        0.03, False,  # three cells in a hundred
        "the share of zeros", "too few zeros", "too many zeros",
        "Shares of cells that express a gene, read off the model, are off by as much.",
    ),
    Check(
        "mean", "Mean by gene", "gene", "mean",
        QUARTER, True,  # a fold change of DeConfig.delta is about as much
        "the mean", "too low a mean", "too high a mean",
        "Denoised expression of these genes is biased.",
    ),
    Check(
        "variance", "Mean and variance by gene", "gene", "variance",
        THIRD, True,  # a standard deviation off by a seventh; less, and a handful of outlier cells decides
        "the variance", "too small a variance", "too large a variance",
        "The noise of these genes is misjudged, and so is how sure differences between cells are.",
    ),
    Check(
        "cv", "Coefficient of variation by gene", "gene", "cv",
        FIFTH, True,  # near the variance's, of which it is the root over the mean
        "the coefficient of variation", "too little variation for their mean", "too much variation for their mean",
        "The noise of these genes is misjudged beside their mean.",
    ),
    Check(
        "cell_total", "Total counts by cell", "cell", "total",
        QUARTER, True,  # half of what separates cells of one type
        "the total", "too few counts", "too many counts",
        "Expression of these cells in counts, not as shares, is biased.",
    ),
    Check(
        "cell_cv", "Coefficient of variation by cell", "cell", "cv",
        QUARTER, True,  # over genes of all levels it varies little, so a quarter is much
        "the coefficient of variation", "counts spread too evenly over genes", "counts that too few genes hold",
        "The model smooths over, or overdraws, what is special to these cells.",
    ),
)  # fmt: skip
STATISTICS = {"gene": ("mean", "zero_fraction", "variance", "cv"), "cell": ("total", "zero_fraction", "cv")}


@dataclasses.dataclass(frozen=True)
class Criticism:
    """What came of it.

    Attributes
    ----------
    genes : a row a gene: ``gene_id``, ``gene_name``, ``judged``; for each statistic s ``{s}_observed``,
        ``{s}_predicted`` (median of the replicates), ``{s}_low`` and ``{s}_high`` (their central 90 %), float64, and
        ``{s}_missed``.
    cells : a row a cell examined: ``cell_id``, and the same of its statistics.
    groups : a row a group of cells: ``group``, ``n_cells``; Spearman correlation of fold changes and share of top genes
        in common, of data and replicate (``lfc_agreement``, ``top_agreement``), and the most that noise allows
        (``lfc_ceiling``, ``top_ceiling``): of two replicates or of two halves of the data, whichever agree better.
    de : a row a (group, gene): ``group``, ``gene_id``, ``lfc_observed``, ``lfc_predicted``: log2, group against rest.
    summary : what the checks are of, and ``checks``: a list of verdicts.
    """

    genes: pd.DataFrame
    cells: pd.DataFrame
    groups: pd.DataFrame
    de: pd.DataFrame
    summary: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the folder of :data:`FILES`. Whole, or not at all."""
        with replacing(path, "CRITICISM") as folder:
            folder.mkdir()
            for name in ("genes", "cells", "groups", "de"):
                write_parquet(folder / f"{name}.parquet", getattr(self, name))
            write_json(folder / "checks.json", self.summary, checksum=True)


def choose_cells(n_cells: int, held: np.ndarray, config: CriticismConfig, seed: int, made: Decisions) -> np.ndarray:
    """Positions of the cells to examine, sorted: those never trained on where they are enough, else any.

    Parameters
    ----------
    n_cells : in the store. held : positions of the cells set aside in training, or none.
    """
    few = len(held) < HELD_OUT
    rows = np.arange(n_cells) if few else np.sort(held)
    if len(rows) > config.n_cells:
        rows = np.sort(np.random.default_rng(seed).choice(rows, config.n_cells, replace=False))
    reason = f"of the {len(held):,} that training held out"
    if few:
        reason = (
            f"of all {n_cells:,}, most of them trained on, as the {len(held):,} held out are too few to judge genes"
        )
    made.add("cells examined", len(rows), f"{reason}; no more than criticism.n_cells ({config.n_cells:,})")
    return rows


def criticise(
    model: SCVI,
    counts: Counts,
    cell_ids: Iterable[str],
    gene_ids: list[str],
    gene_names: list[str],
    group_n: np.ndarray,
    config: CriticismConfig,
    seed: int,
    made: Decisions,
) -> Criticism:
    """Hold replicates of some cells against their counts.

    On the CPU up to four threads make a replicate each, as drawing from distributions takes one thread. Each holds one
    in memory, as a sparse matrix.

    Parameters
    ----------
    counts : of the cells to examine (:meth:`Counts.subset`), at most some ten thousand.
    cell_ids, group_n : (cells,) names, and the group of each as text; None is no group.

    Raises
    ------
    UserError
        For fewer than two cells.
    """
    n_cells = len(counts)
    if n_cells < 2:
        raise UserError(f"criticism: {n_cells} cells to examine; at least 2 are needed")
    real = _matrix(counts)
    groups = _groups(group_n, made)
    observed, marked = moments(real), markers(real, groups)
    made_r: list[dict[str, dict[str, np.ndarray]]] = []
    agreement, between, lfc_kg, before = [], [], np.zeros_like(marked[0]), None

    def replicate(r: int) -> tuple[dict[str, dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
        x_ng = posterior_predictive(model, counts, seed * 1_000_003 + r)
        return moments(x_ng), markers(x_ng, groups)

    replicates = _in_turn(replicate, config.n_replicates, next(model.parameters()).is_cuda)
    for of_all, now in progress(replicates, "replicates made", config.n_replicates):
        made_r.append(of_all)
        agreement.append(agree(marked, now))
        if before is not None:
            between.append(agree(before, now))
        lfc_kg += now[0] / config.n_replicates
        before = now
    tables, checks = {}, []
    names = {"gene": [str(n) for n in gene_names], "cell": [str(c) for c in cell_ids]}
    first = {
        "gene": {"gene_id": [str(g) for g in gene_ids], "gene_name": names["gene"]},
        "cell": {"cell_id": names["cell"]},
    }
    for level, columns in first.items():
        table = pd.DataFrame(columns)
        values = {s: np.stack([m[level][s] for m in made_r]) for s in STATISTICS[level]}
        table["judged"] = True
        if level == "gene":
            seen = [1 - observed[level]["zero_fraction"], 1 - np.median(values["zero_fraction"], 0)]
            table["judged"] = np.maximum(*seen) * n_cells >= MIN_SEEN
        for s in STATISTICS[level]:
            low, high = interval(values[s])
            table[f"{s}_observed"], table[f"{s}_predicted"] = observed[level][s], np.median(values[s], 0)
            table[f"{s}_low"], table[f"{s}_high"] = low, high
        for check in (c for c in CHECKS if c.level == level):
            checks.append(judge(check, table, names[level], config.n_replicates))
        tables[level] = table
    unjudged = int((~tables["gene"]["judged"]).sum())
    if unjudged:
        reason = f"seen in fewer than {MIN_SEEN} of the cells examined, in the data and in the replicates"
        made.add("genes not judged", unjudged, reason)
    by_group = pd.DataFrame({"group": list(groups), "n_cells": [len(rows) for rows in groups.values()]})
    by_group = by_group.astype({"group": object, "n_cells": np.int64})
    halves = [agree(*(markers(real[rows], its) for rows, its in halve(n_cells, groups, i))) for i in range(SPLITS)]
    for i, kind in enumerate(("lfc", "top")):
        by_group[f"{kind}_agreement"] = np.mean([pair[i] for pair in agreement], axis=0)
        by_group[f"{kind}_ceiling"] = np.maximum(
            *(np.mean([p[i] for p in pairs], axis=0) for pairs in (between, halves))
        )
    if groups:
        checks += judge_markers(by_group, top_size(len(gene_ids)))
    de = pd.DataFrame(
        {
            "group": np.repeat(np.array(list(groups), dtype=object), len(gene_ids)),
            "gene_id": np.tile(np.array(first["gene"]["gene_id"], dtype=object), len(groups)),
            "lfc_observed": marked[0].ravel(),
            "lfc_predicted": lfc_kg.ravel(),
        }
    )
    for check in checks:
        log.info("%s = %s: %s", check["check"], check["verdict"], check["sentence"])
    summary = {"n_cells": n_cells, "n_replicates": config.n_replicates, "checks": checks}
    return Criticism(tables["gene"], tables["cell"], by_group, de, summary)


def _in_turn(function: Callable[[int], Any], n: int, on_gpu: bool) -> Iterator[Any]:
    """``function(0)``, ..., ``function(n - 1)``; on the CPU by PyTorch's threads, up to four, each one alone."""
    threads = torch.get_num_threads()
    if on_gpu:
        yield from map(function, range(n))
        return
    try:
        with ThreadPoolExecutor(min(threads, 4), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, range(n))
    finally:
        torch.set_num_threads(threads)


def _matrix(counts: Counts) -> sp.csr_matrix:
    parts = (unsigned(counts.values_m), unsigned(counts.genes_m).int(), counts.indptr_n)
    return sp.csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=(len(counts), counts.n_genes))


def moments(x_ng: sp.csr_matrix) -> dict[str, dict[str, np.ndarray]]:
    """Total, mean, zero fraction, variance (n - 1) and coefficient of variation: of each gene, and of each cell.

    The coefficient of variation of zeros alone is not defined. They get the root of the number of values, which is
    what a single count among zeros gives: the largest there is.

    Returns
    -------
    dict of level (``gene`` over cells, ``cell`` over genes), statistic, then (genes,) or (cells,) float64.
    """
    n_cells, n_genes = x_ng.shape
    x_m = x_ng.data.astype(np.float64)
    cell_m = np.repeat(np.arange(n_cells), np.diff(x_ng.indptr))
    out = {}
    for level, place_m, size, n in (("gene", x_ng.indices, n_genes, n_cells), ("cell", cell_m, n_cells, n_genes)):
        total, square = np.bincount(place_m, x_m, size), np.bincount(place_m, x_m**2, size)
        mean = total / n
        variance = np.maximum(square - total * mean, 0) / (n - 1)
        cv = np.divide(np.sqrt(variance), mean, out=np.full(size, np.sqrt(n)), where=mean > 0)
        zeros = 1 - np.bincount(place_m, x_m > 0, size) / n
        out[level] = {"total": total, "mean": mean, "zero_fraction": zeros, "variance": variance, "cv": cv}
    return out


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central 90 % of replicates, along the first axis: two order statistics.

    Of R replicates and the data, all alike under a right model, the data come k-th or lower with probability k/(R + 1)
    (:func:`coverage`), so k = 0.05 (R + 1), rounded down.
    """
    k = max(1, int((1 - INTERVAL) / 2 * (len(values) + 1) + 1e-9))
    ordered = np.sort(values, axis=0)
    return ordered[k - 1], ordered[-k]


def coverage(n_replicates: int) -> float:
    """Probability that a right model's data lie within :func:`interval`, ties apart."""
    k = max(1, int((1 - INTERVAL) / 2 * (n_replicates + 1) + 1e-9))
    return 1 - 2 * k / (n_replicates + 1)


def judge(check: Check, table: pd.DataFrame, names: list[str], n_replicates: int) -> dict[str, Any]:
    """One check's verdict; adds the column ``{statistic}_missed`` to `table`."""
    s, judged = check.statistic, table["judged"].to_numpy()
    observed, predicted = table[f"{s}_observed"].to_numpy(), table[f"{s}_predicted"].to_numpy()
    error = predicted - observed
    if check.ratio:
        error = np.log2(np.maximum(predicted, 1e-9) / np.maximum(observed, 1e-9))
    outside = (observed < table[f"{s}_low"].to_numpy()) | (observed > table[f"{s}_high"].to_numpy())
    missed = judged & outside & (np.abs(error) > check.tolerance)
    table[f"{s}_missed"] = missed
    n = max(int(judged.sum()), 1)
    value = missed.sum() / n
    parts = []
    for where, what in ((missed & (error < 0), check.low), (missed & (error > 0), check.high)):
        if where.any():
            worst = np.argsort(-np.abs(error) * where, kind="stable")[: min(3, where.sum())]
            named = f" (most of all {_listed([names[i] for i in worst])})" if check.level == "gene" else ""
            parts.append(f"{what} for {_percent(where.sum() / n)} of {check.level}s{named}")
    bias = float(np.median(error[judged])) if judged.any() else 0.0
    shifted = abs(bias) > check.tolerance  # all a little off: seen in the middle even where no single one is sure
    verdict = "poor" if value > POOR else "look" if value > GOOD or shifted else "good"
    sentence = f"The model gets {check.subject} right for {_percent(1 - value)} of {judged.sum():,} {check.level}s"
    sentence = f"{sentence}. It predicts {' and '.join(parts)}." if parts else f"{sentence}."
    if shifted:
        by = f"{abs(2**bias - 1):.0%}" if check.ratio else f"{abs(bias):.2f}"
        sentence = f"{sentence} The typical {check.level}'s is {by} too {'low' if bias < 0 else 'high'}."
    if verdict != "good":
        sentence = f"{sentence} {check.matters}"
    return {
        "check": check.name,
        "title": check.title,
        "level": check.level,
        "verdict": verdict,
        "sentence": sentence,
        "value": _rounded(value),  # the share missed
        "good": GOOD,
        "poor": POOR,
        "tolerance": _rounded(check.tolerance),
        "scale": "log2 ratio" if check.ratio else "difference",
        "bias": _rounded(bias),  # median, of predicted against observed
        "median_error": _rounded(np.median(np.abs(error[judged])) if judged.any() else 0.0),
        "within": _rounded((judged & ~outside).sum() / n),
        "within_expected": _rounded(coverage(n_replicates)),
    }


def _groups(group_n: np.ndarray, made: Decisions) -> dict[str, np.ndarray]:
    """Positions of each group's cells, by the group's name; groups too small to be compared are left out."""
    labels = pd.Series(np.asarray(group_n, dtype=object))
    sizes = labels.value_counts()
    names = sorted(sizes.index, key=natural)
    small = [name for name in names if sizes[name] < MIN_GROUP or len(labels) - sizes[name] < MIN_GROUP]
    if small:
        reason = f"fewer than {MIN_GROUP} cells examined in the group, or in the rest: no check of its markers"
        made.add("groups left out", small, reason, n_cells=int(sizes[small].sum()))
    return {name: np.flatnonzero(labels == name) for name in names if name not in small}


def markers(x_ng: sp.csr_matrix, groups: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log2 fold change and Welch's t of each group against the rest, on log(1 + counts per 10,000).

    Returns
    -------
    lfc_kg, t_kg : (groups, genes) float64. The fold change is the difference of the means; t is 0 where nothing varies.
    """
    n_cells, sizes = x_ng.shape[0], [len(rows) for rows in groups.values()]
    rows_m = np.concatenate([*groups.values(), np.zeros(0, dtype=np.int64)])
    member_kn = sp.csr_matrix((np.ones(len(rows_m)), rows_m, np.cumsum([0, *sizes])), shape=(len(sizes), n_cells))
    total_n = np.asarray(x_ng.sum(1, dtype=np.float64)).ravel()
    y_m = log_normalised(x_ng.data, x_ng.indptr, np.maximum(total_n, 1))
    sums = []
    for values_m in (y_m, y_m**2):
        y_ng = sp.csr_matrix((values_m, x_ng.indices, x_ng.indptr), shape=x_ng.shape)
        sums.append(((member_kn @ y_ng).toarray(), np.asarray(y_ng.sum(0)).ravel()))
    n_k1 = np.array(sizes, dtype=np.float64)[:, None]
    sides = []
    for sum_kg, square_kg, n in (
        (sums[0][0], sums[1][0], n_k1),
        (sums[0][1] - sums[0][0], sums[1][1] - sums[1][0], n_cells - n_k1),
    ):
        mean_kg = sum_kg / n
        sides.append((mean_kg, np.maximum(square_kg - sum_kg * mean_kg, 0) / (n - 1) / n))
    difference_kg = sides[0][0] - sides[1][0]
    error_kg = np.sqrt(sides[0][1] + sides[1][1])
    t_kg = np.divide(difference_kg, error_kg, out=np.zeros_like(difference_kg), where=error_kg > 1e-12)
    return difference_kg / np.log(2), t_kg


def halve(n_cells: int, groups: dict[str, np.ndarray], seed: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Two random halves of the cells, of every group too: positions of the cells, and of each group's among them."""
    code_n = np.full(n_cells, -1)
    for k, rows in enumerate(groups.values()):
        code_n[rows] = k
    order_n = np.random.default_rng(seed).permutation(n_cells)
    order_n = order_n[np.argsort(code_n[order_n], kind="stable")]
    halves = [np.sort(order_n[side::2]) for side in (0, 1)]
    return [(rows, {g: np.flatnonzero(code_n[rows] == k) for k, g in enumerate(groups)}) for rows in halves]


def top_size(n_genes: int) -> int:
    """How many genes are a group's markers: :data:`TOP`, or a tenth of few genes."""
    return min(TOP, max(1, n_genes // 10))


def agree(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How far two answers of :func:`markers` agree: Spearman correlation of fold changes, share of top genes in common.

    Returns
    -------
    correlation_k, overlap_k : (groups,) float64.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(lfc_kg, axis=1) for lfc_kg, _ in (a, b)]
    ranks = [r - r.mean(1, keepdims=True) for r in ranks]
    scale_k = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    correlation_k = (ranks[0] * ranks[1]).sum(1) / np.maximum(scale_k, 1e-12)
    n_top = top_size(a[1].shape[1])
    tops = [np.argsort(-t_kg, axis=1, kind="stable")[:, :n_top] for _, t_kg in (a, b)]
    overlap_k = [len(np.intersect1d(i, j)) / n_top for i, j in zip(*tops, strict=True)]
    return correlation_k, np.array(overlap_k)


def judge_markers(groups: pd.DataFrame, n_top: int) -> list[dict[str, Any]]:
    """Verdicts on differential expression: agreement of data and replicates, over the most that noise allows."""
    texts = {
        "lfc": (
            "de_lfc",
            "Differential expression: fold changes",
            "Fold changes between a group and the rest, in the data and in the model's counts, correlate with {:.2f}; "
            "noise allows {:.2f} (Spearman, mean of groups).",
        ),
        "top": (
            "de_top",
            "Differential expression: top genes",
            f"Of the {n_top} genes that mark a group best in the data, the model's counts have {{:.0%}} among theirs; "
            "noise allows {:.0%}.",
        ),
    }
    out = []
    for kind, (name, title, text) in texts.items():
        found, ceiling = groups[f"{kind}_agreement"].to_numpy(), groups[f"{kind}_ceiling"].to_numpy()
        value = max(found.mean(), 0) / max(ceiling.mean(), 1e-9)
        verdict = "good" if value >= GOOD_DE else "look" if value >= POOR_DE else "poor"
        sentence = text.format(found.mean(), ceiling.mean())
        off = found / np.maximum(ceiling, 1e-9)
        weak = [groups["group"].iloc[i] for i in np.argsort(off, kind="stable")[:3] if off[i] < GOOD_DE]
        if weak:
            sentence += f" Least alike: group {_listed(weak)}."
        if verdict != "good":
            sentence += " Markers that the model ranks high may not stand out in the counts themselves."
        out.append(
            {
                "check": name,
                "title": title,
                "level": "group",
                "verdict": verdict,
                "sentence": sentence,
                "value": _rounded(value),  # what they share, over what noise allows
                "good": GOOD_DE,
                "poor": POOR_DE,
                "agreement": _rounded(found.mean()),
                "ceiling": _rounded(ceiling.mean()),
            }
        )
    return out


def _percent(share: float) -> str:
    """A share in words, that is 0 % and 100 % only where it is."""
    if 0 < share < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < share < 1 else f"{share:.0%}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _rounded(value: float) -> float:
    return round(float(value), 6)
