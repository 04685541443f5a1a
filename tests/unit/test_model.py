import dataclasses
import itertools

import numpy as np
import pytest
import torch
from _data import cells, choose, packed
from scipy.special import expit, gammaln, logsumexp

from scvi_core import kernels
from scvi_core.config import ModelConfig
from scvi_core.kernels import Nonzeros, native
from scvi_core.model import LinearOfCounts, Noise, build

LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-cell")
LIBRARIES = ("observed", "latent")
EVERY = list(itertools.product(LIKELIHOODS, DISPERSIONS, LIBRARIES))


@pytest.fixture(params=["compiled", "plain"])
def how(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def make(likelihood="zinb", dispersion="gene", library="observed", covariates=True, n=20, seed=0, **more):
    """A model in eval mode whose batch norms have statistics to speak of, and all its cells as one minibatch."""
    adata = cells(n)
    schema, counts = packed(adata, *((("day",), ("age",)) if covariates else ()))
    sizes = {"n_latent": 3, "n_hidden": 7, **more}
    config = ModelConfig(likelihood=likelihood, dispersion=dispersion, library=library, **sizes)
    model = build(config, len(schema.gene_ids), len(schema.batches), 4 if covariates else 0, seed)
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "norm.bias", "library_mean_s")):
            value.normal_(1.0, 0.3)
        if name.endswith(("running_var", "norm.weight", "library_variance_s")):
            value.uniform_(0.5, 2.0)
    return model.eval(), counts.gather(torch.arange(n))


def double(minibatch):
    return dataclasses.replace(
        minibatch,
        x=dataclasses.replace(minibatch.x, x_m=minibatch.x.x_m.double()),
        **{k: getattr(minibatch, k).double() for k in ("library_n", "covariates_nc")},
    )


@pytest.mark.parametrize(("likelihood", "dispersion", "library"), EVERY)
def test_only_what_the_likelihood_reads_exists(likelihood, dispersion, library, how):
    model, minibatch = make(likelihood, dispersion, library)
    block = ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    gaussian = ["layers.0.linear.weight_gh", *(f"layers.0.{b}" for b in block[1:])]
    gaussian += ["mean.weight", "mean.bias", "log_variance.weight"]
    gaussian.append("log_variance.bias")
    expected = {f"encoder.{name}" for name in gaussian} | {f"decoder.0.{b}" for b in block}
    expected |= {"rho.weight", "rho.bias"}
    if library == "latent":
        expected |= {f"library_encoder.{name}" for name in gaussian}
    if likelihood == "zinb":
        expected |= {"dropout_logit.weight", "dropout_logit.bias"}
    if likelihood != "poisson":
        expected |= {"log_theta.weight", "log_theta.bias"} if dispersion == "gene-cell" else {"log_theta_sg"}
    assert {name for name, _ in model.named_parameters()} == expected
    if likelihood != "poisson" and dispersion != "gene-cell":
        assert len(model.log_theta_sg) == (2 if dispersion == "gene-batch" else 1)
    assert hasattr(model, "library_mean_s") == (library == "latent")
    # and every one of them has a gradient
    model.train()
    reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(minibatch, Noise(0))
    (kl_z_n + kl_l_n - reconstruction_n).mean().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("linear.bias"):  # batch norm takes the mean away, so theirs is zero
            assert parameter.grad is not None and (parameter.grad != 0).any(), name


def layer(state, name, x):
    """The published layer in numpy: linear, batch norm by running statistics, ReLU."""
    counts = f"{name}.linear.weight_gh"  # the encoder's first layer keeps its weights by gene
    weight = state[counts] if counts in state else state[f"{name}.linear.weight"].T
    h = x @ weight + state[f"{name}.linear.bias"]
    h = (h - state[f"{name}.norm.running_mean"]) / np.sqrt(state[f"{name}.norm.running_var"] + 1e-3)
    return np.maximum(h * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"], 0)


def linear(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def numpy_elbo_terms(model, minibatch, epsilon_z, epsilon_l):
    """The evidence lower bound from the weights by the paper's equations, in numpy and float64 alone."""
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    x, s = minibatch.x.dense().double().numpy(), minibatch.batch_n.numpy()
    h = layer(state, "encoder.layers.0", np.log1p(x))
    mean, variance = linear(state, "encoder.mean", h), np.exp(linear(state, "encoder.log_variance", h)) + 1e-4
    z = mean + np.sqrt(variance) * epsilon_z
    kl_z = 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(1)
    log_l, kl_l = np.log(x.sum(1)), np.zeros(len(x))
    if model.config.library == "latent":
        h = layer(state, "library_encoder.layers.0", np.log1p(x))
        m = linear(state, "library_encoder.mean", h)[:, 0]
        v = np.exp(linear(state, "library_encoder.log_variance", h)[:, 0]) + 1e-4
        log_l = m + np.sqrt(v) * epsilon_l
        m0, v0 = state["library_mean_s"][s], state["library_variance_s"][s]
        kl_l = np.log(np.sqrt(v0 / v)) + (v + (m - m0) ** 2) / (2 * v0) - 0.5
    design = np.concatenate([np.eye(2)[s], minibatch.covariates_nc.double().numpy()], 1)
    h = layer(state, "decoder.0", np.concatenate([z, design], 1))
    rho = linear(state, "rho", h)
    mu = np.exp(rho - logsumexp(rho, axis=1, keepdims=True) + log_l[:, None])
    if model.config.likelihood == "poisson":
        return (x * np.log(mu) - mu - gammaln(x + 1)).sum(1), kl_z, kl_l
    if model.config.dispersion == "gene-cell":
        theta = np.exp(linear(state, "log_theta", h))
    else:
        theta = np.exp(state["log_theta_sg"][s if model.config.dispersion == "gene-batch" else 0])
    nb = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    nb = nb + theta * np.log(theta / (theta + mu)) + x * np.log(mu / (theta + mu))
    if model.config.likelihood == "nb":
        return nb.sum(1), kl_z, kl_l
    pi = expit(linear(state, "dropout_logit", h))
    return np.where(x == 0, np.log(pi + (1 - pi) * np.exp(nb)), np.log(1 - pi) + nb).sum(1), kl_z, kl_l


@pytest.mark.parametrize(("likelihood", "dispersion", "library"), EVERY)
def test_elbo_against_numpy(likelihood, dispersion, library, how):
    model, minibatch = make(likelihood, dispersion, library)
    generator = torch.Generator().manual_seed(7)
    for dtype, rtol in ((torch.float32, 3e-6), (torch.float64, 1e-11)):
        module, batch = (model, minibatch) if dtype == torch.float32 else (model.double(), double(minibatch))
        generator.manual_seed(7)
        epsilon_z = torch.empty(20, 3, dtype=dtype).normal_(generator=generator)
        epsilon_l = torch.empty(20, dtype=dtype).normal_(generator=generator)
        expected = numpy_elbo_terms(module, batch, epsilon_z.double().numpy(), epsilon_l.double().numpy())
        with torch.no_grad():
            got = module.elbo_terms(batch, Noise(7))
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.shape == (20,) and ours.dtype == dtype
            np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_gradients_of_the_weights_compiled_and_plain(dispersion, monkeypatch):
    """Through the whole model, of every parameter: in float32, to what float64 says of the same weights."""
    choose("compiled", monkeypatch)
    seen = []
    for how in ("float64", "compiled", "plain"):
        model, minibatch = make("zinb", dispersion, "latent", n=40)
        model, minibatch = (model.double(), double(minibatch)) if how == "float64" else (model, minibatch)
        monkeypatch.setattr(model, "sample", lambda cells, q, _: (q.mean_nk, q.library_mean_n))  # the same draw
        with monkeypatch.context() as patch:
            if how == "plain":
                patch.setattr(native, "library", None)
            reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(minibatch, Noise(0))
            weight_n = torch.linspace(-1, 2, 40, dtype=reconstruction_n.dtype)
            ((kl_z_n + kl_l_n - reconstruction_n) * weight_n).sum().backward()
        seen.append({name: p.grad.double() for name, p in model.named_parameters()})
    for name, expected in seen[0].items():
        for got in seen[1:]:
            torch.testing.assert_close(
                got[name], expected, rtol=3e-5, atol=3e-6 * float(expected.abs().max()), msg=name
            )


def few_counts(n, g, seed=0):
    """Cells of few non-zeros, the first, the last and one between without any."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.1, 10.0, (n, g)))
    x[[0, n // 2, n - 1]] = 0
    return torch.tensor(x, dtype=torch.float32)


@pytest.mark.parametrize("n_hidden", [1, 7, 31, 32, 33, 64, 128])
@pytest.mark.parametrize(("n", "g"), [(1, 1), (3, 1), (1, 40), (37, 301), (130, 1000)])
def test_linear_is_the_dense_product(n, g, n_hidden, how):
    """Values and the gradient of the weights, to the rounding of the sums; cells and genes without counts give 0."""
    x_ng = few_counts(n, g) if n > 1 else torch.arange(1.0, g + 1)[None]
    x = Nonzeros.of(x_ng)
    torch.manual_seed(0)
    value_m = x.x_m.log1p()
    weight_gh, outer_nh = torch.randn(g, n_hidden).requires_grad_(), torch.randn(n, n_hidden)
    got_nh = kernels.linear_of_counts(x, weight_gh)
    (got_gh,) = torch.autograd.grad(got_nh, weight_gh, outer_nh)
    dense_ng, weight, outer = x.dense(value_m).double(), weight_gh.detach().double(), outer_nh.double()
    assert torch.equal(dense_ng.float(), x.dense(value_m)) and got_nh.dtype == got_gh.dtype == torch.float32
    for got, a, b in ((got_nh, dense_ng, weight), (got_gh, dense_ng.T, outer)):
        error, terms = (got.detach().double() - a @ b).abs(), a.abs() @ b.abs()
        assert got.shape == terms.shape and (error <= 1e-6 * terms).all()  # where there are no terms, 0 exactly
    with torch.no_grad():
        assert torch.equal(kernels.linear_of_counts(x, weight_gh), got_nh)


def test_linear_of_tensors_that_are_not_contiguous(how):
    """Weights and upstream gradients as views, the sum's gradient (all one number), no cells at all."""
    x = Nonzeros.of(few_counts(20, 50))
    torch.manual_seed(0)
    weight_hg, outer_hn = torch.randn(9, 50), torch.randn(9, 20)
    answers = []
    for weight_gh, outer_nh in ((weight_hg.T, outer_hn.T), (weight_hg.T.contiguous(), outer_hn.T.contiguous())):
        weight_gh = weight_gh.detach().requires_grad_()
        out_nh = kernels.linear_of_counts(x, weight_gh)
        views = torch.autograd.grad(out_nh, weight_gh, outer_nh, retain_graph=True)
        answers.append([out_nh.detach(), *views, *torch.autograd.grad(out_nh.sum(), weight_gh)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(answers[0][2], x.dense().log1p().sum(0)[:, None].expand(50, 9))
    none = Nonzeros.of(torch.zeros(0, 50))
    out_nh = kernels.linear_of_counts(none, weight_gh)
    assert out_nh.shape == (0, 9) and (torch.autograd.grad(out_nh.sum(), weight_gh)[0] == 0).all()


def test_first_layer_draws_as_torch_does_and_reads_log_counts(how):
    torch.manual_seed(0)
    layer, theirs = LinearOfCounts(400, 0, 50), torch.nn.Linear(400, 50)
    for ours, like in ((layer.weight_gh, theirs.weight.T), (layer.bias, theirs.bias)):
        assert ours.shape == like.shape and 0.045 < ours.abs().max() <= 0.05
    np.testing.assert_allclose(layer.weight_gh.std().item(), theirs.weight.std().item(), rtol=0.02)
    x_ng = few_counts(9, 400)
    with torch.no_grad():
        theirs.weight.copy_(layer.weight_gh.T)
        theirs.bias.copy_(layer.bias)
        torch.testing.assert_close(layer(Nonzeros.of(x_ng)), theirs(x_ng.log1p()), rtol=1e-5, atol=1e-5)


def test_nonzeros_and_back():
    """Dense and sparse are one thing, whatever cells or genes are empty."""
    for n, g in ((1, 1), (5, 1), (1, 9), (40, 77), (0, 3)):
        x_ng = few_counts(n, g) if n > 1 else torch.full((n, g), 3.0)
        x = Nonzeros.of(x_ng)
        assert torch.equal(x.dense(), x_ng) and len(x) == n and x.n_genes == g
        assert torch.equal(x.totals(), x_ng.double().sum(1)) and torch.equal(x.rows(), x_ng.nonzero()[:, 0])
        assert torch.equal(x.dense(-x.x_m.double()), -x_ng.double())
        assert (x.indptr_n.dtype, x.genes_m.dtype, x.x_m.dtype) == (torch.int64, torch.int32, torch.float32)


def test_kl_terms_against_torch_and_monte_carlo():
    from torch.distributions import Normal, kl_divergence

    model, minibatch = make(library="latent")
    q = model.encode(minibatch)
    _, kl_z_n, kl_l_n = model.elbo_terms(minibatch, Noise(0))
    z = Normal(q.mean_nk, q.variance_nk.sqrt())
    torch.testing.assert_close(kl_z_n, kl_divergence(z, Normal(0.0, 1.0)).sum(1))
    s = minibatch.batch_n
    log_l, prior = (
        Normal(q.library_mean_n, q.library_variance_n.sqrt()),
        Normal(model.library_mean_s[s], model.library_variance_s[s].sqrt()),
    )
    torch.testing.assert_close(kl_l_n, kl_divergence(log_l, prior))
    torch.manual_seed(0)  # of torch's draws
    draw = z.sample((20_000,))
    estimate = (z.log_prob(draw) - Normal(0.0, 1.0).log_prob(draw)).sum(2).mean(0)
    torch.testing.assert_close(kl_z_n, estimate, rtol=0.03, atol=0.03)
    # draws of the model have the moments of q
    with torch.no_grad():
        noise = Noise(0)
        draws = torch.stack([model.sample(minibatch, q, noise)[0] for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), q.mean_nk.detach(), rtol=0, atol=0.1)
    torch.testing.assert_close(draws.var(0), q.variance_nk.detach(), rtol=0.15, atol=0.01)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_single_cell_and_shapes(library, how):
    model, minibatch = make(library=library, n_layers=2)
    _schema, counts = packed(cells(20), ("day",), ("age",))
    with torch.no_grad():
        q = model.encode(minibatch)
        assert q.mean_nk.shape == q.variance_nk.shape == (20, 3) and (q.variance_nk > 0).all()
        hidden = model.hidden(q.mean_nk, minibatch.batch_n, minibatch.covariates_nc)
        rho = model.log_rho(hidden).exp()
        assert hidden.shape == (20, 7) and rho.shape == (20, 25)
        torch.testing.assert_close(rho.sum(1), torch.ones(20))
        alone = [model.encode(counts.gather(torch.tensor([i]))).mean_nk for i in (0, 19)]
        torch.testing.assert_close(torch.cat(alone), q.mean_nk[[0, 19]])
        one = model.elbo_terms(counts.gather(torch.tensor([5])), Noise(0))
        assert all(term.shape == (1,) and torch.isfinite(term).all() for term in one)


def test_encoder_does_not_see_the_batch_and_the_decoder_does():
    model, minibatch = make()
    other = dataclasses.replace(minibatch, batch_n=1 - minibatch.batch_n)
    older = dataclasses.replace(minibatch, covariates_nc=minibatch.covariates_nc + torch.tensor([0.0, 0, 0, 1]))
    day = dataclasses.replace(minibatch, covariates_nc=minibatch.covariates_nc[:, [1, 0, 2, 3]])
    with torch.no_grad():
        z = model.encode(minibatch).mean_nk
        rho = lambda m: model.log_rho(model.hidden(z, m.batch_n, m.covariates_nc))  # noqa: E731
        for changed in (other, older, day):
            assert torch.equal(model.encode(changed).mean_nk, z)
            assert ((rho(changed) - rho(minibatch)).abs() > 1e-4).any()


def test_every_layer_of_the_decoder_sees_the_design_and_one_batch_adds_none():
    model, _ = make(n_layers=2)
    assert [block.linear.in_features for block in model.decoder] == [3 + 2 + 4, 7 + 2 + 4]
    schema, _ = packed(cells(20), batch_key=None)
    lone = build(ModelConfig(n_latent=3, n_hidden=7), 25, len(schema.batches), 0, 0)
    assert lone.decoder[0].linear.in_features == 3


def test_dropout_is_the_generators_alone(how):
    """The noise of a step depends on its generator: same seed, same numbers, whatever the global state."""
    model, minibatch = make(dropout=0.5)
    model.train()
    answers = []
    for seed, globally in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(globally)
        answers.append(model.elbo_terms(minibatch, Noise(seed))[0])
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_build_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, third = (build(ModelConfig(), 9, 1, 0, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.rho.weight, third.rho.weight)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_same_gradients_every_time_on_two_threads(dispersion, how):
    """What a fixed seed rests on: no sum's order is left to the threads."""
    adata = cells(200, 200)
    _schema, counts = packed(adata)
    model = build(ModelConfig(dispersion=dispersion, n_hidden=16), 200, 2, 0, 0)
    minibatch = counts.gather(torch.arange(200))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        for _ in range(4):
            model.zero_grad()
            model.elbo_terms(minibatch, Noise(0))[0].sum().backward()
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(seen[0], other) for other in seen[1:])
