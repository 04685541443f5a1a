import dataclasses

import numpy as np
import pytest
import torch
from _data import brief, cells, choose, packed

import scvi_core as sv
from scvi_core import posterior
from scvi_core.config import ModelConfig
from scvi_core.files import UserError
from scvi_core.kernels import Nonzeros
from scvi_core.model import build


def random_model(library="observed", n=12, **more):
    adata = cells(n)
    _schema, counts = packed(adata)
    config = ModelConfig(library=library, **{"n_latent": 1, "n_hidden": 6, **more})
    model = build(config, 25, 2, 0, 3).eval()
    if library == "latent":
        model.library_mean_s[:] = torch.tensor([3.0, 3.3])
        model.library_variance_s[:] = torch.tensor([0.2, 0.3])
    with torch.no_grad():  # a decoder that z moves
        model.decoder[0].linear.weight.mul_(4)
        if library == "latent":
            model.library_encoder.mean.bias.fill_(3.1)
            model.library_encoder.log_variance.bias.fill_(-1.5)
    return model, counts


@pytest.mark.parametrize("how", ["compiled", "plain"])
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_marginal_log_likelihood_against_a_grid(library, how, monkeypatch):
    """One latent dimension: log p(x) is an integral, taken here on a fine grid of z (and log l) in float64."""
    choose(how, monkeypatch)
    model, counts = random_model(library)
    rows = torch.arange(4)
    few = dataclasses.replace(
        counts, indptr_n=counts.indptr_n[:5], library_n=counts.library_n[:4], batch_n=counts.batch_n[:4],
        categories_nc=counts.categories_nc[:4], continuous_nc=counts.continuous_nc[:4],
    )  # fmt: skip
    got = posterior.marginal_log_likelihood(model, few, n_samples=2000, seed=1)
    z = torch.linspace(-7, 7, 351, dtype=torch.float64)
    l = torch.linspace(0.0, 6.5, 261, dtype=torch.float64)  # noqa: E741
    exact = []
    twice = build(model.config, 25, 2, 0, 3).eval()
    twice.load_state_dict(model.state_dict())
    twice.double()
    normal = torch.distributions.Normal
    for i in rows:
        if library == "observed":
            z_n, log_l = z, few.library_n[i].log().expand(len(z))
            weight = normal(0.0, 1.0).log_prob(z_n) + (z[1] - z[0]).log()
        else:
            z_n, log_l = (grid.flatten() for grid in torch.meshgrid(z, l, indexing="ij"))
            s = few.batch_n[i]
            prior = normal(twice.library_mean_s[s], twice.library_variance_s[s].sqrt())
            weight = normal(0.0, 1.0).log_prob(z_n) + prior.log_prob(log_l) + ((z[1] - z[0]) * (l[1] - l[0])).log()
        one = few.gather(i.expand(1))
        many = dataclasses.replace(
            one, x=Nonzeros.of(one.x.dense().expand(len(z_n), -1)), batch_n=one.batch_n.expand(len(z_n)),
            covariates_nc=one.covariates_nc.double().expand(len(z_n), -1),
        )  # fmt: skip
        with torch.no_grad():
            exact.append(torch.logsumexp(twice.log_likelihood(many, z_n[:, None], log_l) + weight, 0))
    np.testing.assert_allclose(got, torch.stack(exact).numpy(), atol=0.15)
    assert got.dtype == np.float64


def test_bounds_and_convergence():
    """ELBO <= marginal in the mean; more samples, tighter and surer."""
    model, counts = random_model("latent", n=40, n_latent=3)
    elbo = posterior.elbo(model, counts, n_samples=50)
    means = [posterior.marginal_log_likelihood(model, counts, n, seed=2).mean() for n in (1, 10, 300)]
    assert elbo.mean() < means[1] < means[2] and abs(means[0] - elbo.mean()) < 0.5 * (means[2] - elbo.mean())
    spread = [
        np.std([posterior.marginal_log_likelihood(model, counts, n, seed=s) for s in range(4)], 0).mean()
        for n in (5, 100)
    ]
    assert spread[1] < spread[0] / 2
    again = posterior.elbo(model, counts, n_samples=50)
    assert np.array_equal(elbo, again) and not np.array_equal(elbo, posterior.elbo(model, counts, 50, seed=1))
    assert elbo.dtype == np.float64 and elbo.shape == (40,)


def test_blocks_do_not_change_the_answer(monkeypatch):
    model, counts = random_model(n=40, n_latent=3)
    whole = posterior.latent(model, counts)
    monkeypatch.setattr(posterior, "BLOCK", 7)
    monkeypatch.setattr(posterior.blocks, "__defaults__", (None, 7))
    np.testing.assert_allclose(posterior.latent(model, counts), whole, rtol=1e-5, atol=1e-6)
    assert whole.dtype == np.float32 and whole.shape == (40, 3)


def test_normalized_expression():
    model, counts = random_model(n=30)
    genes = np.arange(25)
    values = posterior.normalized_expression(model, counts, genes, 1e4)
    assert values.dtype == np.float32 and (values > 0).all()
    np.testing.assert_allclose(values.sum(1), 1e4, rtol=1e-5)
    own = posterior.normalized_expression(model, counts, genes, None)
    np.testing.assert_allclose(own.sum(1), counts.library_n.numpy(), rtol=1e-4)
    some = posterior.normalized_expression(model, counts, np.array([7, 2]), 1e4)
    np.testing.assert_array_equal(some, values[:, [7, 2]])
    under = [posterior.normalized_expression(model, counts, genes, 1e4, transform_batch=s) for s in (0, 1)]
    assert np.abs(under[0] - under[1]).max() > 1
    mine = counts.batch_n.numpy() == 0
    np.testing.assert_array_equal(under[0][mine], values[mine])
    np.testing.assert_array_equal(under[1][~mine], values[~mine])


def test_latent_of_an_unseen_batch():
    adata = cells()
    model = sv.fit(adata, batch_key="batch", train=brief(max_epochs=1), device="cpu", progress=False)
    z = model.latent(adata)
    other = adata.copy()
    other.obs["batch"] = "never seen"
    assert np.array_equal(model.latent(other), z)
    del other.obs["batch"]
    assert np.array_equal(model.latent(other), z)
    with pytest.raises(UserError):
        model.elbo(other)
