import dataclasses
import functools
import importlib.machinery
import itertools
import shutil

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from _data import choose

from scvi_core import kernels
from scvi_core.kernels import Nonzeros, likelihood, native

THETA = [1e-4, 1e-2, 0.5, 1.0, 30.0, 1e3, 1e6]
MU = [1e-8, 1e-3, 0.3, 1.0, 40.0, 1e4, 1e6]
X = [0, 1, 2, 3, 8, 9, 100, 5_000, 1_000_000]
LOGIT = [-200.0, -80.0, -30.0, -4.0, 0.0, 4.0, 30.0, 200.0]
LEAST_LOGIT = {torch.float32: -80.0, torch.float64: -700.0}  # what a lower one is as good as, where the count is 0
USED = {"zinb": 4, "nb": 3, "poisson": 2}  # of logit_rho, log_library, log_theta, logit_pi


@pytest.fixture(params=["compiled", "plain", "float64"])
def dtype(request, monkeypatch):
    """Every way to a likelihood: float32, compiled and not, and float64, which is never compiled."""
    choose("plain" if request.param == "float64" else request.param, monkeypatch)
    return torch.float64 if request.param == "float64" else torch.float32


@functools.cache
def nb_exact(x, log_mu, log_theta):
    """Log NB by 60 digits, from the definition."""
    with mpmath.workdps(60):
        mu, theta = mpmath.exp(mpmath.mpf(log_mu)), mpmath.exp(mpmath.mpf(log_theta))
        p = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        return p + theta * mpmath.log(theta / (theta + mu)) + x * mpmath.log(mu / (theta + mu))


def zinb_exact(x, log_mu, log_theta, logit):
    with mpmath.workdps(60):
        pi, keep = (1 / (1 + mpmath.exp(-mpmath.mpf(h))) for h in (logit, -logit))
        nb = nb_exact(x, log_mu, log_theta)
        return mpmath.log(pi + keep * mpmath.exp(nb)) if x == 0 else mpmath.log(keep) + nb


@functools.cache
def nb_gradient_exact(x, log_mu, log_theta):
    """d/d log mu and d/d log theta."""
    with mpmath.workdps(60):
        mu, theta = mpmath.exp(mpmath.mpf(log_mu)), mpmath.exp(mpmath.mpf(log_theta))
        by_mu = (x - mu) / (1 + mu / theta)
        rising = theta * (mpmath.digamma(x + theta) - mpmath.digamma(theta))
        return by_mu, rising - theta * mpmath.log(1 + mu / theta) - by_mu


def gradient_exact(x, log_mu, log_theta, logit=None):
    """d/d log mu, d/d log theta and, with a logit, d/d logit."""
    with mpmath.workdps(60):
        by_mu, by_theta = nb_gradient_exact(x, log_mu, log_theta)
        if logit is None:
            return by_mu, by_theta
        pi, keep = (1 / (1 + mpmath.exp(-mpmath.mpf(h))) for h in (logit, -logit))
        if x > 0:
            return by_mu, by_theta, -pi
        nb = mpmath.exp(nb_exact(x, log_mu, log_theta))
        zero = pi + keep * nb
        return by_mu * keep * nb / zero, by_theta * keep * nb / zero, pi * keep * (1 - nb) / zero


def corners(dtype=torch.float64):
    """Every combination of count, mean and theta as (cells, one gene) tensors, with log_theta of every cell."""
    grid = np.array(list(itertools.product(X, MU, THETA)))
    x, log_mu, log_theta = (torch.tensor(c, dtype=dtype)[:, None] for c in (grid[:, 0], *np.log(grid[:, 1:]).T))
    return x, log_mu, log_theta


def close(a, b, rtol, atol):
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double().reshape(a.shape), rtol=rtol, atol=atol)


def assert_within(got, expected, allowed, *where):
    """Says the worst."""
    error = (got.double() - expected.double()).abs() - allowed
    if error.numel() and not (error <= 0).all():
        i = error.nan_to_num(nan=torch.inf).flatten().argmax()
        values = [t.expand(error.shape).flatten()[i].item() for t in (got, expected, allowed)]
        raise AssertionError(f"{where} at {int(i)} of {tuple(error.shape)}: {values[0]}, not {values[1]} ± {values[2]}")


def test_reference_against_scipy():
    x, log_mu, log_theta = corners()
    mu, theta = log_mu.exp().numpy(), log_theta.exp().numpy()
    close(likelihood.poisson(x, log_mu), scipy.stats.poisson.logpmf(x.numpy(), mu), 1e-12, 1e-9)
    # scipy's nbinom forms theta / (theta + mu), exact enough where neither drowns the other
    mild = ((mu / theta > 1e-4) & (mu / theta < 1e4) & (theta < 1e4))[:, 0]
    expected = scipy.stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mu))[mild]
    close(likelihood.negative_binomial(x, log_mu, log_theta)[mild], expected, 1e-9, 1e-9)


def rounding(logit, dtype):
    """Of a sum of a logit and log NB(0), which the plain path forms in float32."""
    plain = dtype == torch.float32 and native.library is None
    return torch.finfo(dtype).eps * max(abs(logit) - 30, 0) if plain else 0.0


def assert_corners(zinb, nb, dtype, eps, atol):
    """Float64 to 1e-11; float32 to what its inputs, which are logs, can carry."""
    rtol, least = (1e-11, 1e-11) if dtype == torch.float64 else (2e-6, 2e-6)
    x, log_mu, log_theta = corners(dtype)
    inputs = list(zip(x[:, 0].int().tolist(), log_mu[:, 0].tolist(), log_theta[:, 0].tolist(), strict=True))
    slack = eps * 25 * x[:, 0].double()  # x times a log, 1e7, cancels to less: its rounding stays
    for logit in (None, *LOGIT):
        if logit is None:
            exact, got = [nb_exact(*row) for row in inputs], nb(x, log_mu, log_theta)
        else:
            exact = [zinb_exact(*row, logit if row[0] else max(logit, LEAST_LOGIT[dtype])) for row in inputs]
            got = zinb(x, log_mu, log_theta, torch.full_like(x, logit))
        exact = torch.tensor([float(v) for v in exact], dtype=torch.float64)
        more = rounding(max(logit or 0, LEAST_LOGIT[dtype]), dtype)
        assert_within(got, exact, max(least, atol) + rtol * exact.abs() + slack + more, logit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_corners_of_the_reference_against_exact_arithmetic(dtype, monkeypatch):
    monkeypatch.setitem(LEAST_LOGIT, torch.float32, -np.inf)  # the equations know no least logit
    assert_corners(
        lambda *inputs: likelihood.zero_inflated_negative_binomial(*inputs)[:, 0],
        lambda *inputs: likelihood.negative_binomial(*inputs)[:, 0],
        dtype,
        eps=torch.finfo(dtype).eps,
        atol=1e-8,  # log-gammas of 1e6, subtracted
    )


def test_corners_of_the_kernel_against_exact_arithmetic(dtype):
    """One gene: softmax is 1, and mu the library size. Sums of the non-zeros are in float64 whatever comes in."""

    def value(x, log_mu, *more):
        return kernels.log_likelihood(Nonzeros.of(x), torch.zeros_like(x), log_mu[:, 0], *more)

    assert_corners(value, value, dtype, eps=torch.finfo(torch.float64).eps, atol=0)


def test_corners_of_poisson_against_exact_arithmetic(dtype):
    x, log_mu, _ = corners(dtype)
    with mpmath.workdps(60):
        exact = [
            k * mpmath.mpf(m) - mpmath.exp(mpmath.mpf(m)) - mpmath.loggamma(k + 1)
            for k, m in zip(x[:, 0].int().tolist(), log_mu[:, 0].tolist(), strict=True)
        ]
    leaf = log_mu[:, 0].clone().requires_grad_()
    got = kernels.log_likelihood(Nonzeros.of(x), torch.zeros_like(x), leaf)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    exact = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    mu, count = log_mu[:, 0].double().exp(), x[:, 0].double()
    # mu, of the zeros, is taken in the precision of the input, and the sum is what is left of x log mu - mu
    slack = torch.finfo(dtype).eps * mu + torch.finfo(torch.float64).eps * 25 * count
    assert_within(got, exact, rtol + rtol * exact.abs() + slack)
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    assert_within(gradient, count - mu, rtol * (count + mu))


def tile(dtype, theta_rows, n=12, g=40, seed=0):
    """Random input of a kernel, a few large counts, one cell of zeros, and dropout; leaves that want gradients."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 3.0, (n, g)))
    large = [1_000_000, 9, 8, 300][:g]
    x[:1, : len(large)] = large
    x[1:2] = 0
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


def kernel(kind, x, rho, library, theta, pi):
    theta, pi = (theta if kind != "poisson" else None), (pi if kind == "zinb" else None)
    return kernels.log_likelihood(x if isinstance(x, Nonzeros) else Nonzeros.of(x), rho, library, theta, pi)


def answer(function, kind, x, leaves):
    """Value and every gradient, with another upstream gradient for every cell."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(kind, x, *leaves)
    weight = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), leaves[: USED[kind]])]


def shuffled(x):
    """The same counts with the genes of every cell in another order."""
    order = np.lexsort((np.random.default_rng(1).random(len(x.genes_m)), x.rows()))
    return dataclasses.replace(x, genes_m=x.genes_m[order], x_m=x.x_m[order])


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_kernel_is_the_reference(kind, theta_rows, dtype):
    """Values and every gradient; with and without gradients; a cell's non-zeros in any order."""
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    x, leaves = tile(dtype, theta_rows)
    expected_all = answer(equations, kind, x, leaves)
    got_all = answer(kernel, kind, x, leaves)
    other_all = answer(kernel, kind, shuffled(Nonzeros.of(x)), leaves)
    for expected, got, other in zip(expected_all, got_all, other_all, strict=True):
        assert expected.shape == got.shape and got.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)
        torch.testing.assert_close(other, got, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(got_all[0], expected_all[0], rtol=tolerance, atol=0)  # cell by cell
    with torch.no_grad():
        value = kernel(kind, x, *leaves)
    assert not value.requires_grad and torch.equal(value, got_all[0])


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize(
    ("n", "g"), [(1, 1), (4, 1), (0, 5), (1, 2), (3, 15), (2, 17), (5, 255), (5, 256), (5, 257), (3, 1023), (4, 30_011)]
)
def test_shapes(n, g, kind, theta_rows, dtype):
    """A single gene, no cell, blocks that are full, one short and one over: all as float64 on the same inputs."""
    x, leaves = tile(dtype, theta_rows, n, g)
    if n > 2:  # no zero in a cell, so that its non-zeros fill blocks too
        x[2] += 1
    exact = [leaf.detach().double() for leaf in leaves]
    expected, got = answer(equations, kind, x.double(), exact), answer(kernel, kind, x, leaves)
    # float32 takes logs as they come and sums over genes; gradients are made of x and mu, and cancel
    rtol = 1e-11 if dtype == torch.float64 else 3e-6
    share_ng = torch.softmax(exact[0], 1)
    terms_ng = x.double() + share_ng * exact[1].exp()[:, None]
    sum_n1 = terms_ng.sum(1, keepdim=True)
    sizes = [sum_n1[:, 0], terms_ng + share_ng * sum_n1, sum_n1[:, 0], terms_ng, torch.ones_like(terms_ng)]
    sizes[0] = sizes[0] if kind == "poisson" else 0 * sizes[0]  # library - x log mu
    sizes[3] = sizes[3] if theta_rows == "n" else sizes[3].sum(0, keepdim=True)
    for i, (ours, theirs, size) in enumerate(zip(got, expected, sizes, strict=False)):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        # the reference subtracts digammas and multiplies by theta
        lost = 1e-14 * exact[2].exp() if i == 3 else 0.0
        assert_within(ours, theirs, rtol * (1 + theirs.abs() + size) + lost, i)


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_nothing_is_read_beyond_the_inputs(kind, monkeypatch):
    """Inputs in the midst of NaNs, and as views with other strides, give the same bits as on their own."""
    choose("compiled", monkeypatch)

    def amidst(t):
        return torch.full((t.numel() + 200,), torch.nan)[100:-100].view(t.shape).copy_(t)

    for n, g in ((1, 1), (3, 7), (5, 257), (2, 513)):
        for theta_rows in "1n":
            x, leaves = tile(torch.float32, theta_rows, n, g)
            leaves = [leaf.detach() for leaf in leaves]
            expected = answer(kernel, kind, x, leaves)
            views = [leaf.T.contiguous().T for leaf in leaves[:1] + leaves[2:]]
            padded = Nonzeros.of(x)
            padded = dataclasses.replace(padded, x_m=amidst(padded.x_m))
            for others in ([amidst(leaf) for leaf in leaves], [views[0], leaves[1], *views[1:]]):
                got = answer(kernel, kind, padded, others)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (n, g, theta_rows)


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_gradients_by_finite_differences(kind, theta_rows):
    """In float64, the plain path; the compiled one is held to it elsewhere."""
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.poisson(2.0, (3, 5)), dtype=torch.float64)
    x[0, 0], x[1] = 30, 0
    _, leaves = tile(torch.float64, theta_rows, n=3, g=5)
    used = [leaf.detach() * 0.5 for leaf in leaves[: USED[kind]]]
    used = [leaf.requires_grad_() for leaf in used]
    assert torch.autograd.gradcheck(lambda *inputs: kernels.log_likelihood(Nonzeros.of(x), *inputs), used)


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
                value = kernels.log_likelihood(Nonzeros.of(x), torch.zeros_like(x), *leaves)
            else:
                library, theta, pi = (leaf.double() for leaf in (*leaves, leaves[0])[:3])
                pi = pi.where(x.double() > 0, pi + max(LEAST_LOGIT[dtype] - (logit or 0), 0))
                value = equations("nb" if logit is None else "zinb", x.double(), x.double() * 0, library, theta, pi)
            answers.append(torch.autograd.grad(value.sum(), leaves))
        for expected, got in zip(*answers, strict=True):
            assert torch.isfinite(got).all()
            small = 1e-9 if dtype == torch.float64 else 1e-6
            terms = (x + log_mu.exp()).reshape(got.shape).double()  # x and mu are what the gradients are made of
            assert_within(got, expected, 1e-7 + small * (expected.double().abs() + terms), logit)


@pytest.mark.parametrize("sign", [-1, 1])
def test_gradients_and_values_beyond_the_limit_of_theta(sign, dtype):
    """|log theta| beyond 60 is as good as 60: values and gradients by exact arithmetic there, where nothing is lost."""
    small = 1e-9 if dtype == torch.float64 else 1e-6
    grid = list(itertools.product(X, np.log(MU), (59.0, 60.0, 61.0, 200.0, 1e4), (None, *LOGIT[::3])))
    for logit in (None, *LOGIT[::3]):
        rows = [(x, log_mu, sign * size) for x, log_mu, size, other in grid if other == logit]
        x, log_mu, log_theta = (torch.tensor(column, dtype=dtype)[:, None] for column in zip(*rows, strict=True))
        leaves = [log_mu[:, 0].clone().requires_grad_(), log_theta.clone().requires_grad_()]
        if logit is not None:
            leaves.append(torch.full_like(x, logit).requires_grad_())
        value = kernels.log_likelihood(Nonzeros.of(x), torch.zeros_like(x), *leaves)
        gradients = [g.double().flatten() for g in torch.autograd.grad(value.sum(), leaves)]
        exact = []
        for k, m, t in zip(x[:, 0].int().tolist(), log_mu[:, 0].tolist(), log_theta[:, 0].tolist(), strict=True):
            inputs = [k, m, max(-60.0, min(60.0, t))]
            if logit is not None:
                inputs.append(logit if k else max(logit, LEAST_LOGIT[dtype]))
            v = nb_exact(*inputs) if logit is None else zinb_exact(*inputs)
            exact.append([float(v), *map(float, gradient_exact(*inputs))])
        exact = torch.tensor(exact, dtype=torch.float64).T
        terms = x[:, 0].double() + log_mu[:, 0].double().exp()
        # theta is e^60, and log Gamma(x + theta) - log Gamma(theta) is right to a part of x, as are x log mu and mu
        slack = (torch.finfo(dtype).eps * log_mu[:, 0].double().exp()) + 2e-14 * x[:, 0].double()
        rtol = 1e-11 if dtype == torch.float64 else 2e-6
        more = rounding(max(logit or 0, LEAST_LOGIT[dtype]), dtype)
        assert_within(value, exact[0], rtol + rtol * exact[0].abs() + slack + more, logit)
        for expected, got in zip(exact[1:], gradients, strict=True):
            assert_within(got, expected, 1e-7 + small * (expected.abs() + terms) + more * expected.abs(), logit)


def test_theta_out_of_all_bounds_stays_finite(dtype):
    x_ng = torch.tensor([[0.0, 1.0, 50.0]] * 4, dtype=dtype)
    x, library = Nonzeros.of(x_ng), x_ng.sum(1).log()
    rows = lambda *values: torch.tensor(values, dtype=dtype)[:, None].expand(4, 3).clone().requires_grad_()  # noqa: E731
    log_theta, pi, rho = rows(-1e3, -200.0, 200.0, 1e3), rows(-1e3, 1e3, -200.0, 200.0), rows(0.0, 0.0, 0.0, 0.0)
    value = kernels.log_likelihood(x, rho, library, log_theta, pi)
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (rho, log_theta, pi)))


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_what_is_not_a_number_is_not_hidden(kind, dtype):
    """One NaN in any input, at a zero or not, makes its cell's value NaN, and no other's."""
    x, leaves = tile(dtype, "n", n=4, g=21)
    x[1, 0] = 1  # log Poisson of nothing at all is minus the library, and knows no rho
    leaves = [leaf.detach() for leaf in leaves[: USED[kind]]]
    for i, leaf in enumerate(leaves):
        for place in [2] if i == 1 else [(2, int((x[2] == 0).nonzero()[0])), (2, int(x[2].nonzero()[0]))]:
            spoilt = leaf.clone()
            spoilt[place] = torch.nan
            value = kernels.log_likelihood(Nonzeros.of(x), *leaves[:i], spoilt, *leaves[i + 1 :])
            assert value.isnan().tolist() == [False, False, True, False], (i, place)
    value = kernels.log_likelihood(Nonzeros.of(x), torch.full_like(leaves[0], torch.nan), *leaves[1:])
    assert value.isnan().all()


def test_poisson_is_the_limit(dtype):
    """Without overdispersion the negative binomial is the Poisson, to the last digits."""
    x, leaves = tile(dtype, "1")
    x[0, 0] = 50
    rho, library = (leaf.detach() for leaf in leaves[:2])
    x = Nonzeros.of(x)
    nb = kernels.log_likelihood(x, rho, library, torch.full((1, x.n_genes), 25.0, dtype=dtype))
    rtol = 1e-7 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(nb, kernels.log_likelihood(x, rho, library), rtol=rtol, atol=1e-5)


def on_threads(counts, function):
    """What `function` gives on so many threads, one after the other."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_same_bits_every_time(kind, theta_rows, dtype):
    """Whatever the run and, where compiled, whatever the number of threads."""
    x, leaves = tile(dtype, theta_rows, n=64, g=500)
    counts = (1, 1, 2, 2, 3) if native.serves(x) else (1, 1, 1)
    first, *others = on_threads(counts, lambda: answer(kernel, kind, x, leaves))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("n_hidden", [1, 7, 33, 128])
def test_linear_gives_the_same_bits_on_any_threads(n_hidden, monkeypatch):
    choose("compiled", monkeypatch)
    x = Nonzeros.of(tile(torch.float32, "1", n=70, g=900)[0])
    torch.manual_seed(0)
    weight_gh, outer_nh = torch.randn(900, n_hidden).requires_grad_(), torch.randn(70, n_hidden)

    def once():
        out_nh = kernels.linear_of_counts(x, weight_gh)
        return out_nh.detach(), *torch.autograd.grad(out_nh, weight_gh, outer_nh)

    first, *others = on_threads((1, 1, 2, 2, 3), once)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_library_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    """Not there, not a library, another library: nothing is raised, and the reason says what to do."""
    file = tmp_path / f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    found, reason = native._open()
    assert found is None and "not built" in reason and "C compiler" in reason
    file.mkdir()  # of that name, but no file
    assert native._open() == (None, reason)
    file.rmdir()
    file.write_bytes(b"not a library")
    found, reason = native._open()
    assert found is None and reason.startswith(f"{file.name} cannot be used (")
    import _ctypes  # any other library

    shutil.copy(_ctypes.__file__, file)
    found, reason = native._open()
    assert found is None and "cannot be used" in reason and "scvi_interface" in reason


def test_a_library_of_another_version_is_refused(monkeypatch):
    choose("compiled", monkeypatch)
    assert native.reason == "" and native._open()[0] is not None
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    found, reason = native._open()
    assert found is None and reason.startswith("_kernels.") and "another version; install scvi-core again" in reason


def test_what_the_compiled_kernels_serve(monkeypatch):
    choose("compiled", monkeypatch)
    assert native.serves(torch.zeros(1)) and not native.serves(torch.zeros(1).double())
    assert not native.serves(torch.zeros(1, device="meta"))
    monkeypatch.setattr(native, "library", None)
    assert not native.serves(torch.zeros(1))
