"""Questions to a fitted model, answered by sampling the posterior: embedding, expression, likelihoods.

Every function takes the network and packed counts, and works block by block. Differential expression is in
:mod:`scvi_core.de`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from scvi_core.counts import Counts, Minibatch
from scvi_core.model import SCVI, Noise

BLOCK = 1024  # cells at a time: 8 MB of float32 at 2,000 genes


def blocks(counts: Counts, rows: np.ndarray | None = None, size: int = BLOCK) -> Iterator[tuple[slice, Minibatch]]:
    """(position in the answer, minibatch) over all cells, or over `rows`, in order."""
    rows_n = torch.arange(len(counts)) if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64))
    for start in range(0, len(rows_n), size):
        block_n = rows_n[start : start + size]
        yield slice(start, start + len(block_n)), counts.gather(block_n.to(counts.indptr_n.device))


@torch.inference_mode()
def latent(model: SCVI, counts: Counts) -> np.ndarray:
    """Posterior means of z, (cells, latent) float32."""
    out = np.empty((len(counts), model.config.n_latent), dtype=np.float32)
    for at, cells in blocks(counts):
        out[at] = model.encode(cells).mean_nk.cpu().numpy()
    return out


@torch.inference_mode()
def elbo(model: SCVI, counts: Counts, n_samples: int = 10, seed: int = 0) -> np.ndarray:
    """Evidence lower bound of each cell, (cells,) float64, nats, KL weight 1, averaged over `n_samples` draws."""
    noise = Noise(seed, counts.indptr_n.device)
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
    noise = Noise(seed, counts.indptr_n.device)
    out = np.empty(len(counts))
    for at, cells in blocks(counts, size=128):
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


@torch.inference_mode()
def normalized_expression(
    model: SCVI,
    counts: Counts,
    genes: np.ndarray,
    library_size: float | None = 1e4,
    transform_batch: int | None = None,
    n_samples: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Posterior mean of rho × `library_size`, (cells, len(genes)) float32.

    Parameters
    ----------
    genes : positions of the genes wanted.
    library_size : counts a cell is scaled to; None gives each cell its own library size.
    transform_batch : decode every cell under this batch; None means its own.
    n_samples : draws of z to average.
    """
    noise = Noise(seed, counts.indptr_n.device)
    out = np.zeros((len(counts), len(genes)), dtype=np.float32)
    columns = torch.from_numpy(np.asarray(genes, dtype=np.int64)).to(counts.indptr_n.device)
    for at, cells in blocks(counts):
        q = model.encode(cells)
        batch_n = cells.batch_n if transform_batch is None else torch.full_like(cells.batch_n, transform_batch)
        for _ in range(n_samples):
            z_nk, log_library_n = model.sample(cells, q, noise)
            rho_ng = model.log_rho(model.hidden(z_nk, batch_n, cells.covariates_nc)).exp()[:, columns]
            scale = log_library_n.exp()[:, None] if library_size is None else library_size
            out[at] += (rho_ng * (scale / n_samples)).cpu().numpy()
    return out
