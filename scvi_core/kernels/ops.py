"""What the rest calls: the parts of a model that take time, each by the fastest kernels that serve its tensors.

Compiled for the CPU (``native.py``), Triton's for a GPU (``gpu.py``), or plain PyTorch (``plain.py`` and autograd), for
float64, other devices, and where the others could not be built. A part whose gradient is written by hand is a
:class:`torch.autograd.Function`: a model composes them with any operation of PyTorch's, and its loss is
differentiated as any other. Gradients of gradients there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from scvi_core import parallel
from scvi_core.kernels import gpu, native, plain
from scvi_core.kernels.nonzeros import Nonzeros


def kind(tensor: torch.Tensor) -> tuple[str, str]:
    """Which kernels take a float32 tensor like this one, ``compiled``, ``triton`` or ``plain``; and why no others."""
    if native.serves(tensor):
        return "compiled", ""
    if gpu.serves(tensor):
        return "triton", ""
    return "plain", gpu.reason() if tensor.is_cuda else native.reason


def _by_hand(tensor: torch.Tensor) -> ModuleType | None:
    """The module whose kernels take it, if there is one."""
    return native if native.serves(tensor) else gpu if gpu.serves(tensor) else None


# ---- layers


def linear_of_counts(x: Nonzeros | gpu.Rows, weight_gh: torch.Tensor) -> torch.Tensor:
    """(cells, hidden): log(1 + counts) times (genes, hidden) weights; of the product only the non-zeros are read."""
    if native.serves(weight_gh):
        return _LinearOfCounts.apply(x, weight_gh)
    if gpu.serves(weight_gh):
        return gpu.Rows.of(x).log1p() @ weight_gh
    return x.dense(x.x_m.log1p().to(weight_gh.dtype)) @ weight_gh


class _LinearOfCounts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_gh):
        out_nh, ctx.value_m = native.sparse_linear(x, weight_gh)
        ctx.x = x
        return out_nh

    @staticmethod
    @once_differentiable
    def backward(ctx, outer_nh):
        return None, native.sparse_linear_gradient(ctx.x, ctx.value_m, outer_nh)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(cells, out): x weight' + bias."""
    if native.serves(x):
        return _Linear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return native.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        return native.linear_gradient(outer, None, *ctx.saved_tensors, ctx.needs_input_grad)


def hidden(
    a_nh: torch.Tensor, norm: nn.Module, kept_nh: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Norm, ReLU and dropout of a hidden layer, (cells, hidden).

    Parameters
    ----------
    norm : a batch norm, a layer norm without weights, or :class:`torch.nn.Identity`.
    kept_nh : True where dropout, of that share, leaves a number; None leaves all.
    """
    scale = 1.0 if kept_nh is None else 1 / (1 - dropout)
    batch = isinstance(norm, nn.BatchNorm1d)
    if native.serves(a_nh) and not (batch and norm.training and parallel.world() > 1):
        weight, bias = (norm.weight, norm.bias) if batch else (None, None)
        return _Hidden.apply(a_nh, weight, bias, norm, kept_nh, scale)
    h = torch.relu(norm(a_nh))
    return h if kept_nh is None else h * kept_nh * scale


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_nh, weight_h, bias_h, norm, kept_nh, scale):
        out_nh, normal_nh, inverse = native.hidden(a_nh, norm, kept_nh, scale)
        ctx.save_for_backward(out_nh, weight_h, normal_nh, inverse)
        ctx.norm, ctx.training, ctx.scale = norm, norm.training, scale
        return out_nh

    @staticmethod
    @once_differentiable
    def backward(ctx, outer_nh):
        gradients = native.hidden_gradient(outer_nh, *ctx.saved_tensors, ctx.norm, ctx.training, ctx.scale)
        return *gradients, None, None, None


# ---- the likelihood


def reconstruction(
    x: Nonzeros | gpu.Rows,
    hidden_nh: torch.Tensor,
    log_library_n: torch.Tensor,
    rho: nn.Linear,
    pi: nn.Linear | None = None,
    log_theta_rg: torch.Tensor | None = None,
    row_n: torch.Tensor | None = None,
    half: bool = False,
) -> torch.Tensor:
    """Log p(x_n), summed over genes, (cells,), from the hidden state before the heads.

    Poisson without `log_theta_rg`, negative binomial with it, zero-inflated with `pi` too.

    Parameters
    ----------
    rho, pi : heads, (genes, hidden): their logits go to :func:`log_likelihood`.
    log_theta_rg : (1, genes), (cells, genes), or rows of which `row_n`, (cells,), names each cell's.
    half : whether the heads multiply in bfloat16. Sums within a product are float32, and so are the biases, where most
        of a logit lies.
    """
    heads = [weight for head in (rho, pi) if head is not None for weight in (head.weight, head.bias)]
    if _by_hand(hidden_nh) is not None:
        leaves = [t for t in (hidden_nh, log_library_n, log_theta_rg, *heads) if t is not None]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
        return _Reconstruction.apply(x, row_n, half, wanted, hidden_nh, log_library_n, log_theta_rg, *heads)
    product = _HalfLinear.apply if half else functional.linear
    logits = [product(hidden_nh, *heads[i : i + 2]) for i in range(0, len(heads), 2)]
    if row_n is not None:
        # not by indexing, whose gradient may add up in another order at every run (index_put_, accumulating)
        log_theta_rg = functional.embedding(row_n, log_theta_rg)
    return log_likelihood(x, logits[0], log_library_n, log_theta_rg, logits[1] if pi is not None else None)


class _Reconstruction(torch.autograd.Function):
    """Heads and likelihood. Forward leaves the gradients of each cell's value in the place of its logits; backward
    multiplies them by what comes from above.
    """

    @staticmethod
    def forward(ctx, x, row_n, half, wanted, hidden_nh, log_library_n, log_theta_rg, *heads):
        kernels = _by_hand(hidden_nh)
        weights, biases = heads[::2], heads[1::2]
        if half:
            hidden_nh, weights = hidden_nh.bfloat16(), [weight.bfloat16() for weight in weights]
            logits = [hidden_nh @ weight.t() for weight in weights]
        else:
            logits = [kernels.linear(hidden_nh, *head) for head in zip(weights, biases, strict=True)]
        added = biases if half else None
        value_n, tiles, theta_ng, library_n = kernels.tile(x, logits, added, log_library_n, log_theta_rg, row_n, wanted)
        ctx.kernels, ctx.half, ctx.n_theta = kernels, half, 0 if log_theta_rg is None else len(log_theta_rg)
        ctx.n_heads = len(weights)
        ctx.save_for_backward(row_n, hidden_nh, library_n, theta_ng, *weights, *tiles)
        return value_n

    @staticmethod
    @once_differentiable
    def backward(ctx, outer_n):
        kernels, outer_n = ctx.kernels, outer_n.contiguous()
        row_n, hidden_nh, library_n, theta_ng, *rest = ctx.saved_tensors
        by_hidden, by_library, by_theta, *by_heads = ctx.needs_input_grad[4:]
        grad_hidden_nh, grads = None, []
        for i, (weight, tile_ng) in enumerate(zip(rest[: ctx.n_heads], rest[ctx.n_heads :], strict=True)):
            gradient = _half_gradient if ctx.half else kernels.linear_gradient
            one_nh, *head = gradient(tile_ng, outer_n, hidden_nh, weight, (by_hidden, *by_heads[2 * i : 2 * i + 2]))
            if one_nh is not None:
                grad_hidden_nh = one_nh if grad_hidden_nh is None else grad_hidden_nh.add_(one_nh)
            grads += head
        if theta_ng is not None:
            if not by_theta:
                theta_ng = None
            elif row_n is None and ctx.n_theta > 1:
                theta_ng = theta_ng * outer_n[:, None]
            else:
                theta_ng = kernels.sums(theta_ng, outer_n, row_n, ctx.n_theta)
        library_n = library_n * outer_n if by_library else None
        return None, None, None, None, grad_hidden_nh, library_n, theta_ng, *grads


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_nh, weight_gh, bias_g):
        h_nh, weight_gh = h_nh.bfloat16(), weight_gh.bfloat16()
        ctx.save_for_backward(h_nh, weight_gh)
        return (h_nh @ weight_gh.t()).float().add_(bias_g)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer_ng):
        h_nh, weight_gh = ctx.saved_tensors
        half_ng = outer_ng.bfloat16()
        return (half_ng @ weight_gh).float(), (half_ng.t() @ h_nh).float(), outer_ng.sum(0)


def _half_gradient(tile_ng, outer_n, hidden_nh, weight_gh, wanted):
    """As ``linear_gradient``, of tiles and weights in bfloat16."""
    outer_n1 = outer_n[:, None]
    return (
        (tile_ng @ weight_gh).float().mul_(outer_n1) if wanted[0] else None,
        (tile_ng.t() @ (hidden_nh * outer_n1).bfloat16()).float() if wanted[1] else None,
        (tile_ng * outer_n1).sum(0) if wanted[2] else None,  # a float32 product, as one factor is
    )


def log_likelihood(
    x: Nonzeros,
    logit_rho_ng: torch.Tensor,
    log_library_n: torch.Tensor,
    log_theta_ng: torch.Tensor | None = None,
    logit_pi_ng: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log p(x_n), summed over genes, (cells,); mu = library × softmax over genes of `logit_rho_ng`.

    Poisson without `log_theta_ng`, negative binomial with it, zero-inflated with `logit_pi_ng` too.

    Parameters
    ----------
    x : counts. Have no gradient.
    logit_rho_ng : (cells, genes) before the softmax, float32 or float64 as all that follow.
    log_library_n : (cells,).
    log_theta_ng : (1, genes) or (cells, genes) log inverse dispersion.
    logit_pi_ng : (cells, genes) dropout. Below -80 (float32) it is as good as -80: a probability of 1e-35.
    """
    inputs = (logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _LogLikelihood.apply(x, *inputs)
    return _evaluate(x, *inputs, gradient=False)[0]


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *inputs):
        value_n, *gradients = _evaluate(x, *inputs, gradient=True)
        ctx.save_for_backward(*gradients)
        ctx.theta_per_gene = inputs[2] is not None and len(inputs[2]) == 1
        return value_n

    @staticmethod
    @once_differentiable
    def backward(ctx, outer_n):
        rho_ng, library_n, theta_ng, pi_ng = ctx.saved_tensors
        outer_n1 = outer_n[:, None]
        if theta_ng is not None:
            theta_ng = outer_n[None] @ theta_ng if ctx.theta_per_gene else theta_ng * outer_n1
        if pi_ng is not None:
            pi_ng = pi_ng * outer_n1
        return None, rho_ng * outer_n1, library_n * outer_n, theta_ng, pi_ng


def _evaluate(x, logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng, gradient):
    """Log-likelihood (cells,) and, if asked, its gradients by logit_rho, log_library, log_theta and logit_pi."""
    kernels = _by_hand(logit_rho_ng)
    if kernels is None:
        return plain.log_likelihood(x, logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng, gradient)
    logits = [t.contiguous() for t in (logit_rho_ng, logit_pi_ng) if t is not None]
    value_n, tiles, theta_ng, library_n = kernels.tile(
        x, logits, None, log_library_n, log_theta_ng, None, gradient, in_place=False
    )
    if not gradient:
        return value_n, None, None, None, None
    return value_n, tiles[0], library_n, theta_ng, tiles[1] if len(tiles) > 1 else None


# ---- the optimiser


def adam(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    trainable: Sequence[torch.Tensor | None],
    numbers: tuple[float, float] | torch.Tensor,
    eps: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """One step of Adam (Kingma & Ba 2015) on some tensors, in place; weight decay is added to the gradient.

    Its own few lines, as to import PyTorch's optimisers takes seconds, longer than many a fit.

    Parameters
    ----------
    means, squares : moments of the gradients, zero before the first step.
    trainable : of each tensor, False for the entries that stay as they are, bit for bit; None where none does.
    numbers : of :func:`corrected`; on a GPU a tensor there.
    """
    kernels, rates = _by_hand(weights[0]), (1 - betas[0], 1 - betas[1])
    if kernels is not None:
        kernels.adam(weights, gradients, means, squares, trainable, numbers, *rates, eps, weight_decay)
        return
    rate, scale = numbers
    for w, g, mean, square, mask in zip(weights, gradients, means, squares, trainable, strict=True):
        g = g.add(w, alpha=weight_decay)
        g = g if mask is None else torch.where(mask, g, 0.0)
        mean.lerp_(g, rates[0])
        square.lerp_(g.square(), rates[1])
        w.addcdiv_(mean, square.sqrt().mul_(scale).add_(eps), value=-rate)


def corrected(rate: float, step: int, betas: tuple[float, float] = (0.9, 0.999)) -> tuple[float, float]:
    """Adam's rate and the factor of its root, with the corrections for moments that began at zero; steps from 1."""
    return rate / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)
