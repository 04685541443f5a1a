import itertools

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from scvi_core import kernels, likelihood

THETA = [1e-4, 1e-2, 0.5, 1.0, 30.0, 1e3, 1e6]
MU = [1e-8, 1e-3, 0.3, 1.0, 40.0, 1e4, 1e6]
X = [0, 1, 2, 3, 8, 9, 100, 5_000, 1_000_000]
LOGIT = [-30.0, -4.0, 0.0, 4.0, 30.0]


def nb_exact(x, log_mu, log_theta):
    """Log NB by 60 digits, from the definition."""
    with mpmath.workdps(60):
        mu, theta = mpmath.exp(mpmath.mpf(log_mu)), mpmath.exp(mpmath.mpf(log_theta))
        p = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        return p + theta * mpmath.log(theta / (theta + mu)) + x * mpmath.log(mu / (theta + mu))


def zinb_exact(x, log_mu, log_theta, logit):
    with mpmath.workdps(60):
        pi = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
        nb = nb_exact(x, log_mu, log_theta)
        return mpmath.log(pi + (1 - pi) * mpmath.exp(nb)) if x == 0 else mpmath.log(1 - pi) + nb


def corners(dtype=torch.float64):
    """Every combination of count, mean and theta as (cells, one gene) tensors, with log_theta of every cell."""
    grid = np.array(list(itertools.product(X, MU, THETA)))
    x, log_mu, log_theta = (torch.tensor(c, dtype=dtype)[:, None] for c in (grid[:, 0], *np.log(grid[:, 1:]).T))
    return x, log_mu, log_theta


def close(a, b, rtol, atol):
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double().reshape(a.shape), rtol=rtol, atol=atol)


def test_reference_against_scipy():
    x, log_mu, log_theta = corners()
    mu, theta = log_mu.exp().numpy(), log_theta.exp().numpy()
    close(likelihood.poisson(x, log_mu), scipy.stats.poisson.logpmf(x.numpy(), mu), 1e-12, 1e-9)
    # scipy's nbinom forms theta / (theta + mu), exact enough where neither drowns the other
    mild = ((mu / theta > 1e-4) & (mu / theta < 1e4) & (theta < 1e4))[:, 0]
    expected = scipy.stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mu))[mild]
    close(likelihood.negative_binomial(x, log_mu, log_theta)[mild], expected, 1e-9, 1e-9)


@pytest.mark.parametrize("of", ["reference", "kernel"])
def test_corners_against_exact_arithmetic(of):
    """Float64 to 1e-11; float32 to what its inputs, which are logs, can carry."""
    for dtype, rtol, atol in ((torch.float64, 1e-11, 1e-11), (torch.float32, 2e-6, 2e-6)):
        x, log_mu, log_theta = corners(dtype)
        inputs = list(zip(x[:, 0].int().tolist(), log_mu[:, 0].tolist(), log_theta[:, 0].tolist(), strict=True))
        exact = torch.tensor([float(nb_exact(*row)) for row in inputs], dtype=torch.float64)
        if of == "reference":
            got = likelihood.negative_binomial(x, log_mu, log_theta)[:, 0]
            atol = max(atol, 1e-8)  # log-gammas of 1e6, subtracted
        else:
            # one gene: softmax is 1, and mu the library size
            got = kernels.log_likelihood(x, torch.zeros_like(x), log_mu[:, 0], log_theta)
        # x times a log, 1e7, cancels to less: its rounding stays. The kernel takes it in float64 whatever comes in
        rounding = torch.finfo(torch.float64 if of == "kernel" else dtype).eps
        slack = rounding * 25 * x[:, 0].double()
        assert ((got.double() - exact).abs() <= atol + rtol * exact.abs() + slack).all()
        for logit in LOGIT:
            h = torch.full_like(x, logit)
            exact = torch.tensor([float(zinb_exact(*row, logit)) for row in inputs[::5]], dtype=torch.float64)
            if of == "reference":
                got = likelihood.zero_inflated_negative_binomial(x, log_mu, log_theta, h)[::5, 0]
            else:
                got = kernels.log_likelihood(x, torch.zeros_like(x), log_mu[:, 0], log_theta, h)[::5]
            assert ((got.double() - exact).abs() <= atol + rtol * exact.abs() + slack[::5]).all(), logit


def tile(dtype, theta_rows, n=12, g=40, seed=0):
    """Random input of a kernel, a few large counts, one cell of zeros, and dropout; leaves that want gradients."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 3.0, (n, g)))
    x[0, :4] = 1_000_000, 9, 8, 300
    x[1] = 0
    make = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=dtype)  # noqa: E731
    leaves = [make(n, g), torch.tensor(rng.uniform(3, 9, n), dtype=dtype)]
    leaves.append(make(n if theta_rows == "n" else 1, g) * 3)
    leaves.append(make(n, g) * 3)
    return torch.tensor(x, dtype=dtype), [leaf.requires_grad_() for leaf in leaves]


def equations(kind, x, rho, library, theta, pi):
    """The reference as the model would write it, (cells,)."""
    log_mu = torch.log_softmax(rho, 1) + library[:, None]
    if kind == "poisson":
        return likelihood.poisson(x, log_mu).sum(1)
    if kind == "nb":
        return likelihood.negative_binomial(x, log_mu, theta).sum(1)
    return likelihood.zero_inflated_negative_binomial(x, log_mu, theta, pi).sum(1)


def kernel(kind, x, rho, library, theta, pi, nonzero=None):
    theta, pi = (theta if kind != "poisson" else None), (pi if kind == "zinb" else None)
    return kernels.log_likelihood(x, rho, library, theta, pi, nonzero)


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_kernel_is_the_reference(kind, theta_rows):
    """Values and every gradient, in both precisions; with and without gradients; non-zeros named or not."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        x, leaves = tile(dtype, theta_rows)
        used = leaves[: {"zinb": 4, "nb": 3, "poisson": 2}[kind]]
        weight = torch.linspace(-1, 2, len(x), dtype=dtype)  # another upstream gradient for every cell
        answers = []
        for function in (equations, kernel):
            value = function(kind, x, *leaves)
            answers.append([value.detach(), *torch.autograd.grad((value * weight).sum(), used)])
        for expected, got in zip(*answers, strict=True):
            assert expected.shape == got.shape and got.dtype == dtype
            scale = expected.abs().max()
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(scale))
        torch.testing.assert_close(answers[1][0], answers[0][0], rtol=tolerance, atol=0)  # cell by cell
        nonzero = torch.randperm(int((x > 0).sum()))
        nonzero = x.view(-1).nonzero()[:, 0][nonzero]
        with torch.no_grad():
            value = kernel(kind, x, *leaves, nonzero)
        assert not value.requires_grad and torch.equal(value, answers[1][0])


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_gradients_by_finite_differences(kind, theta_rows):
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.poisson(2.0, (3, 5)), dtype=torch.float64)
    x[0, 0], x[1] = 30, 0
    _, leaves = tile(torch.float64, theta_rows, n=3, g=5)
    used = [leaf.detach() * 0.5 for leaf in leaves[: {"zinb": 4, "nb": 3, "poisson": 2}[kind]]]
    used = [leaf.requires_grad_() for leaf in used]
    assert torch.autograd.gradcheck(lambda *inputs: kernels.log_likelihood(x, *inputs), used)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_corner_gradients(dtype):
    """A single gene at every corner: gradients by log mu, log theta and logit as the reference's, none lost."""
    x, log_mu, log_theta = corners(dtype)
    for logit in (None, *LOGIT):
        answers = []
        for fused in (False, True):
            leaves = [log_mu[:, 0].clone().requires_grad_(), log_theta.clone().requires_grad_()]
            if logit is not None:
                leaves.append(torch.full_like(x, logit).requires_grad_())
            if fused:
                value = kernels.log_likelihood(x, torch.zeros_like(x), *leaves)
            else:
                library, theta, pi = (leaf.double() for leaf in (*leaves, leaves[0])[:3])
                value = equations("nb" if logit is None else "zinb", x.double(), x.double() * 0, library, theta, pi)
            answers.append(torch.autograd.grad(value.sum(), leaves))
        for expected, got in zip(*answers, strict=True):
            assert torch.isfinite(got).all()
            small = 1e-9 if dtype == torch.float64 else 1e-6
            terms = (x + log_mu.exp()).reshape(got.shape).double()  # x and mu are what the gradients are made of
            error = (got.double() - expected.double()).abs()
            assert (error <= 1e-7 + small * (expected.double().abs() + terms)).all()


def test_theta_out_of_all_bounds_stays_finite():
    x = torch.tensor([[0.0, 1.0, 50.0]] * 4)
    log_theta = torch.tensor([-1e3, -200.0, 200.0, 1e3])[:, None].expand(4, 3).clone().requires_grad_()
    pi = torch.tensor([-1e3, 1e3, -200.0, 200.0])[:, None].expand(4, 3).clone().requires_grad_()
    rho = torch.zeros(4, 3, requires_grad=True)
    value = kernels.log_likelihood(x, rho, x.sum(1).log(), log_theta, pi)
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (rho, log_theta, pi)))
    # and what is not a number is not hidden
    rho = torch.full((4, 3), torch.nan)
    assert kernels.log_likelihood(x, rho, x.sum(1).log(), log_theta.detach(), pi.detach()).isnan().all()


def test_poisson_is_the_limit():
    """Without overdispersion the negative binomial is the Poisson, to the last digits."""
    x, leaves = tile(torch.float64, "1")
    x[0, 0] = 50
    rho, library = (leaf.detach() for leaf in leaves[:2])
    nb = kernels.log_likelihood(x, rho, library, torch.full((1, x.shape[1]), 25.0, dtype=torch.float64))
    torch.testing.assert_close(nb, kernels.log_likelihood(x, rho, library), rtol=1e-7, atol=1e-5)


def test_same_bits_every_time():
    x, leaves = tile(torch.float32, "1", n=64, g=500)
    answers = []
    for _ in range(3):
        value = kernel("zinb", x, *leaves)
        answers.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))
