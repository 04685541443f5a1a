"""The likelihoods of :mod:`scvi_core.kernels.likelihood`, fused and with gradients by hand, in PyTorch for any device.

What makes them cheap:

- Softmax, library size, likelihood and the sum over genes are one function, whose gradients are written down and taken
  while the tile is at hand; autograd keeps no temporaries of that size.
- Most counts are zero. Only at the non-zeros, which the caller may name, are log-gammas needed. They are taken there
  in float64, as x terms cancel to far below their size; where theta is one per gene, small counts read them from a
  table of a few rows. At a zero, with pi = sigmoid(h) and NB(0) = (theta / (theta + mu))^theta,

      v := sigmoid(h - log NB(0)) = pi / (pi + (1 - pi) NB(0))        share of dropout in an observed zero
      log ZINB(0) = log(pi / v),    d/dh = v - pi,    d/d log NB(0) = 1 - v

- The negative binomial is written so that nothing cancels for large theta. With s = log(1 + mu / theta),

      log NB(x) = -theta s + x (log mu - s) + B(x, theta) - log x!
      B(x, theta) = log Gamma(x + theta) - log Gamma(theta) - x log theta = sum_{k<x} log(1 + k / theta)
      d/d log mu = (x - mu) / (1 + mu / theta)
      d/d log theta = -theta s - d/d log mu + x + dB/d log theta,    dB/d log theta = -sum_{k<x} k / (theta + k)

In float32 ``kernels.c`` does the same on the CPU, in one pass, and ``triton_kernels.py`` on a GPU; what stands here
serves float64 and other devices, checks the compiled code, and replaces it where it could not be built. Only
elementwise operations and sums along an axis, so results are the same at every run, on any device. m runs over the
non-zeros.
"""

from __future__ import annotations

import torch

TABLE = 8  # counts up to this read B(x, theta) from a table, where theta is one per gene
LIMIT = 60.0  # |log theta| beyond this is as good as this, and keeps mu / theta within float32


def log_likelihood(x, logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng, gradient):
    """Log p(x) of each cell and, if asked, its gradients by logit_rho, log_library, log_theta and logit_pi.

    As :func:`scvi_core.kernels.log_likelihood`.
    """
    logit_rho_ng = logit_rho_ng.contiguous()
    x_m, row_m = x.x_m.double(), x.rows()
    nonzero_m = row_m * x.n_genes + x.genes_m
    library_n1 = log_library_n.exp()[:, None]
    rho_ng = torch.softmax(logit_rho_ng, 1)
    # log of the softmax's denominator; the largest share is no less than 1 / genes, so its log is safe
    log_sum_n = logit_rho_ng.amax(1).double() - rho_ng.amax(1).double().log()
    log_mu_m = _at(logit_rho_ng, nonzero_m) + _at(log_library_n - log_sum_n, row_m)

    if log_theta_ng is None:
        value_ng = torch.zeros_like(logit_rho_ng)
        _put(value_ng, nonzero_m, x_m * log_mu_m - torch.lgamma(x_m + 1))
        value_n = value_ng.sum(1) - library_n1[:, 0]
        if not gradient:
            return value_n, None, None, None, None
        total_n1 = x.totals().to(logit_rho_ng.dtype)[:, None]
        grad_rho_ng = torch.mul(rho_ng, -total_n1, out=rho_ng)
        _add(grad_rho_ng, nonzero_m, x_m)
        return value_n, grad_rho_ng, (total_n1 - library_n1)[:, 0], None, None

    log_theta_ng = log_theta_ng.contiguous().clamp(-LIMIT, LIMIT)
    mu_ng = rho_ng.mul_(library_n1)
    odds_ng = mu_ng * (-log_theta_ng).exp()  # mu / theta
    zero_ng = odds_ng.log1p().mul_(-log_theta_ng.exp())  # log NB(0)

    # non-zeros, in float64
    per_gene = len(log_theta_ng) == 1
    at_m = x.genes_m.long() if per_gene else nonzero_m
    log_theta_m = _at(log_theta_ng, at_m)
    s_m = torch.logaddexp(log_mu_m - log_theta_m, log_mu_m.new_zeros(()))
    table = _table(log_theta_ng[0]) if per_gene else None
    b_m, slope_m = _rising(x_m, at_m, log_theta_m, table)
    value_m = x_m * (log_mu_m - s_m) - log_theta_m.exp() * s_m + b_m

    if logit_pi_ng is None:
        value_ng = zero_ng.clone() if gradient else zero_ng
        share_ng = None
    else:
        logit_pi_ng = logit_pi_ng.contiguous()
        value_m += torch.nn.functional.logsigmoid(-_at(logit_pi_ng, nonzero_m))
        logit_pi_ng = logit_pi_ng.clamp(min=-80.0 if logit_pi_ng.dtype == torch.float32 else -700.0)
        share_ng = (logit_pi_ng - zero_ng).sigmoid_()  # v
        pi_ng = logit_pi_ng.sigmoid_()
        value_ng = (pi_ng / share_ng).log_()
    _put(value_ng, nonzero_m, value_m)
    value_n = value_ng.sum(1)
    if not gradient:
        return value_n, None, None, None, None

    grad_mu_ng = -mu_ng  # by log mu
    _add(grad_mu_ng, nonzero_m, x_m)
    grad_pi_ng = None
    if share_ng is not None:
        share_ng.view(-1).scatter_(0, nonzero_m, 0.0)
        grad_pi_ng = torch.sub(share_ng, pi_ng, out=pi_ng)
        grad_mu_ng.addcmul_(share_ng, mu_ng)
        zero_ng.addcmul_(share_ng, zero_ng, value=-1)
    grad_mu_ng.div_(odds_ng.add_(1))
    grad_theta_ng = zero_ng.sub_(grad_mu_ng)
    _add(grad_theta_ng, nonzero_m, x_m + slope_m)
    grad_library_n1 = grad_mu_ng.sum(1, keepdim=True)
    grad_rho_ng = grad_mu_ng.addcmul_(mu_ng, grad_library_n1 / library_n1, value=-1)
    return value_n, grad_rho_ng, grad_library_n1[:, 0], grad_theta_ng, grad_pi_ng


def _at(tensor, place_m):
    """Entries of a flattened tensor, in float64."""
    return tensor.reshape(-1).index_select(0, place_m).double()


def _put(tensor, place_m, value_m):
    """Set entries of a flattened tensor, each place once."""
    tensor.view(-1).scatter_(0, place_m, value_m.to(tensor.dtype))


def _add(tensor, place_m, value_m):
    """Add to entries of a flattened tensor, to each place once."""
    tensor.view(-1).index_add_(0, place_m, value_m.to(tensor.dtype))


def _table(log_theta_g):
    """B(x, theta) - log x! and dB/d log theta for x = 1 .. TABLE, (TABLE, genes) each, float64."""
    theta_g = log_theta_g.double().exp()
    k = torch.arange(TABLE, dtype=torch.float64, device=theta_g.device)[:, None]
    return torch.cumsum((k / theta_g).log1p_() - (k + 1).log(), 0), torch.cumsum(-k / (theta_g + k), 0)


def _rising(x_m, gene_m, log_theta_m, table):
    """B(x, theta) - log x! and dB/d log theta at the non-zeros, float64."""
    if table is None:
        small_m = x_m <= 1
        b_m, slope_m = torch.zeros_like(x_m), torch.zeros_like(x_m)
    else:
        b_kg, slope_kg = table
        place_m = (x_m.long() - 1).clamp_(max=TABLE - 1) * b_kg.shape[1] + gene_m
        b_m, slope_m = _at(b_kg, place_m), _at(slope_kg, place_m)
        small_m = x_m <= TABLE
    large = (~small_m).nonzero()[:, 0]
    b_m[large], slope_m[large] = _rising_large(x_m[large], log_theta_m[large])
    return b_m, slope_m


def _rising_large(x_m, log_theta_m):
    """The same for any count, by log-gammas, or by Stirling's series where those are too large to subtract."""
    theta_m = log_theta_m.exp()
    sum_m = x_m + theta_m
    b_m = torch.lgamma(sum_m) - torch.lgamma(theta_m) - x_m * log_theta_m
    slope_m = theta_m * (torch.digamma(sum_m) - torch.digamma(theta_m)) - x_m
    log_ratio_m = torch.log1p(x_m / theta_m)
    far_m = theta_m > 100
    b_m = torch.where(far_m, (sum_m - 0.5) * log_ratio_m - x_m + _tail(sum_m) - _tail(theta_m), b_m)
    far_slope_m = theta_m * (log_ratio_m + _slope_tail(sum_m) - _slope_tail(theta_m)) - x_m
    return b_m - torch.lgamma(x_m + 1), torch.where(far_m, far_slope_m, slope_m)


def _tail(y):
    """Stirling's series of log Gamma(y) beyond (y - 1/2) log y - y + log(2 pi) / 2; y > 100 to 1e-17."""
    return (1 / 12 - (1 / 360 - 1 / (1260 * y**2)) / y**2) / y


def _slope_tail(y):
    """The series of digamma(y) beyond log y."""
    return (-1 / 2 - (1 / 12 - (1 / 120 - 1 / (252 * y**2)) / y**2) / y) / y
