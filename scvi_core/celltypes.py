"""Cell types of cells: a linear classifier that says how sure it is, how sure it may be, and what it does not know.

On the latent state and the log-normalised counts of a fitted model's cells lies one softmax over the leaves of a
taxonomy (:func:`learn`). It is fitted to the labelled cells by

    - mean over cells of w log sum_{y under the label} p_y + (l2 / 2) |W|^2

so that a cell labelled with an inner node says just that. What it is worth is measured where it has not looked: each
batch in turn (or a fifth of the cells, where labels are in one batch) is annotated by a classifier of the others. From
these held-out answers come the temperature that calibrates the probabilities, the threshold of the label sets, the
scale of the novelty score, and every figure in :class:`Quality`. Suffixes: n cells, y leaves, v nodes, g genes, f
features, k latent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from threadpoolctl import threadpool_limits

from scvi_core import posterior
from scvi_core.cluster import neighbors
from scvi_core.config import AnnotateConfig
from scvi_core.counts import Counts
from scvi_core.files import Decisions, UserError
from scvi_core.labels import ANY, Taxonomy
from scvi_core.log import log
from scvi_core.normalise import log_normalised

L2 = 3e-3  # measured: benchmarks/annotate.py
N_COMPONENTS = 50  # principal components of log-normalised counts among the features
N_FOLDS = 5  # at most
N_NEAR = 5  # cells whose expression is averaged before it is held against the labels', the cell itself among them
N_GENES = 10  # largest excesses, and lacks, that count
NOVELTY_WEIGHTS = np.array([0.5, 1.0])  # of entropy and surprise, standardised; measured: benchmarks/annotate.py
TOGETHER = 20_000  # cells of a batch in memory at a time
MOST_CELLS = 30_000  # the classifier is fitted to; of more, some of each label
MOST_NUMBERS = 40_000_000  # cells x genes that the principal components are taken from
N_BINS = 15  # of the reliability curve, of equal numbers of cells
UNIT = {"batch": "batch", "cells": "fold"}  # what is held out, one of it
CALLS = ["label", "probability", "safe_label", "safe_probability", "label_set", "novelty", "is_novel"]


@dataclasses.dataclass
class Classifier:
    """Expression and latent state -> logits, and how far expression is from what the labels explain.

    Attributes
    ----------
    gene_gy, latent_ky, bias_y : logits are log-normalised counts x gene_gy + latent state x latent_ky + bias_y, minus
        infinity for a leaf that no cell showed.
    mean_g, scale_g : standardise log-normalised counts.
    centre_yg : standardised means of the labels' cells, 0 without any.
    """

    gene_gy: np.ndarray
    latent_ky: np.ndarray
    bias_y: np.ndarray
    mean_g: np.ndarray
    scale_g: np.ndarray
    centre_yg: np.ndarray

    def logits(self, z_nk: np.ndarray, expression_ng: sp.csr_matrix) -> np.ndarray:
        """(cells, leaves) logits."""
        return expression_ng @ self.gene_gy + z_nk @ self.latent_ky + self.bias_y

    def surprise(self, p_ny: np.ndarray, z_nk: np.ndarray, expression_ng: sp.csr_matrix) -> np.ndarray:
        """(cells,) how far expression is from what the labels explain, of cells of one batch.

        What labels explain is the mean of the labels' cells, weighed by probability. What they leave is averaged over a
        cell and its nearest others in the latent space, as noise of counts differs from cell to cell, and the genes of
        a type that was never shown do not. What all labels of the batch have in common, by their median, is the batch's
        own and taken away, where three labels or more are found in it. Of the rest the sum of the :data:`N_GENES`
        largest excesses and lacks.
        """
        n_cells = len(p_ny)
        k = min(N_NEAR, n_cells) - 1
        near_nk = np.arange(n_cells)[:, None]
        if k:
            z_nk = np.ascontiguousarray(z_nk, dtype=np.float32)
            near_nk = np.hstack([near_nk, neighbors(z_nk, k, 0, 1, Decisions("annotate"))[0]])
        ones = np.full(near_nk.size, 1 / (k + 1))
        mean_nn = sp.csr_matrix((ones, near_nk.ravel(), np.arange(n_cells + 1) * (k + 1)), (n_cells, n_cells))
        found_n = p_ny.argmax(1)
        left = [
            self._left(sp.csr_matrix(found_n == y, dtype=np.float64) / n, p_ny, expression_ng)[0]
            for y, n in zip(*np.unique(found_n, return_counts=True), strict=True)
            if n > N_NEAR
        ]
        shift_g = np.median(left, axis=0) if len(left) > 2 else 0.0
        out_n = np.empty(n_cells)
        for start in range(0, n_cells, posterior.BLOCK):
            at = slice(start, start + posterior.BLOCK)
            left_ng = (self._left(mean_nn[at], p_ny, expression_ng) - shift_g).astype(np.float32)
            m = min(N_GENES, left_ng.shape[1] // 4)
            left_ng.partition((m - 1, left_ng.shape[1] - m), axis=1)
            out_n[at] = left_ng[:, -m:].sum(1) - left_ng[:, :m].sum(1)
        return out_n

    def _left(self, mean_mn: sp.csr_matrix, p_ny: np.ndarray, expression_ng: sp.csr_matrix) -> np.ndarray:
        """(means, genes) of some means over cells: standardised expression without what labels explain."""
        standard_mg = ((mean_mn @ expression_ng).toarray() - self.mean_g) / self.scale_g
        return standard_mg - (mean_mn @ p_ny) @ self.centre_yg


@dataclasses.dataclass
class Quality:
    """How well cells were annotated whose batch the classifier had not seen (or cells, where labels are in one batch).

    Attributes
    ----------
    held_out : ``batch`` or ``cells``: what the folds are made of. n_folds : their number. n_cells : cells scored.
    n_apart : labelled cells that could not be scored, as no other fold has their label.
    macro_f1 : mean over leaves of the harmonic mean of precision and recall, unweighted; leaves with held-out cells.
    accuracy, ece, brier : share right; mean gap between probability and share right over :data:`N_BINS` bins of equal
        numbers of cells; squared error of the probabilities, summed over leaves.
    coverage : share of label sets that hold the truth. By construction near the one asked for, as the threshold is
        chosen on these cells; what holds for new batches is that, if they are like these.
    reliability : a row a bin: probability, share right, cells.
    confusion_yy : (given leaf, found leaf) cells.
    by_label : a row a leaf: precision, recall, f1 (NaN without held-out cells), median_probability of its cells.
    """

    held_out: str
    n_folds: int
    n_cells: int
    n_apart: int
    macro_f1: float
    accuracy: float
    ece: float
    brier: float
    coverage: float
    reliability: list[list[float]]
    confusion_yy: list[list[int]]
    by_label: list[dict[str, float | None]]


@dataclasses.dataclass
class Annotator:
    """What :func:`learn` leaves: all that is needed to annotate cells, and how well it does.

    Attributes
    ----------
    temperature : logits are divided by it.
    threshold : a leaf is in a cell's label set if its probability is this or more.
    novelty_mean, novelty_scale : (2,) of the novelty score's parts, entropy and surprise, over held-out cells.
    novelty_knots : (101,) percentiles of the score over held-out cells. novelty_tail : its mean excess beyond the 95th.
    n_cells_v : cells that were given each node.
    """

    taxonomy: Taxonomy
    config: AnnotateConfig
    classifier: Classifier
    temperature: float
    threshold: float
    novelty_mean: list[float]
    novelty_scale: list[float]
    novelty_knots: list[float]
    novelty_tail: float
    n_cells_v: list[int]
    quality: Quality

    def probabilities(self, z_nk: np.ndarray, counts: Counts, batch_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cells, leaves) calibrated probabilities that sum to 1, and (cells,) novelty in 0..1.

        `batch_n`, (cells,) of any type, says which cells belong together: novelty looks at cells beside those of their
        batch.
        """
        p_ny, novelty_n = np.empty((len(counts), self.taxonomy.n_leaves)), np.empty(len(counts))
        with _one_thread():
            for rows in _by_batch(batch_n):
                z_mk, expression_mg = z_nk[rows].astype(np.float64), expression(counts, rows)
                p_my = softmax(self.classifier.logits(z_mk, expression_mg) / self.temperature)
                parts_m2 = _novelty_parts(p_my, self.classifier.surprise(p_my, z_mk, expression_mg))
                score_m = ((parts_m2 - self.novelty_mean) / self.novelty_scale) @ NOVELTY_WEIGHTS
                p_ny[rows], novelty_n[rows] = p_my, self._novelty(score_m)
        return p_ny, novelty_n

    def _novelty(self, score_n: np.ndarray) -> np.ndarray:
        """The share of held-out cells whose score is less; beyond their 95th percentile an exponential tail, so that
        cells far off still differ.
        """
        edge = self.novelty_knots[95]
        inside_n = np.interp(score_n, self.novelty_knots, np.linspace(0, 1, 101))
        return np.where(
            score_n <= edge, inside_n, 1 - 0.05 * np.exp(-np.maximum(score_n - edge, 0) / self.novelty_tail)
        )

    def calls(self, p_ny: np.ndarray, novelty_n: np.ndarray, index: pd.Index) -> pd.DataFrame:
        """A row a cell, from what :meth:`probabilities` gave; columns as :meth:`scvi_core.api.Model.annotate`."""
        leaves, names = (
            np.array(self.taxonomy.leaves, dtype=object),
            np.array([*self.taxonomy.names, None], dtype=object),
        )
        node_nv, set_ny = self.taxonomy.node_probabilities(p_ny), p_ny >= self.threshold
        safe_n = self.taxonomy.covering(set_ny)
        enough_nv = node_nv >= self.config.coverage - 1e-12
        first_n = np.where(enough_nv.any(1), enough_nv.argmax(1), ANY)
        safe_n = np.where(set_ny.any(1), safe_n, first_n)  # nodes of few leaves come first in `names`
        safe_p_n = np.where(safe_n == ANY, np.nan, node_nv[np.arange(len(safe_n)), safe_n])
        return pd.DataFrame(
            {
                "label": leaves[p_ny.argmax(1)],
                "probability": p_ny.max(1),
                "safe_label": names[safe_n],
                "safe_probability": safe_p_n,
                "label_set": [list(leaves[row]) for row in set_ny],
                "novelty": novelty_n,
                "is_novel": novelty_n > 1 - self.config.max_false_novel,
            },
            index=index,
        )

    def node_probabilities(self, p_ny: np.ndarray, level: str, index: pd.Index) -> pd.DataFrame:
        """Cells x leaves, or, at level ``all``, cells x nodes."""
        if level not in ("leaf", "all"):
            raise UserError(f"level: {level!r}; give 'leaf' or 'all'")
        if level == "leaf":
            return pd.DataFrame(p_ny, index=index, columns=list(self.taxonomy.leaves))
        return pd.DataFrame(self.taxonomy.node_probabilities(p_ny), index=index, columns=list(self.taxonomy.names))

    def table(self) -> pd.DataFrame:
        """A row a node of the taxonomy; columns as ``labels.parquet``."""
        parents, n = self.taxonomy.parents, self.taxonomy.n_leaves
        rows = [*self.quality.by_label, *({} for _ in self.taxonomy.names[n:])]
        columns = ("precision", "recall", "f1", "median_probability")
        return pd.DataFrame(
            {
                "label": list(self.taxonomy.names),
                "parent": [";".join(parents[name]) or None for name in self.taxonomy.names],
                "is_leaf": np.arange(len(self.taxonomy.names)) < n,
                "n_cells": np.array(self.n_cells_v, dtype=np.int64),
            }
            | {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in columns}
        )

    def save(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and the JSON beside them, for a bundle."""
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in vars(self.classifier).items()}
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        about |= {"taxonomy": self.taxonomy.to_dict(), "config": self.config.model_dump()}
        about |= {"quality": dataclasses.asdict(self.quality)}
        del about["classifier"]
        return tensors, about

    @staticmethod
    def load(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Annotator:
        """Rebuild it from :meth:`save`."""
        made = {
            "taxonomy": Taxonomy.from_dict(about["taxonomy"]),
            "config": AnnotateConfig(**about["config"]),
            "classifier": Classifier(**{k: v.numpy() for k, v in tensors.items()}),
            "quality": Quality(**about["quality"]),
        }
        return Annotator(**{**about, **made})


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums are taken in one order, whatever the machine has to spare.

    A limit holds for the libraries that are loaded when it is set: those used within it are loaded first, or a
    process' first call would give other last bits than its second.
    """
    import faiss  # noqa: F401
    import scipy.optimize
    import scipy.sparse.linalg  # noqa: F401

    with threadpool_limits(1):
        yield


def expression(counts: Counts, rows: np.ndarray) -> sp.csr_matrix:
    """(rows, genes) log(1 + counts per 10,000), float64."""
    blocks = []
    for _, cells in posterior.blocks(counts, rows):
        x = cells.x
        x_m, genes_m, indptr_n = (part.cpu().numpy() for part in (x.x_m, x.genes_m, x.indptr_n))
        values_m = log_normalised(x_m, indptr_n, cells.library_n.cpu().numpy().astype(np.float64))
        blocks.append(sp.csr_matrix((values_m, genes_m, indptr_n), (len(cells.batch_n), counts.n_genes)))
    return sp.vstack(blocks, format="csr")


def _by_batch(batch_n: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the cells of each batch, in parts of nearly equal size where it has many."""
    names, code_n, n_s = np.unique(np.asarray(batch_n), return_inverse=True, return_counts=True)
    few = names[n_s < 30]
    if len(few):
        told = ", ".join(map(str, few[:5]))
        log.warning("annotate: fewer than 30 cells in %d batches (%s): novelty is rough there", len(few), told)
    for s in range(len(names)):
        rows = np.flatnonzero(code_n == s)
        yield from np.array_split(rows, -(-len(rows) // TOGETHER))


def softmax(logit_ny: np.ndarray) -> np.ndarray:
    """Over leaves."""
    p_ny = np.exp(logit_ny - logit_ny.max(1, keepdims=True))
    return p_ny / p_ny.sum(1, keepdims=True)


def learn(
    latents: Callable[[np.ndarray], np.ndarray],
    counts: Counts,
    node_n: np.ndarray,
    taxonomy: Taxonomy,
    config: AnnotateConfig,
    seed: int,
) -> Annotator:
    """Fit the classifier to the labelled cells, and measure it on cells it has not seen.

    Parameters
    ----------
    latents : (cells,) labels -> (cells, latent) posterior means by a model that was shown these labels and no others.
        It is asked once with all labels, and once for every fold with those of the fold hidden.
    counts : the cells.
    node_n : (cells,) each cell's label, as ``Taxonomy.codes`` gives it.
    seed : of the choice of cells, where there are many, and of folds, where labels are in one batch.
    """
    rng = np.random.default_rng([seed, 23])
    rows = _some(node_n, rng)
    batch_n, labelled = counts.batch_n.cpu().numpy(), np.flatnonzero(node_n != ANY)
    fold_n = np.full(len(counts), -1)
    fold_n[labelled], held_out = _folds(batch_n[labelled], rng)
    hidden = [np.where(fold_n == fold, ANY, node_n) for fold in range(fold_n.max() + 1)]
    latent_fnk = [latents(labels_n).astype(np.float64) for labels_n in (node_n, *hidden)]
    with _one_thread():
        expression_ng = expression(counts, rows)
        genes = Genes.of(counts, rng)
        node_n, fold_n, n_leaves, reach_vy = node_n[rows], fold_n[rows], taxonomy.n_leaves, taxonomy.reach_vy
        logit_ny, of_others = np.full((len(rows), n_leaves), -np.inf), {}
        whole = fit(genes, latent_fnk[0][rows], expression_ng, node_n, reach_vy)
        for fold, z_nk in enumerate(latent_fnk[1:]):
            here, z_nk = fold_n == fold, z_nk[rows]
            if (node_n[~here] < n_leaves).any():
                of_others[fold] = fit(genes, z_nk[~here], expression_ng[~here], node_n[~here], reach_vy)
                logit_ny[here] = of_others[fold].logits(z_nk[here], expression_ng[here])

        def surprises(p_ny: np.ndarray) -> np.ndarray:
            out_n = np.full(len(rows), np.nan)
            for fold, classifier in of_others.items():
                for s in np.unique(batch_n[rows]):
                    here = np.flatnonzero((fold_n == fold) & (batch_n[rows] == s))
                    if len(here):
                        z_nk = latent_fnk[1 + fold][rows[here]]
                        out_n[here] = classifier.surprise(p_ny[here], z_nk, expression_ng[here])
            return out_n

        return _calibrated(whole, logit_ny, surprises, node_n, taxonomy, config, held_out, len(hidden))


def _calibrated(
    classifier: Classifier,
    logit_ny: np.ndarray,
    surprises: Callable[[np.ndarray], np.ndarray],
    node_n: np.ndarray,
    taxonomy: Taxonomy,
    config: AnnotateConfig,
    held_out: str,
    n_folds: int,
) -> Annotator:
    """What the held-out answers say of `classifier`: logits of labelled cells, and by their probabilities surprises."""
    n_leaves, rows = taxonomy.n_leaves, np.arange(len(node_n))
    leaf_n = np.where(node_n < n_leaves, node_n, 0)
    scored = (node_n < n_leaves) & np.isfinite(logit_ny[rows, leaf_n])
    n_apart = int((node_n < n_leaves).sum() - scored.sum())
    if n_apart:
        log.info("annotate: %d cells have a label of one %s alone: none to check it on", n_apart, UNIT[held_out])
    if scored.sum() < 20:
        raise UserError(
            f"label_key: {int(scored.sum())} labelled cells have a label that is in another {UNIT[held_out]}, too; "
            "20 or more are needed to calibrate: label more cells, or the same types in two batches or more"
        )
    truth_n, found_ny = leaf_n[scored], logit_ny[scored]
    temperature = _temperature(found_ny, truth_n)
    p_ny = softmax(found_ny / temperature)
    true_n = p_ny[np.arange(len(p_ny)), truth_n]
    threshold = _conformal(true_n, config.coverage)
    if held_out == "cells":  # what the step to another batch costs was not measured: no set is to be empty for it
        threshold = min(threshold, 1 / n_leaves)
    all_ny = np.zeros_like(logit_ny)
    seen = np.isfinite(logit_ny).any(1)
    all_ny[seen] = softmax(logit_ny[seen] / temperature)
    parts_n2 = _novelty_parts(p_ny, surprises(all_ny)[scored])
    mean, scale = parts_n2.mean(0), parts_n2.std(0) + 1e-9
    score_n = ((parts_n2 - mean) / scale) @ NOVELTY_WEIGHTS
    knots = np.percentile(score_n, np.arange(101))
    tail = float((score_n[score_n >= knots[95]] - knots[95]).mean()) + 1e-6
    quality = _quality(p_ny, truth_n, threshold, held_out, n_folds, n_apart)
    n_cells_v = np.bincount(node_n, minlength=len(taxonomy.names))
    log.info(
        "annotate: %d labels, macro-F1 %.3f, ECE %.3f on cells of a %s that was held out; temperature %.2f",
        n_leaves, quality.macro_f1, quality.ece, UNIT[held_out], temperature,
    )  # fmt: skip
    return Annotator(
        taxonomy, config, classifier, temperature, threshold, mean.tolist(), scale.tolist(), knots.tolist(), tail,
        n_cells_v.tolist(), quality,
    )  # fmt: skip


@dataclasses.dataclass
class Genes:
    """Moments and principal components of log-normalised counts, from cells of all batches and no label.

    Attributes
    ----------
    mean_g, scale_g : the scale is the standard deviation + 0.1, so that no gene of few counts weighs much.
    views : of standardised and of centred values, by what they are divided, and the components, (genes, components),
        scaled so that the first has variance 1.
    """

    mean_g: np.ndarray
    scale_g: np.ndarray
    views: list[tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def of(counts: Counts, rng: np.random.Generator) -> Genes:
        """Of all cells, or of some where they are many."""
        from scipy.sparse.linalg import svds

        most = max(100, MOST_NUMBERS // counts.n_genes)
        some = np.sort(rng.permutation(len(counts))[:most])
        expression_ng = expression(counts, some)
        mean_g = np.asarray(expression_ng.mean(0)).ravel()
        square_g = np.asarray(expression_ng.multiply(expression_ng).mean(0)).ravel()
        scale_g = np.sqrt(np.maximum(square_g - mean_g**2, 0)) + 0.1
        views = []
        for divisor_g in (scale_g, np.ones_like(scale_g)):
            dense_ng = ((expression_ng.toarray() - mean_g) / divisor_g).astype(np.float32)
            n = min(N_COMPONENTS, min(dense_ng.shape) - 1)
            _, _, component_cg = svds(dense_ng, n, tol=1e-3, v0=np.ones(min(dense_ng.shape)))
            first = float((dense_ng @ component_cg[-1]).std()) + 1e-9  # the largest comes last
            views.append((divisor_g, component_cg.T.astype(np.float64) / first))
        return Genes(mean_g, scale_g, views)


def fit(
    genes: Genes, z_nk: np.ndarray, expression_ng: sp.csr_matrix, node_n: np.ndarray, reach_vy: np.ndarray
) -> Classifier:
    """A classifier of labelled cells.

    Its features are the latent state, standardised, and of expression the directions of the labels' means, which keep
    what tells rare labels apart, and the principal components; both of genes that weigh alike and of genes that weigh
    by their variance. Labels weigh by the root of their number of cells, which is between all cells counting the same
    and all labels counting the same.
    """
    n_leaves = reach_vy.shape[1]
    n_v = np.bincount(node_n, minlength=len(reach_vy))
    seen_y = n_v[:n_leaves] > 0
    member_vn = sp.csr_matrix((np.ones(len(node_n)), (node_n, np.arange(len(node_n)))), (len(reach_vy), len(node_n)))
    mean_sg = (member_vn[:n_leaves][seen_y] @ expression_ng).toarray() / n_v[:n_leaves][seen_y][:, None]
    parts = []
    for divisor_g, component_gc in genes.views:
        apart_gs = ((mean_sg - mean_sg.mean(0)) / divisor_g).T
        apart_gs = np.linalg.svd(apart_gs, full_matrices=False)[0][:, : max(1, len(mean_sg) - 1)] / divisor_g[:, None]
        parts += [apart_gs / ((expression_ng @ apart_gs).std(0) + 1e-9), component_gc / divisor_g[:, None]]
    gene_gf = np.hstack(parts)
    offset_f, scale_k = genes.mean_g @ gene_gf, z_nk.std(0) + 1e-6
    features_nf = np.hstack([expression_ng @ gene_gf - offset_f, (z_nk - z_nk.mean(0)) / scale_k])

    allowed_ns = reach_vy[node_n][:, seen_y]
    speaks = allowed_ns.any(1)  # of an inner node none of whose leaves was seen there is nothing to say
    weight_sf, bias_s = _softmax_regression(features_nf[speaks], allowed_ns[speaks], 1 / np.sqrt(n_v[node_n][speaks]))
    n_f = gene_gf.shape[1]
    latent_ks = weight_sf[:, n_f:].T / scale_k[:, None]
    gene_gy, latent_ky = np.zeros((len(genes.mean_g), n_leaves)), np.zeros((len(scale_k), n_leaves))
    bias_y, centre_yg = np.full(n_leaves, -np.inf), np.zeros((n_leaves, len(genes.mean_g)))
    gene_gy[:, seen_y], latent_ky[:, seen_y] = gene_gf @ weight_sf[:, :n_f].T, latent_ks
    bias_y[seen_y] = bias_s - offset_f @ weight_sf[:, :n_f].T - z_nk.mean(0) @ latent_ks
    centre_yg[seen_y] = (mean_sg - genes.mean_g) / genes.scale_g
    return Classifier(gene_gy, latent_ky, bias_y, genes.mean_g, genes.scale_g, centre_yg)


def _softmax_regression(
    features_nf: np.ndarray, allowed_ny: np.ndarray, weight_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (leaves, features) and biases (leaves,): the minimum of the equation on top of this module."""
    from scipy.optimize import minimize

    (n, f), n_leaves = features_nf.shape, allowed_ny.shape[1]
    weight_n = weight_n / weight_n.sum()
    inputs_nf = np.hstack([features_nf, np.ones((n, 1))])
    decay_f = np.append(np.full(f, L2), 0.0)

    def loss(flat):
        weight_yf = flat.reshape(n_leaves, f + 1)
        p_ny = softmax(inputs_nf @ weight_yf.T)
        allowed_p_ny = p_ny * allowed_ny
        allowed_n1 = np.maximum(allowed_p_ny.sum(1, keepdims=True), 1e-300)
        value = -(weight_n * np.log(allowed_n1[:, 0])).sum() + 0.5 * (decay_f * weight_yf**2).sum()
        outer_ny = (p_ny - allowed_p_ny / allowed_n1) * weight_n[:, None]
        return value, (outer_ny.T @ inputs_nf + decay_f * weight_yf).ravel()

    start = np.zeros(n_leaves * (f + 1))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200, "maxcor": 10})
    weight_yf = found.x.reshape(n_leaves, f + 1)
    return weight_yf[:, :-1], weight_yf[:, -1]


def _some(node_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of labelled cells: all, or up to :data:`MOST_CELLS`, as many of each label as there is room for."""
    rows = np.flatnonzero(node_n != ANY)
    if len(rows) <= MOST_CELLS:
        return rows
    order = rng.permutation(rows)
    n_v = np.sort(np.bincount(node_n[rows]))
    n_v = n_v[n_v > 0]
    most = next(m for m in range(int(n_v[-1]), 0, -1) if m == 1 or np.minimum(n_v, m).sum() <= MOST_CELLS)
    rank = pd.Series(node_n[order]).groupby(node_n[order]).cumcount().to_numpy()
    log.info("annotate: the classifier is fitted to %d cells of a label at most (%d labelled cells)", most, len(rows))
    return np.sort(order[rank < most])


def _folds(batch_n: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(cells,) fold of each, and what is held out: whole batches, the largest first into the smallest fold."""
    names, code_n, n_s = np.unique(batch_n, return_inverse=True, return_counts=True)
    if len(names) == 1:
        log.warning("annotate: labels are in one batch alone: calibrated within it; what another costs is not measured")
        n_folds = min(N_FOLDS, len(batch_n))
        return rng.permutation(np.arange(len(batch_n)) % n_folds), "cells"
    n_folds = min(N_FOLDS, len(names))
    size, fold_s = np.zeros(n_folds), np.empty(len(names), dtype=np.int64)
    for s in np.argsort(-n_s, kind="stable"):
        fold_s[s] = size.argmin()
        size[fold_s[s]] += n_s[s]
    return fold_s[code_n], "batch"


def _temperature(logit_ny: np.ndarray, truth_n: np.ndarray) -> float:
    """What minimises the held-out cross-entropy (Guo et al., ICML 2017), within 0.05 to 20."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(truth_n))

    def loss(log_t):
        scaled_ny = logit_ny / math.exp(log_t)
        top_n = scaled_ny.max(1)
        return (np.log(np.exp(scaled_ny - top_n[:, None]).sum(1)) + top_n - scaled_ny[rows, truth_n]).mean()

    return float(math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x))


def _conformal(true_n: np.ndarray, coverage: float) -> float:
    """The probability that a share `coverage` of held-out cells gave their true label (Sadinle et al., JASA 2019).

    By the finite-sample rule a new cell that is exchangeable with these is covered at least so often.
    """
    rank = math.floor((len(true_n) + 1) * (1 - coverage))
    return float(np.sort(true_n)[rank - 1]) if rank else 0.0


def _novelty_parts(p_ny: np.ndarray, surprise_n: np.ndarray) -> np.ndarray:
    """(cells, 2): how unsure the label is, and :meth:`Classifier.surprise`; both on a log scale."""
    entropy_n = -(p_ny * np.log(np.maximum(p_ny, 1e-300))).sum(1)
    return np.log(np.stack([entropy_n, surprise_n], 1) + 1e-3)


def ece_of(confidence_n: np.ndarray, right_n: np.ndarray) -> tuple[float, list[list[float]]]:
    """Expected calibration error over bins of equal numbers of cells, and the bins: probability, share right, cells."""
    order = np.argsort(confidence_n, kind="stable")
    bins = [b for b in np.array_split(order, N_BINS) if len(b)]
    curve = [[float(confidence_n[b].mean()), float(right_n[b].mean()), len(b)] for b in bins]
    return sum(abs(p - share) * n for p, share, n in curve) / len(order), curve


def _quality(p_ny, truth_n, threshold, held_out, n_folds, n_apart) -> Quality:
    n_leaves = p_ny.shape[1]
    found_n, rows = p_ny.argmax(1), np.arange(len(truth_n))
    confusion_yy = np.zeros((n_leaves, n_leaves), dtype=np.int64)
    np.add.at(confusion_yy, (truth_n, found_n), 1)
    hit_y, given_y, called_y = np.diag(confusion_yy), confusion_yy.sum(1), confusion_yy.sum(0)
    by_label = []
    for y in range(n_leaves):
        there = truth_n == y
        row = dict.fromkeys(("precision", "recall", "f1", "median_probability"))
        if there.any():
            row["precision"] = float(hit_y[y] / called_y[y]) if called_y[y] else 0.0
            row["recall"] = float(hit_y[y] / given_y[y])
            row["f1"] = float(2 * hit_y[y] / (given_y[y] + called_y[y]))
            row["median_probability"] = float(np.median(p_ny[there, y]))
        by_label.append(row)
    ece, curve = ece_of(p_ny.max(1), found_n == truth_n)
    return Quality(
        held_out=held_out,
        n_folds=n_folds,
        n_cells=len(truth_n),
        n_apart=n_apart,
        macro_f1=float(np.mean([row["f1"] for row in by_label if row["f1"] is not None])),
        accuracy=float((found_n == truth_n).mean()),
        ece=float(ece),
        brier=float((p_ny**2).sum(1).mean() - 2 * p_ny[rows, truth_n].mean() + 1),
        coverage=float((p_ny[rows, truth_n] >= threshold).mean()),
        reliability=curve,
        confusion_yy=confusion_yy.tolist(),
        by_label=by_label,
    )
