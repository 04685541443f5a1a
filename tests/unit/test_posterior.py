import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _data import brief, cells, choose, packed

import scvi_core as sv
from scvi_core import posterior
from scvi_core.config import DeConfig, ModelConfig
from scvi_core.counts import Schema, pack
from scvi_core.files import UserError
from scvi_core.kernels import Nonzeros
from scvi_core.model import build
from scvi_core.posterior import DE_COLUMNS, called_at_fdr, differential_expression

ARCHITECTURE = """
group reference gene_id gene_name lfc_mean lfc_median lfc_std lfc_ci_low
lfc_ci_high proba_de proba_not_de bayes_factor scale_group scale_reference raw_mean_group
raw_mean_reference nonzero_group nonzero_reference is_de rank
"""


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
    monkeypatch.setattr(posterior._blocks, "__defaults__", (None, 7))
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


# ---- differential expression of a decoder that is known


N_GENES = 40
UP, DOWN = range(1, 6), range(6, 11)  # genes that z moves; the others stand still


def known(effect=1.0, spread=-9.0, batch_effect=0.0):
    """A decoder set by hand: z = log(1 + count of gene 0), rho = softmax(base + slope z). Three groups by gene 0."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], (40, 50, 60))
    x = rng.poisson(3, (150, N_GENES)) + 1
    x[:, 0] = np.array([0, 1, 7])[kind]
    obs = pd.DataFrame(
        {"kind": np.array(["none", "low", "high"])[kind], "batch": np.array(["p", "q"])[np.arange(150) % 2]}
    )
    obs.index = [f"c{i}" for i in range(150)]
    adata = ad.AnnData(x.astype(np.float32), obs, pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))
    schema = Schema.of(adata, "batch")
    counts = pack(adata, schema)
    model = build(ModelConfig(likelihood="poisson", n_latent=1, n_hidden=2), N_GENES, 2, 0, 0).eval()
    slope = torch.zeros(N_GENES)
    slope[list(UP)], slope[list(DOWN)] = effect, -effect
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in (model.encoder.layers[0], model.decoder[0]):
            layer.norm.running_var.fill_(1 - 1e-3)
            layer.norm.weight.fill_(1)
        model.encoder.layers[0].linear.weight_gh[0, 0] = 1  # log1p of gene 0
        model.encoder.mean.weight[0, 0] = 1
        model.encoder.log_variance.bias.fill_(spread)
        model.decoder[0].linear.weight[0, 0] = 1
        model.decoder[0].linear.weight[1, 2] = 1  # batch q
        model.rho.weight[:, 0] = slope
        model.rho.weight[30:, 1] = batch_effect
        model.rho.bias.copy_(torch.linspace(-1, 1, N_GENES))
    base = np.linspace(-1, 1, N_GENES)[None] + np.log1p([[0], [1], [7]]) * slope.numpy()[None]
    rho = np.exp(base) / np.exp(base).sum(1, keepdims=True)
    return model, counts, adata, pd.DataFrame(rho, index=["none", "low", "high"])


def table(model, counts, adata, seed=0, **more):
    config = DeConfig(**{"n_samples": 2000, **more})
    names = [f"Name{i}" for i in range(N_GENES)]
    return differential_expression(model, counts, adata.obs["kind"], list(adata.var_names), names, config, seed)


def test_de_of_a_known_decoder():
    model, counts, adata, rho = known()
    found = table(model, counts, adata)
    assert list(found.columns) == DE_COLUMNS == ARCHITECTURE.split()
    assert found["group"].unique().tolist() == ["high", "low", "none"] and len(found) == 3 * N_GENES
    sizes = {"none": 40, "low": 50, "high": 60}
    c = 0.01 / float(counts.library_n.median())
    for group, part in found.groupby("group"):
        assert part["rank"].tolist() == list(range(1, N_GENES + 1)) and (part["reference"] == "rest").all()
        assert (part["lfc_median"] * np.sqrt(part["nonzero_group"])).is_monotonic_decreasing
        part = part.set_index("gene_id").loc[list(adata.var_names)]
        assert part["gene_name"].tolist() == [f"Name{i}" for i in range(N_GENES)]
        others = {k: v for k, v in sizes.items() if k != group}
        lfc = sum(n * (np.log2(rho.loc[group] + c) - np.log2(rho.loc[k] + c)) for k, n in others.items())
        lfc = (lfc / sum(others.values())).to_numpy()
        np.testing.assert_allclose(part["lfc_mean"], lfc, atol=0.12)
        reference = sum(n * rho.loc[k] for k, n in others.items()) / sum(others.values())
        np.testing.assert_allclose(part["scale_group"], rho.loc[group], rtol=0.02)
        np.testing.assert_allclose(part["scale_reference"], reference, rtol=0.08)
        mine = (adata.obs["kind"] == group).to_numpy()
        np.testing.assert_allclose(part["raw_mean_group"], adata.X[mine].mean(0), rtol=1e-5)
        np.testing.assert_allclose(part["raw_mean_reference"], adata.X[~mine].mean(0), rtol=1e-5)
        np.testing.assert_allclose(part["nonzero_group"], (adata.X[mine] > 0).mean(0), rtol=1e-5)
        np.testing.assert_allclose(part["nonzero_reference"], (adata.X[~mine] > 0).mean(0), rtol=1e-5)
        np.testing.assert_allclose(part["proba_not_de"], 1 - part["proba_de"])
        assert np.array_equal(part["is_de"], called_at_fdr(part["proba_de"].to_numpy(), 0.05))
        assert (part["lfc_ci_low"] <= part["lfc_median"]).all() and (part["lfc_median"] <= part["lfc_ci_high"]).all()
    high = found[found["group"] == "high"].set_index("gene_id")
    moved = [f"G{i}" for i in (*UP, *DOWN)]
    assert high.loc[moved, "is_de"].all() and (high.loc[moved[:5], "lfc_mean"] > 1).all()
    assert (high.loc[moved[5:], "lfc_mean"] < -1).all() and set(high.nsmallest(5, "rank").index) == set(moved[:5])


def test_null_genes_are_not_called():
    """Nothing moves but z itself: no gene is called, however wide the posterior."""
    for spread in (-9.0, 0.0):
        model, counts, adata, _ = known(effect=0.0, spread=spread)
        found = table(model, counts, adata)
        assert not found["is_de"].any() and (found["lfc_mean"].abs() < 1e-5).all()
    # a posterior as wide as the effect, with mass on both sides, is not change
    model, counts, adata, _ = known(spread=4.0)
    with torch.no_grad():
        model.encoder.mean.weight.zero_()
        model.encoder.mean.bias.fill_(5.0)
    found = table(model, counts, adata)
    assert not found["is_de"].any() and (found["proba_de"] < 0.75).all()


def test_batches_are_averaged_out():
    """Genes that differ by batch alone are no markers, although the groups' batches differ."""
    model, counts, adata, _ = known(batch_effect=2.0)
    skewed = pd.Series(np.where(counts.batch_n.numpy() == 1, "x", "y"), adata.obs_names, name="kind")
    adata.obs["kind"] = skewed
    corrected = table(model, counts, adata, batch_correction=True)
    plain = table(model, counts, adata, batch_correction=False)
    late = [f"G{i}" for i in range(30, 40)]
    assert not corrected[corrected["gene_id"].isin(late)]["is_de"].any()
    assert plain[plain["gene_id"].isin(late)]["is_de"].all()


def test_de_is_the_seeds_and_blocks_of_genes_do_not_matter(monkeypatch):
    model, counts, adata, _ = known(spread=-1.0)
    first, again, other = (table(model, counts, adata, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)
    pd.testing.assert_series_equal(first["lfc_mean"].sort_values(), other["lfc_mean"].sort_values(), atol=0.3,
                                   check_index=False)  # fmt: skip
    vanilla = table(model, counts, adata, mode="vanilla")
    high = vanilla[vanilla["group"] == "high"].set_index("gene_id")
    assert (high.loc[["G1", "G6"], "proba_de"] > 0.9).all() and (vanilla["proba_de"] >= 0.5 - 1e-3).sum() > 0


def test_types_of_the_table():
    model, counts, adata, _ = known()
    found = table(model, counts, adata, n_samples=200)
    for column in DE_COLUMNS:
        kind = found[column].dtype
        if column in ("group", "reference", "gene_id", "gene_name"):
            assert pd.api.types.is_string_dtype(found[column]), column
        else:
            assert kind == {"is_de": bool, "rank": np.int32}.get(column, np.float64), column
    assert found.notna().all(axis=None) and np.isfinite(found.select_dtypes("number")).all(axis=None)


def test_small_groups_and_missing_labels():
    model, counts, adata, _ = known()
    kinds = adata.obs["kind"].astype(object)
    kinds.iloc[:40] = None  # every "none"
    kinds.iloc[40:43] = "tiny"
    adata.obs["kind"] = kinds
    found = table(model, counts, adata, n_samples=200)
    assert found["group"].unique().tolist() == ["high", "low"]
    adata.obs["kind"] = "all"
    with pytest.raises(UserError, match="1 groups of 'kind' have 5 cells or more; two are needed"):
        table(model, counts, adata)


def test_called_at_fdr_by_brute_force():
    rng = np.random.default_rng(0)
    for trial in range(200):
        proba = rng.beta(0.5, 0.5, rng.integers(1, 30))
        if trial % 3 == 0:
            proba = np.round(proba, 1)  # ties
        earlier = 0
        for fdr in (0.0111, 0.0512, 0.2013, 0.5014):
            called = called_at_fdr(proba, fdr)
            best = 0
            for k in range(1, len(proba) + 1):
                if np.mean(1 - np.sort(proba)[::-1][:k]) <= fdr:
                    best = k
            assert called.sum() == best >= earlier and called.dtype == bool
            if 0 < best < len(proba):
                assert proba[called].min() >= proba[~called].max()
            earlier = best
    assert not called_at_fdr(np.zeros(5), 0.05).any() and called_at_fdr(np.ones(5), 0.05).all()


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
