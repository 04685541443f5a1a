"""Questions to a fitted model, answered by sampling the posterior: embedding, expression, likelihoods.

Every function takes the network and packed counts, and works block by block. Differential expression is in
:mod:`scvi_core.de`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp
import torch

from scvi_core.counts import Counts, Minibatch
from scvi_core.files import UserError
from scvi_core.log import progress
from scvi_core.model import SCVI, Noise, Posterior

BLOCK = 1024  # cells at a time: 8 MB of float32 at 2,000 genes


def blocks(counts: Counts, rows: np.ndarray | None = None, size: int = BLOCK) -> Iterator[tuple[slice, Minibatch]]:
    """(position in the answer, minibatch) over all cells, or over `rows`, in order."""
    rows_n = torch.arange(len(counts)) if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64))
    for start in range(0, len(rows_n), size):
        block_n = rows_n[start : start + size]
        yield slice(start, start + len(block_n)), counts.gather(block_n.to(counts.indptr_n.device))


def latent(model: SCVI, counts: Counts) -> np.ndarray:
    """Posterior means of z, (cells, latent) float32."""
    return _moments(model, counts)[0]


def latent_std(model: SCVI, counts: Counts) -> np.ndarray:
    """Posterior standard deviations of z, (cells, latent) float32; those of the prior are 1."""
    return _moments(model, counts)[1]


@torch.inference_mode()
def _moments(model: SCVI, counts: Counts) -> np.ndarray:
    out = np.empty((2, len(counts), model.config.n_latent), dtype=np.float32)
    for at, cells in progress(blocks(counts), "cells embedded", len(counts), lambda block: len(block[1].batch_n)):
        q = model.encode(cells)
        out[0, at], out[1, at] = q.mean_nk.cpu().numpy(), q.variance_nk.sqrt().cpu().numpy()
    return out


def uncertainty(std_nk: np.ndarray) -> np.ndarray:
    """The share of z's prior variance that a cell's counts leave, mean over dimensions, (cells,) float32.

    0 where the counts say exactly where a cell lies, 1 where they say nothing. A dimension that the model does not use
    adds the same 1 / latent to every cell.
    """
    return (std_nk**2).mean(1)


@torch.inference_mode()
def latent_library(model: SCVI, counts: Counts) -> np.ndarray:
    """Posterior means of the library size l, (cells,) float64, in counts.

    q(log l) = Normal(m, v), so E[l] = exp(m + v / 2). The count total of each cell where the library is observed.
    """
    if model.config.library == "observed":
        return counts.library_n.cpu().numpy().copy()
    out = np.empty(len(counts))
    for at, cells in blocks(counts):
        q = model.encode(cells)
        out[at] = (q.library_mean_n + q.library_variance_n / 2).double().exp().cpu().numpy()
    return out


@torch.inference_mode()
def elbo(model: SCVI, counts: Counts, n_samples: int = 10, seed: int = 0) -> np.ndarray:
    """Evidence lower bound of each cell, (cells,) float64, nats, KL weight 1, averaged over `n_samples` draws."""
    noise = Noise(seed, next(model.parameters()).device)
    out = np.zeros(len(counts))
    for at, cells in blocks(counts):
        for _ in range(n_samples):
            reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(cells, noise)
            out[at] += (reconstruction_n - kl_z_n - kl_l_n).double().cpu().numpy() / n_samples
    return out


@torch.inference_mode()
def marginal_log_likelihood(model: SCVI, counts: Counts, n_samples: int = 1000, seed: int = 0) -> np.ndarray:
    """Log p(x_n) by importance sampling with the posterior as proposal, (cells,) float64, nats.

    log p(x) = log E_q[ p(x | z, l) p(z) p(l) / q(z, l | x) ]; a lower bound in expectation, tight as samples grow.
    """
    noise = Noise(seed, next(model.parameters()).device)
    out = np.empty(len(counts))
    # small enough for a processor's cache; a GPU wants more to do at a time
    for at, cells in blocks(counts, size=128 if noise.generator.device.type == "cpu" else 4 * BLOCK):
        q = model.encode(cells)
        total_n = torch.full_like(cells.library_n, -math.inf, dtype=torch.float64)
        for _ in range(n_samples):
            z_nk, log_library_n = model.sample(cells, q, noise)
            weight_n = model.log_likelihood(cells, z_nk, log_library_n).double()
            weight_n += (_log_normal(z_nk, 0.0, 1.0) - _log_normal(z_nk, q.mean_nk, q.variance_nk)).sum(1)
            if q.library_mean_n is not None:
                mean_n, variance_n = model.library_mean_s[cells.batch_n], model.library_variance_s[cells.batch_n]
                weight_n += _log_normal(log_library_n, mean_n, variance_n)
                weight_n -= _log_normal(log_library_n, q.library_mean_n, q.library_variance_n)
            total_n = torch.logaddexp(total_n, weight_n)
        out[at] = (total_n - math.log(n_samples)).cpu().numpy()
    return out


def _log_normal(x: torch.Tensor, mean: torch.Tensor | float, variance: torch.Tensor | float) -> torch.Tensor:
    x, variance = x.double(), torch.as_tensor(variance).double()
    return -0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))


def normalized_expression(
    model: SCVI,
    counts: Counts,
    genes: np.ndarray,
    library_size: float | None = 1e4,
    transform_batch: int | Sequence[int] | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Posterior mean of rho × `library_size`, (cells, len(genes)) float32; parameters as :func:`expression_blocks`."""
    out = np.empty((len(counts), len(genes)), dtype=np.float32)
    for at, values_ng in expression_blocks(model, counts, genes, library_size, transform_batch, n_samples, seed):
        out[at] = values_ng
    return out


@torch.inference_mode()
def expression_blocks(
    model: SCVI,
    counts: Counts,
    genes: np.ndarray,
    library_size: float | None = 1e4,
    transform_batch: int | Sequence[int] | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Posterior mean of rho × `library_size`, block by block: (place of the cells, (cells, len(genes)) float32).

    Parameters
    ----------
    genes : (wanted,) positions of the genes wanted. The draws of z do not depend on them.
    library_size : counts a cell is scaled to; None gives each cell its own library size.
    transform_batch : decode every cell under this batch, or under each of several and average, all weighing the same;
        None means its own.
    n_samples : draws of z to average.

    Raises
    ------
    UserError
        When `library_size` or `n_samples` is not positive.
    """
    _check(n_samples, library_size)
    noise = Noise(seed, next(model.parameters()).device)
    for at, cells in blocks(counts):
        q = model.encode(cells)
        mean_ng = 0.0
        for _ in range(n_samples):
            mean_ng = mean_ng + _expression(model, cells, q, genes, library_size, transform_batch, noise) / n_samples
        yield at, mean_ng.cpu().numpy()


@torch.inference_mode()
def expression_samples(
    model: SCVI,
    counts: Counts,
    genes: np.ndarray,
    library_size: float | None = 1e4,
    transform_batch: int | Sequence[int] | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Posterior samples of rho × `library_size`, (samples, cells, len(genes)) float32.

    Parameters as :func:`expression_blocks`, whose blocks are the means of these.
    """
    _check(n_samples, library_size)
    noise = Noise(seed, next(model.parameters()).device)
    out = np.empty((n_samples, len(counts), len(genes)), dtype=np.float32)
    for at, cells in blocks(counts):
        q = model.encode(cells)
        for i in range(n_samples):
            out[i, at] = _expression(model, cells, q, genes, library_size, transform_batch, noise).cpu().numpy()
    return out


def _check(n_samples: int, library_size: float | None = None) -> None:
    if n_samples < 1:
        raise UserError(f"n_samples: {n_samples} is less than 1")
    if library_size is not None and not 0 < library_size < math.inf:
        raise UserError(f"library_size: {library_size} is not a positive number; give one, or None for the cell's own")


def _expression(
    model: SCVI,
    cells: Minibatch,
    q: Posterior,
    genes: np.ndarray,
    library_size: float | None,
    transform_batch: int | Sequence[int] | None,
    noise: Noise,
) -> torch.Tensor:
    """One draw of rho × `library_size`, (cells, len(genes)).

    Rho is a softmax over all genes: its denominator needs every gene's logit, one matrix product and one pass over
    it, however few genes are wanted. What follows, and all that is kept, is of the wanted genes alone.
    """
    z_nk, log_library_n = model.sample(cells, q, noise)
    if transform_batch is None:
        designs = [cells.batch_n]
    else:
        designs = [torch.full_like(cells.batch_n, int(s)) for s in np.atleast_1d(transform_batch)]
    columns = torch.from_numpy(np.asarray(genes, dtype=np.int64)).to(z_nk.device)
    rho_ng = 0.0
    for batch_n in designs:
        logits_ng = model.rho(model.hidden(z_nk, batch_n, cells.covariates_nc))
        rho_ng = rho_ng + (logits_ng[:, columns] - logits_ng.logsumexp(1, keepdim=True)).exp() / len(designs)
    return rho_ng * (log_library_n.exp()[:, None] if library_size is None else library_size)


@torch.inference_mode()
def gene_correlation(
    model: SCVI,
    counts: Counts,
    genes: np.ndarray,
    transform_batch: int | Sequence[int] | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Pearson correlation of log rho between genes, over cells and posterior samples, (genes, genes) float64.

    Counts are noisy measurements of rho, and noise pulls correlations towards 0: so rho is correlated, not the counts.
    Posterior means would overstate, as they leave out how uncertain each cell's z is; samples keep that. Log rho, since
    effects are fold changes; and Pearson's coefficient, since it needs sums alone, so that memory does not grow with
    cells, where ranks need all values at once. All genes move with a few latent dimensions, and rho are shares of one
    total: expect large correlations, and read them beside each other rather than as proof that two genes are related.

    Parameters
    ----------
    genes : (genes,) positions. transform_batch, n_samples : as :func:`expression_blocks`; cells under several batches
        make correlations that batches make, unless all are decoded under the same.
    """
    _check(n_samples)
    noise = Noise(seed, next(model.parameters()).device)
    n, shift_g, sum_g, sum_gg = 0, None, 0.0, 0.0
    for _, cells in blocks(counts):
        q = model.encode(cells)
        for _ in range(n_samples):
            rho_ng = _expression(model, cells, q, genes, 1.0, transform_batch, noise)
            x_ng = rho_ng.clamp(min=torch.finfo(torch.float32).tiny).log().double()
            shift_g = x_ng.mean(0) if shift_g is None else shift_g  # near the mean, so that sums of squares stay exact
            x_ng -= shift_g
            n, sum_g, sum_gg = n + len(x_ng), sum_g + x_ng.sum(0), sum_gg + x_ng.T @ x_ng
    covariance_gg = (sum_gg - torch.outer(sum_g, sum_g) / n).cpu().numpy()
    spread_g = np.sqrt(np.diag(covariance_gg))
    correlation_gg = (covariance_gg / np.outer(spread_g, spread_g)).clip(-1, 1)
    np.fill_diagonal(correlation_gg, 1.0)
    return correlation_gg


@torch.inference_mode()
def posterior_predictive(model: SCVI, counts: Counts, seed: int = 0, rows: np.ndarray | None = None) -> sp.csr_matrix:
    """One replicate of the data: z_n, l_n ~ q(z, l | x_n), then new counts from the likelihood.

    The zero-inflated negative binomial is drawn as it is written (Lopez et al. 2018, Methods): w ~ Gamma(theta),
    y ~ Poisson(l rho w / theta), and y is dropped with probability pi.

    Parameters
    ----------
    rows : positions of the cells to replicate, in order, repeats allowed; None replicates all.

    Returns
    -------
    scipy.sparse.csr_matrix
        (cells, genes) int32, in canonical form. A cell may come out empty. The numbers depend on the seed, on which
        cells are asked for and in which order: cells are drawn in blocks, one after another.
    """
    noise = Noise(seed, next(model.parameters()).device)
    parts = [sp.csr_matrix((0, counts.n_genes), dtype=np.int32)]
    for _, cells in blocks(counts, rows):
        z_nk, log_library_n = model.sample(cells, model.encode(cells), noise)
        mu_ng, theta_ng, pi_ng = _parameters(model, cells, z_nk, log_library_n)
        if theta_ng is not None:
            w_ng = torch._standard_gamma(theta_ng.expand_as(mu_ng).contiguous(), generator=noise.generator)
            mu_ng *= w_ng.div_(theta_ng)
        x_ng = torch.poisson(mu_ng, generator=noise.generator)
        if pi_ng is not None:
            x_ng *= torch.rand(pi_ng.shape, device=pi_ng.device, generator=noise.generator) >= pi_ng
        parts.append(sp.csr_matrix(x_ng.int().cpu().numpy()))
    return sp.vstack(parts, format="csr")


def _parameters(
    model: SCVI, cells: Minibatch, z_nk: torch.Tensor, log_library_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Mean l rho (cells, genes), theta (cells or 1, genes) and pi (cells, genes); None where it has none."""
    hidden_nh = model.hidden(z_nk, cells.batch_n, cells.covariates_nc)
    mu_ng = (model.log_rho(hidden_nh) + log_library_n[:, None]).exp()
    theta_ng = pi_ng = None
    if model.config.likelihood != "poisson":
        if model.config.dispersion == "gene-cell":
            log_theta_ng = model.log_theta(hidden_nh)
        else:
            log_theta_ng = model.log_theta_sg
            if model.config.dispersion == "gene-batch":
                log_theta_ng = log_theta_ng[cells.batch_n]
        theta_ng = log_theta_ng.clamp(-30, 30).exp()  # beyond, float32 could not tell it from 0 or from Poisson
    if model.config.likelihood == "zinb":
        pi_ng = model.dropout_logit(hidden_nh).sigmoid()
    return mu_ng, theta_ng, pi_ng
