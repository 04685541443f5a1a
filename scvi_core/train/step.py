"""One step of training: the gradient of a model's loss, and the update of its weights.

Knows no model: it differentiates whatever ``loss`` is and moves the weights that are trainable. The loop runs it, and
on a GPU it is recorded and replayed (:mod:`scvi_core.train.recorded`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from scvi_core import kernels, parallel
from scvi_core.config import TrainConfig
from scvi_core.counts import Minibatch
from scvi_core.kernels import gpu
from scvi_core.model import SCVI, Noise
from scvi_core.train.schedule import Schedule
from scvi_core.train.state import State


class Rates(NamedTuple):
    """What changes from step to step: numbers, or tensors on the device, where a recorded step reads them."""

    kl_weight: float | torch.Tensor
    rate: float | torch.Tensor
    adam: tuple[float, float] | torch.Tensor  # its rate and the factor of its root (kernels.corrected)

    @staticmethod
    def of(schedule: Schedule, step: int) -> Rates:
        """Of one step, counted from 0."""
        rate = schedule.rate_t[step]
        return Rates(schedule.kl_weight_t[step], rate, kernels.corrected(rate, step + 1))


def noise_seed(seed: int, number: int) -> int:
    """Of the noise of one step, or of one block of held-out cells."""
    return seed * 1_000_003 + number


def step(
    state: State, cells: Minibatch, noise: Noise, rates: Rates, config: TrainConfig, *flags: bool
) -> tuple[torch.Tensor, tuple[bool, ...]]:
    """Move the weights by one minibatch, in place.

    Returns
    -------
    The sum of the cells' evidence lower bounds, float64, and of each flag whether any process raised it.
    """
    model, weights = state.model, state.weights
    elbo_n = gradients(model, cells, noise, rates.kl_weight)
    with torch.no_grad():
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        grads = [g if mask is None else torch.where(mask, g, 0.0) for g, mask in zip(grads, state.masks, strict=True)]
        flags = parallel.sum_gradients(grads, *flags)
        if config.gradient_clip:
            norm = torch.stack([g.norm() for g in grads]).norm()
            factor = (config.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
            grads = [g * factor for g in grads]
        moments = state.means, state.squares, state.masks
        kernels.adam(weights, grads, *moments, rates.adam, config.adam_eps, config.weight_decay)
        if model.config.loadings_l1 and model.rho.weight.requires_grad:
            by = rates.rate * model.config.loadings_l1
            mask = state.masks[state.names.index("rho.weight")]
            soft_threshold(model.loadings_gk, by if mask is None else by * mask[:, : model.config.n_latent])
        return elbo_n.double().sum(), flags


def gradients(model: SCVI, cells: Minibatch, noise: Noise, kl_weight: float | torch.Tensor) -> torch.Tensor:
    """Leave the gradients of the mean loss of a minibatch in ``.grad``; its cells' evidence lower bounds, (cells,)."""
    for p in model.parameters():
        p.grad = None
    with gpu.tf32(model.half and cells.library_n.is_cuda):  # the products that are not bfloat16's
        loss_n, elbo_n = model.loss(cells, noise, kl_weight)
        (loss_n.sum() / (noise.n_cells or len(cells.batch_n))).backward()
    return elbo_n.detach()


def soft_threshold(weights: torch.Tensor, by: float | torch.Tensor) -> None:
    """Move every weight towards zero by `by`, and to zero exactly where it is nearer, in place.

    The proximal step of `by` × the sum of absolute weights, which is a Laplace prior's. Taken beside Adam's step, not
    through its gradient, the pull is the same share of every weight's step, whatever the size of its gradient: so
    ``loadings_l1`` weighs the loadings of rare and of abundant genes alike. A loading holds out against it only if the
    mean of its gradient over minibatches, at zero, is more than ``loadings_l1`` times their root mean square. In terms
    of the objective -ELBO summed over N cells + sum of lambda_g |W_g|, lambda_g is ``loadings_l1`` × N × that root.
    """
    weights -= weights.clamp(-by, by)
