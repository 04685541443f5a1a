import dataclasses

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from _data import brief, cells, choose, packed
from _samples import stored

import scvi_core as sv
from scvi_core import cli, posterior, steps, stream
from scvi_core.config import ModelConfig
from scvi_core.files import UserError
from scvi_core.kernels import Nonzeros
from scvi_core.model import Posterior, build


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


@pytest.mark.parametrize("library", ["observed", "latent"])
def test_marginal_log_likelihood_of_a_linear_gaussian_model(library, monkeypatch):
    """Where x is normal around a line in z (and log l), p(x) is a normal density: found, and as fast as 1 / sqrt(n)."""
    model, counts = random_model(library, n=40, n_latent=2)
    rng = np.random.default_rng(0)
    slope, noise = rng.normal(size=(4, 3)) * [1, 1, library == "latent"], 0.6

    def seen(cells):
        return cells.x.dense()[:, :4].log1p().double()

    def log_likelihood(cells, z_nk, log_library_n):
        mean = torch.cat([z_nk, log_library_n[:, None]], 1).double() @ torch.from_numpy(slope).T
        return torch.distributions.Normal(mean, noise).log_prob(seen(cells)).sum(1)

    every = counts.gather(torch.arange(40))
    y, exact, means, variances = seen(every).numpy(), [], [], []
    for n, s in enumerate(every.batch_n):
        centre, spread = np.zeros(3), np.ones(3)
        if library == "latent":
            centre[2], spread[2] = model.library_mean_s[s], model.library_variance_s[s]
        covariance = slope * spread @ slope.T + noise**2 * np.eye(4)
        exact.append(scipy.stats.multivariate_normal(slope @ centre, covariance).logpdf(y[n]))
        posterior_covariance = np.linalg.inv(np.diag(1 / spread) + slope.T @ slope / noise**2)
        mean = posterior_covariance @ (centre / spread + slope.T @ y[n] / noise**2)
        variance = np.diag(posterior_covariance)
        means.append(mean + 0.3 * np.sqrt(variance))  # a proposal that is a little beside, too wide and uncorrelated
        variances.append(1.5 * variance)
    mean, variance = (torch.from_numpy(np.array(a)).float() for a in (means, variances))
    at = {tuple(row.tolist()): n for n, row in enumerate(seen(every))}

    def encode(cells):
        n = [at[tuple(row.tolist())] for row in seen(cells)]
        of_library = (mean[n, 2], variance[n, 2]) if library == "latent" else (None, None)
        return Posterior(mean[n, :2], variance[n, :2], *of_library)

    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "log_likelihood", log_likelihood)
    error = [posterior.marginal_log_likelihood(model, counts, n, seed=3) - exact for n in (30, 300, 3000)]
    rms = [np.sqrt((e**2).mean()) for e in error]
    assert rms[1] < rms[0] / 2 and rms[2] < rms[1] / 2 and rms[2] < 0.03, rms


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


def test_expression_samples_and_averages_over_batches(monkeypatch):
    model, counts = random_model("latent", n=30)
    genes = np.array([3, 20])
    draws = posterior.expression_samples(model, counts, genes, None, n_samples=6, seed=4)
    assert draws.shape == (6, 30, 2) and draws.dtype == np.float32 and (draws.std(0) > 0).all()
    mean = posterior.normalized_expression(model, counts, genes, None, n_samples=6, seed=4)
    np.testing.assert_allclose(draws.mean(0), mean, rtol=1e-5)
    under = [posterior.normalized_expression(model, counts, genes, 1e4, s) for s in (0, 1, [0, 1], [1])]
    np.testing.assert_allclose(under[2], (under[0] + under[1]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(under[3], under[1])
    monkeypatch.setattr(posterior.blocks, "__defaults__", (None, 7))
    parts = list(posterior.expression_blocks(model, counts, genes))
    assert [at.stop for at, _ in parts] == [7, 14, 21, 28, 30]
    assert all(values.shape == (at.stop - at.start, 2) and values.dtype == np.float32 for at, values in parts)
    for more, match in (({"library_size": 0.0}, "library_size: 0.0 is not"), ({"n_samples": 0}, "n_samples: 0 is")):
        with pytest.raises(UserError, match=match):
            posterior.normalized_expression(model, counts, genes, **more)


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_posterior_predictive_moments(likelihood, dispersion, monkeypatch):
    """Mean, variance and zeros of many replicates of three cells, against the closed forms, at known z and l."""
    model, counts = random_model("latent", likelihood=likelihood, dispersion=dispersion)
    encode, many = model.encode, 5000
    still = {"variance_nk": torch.zeros(()), "library_variance_n": torch.zeros(())}
    monkeypatch.setattr(model, "encode", lambda cells: dataclasses.replace(encode(cells), **still))
    x = posterior.posterior_predictive(model, counts, seed=2, rows=np.repeat([5, 0, 2], many)).toarray()
    three = counts.gather(torch.tensor([5, 0, 2]))
    with torch.no_grad():
        q = encode(three)
        hidden = model.hidden(q.mean_nk, three.batch_n, three.covariates_nc)
        mu = (torch.softmax(model.rho(hidden), 1) * q.library_mean_n.exp()[:, None]).double().numpy()
        pi = model.dropout_logit(hidden).sigmoid().double().numpy() if likelihood == "zinb" else np.zeros_like(mu)
        if likelihood == "poisson":
            plain = scipy.stats.poisson(mu)
        else:
            log_theta = (
                model.log_theta(hidden)
                if dispersion == "gene-cell"
                else model.log_theta_sg[three.batch_n % (2 if dispersion == "gene-batch" else 1)]
            )
            theta = log_theta.double().exp().numpy()
            plain = scipy.stats.nbinom(theta, theta / (theta + mu))
    mean, zero = (1 - pi) * plain.mean(), pi + (1 - pi) * plain.pmf(0)
    variance = (1 - pi) * plain.var() + pi * (1 - pi) * plain.mean() ** 2
    got = x.reshape(3, many, 25)
    assert (np.abs(got.mean(1) - mean) < 5 * np.sqrt(variance / many)).all()
    assert (np.abs((got == 0).mean(1) - zero) < 5 * np.sqrt(zero * (1 - zero) / many) + 1e-9).all()
    np.testing.assert_allclose(got.var(1).sum(), variance.sum(), rtol=0.2)


def test_posterior_predictive_draws_from_the_posterior():
    """At any z and l of the posterior: the mean of replicates is that of l rho. Sparse, and the same every time."""
    model, counts = random_model("latent", likelihood="poisson")
    x = posterior.posterior_predictive(model, counts, seed=1)
    assert sp.isspmatrix_csr(x) and x.dtype == np.int32 and x.shape == (12, 25) and x.has_canonical_format
    assert (x != posterior.posterior_predictive(model, counts, seed=1)).nnz == 0
    assert (x != posterior.posterior_predictive(model, counts, seed=2)).nnz > 0
    many = 4000
    x = posterior.posterior_predictive(model, counts, seed=1, rows=np.full(many, 4)).toarray()
    mean = posterior.expression_samples(model, counts, np.arange(25), None, n_samples=many)[:, 4]
    error = np.sqrt((x.var(0) + mean.var(0)) / many)
    assert (np.abs(x.mean(0) - mean.mean(0)) < 5 * error).all()
    assert posterior.posterior_predictive(model, counts, rows=np.array([], dtype=int)).shape == (0, 25)


def test_uncertainty_and_library():
    model, counts = random_model("latent", n_latent=3)
    every = counts.gather(torch.arange(12))
    with torch.no_grad():
        q = model.encode(every)
    std = posterior.latent_std(model, counts)
    assert std.dtype == np.float32
    np.testing.assert_allclose(std, q.variance_nk.sqrt().numpy(), rtol=1e-6)
    np.testing.assert_allclose(posterior.uncertainty(std), q.variance_nk.mean(1).numpy(), rtol=1e-5)
    assert posterior.uncertainty(np.ones((2, 3), dtype=np.float32)).tolist() == [1, 1]
    size = posterior.latent_library(model, counts)
    exact = scipy.stats.lognorm(s=q.library_variance_n.sqrt().numpy(), scale=q.library_mean_n.exp().numpy()).mean()
    np.testing.assert_allclose(size, exact, rtol=1e-5)
    assert size.dtype == np.float64
    model, counts = random_model("observed")
    assert np.array_equal(posterior.latent_library(model, counts), counts.library_n.numpy())


def test_gene_correlation_against_numpy(monkeypatch):
    model, counts = random_model(n=40, n_latent=3)
    genes = np.array([7, 2, 19, 0])
    monkeypatch.setattr(posterior.blocks, "__defaults__", (None, 7))
    for batch in (None, 1, [0, 1]):
        got = posterior.gene_correlation(model, counts, genes, batch, n_samples=4, seed=5)
        draws = posterior.expression_samples(model, counts, genes, 1.0, batch, n_samples=4, seed=5)
        np.testing.assert_allclose(got, np.corrcoef(np.log(draws.astype(float)).reshape(-1, 4).T), atol=1e-5)
        assert got.dtype == np.float64 and np.array_equal(got, got.T) and (np.diag(got) == 1).all()


@pytest.fixture(scope="module")
def fitted():
    adata = cells()
    small = ModelConfig(n_hidden=8, n_latent=2, library="latent")
    return adata, sv.fit(adata, "batch", model=small, train=brief(max_epochs=1), device="cpu", progress=False)


def test_what_a_notebook_calls(fitted):
    adata, model = fitted
    assert model.latent_std(adata).shape == (60, 2) and model.latent_library_size(adata).shape == (60,)
    x = model.posterior_predictive(adata, seed=3)
    assert x.shape == (60, 25) and (x != model.posterior_predictive(adata, seed=3)).nnz == 0
    table = model.gene_correlation(adata, ["Name4", "G3"])
    assert list(table.columns) == list(table.index) == ["Name4", "G3"] and table.loc["G3", "G3"] == 1
    every = model.normalized_expression(adata, transform_batch=model.schema.batches)
    one_by_one = [model.normalized_expression(adata, transform_batch=name) for name in ("b0", "b1")]
    np.testing.assert_allclose(every, (one_by_one[0] + one_by_one[1]) / 2, rtol=1e-5)
    draws = model.expression_samples(adata, ["G3", "Name4"], transform_batch=["b1"], n_samples=10)
    np.testing.assert_allclose(draws.mean(0), one_by_one[1][["G3", "G4"]], rtol=1e-5)
    for ask, match in (
        (lambda: model.normalized_expression(adata, transform_batch=["b0", "b7"]), "'b7' is not one of b0, b1"),
        (lambda: model.normalized_expression(adata, transform_batch=[]), "'' is not one of b0, b1"),
        (lambda: model.normalized_expression(adata, library_size=-1), "library_size: -1 is not a positive number"),
        (lambda: model.gene_correlation(adata, ["nope"]), "'nope' is not one of the model's 25 genes"),
        (lambda: model.gene_correlation(adata[:1], ["G3"]), "two or more"),
    ):
        with pytest.raises(UserError, match=match):
            ask()


@pytest.mark.parametrize("memory", ["whole", "streamed"])
def test_expression_and_embedding_to_files(tmp_path, fitted, memory, monkeypatch):
    adata, model = fitted
    monkeypatch.setattr(posterior.blocks, "__defaults__", (None, 7))
    monkeypatch.setattr(steps, "use_threads", lambda _: None)  # these are the whole process'
    store, folder = stored(tmp_path, adata), tmp_path / "model"
    model.save(folder)
    whole = steps.read_store(store)
    config = "{}"
    if memory == "streamed":
        monkeypatch.setattr(stream, "BLOCK", 250)  # non-zeros
        config = '{"train": {"memory_gb": 2e-6}}'
        loaded = sv.load(folder)
        _, counts = steps.open_store(store, loaded, 2e-6)
        assert isinstance(counts, stream.Stream)
    cli.embed(store, folder, tmp_path / "z.parquet", config, tmp_path / "std.parquet")
    z, std = pd.read_parquet(tmp_path / "z.parquet"), pd.read_parquet(tmp_path / "std.parquet")
    assert list(z) == ["cell_id", "z_0", "z_1"] and list(std) == ["cell_id", "uncertainty", "std_0", "std_1"]
    assert np.array_equal(z[["z_0", "z_1"]], model.latent(whole))
    assert np.array_equal(std[["std_0", "std_1"]], model.latent_std(whole)) and (std.dtypes[1:] == "float32").all()

    (tmp_path / "genes.txt").write_text("Name4\n\n G3 \n")
    out = tmp_path / "expression.parquet"
    for size in ("own", "100"):
        cli.expression(store, folder, out, f"@{tmp_path}/genes.txt", ["b1", "b0"], size, 3, config)
        frame = pd.read_parquet(out)
        assert list(frame) == ["cell_id", "G4", "G3"] and list(frame["cell_id"]) == list(whole.obs_names)
        given = {"library_size": None if size == "own" else 100.0, "transform_batch": ["b0", "b1"], "n_samples": 3}
        assert frame["G4"].dtype == np.float32
        np.testing.assert_allclose(frame[["G4", "G3"]], model.normalized_expression(whole, ["G4", "G3"], **given), 1e-5)
    first = out.read_bytes()
    cli.expression(store, folder, out, "Name4,G3", ["b1", "b0"], "100", 3, config)
    assert out.read_bytes() == first
    for more, match in (
        ({"genes": "G3,Name3"}, "'G3' is asked for twice"),
        ({"genes": "nope"}, "'nope' is not one of the model's 25 genes"),
        ({"genes": " ,"}, "names no gene"),
        ({"batch": ["b7"]}, "'b7' is not one of b0, b1"),
        ({"library_size": "much"}, "neither a number nor 'own'"),
        ({"library_size": "-1"}, "is not a positive number"),
    ):
        with pytest.raises(UserError, match=match):
            cli.expression(store, folder, out, **{"config": config, **more})
    assert out.read_bytes() == first and not list(tmp_path.glob(".*"))


def test_row_groups(tmp_path):
    """Of 10^6 values or a little more, whatever the blocks; the last of what is left."""
    ids, values = [f"c{n}" for n in range(2600)], np.random.default_rng(0).random((2600, 1000), dtype=np.float32)
    places = [slice(start, min(start + 700, 2600)) for start in range(0, 2600, 700)]
    genes = [f"G{g}" for g in range(1000)]
    steps.write_expression(tmp_path / "e.parquet", ids, genes, ((at, values[at]) for at in places))
    file = pq.ParquetFile(tmp_path / "e.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1400, 1200]
    assert file.metadata.row_group(0).column(5).compression == "ZSTD"
    table = file.read().to_pandas()
    assert list(table["cell_id"]) == ids and np.array_equal(table[genes], values)


def test_a_store_of_more_genes_than_the_model_has(tmp_path, fitted, caplog):
    adata, model = fitted
    other = sv.fit(adata[:, 3:], "batch", model=model.model, train=brief(max_epochs=1), device="cpu", progress=False)
    store = stored(tmp_path, adata)
    ids, counts = steps.open_store(store, other, 8.0, design=False)
    assert len(ids) == len(counts) == 60 and counts.n_genes == 22
    assert np.array_equal(posterior.latent(other.network, counts), other.latent(steps.read_store(store)))


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
