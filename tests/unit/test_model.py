import dataclasses
import itertools

import numpy as np
import pytest
import torch
from _data import cells, packed
from scipy.special import expit, gammaln, logsumexp

from scvi_core.config import ModelConfig
from scvi_core.model import build

LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-cell")
LIBRARIES = ("observed", "latent")
EVERY = list(itertools.product(LIKELIHOODS, DISPERSIONS, LIBRARIES))


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
        minibatch, **{k: getattr(minibatch, k).double() for k in ("x_ng", "library_n", "covariates_nc")}
    )


@pytest.mark.parametrize(("likelihood", "dispersion", "library"), EVERY)
def test_only_what_the_likelihood_reads_exists(likelihood, dispersion, library):
    model, minibatch = make(likelihood, dispersion, library)
    block = ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    gaussian = [*(f"layers.0.{b}" for b in block), "mean.weight", "mean.bias", "log_variance.weight"]
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
    reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(minibatch)
    (kl_z_n + kl_l_n - reconstruction_n).mean().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("linear.bias"):  # batch norm takes the mean away, so theirs is zero
            assert parameter.grad is not None and (parameter.grad != 0).any(), name


def layer(state, name, x):
    """The published layer in numpy: linear, batch norm by running statistics, ReLU."""
    h = x @ state[f"{name}.linear.weight"].T + state[f"{name}.linear.bias"]
    h = (h - state[f"{name}.norm.running_mean"]) / np.sqrt(state[f"{name}.norm.running_var"] + 1e-3)
    return np.maximum(h * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"], 0)


def linear(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def numpy_elbo_terms(model, minibatch, epsilon_z, epsilon_l):
    """The evidence lower bound from the weights by the paper's equations, in numpy and float64 alone."""
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    x, s = minibatch.x_ng.double().numpy(), minibatch.batch_n.numpy()
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
def test_elbo_against_numpy(likelihood, dispersion, library):
    model, minibatch = make(likelihood, dispersion, library)
    generator = torch.Generator().manual_seed(7)
    for dtype, rtol in ((torch.float32, 3e-6), (torch.float64, 1e-11)):
        module, batch = (model, minibatch) if dtype == torch.float32 else (model.double(), double(minibatch))
        generator.manual_seed(7)
        epsilon_z = torch.empty(20, 3, dtype=dtype).normal_(generator=generator)
        epsilon_l = torch.empty(20, dtype=dtype).normal_(generator=generator)
        expected = numpy_elbo_terms(module, batch, epsilon_z.double().numpy(), epsilon_l.double().numpy())
        with torch.no_grad():
            got = module.elbo_terms(batch, generator.manual_seed(7))
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.shape == (20,) and ours.dtype == dtype
            np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=rtol, atol=rtol)


def test_kl_terms_against_torch_and_monte_carlo():
    from torch.distributions import Normal, kl_divergence

    model, minibatch = make(library="latent")
    q = model.encode(minibatch)
    _, kl_z_n, kl_l_n = model.elbo_terms(minibatch)
    z = Normal(q.mean_nk, q.variance_nk.sqrt())
    torch.testing.assert_close(kl_z_n, kl_divergence(z, Normal(0.0, 1.0)).sum(1))
    s = minibatch.batch_n
    log_l, prior = (
        Normal(q.library_mean_n, q.library_variance_n.sqrt()),
        Normal(model.library_mean_s[s], model.library_variance_s[s].sqrt()),
    )
    torch.testing.assert_close(kl_l_n, kl_divergence(log_l, prior))
    torch.manual_seed(0)
    draw = z.sample((20_000,))
    estimate = (z.log_prob(draw) - Normal(0.0, 1.0).log_prob(draw)).sum(2).mean(0)
    torch.testing.assert_close(kl_z_n, estimate, rtol=0.03, atol=0.03)
    # draws of the model have the moments of q
    with torch.no_grad():
        draws = torch.stack([model.sample(minibatch, q, None)[0] for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), q.mean_nk.detach(), rtol=0, atol=0.1)
    torch.testing.assert_close(draws.var(0), q.variance_nk.detach(), rtol=0.15, atol=0.01)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_single_cell_and_shapes(library):
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
        one = model.elbo_terms(counts.gather(torch.tensor([5])))
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


def test_dropout_is_the_generators_alone():
    """The noise of a step depends on its generator: same seed, same numbers, whatever the global state."""
    model, minibatch = make(dropout=0.5)
    model.train()
    answers = []
    for seed, globally in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(globally)
        answers.append(model.elbo_terms(minibatch, torch.Generator().manual_seed(seed))[0])
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_build_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, third = (build(ModelConfig(), 9, 1, 0, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.rho.weight, third.rho.weight)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_same_gradients_every_time_on_two_threads(dispersion):
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
            model.elbo_terms(minibatch, torch.Generator().manual_seed(0))[0].sum().backward()
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(seen[0], other) for other in seen[1:])
