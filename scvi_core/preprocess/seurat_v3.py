"""Seurat v3's ranking of genes by variability, from running sums over samples on disk.

Equal, number for number, to ``scanpy.pp.highly_variable_genes(flavor="seurat_v3", batch_key="batch")`` on all kept
cells in memory (a test says so), in two passes over the files in chunks of rows. Memory grows with genes x batches,
not with cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from scvi_core.files import Decisions, UserError
from scvi_core.preprocess.samples import SampleFile, kept_chunks

MIN_LOESS_GENES = 10  # skmisc's loess crashes the process on a handful of points


@dataclasses.dataclass(frozen=True)
class Stream:
    """The kept cells of all samples, to be walked through in file order.

    Attributes
    ----------
    samples : the files.
    batches : kept cells of each batch, in the order that scanpy takes batches (sorted).
    codes : for each sample, (cells,) int: the batch.
    columns : for each sample, (genes of its file,) int: the gene's position in the harmonised set, or -1.
    """

    samples: list[SampleFile]
    batches: dict[str, int]
    codes: list[np.ndarray]
    columns: list[np.ndarray]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (batch, gene positions, counts as float64) of the stored counts."""
        for sample, code, column in zip(self.samples, self.codes, self.columns, strict=True):
            for rows, counts in kept_chunks(sample):
                for batch in np.unique(code[rows]):
                    part = counts[code[rows] == batch] if (code[rows] != batch).any() else counts
                    gene = column[part.indices]
                    yield int(batch), gene[gene >= 0], part.data[gene >= 0].astype(np.float64)


def moments(stream: Stream, n_genes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First pass: sums and sums of squares (batches, genes) float64, and cells with the gene (genes,) int64.

    The sums are of integers, so exact (up to 2^53) in any order.
    """
    sums, squares = np.zeros((2, len(stream.batches), n_genes))
    n_cells = np.zeros(n_genes, dtype=np.int64)
    for batch, gene, count in stream:
        sums[batch] += np.bincount(gene, count, minlength=n_genes)
        squares[batch] += np.bincount(gene, count * count, minlength=n_genes)
        n_cells += np.bincount(gene, minlength=n_genes)
    return sums, squares, n_cells


def mean_variance(sums: np.ndarray, squares: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, in scanpy's order of operations."""
    mean = sums / n
    variance = squares / n - mean**2
    return mean, variance * (n / (n - 1))


def rank_genes(
    stream: Stream,
    sums: np.ndarray,
    squares: np.ndarray,
    candidates: np.ndarray,
    n_top: int,
    span: float,
    decisions: Decisions,
) -> dict[str, np.ndarray]:
    """Rank the candidate genes within each batch and combine the ranks over batches.

    Parameters
    ----------
    stream : the counts.
    sums, squares : (batches, genes), of :func:`moments`.
    candidates : (candidates,) int: the genes to rank.
    n_top : genes of lower rank in a batch are unranked in it.
    span : of the loess fit of variance on mean.
    decisions : a fit that needs another span is recorded here.

    Returns
    -------
    ``variances_norm`` (mean over batches), ``highly_variable_rank`` (median over the batches that rank the gene),
    ``highly_variable_nbatches`` and ``order`` (positions, best first), each (candidates,).

    Raises
    ------
    UserError
        When no gene varies within any batch.
    """
    shape = len(stream.batches), len(candidates)
    mean, expected = np.empty(shape), np.empty(shape)
    varies = np.zeros(len(stream.batches), dtype=bool)
    for b, (batch, n_cells) in enumerate(stream.batches.items()):
        mean[b], variance = mean_variance(sums[b, candidates], squares[b, candidates], n_cells)
        varies[b] = (variance > 0).any()
        expected[b] = np.sqrt(10 ** _trend(mean[b], variance, span, batch, decisions))
    if len(candidates) and not varies.any():
        raise UserError(
            "genes: every gene has one same count in all kept cells of a batch; check the inputs, loosen qc"
        )
    n = np.array(list(stream.batches.values()))[:, None]
    clip = expected * np.sqrt(n) + mean

    # second pass, over counts clipped at sqrt(n) expected standard deviations above the mean. The clipped values
    # are no integers: np.add.at adds them one by one in file order, as scanpy's loop does, so the bits agree.
    local = np.full(sums.shape[1] + 1, -1, dtype=np.intp)  # one more for the -1 of genes that are not harmonised
    local[candidates] = np.arange(len(candidates))
    second = dataclasses.replace(stream, columns=[local[column] for column in stream.columns])
    clipped, clipped_squares = np.zeros_like(mean), np.zeros_like(mean)
    for batch, gene, count in second:
        count = np.minimum(count, clip[batch][gene])
        np.add.at(clipped[batch], gene, count)
        np.add.at(clipped_squares[batch], gene, count * count)
    norm = (1 / ((n - 1) * np.square(expected))) * ((n * np.square(mean)) + clipped_squares - 2 * clipped * mean)
    norm = norm[varies]
    return {"variances_norm": norm.mean(axis=0), **_combine(norm, n_top)}


def _trend(mean: np.ndarray, variance: np.ndarray, span: float, batch: str, decisions: Decisions) -> np.ndarray:
    """Expected log10 variance of each gene given its mean: a loess of degree 2; 0 where the variance is 0."""
    from skmisc.loess import loess

    varies = variance > 0
    trend = np.zeros(len(mean))
    x, y = np.log10(mean[varies]), np.log10(variance[varies])
    if not x.size:
        decisions.add("mean_variance_trend", "none", f"batch {batch}: no gene varies, so it has no say in the ranking")
        return trend
    problem = f"{len(x)} genes are too few for loess"
    if len(x) >= MIN_LOESS_GENES:
        # many genes of one mean (shallow batches) make a local fit singular; a wider span is the usual remedy
        for wider in [span, *(s for s in (0.5, 0.75, 1.0) if s > span)]:
            if wider * len(x) < MIN_LOESS_GENES:
                problem = f"{wider:g} of {len(x)} genes are too few for loess"
                continue
            try:
                model = loess(x, y, span=wider, degree=2)
                model.fit()
                fitted = np.array(model.outputs.fitted_values)
            except ValueError as error:
                problem = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
                continue
            if np.isfinite(fitted).all():
                trend[varies] = fitted
                if wider != span:
                    text = f"batch {batch}: loess with genes.span {span:g} failed ({problem}), so a wider span is used"
                    decisions.add("mean_variance_trend", f"loess, span {wider:g}", text)
                return trend
    degree = min(2, len(np.unique(x)) - 1)
    decisions.add("mean_variance_trend", f"polynomial, degree {degree}", f"batch {batch}: {problem}")
    trend[varies] = np.polyval(np.polyfit(x, y, degree), x)
    return trend


def _combine(norm: np.ndarray, n_top: int) -> dict[str, np.ndarray]:
    """Median rank over batches, then number of batches, as scanpy's flavor ``seurat_v3``; norm is (batches, genes)."""
    import pandas as pd

    # numpy's default sort, not a stable one: genes of equal variance then rank as they do in scanpy
    ranks = np.argsort(np.argsort(-norm, axis=1), axis=1).astype(np.float32)
    nbatches = (ranks < n_top).sum(axis=0)
    ranks[ranks >= n_top] = np.nan
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    by = pd.DataFrame({"rank": median, "nbatches": nbatches})
    order = by.sort_values(["rank", "nbatches"], ascending=[True, False], na_position="last").index.to_numpy()
    return {"highly_variable_rank": median, "highly_variable_nbatches": nbatches, "order": order}
