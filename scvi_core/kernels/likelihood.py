"""Log-likelihoods of counts, in log space, as the equations stand. The tested reference of
:mod:`scvi_core.kernels`, which the model runs.

With mean mu = exp(`log_mu`), inverse dispersion theta = exp(`log_theta`) and x counts,

    NB(x)   = Gamma(x + theta) / (Gamma(theta) x!) · (theta / (theta + mu))^theta · (mu / (theta + mu))^x
    ZINB(x) = pi [x = 0] + (1 - pi) NB(x),   pi = sigmoid(`logit_pi`)

(Lopez et al. 2018, Methods; mean and inverse dispersion as in its Supplementary Note). The two ratios are
``sigmoid(±(log_theta - log_mu))``, so nothing overflows for mu from 1e-8 to 1e6 and theta from 1e-4 to 1e6.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def log_gamma_ratio(x_ng: torch.Tensor, theta_ng: torch.Tensor) -> torch.Tensor:
    """Log Gamma(x + theta) - log Gamma(theta) - log x!, exactly 0 where x = 0.

    The terms cancel to far below their own size (theta = 1e6: 1e7 against 10), so they are taken in float64,
    and only for the non-zero counts, which are few.

    Parameters
    ----------
    x_ng : (cells, genes) counts. theta_ng : broadcastable to it, positive.
    """
    at = x_ng.nonzero(as_tuple=True)
    x_m = x_ng[at].double()
    theta_m = theta_ng.expand_as(x_ng)[at].double()
    ratio_m = torch.lgamma(x_m + theta_m) - torch.lgamma(theta_m) - torch.lgamma(x_m + 1)
    return torch.zeros_like(x_ng).index_put(at, ratio_m.to(x_ng.dtype))


def poisson(x_ng: torch.Tensor, log_mu_ng: torch.Tensor) -> torch.Tensor:
    """Elementwise log Poisson(x; mu), (cells, genes)."""
    return x_ng * log_mu_ng - log_mu_ng.exp() - torch.lgamma(x_ng + 1)


def negative_binomial(x_ng: torch.Tensor, log_mu_ng: torch.Tensor, log_theta_ng: torch.Tensor) -> torch.Tensor:
    """Elementwise log NB(x; mu, theta), (cells, genes). `log_theta_ng` may be (genes,)."""
    theta_ng = log_theta_ng.exp()
    log_odds_ng = log_mu_ng - log_theta_ng
    return log_gamma_ratio(x_ng, theta_ng) + theta_ng * logsigmoid(-log_odds_ng) + x_ng * logsigmoid(log_odds_ng)


def zero_inflated_negative_binomial(
    x_ng: torch.Tensor, log_mu_ng: torch.Tensor, log_theta_ng: torch.Tensor, logit_pi_ng: torch.Tensor
) -> torch.Tensor:
    """Elementwise log ZINB(x; mu, theta, pi), (cells, genes). `log_theta_ng` may be (genes,)."""
    log_nb_ng = negative_binomial(x_ng, log_mu_ng, log_theta_ng)
    log_keep_ng = logsigmoid(-logit_pi_ng)
    # log(pi + (1 - pi) NB(0)) = log(1 - pi) + log(e^logit + NB(0))
    zero_ng = log_keep_ng + torch.logaddexp(logit_pi_ng, log_nb_ng)
    return torch.where(x_ng > 0, log_keep_ng + log_nb_ng, zero_ng)
