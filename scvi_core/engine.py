"""One training step's gradients without autograd: the derivative of :mod:`scvi_core.model`'s loss, written down.

On a CPU a step of the usual size is mostly bookkeeping, when each of its hundred small operations is recorded and then
played back. Here every part of the network is a function that returns its output and the way back: a function from
the gradient by the output to that by the input, which leaves the weights' gradients in ``.grad``. The parts are those
of the model, in its order, and draw the same noise; the tests hold the gradients against autograd's.

Needs compiled kernels (``kernels.c`` on the CPU, Triton's on a GPU), and weights whose ``.grad`` exist to be written
over.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from scvi_core import gpu, native
from scvi_core.counts import Minibatch
from scvi_core.kernels import Nonzeros
from scvi_core.model import SCVI, Gaussian, Layer, LinearOfCounts, Noise

Back = Callable[[torch.Tensor], torch.Tensor | None]


@torch.no_grad()
def gradients(model: SCVI, cells: Minibatch, noise: Noise, kl_weight: float) -> torch.Tensor:
    """Gradients of the mean over cells of kl_weight × KL(z) + KL(l) - reconstruction, left in ``.grad``.

    Returns
    -------
    (cells,) evidence lower bound of each cell, KL weight 1.
    """
    scale = 1 / len(cells.batch_n)
    mean_nk, log_variance_nk, back_q = _moments(model.encoder, cells.x, noise)
    if model.config.library == "latent":
        mean_n1, log_variance_n1, back_ql = _moments(model.library_encoder, cells.x, noise)
    z_nk, kl_n, back_z = _draw(mean_nk, log_variance_nk, noise, 0.0, 1.0, scale * kl_weight)
    log_library_n = cells.library_n.log()
    if model.config.library == "latent":
        prior = model.library_mean_s[cells.batch_n, None], model.library_variance_s[cells.batch_n, None]
        log_library_n1, kl_l_n, back_l = _draw(mean_n1, log_variance_n1, noise, *prior, scale)
        log_library_n, kl_n = log_library_n1[:, 0], kl_n + kl_l_n
    hidden_nh, back_hidden = _decoder(model, cells, z_nk)
    reconstruction_n, grad_hidden_nh, grad_library_n = _reconstruction(model, cells, hidden_nh, log_library_n, scale)

    back_q(*back_z(back_hidden(grad_hidden_nh)))
    if model.config.library == "latent":
        back_ql(*back_l(grad_library_n[:, None]))
    return reconstruction_n - kl_n


def _moments(module: Gaussian, x: Nonzeros | gpu.Rows, noise: Noise) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """Mean and log variance, without the small constant that the variance has in addition."""
    h, ways = x, []
    for layer in module.layers:
        h, way = _layer(layer, h, noise)
        ways.append(way)
    mean, back_mean = _linear(module.mean, h)
    log_variance, back_log_variance = _linear(module.log_variance, h)

    def back(grad_mean: torch.Tensor, grad_log_variance: torch.Tensor) -> None:
        grad_h = back_mean(grad_mean).add_(back_log_variance(grad_log_variance))
        for way in reversed(ways):
            grad_h = way(grad_h)

    return mean, log_variance, back


def _draw(mean, log_variance, noise: Noise, prior_mean, prior_variance, weight: float):
    """A draw from the Gaussian, its KL divergence from the prior, (cells,), and the way back from both.

    `weight` is that of the divergence in the loss.
    """
    spread = log_variance.exp()
    variance = spread + 1e-4
    deviation = variance.sqrt()
    normal = noise.normal(mean)
    apart = mean - prior_mean
    ratio = variance / prior_variance
    kl_n = (ratio + apart**2 / prior_variance - 1 - ratio.log()).sum(1).mul_(0.5)

    def back(grad_draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad_variance = grad_draw * normal / deviation + (1 / prior_variance - 1 / variance) * weight
        return grad_draw + apart * (weight / prior_variance), grad_variance.mul_(spread).mul_(0.5)

    return mean + deviation * normal, kl_n, back


def _decoder(model: SCVI, cells: Minibatch, z_nk: torch.Tensor) -> tuple[torch.Tensor, Back]:
    """(cells, hidden) before the heads."""
    design_nc, h, ways = model.design(cells.batch_n, cells.covariates_nc), z_nk, []
    if not model.decoder:
        return torch.cat([z_nk, design_nc], 1), lambda grad_h: grad_h[:, : z_nk.shape[1]]
    for layer in model.decoder:
        h, way = _layer(layer, torch.cat([h, design_nc], 1), None)
        ways.append(way)
    n_design = design_nc.shape[1]

    def back(grad_h: torch.Tensor) -> torch.Tensor:
        for way in reversed(ways):
            grad_h = way(grad_h)
            grad_h = grad_h[:, : grad_h.shape[1] - n_design].contiguous()
        return grad_h

    return h, back


def _layer(layer: Layer, x: torch.Tensor | Nonzeros | gpu.Rows, noise: Noise | None) -> tuple[torch.Tensor, Back]:
    """Linear, batch norm, ReLU, dropout."""
    a_nh, back_linear = (_linear_of_counts if isinstance(layer.linear, LinearOfCounts) else _linear)(layer.linear, x)
    kept_nh = noise.kept(a_nh, layer.dropout) if layer.dropout else None
    ops = _ops(a_nh)
    h, saved = ops.hidden(a_nh, layer.norm, kept_nh, 1 / (1 - layer.dropout))
    return h, lambda grad_h: back_linear(ops.hidden_gradient(grad_h, h, layer.norm, saved))


def _linear(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, Back]:
    def back(grad: torch.Tensor) -> torch.Tensor:
        torch.mm(grad.t(), x, out=layer.weight.grad)
        torch.sum(grad, 0, out=layer.bias.grad)
        return grad @ layer.weight

    return torch.addmm(layer.bias, x, layer.weight.t()), back


def _linear_of_counts(layer: LinearOfCounts, x: Nonzeros | gpu.Rows) -> tuple[torch.Tensor, Back]:
    if not native.serves(layer.weight_gh):
        log_ng = gpu.Rows.of(x).log1p()
        out_nh = torch.addmm(layer.bias, log_ng, layer.weight_gh)
        return out_nh, lambda grad: _products(layer, log_ng, grad)
    value_m = x.x_m.log1p()

    def back(grad: torch.Tensor) -> None:
        native.sparse_linear_gradient(x.indptr_n, x.genes_m, value_m, grad, x.n_genes, layer.weight_gh.grad)
        torch.sum(grad, 0, out=layer.bias.grad)

    return native.sparse_linear(x.indptr_n, x.genes_m, value_m, layer.weight_gh).add_(layer.bias), back


def _products(layer: LinearOfCounts, log_ng: torch.Tensor, grad: torch.Tensor) -> None:
    torch.mm(log_ng.t(), grad, out=layer.weight_gh.grad)
    torch.sum(grad, 0, out=layer.bias.grad)


def _reconstruction(model: SCVI, cells: Minibatch, hidden_nh, log_library_n, scale: float):
    """Log p(x | z, l, s), (cells,), and the loss' gradients by hidden state and log library size.

    The heads' weights have theirs from the tiles that the likelihood leaves, their biases from its sums.
    """
    heads = [model.rho]
    if model.config.likelihood == "zinb":
        heads.append(model.dropout_logit)
    per_cell = model.config.likelihood != "poisson" and model.config.dispersion == "gene-cell"
    input_nh = hidden_nh.bfloat16() if model.half else hidden_nh
    weights = [head.weight.bfloat16() if model.half else head.weight for head in heads]
    if model.half:
        logits = [input_nh @ weight.t() for weight in weights]
    else:
        logits = [torch.addmm(head.bias, input_nh, head.weight.t()) for head in heads]
    log_theta_ng, back_theta = None, None
    if per_cell:
        log_theta_ng, back_theta = _linear(model.log_theta, hidden_nh)
    elif model.config.likelihood != "poisson":
        log_theta_ng = model.log_theta_sg
        if model.config.dispersion == "gene-batch":
            log_theta_ng = log_theta_ng[cells.batch_n]
    shared = log_theta_ng is not None and len(log_theta_ng) == 1
    value_n, tiles, grad_theta_ng, grad_library_n = _ops(hidden_nh).log_likelihood_gradients(
        cells.x, logits, [head.bias for head in heads], log_library_n, log_theta_ng, -scale,
        [head.bias.grad for head in heads], model.log_theta_sg.grad if shared else None,
    )  # fmt: skip
    grad_hidden_nh = torch.zeros_like(hidden_nh)
    for head, weight, tile in zip(heads, weights, tiles, strict=True):
        head.weight.grad.copy_(tile.t() @ input_nh)
        grad_hidden_nh += tile @ weight
    if per_cell:
        grad_hidden_nh += back_theta(grad_theta_ng)
    elif grad_theta_ng is not None and not shared:
        # by batch; not by index_add, whose sums may take any order on several threads
        one_hot_ns = nn.functional.one_hot(cells.batch_n, model.n_batches).float()
        torch.mm(one_hot_ns.t(), grad_theta_ng, out=model.log_theta_sg.grad)
    return value_n, grad_hidden_nh, grad_library_n


def serves(model: SCVI) -> bool:
    """Whether :func:`gradients` can take this model's steps."""
    return native.serves(model.rho.weight) or gpu.serves(model.rho.weight)


def _ops(tensor: torch.Tensor) -> ModuleType:
    """The kernels for tensors like this one."""
    return native if native.serves(tensor) else gpu
