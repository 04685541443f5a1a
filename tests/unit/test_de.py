import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scvi_core.config import DeConfig, ModelConfig
from scvi_core.counts import Schema, pack
from scvi_core.de import DE_COLUMNS, called_at_fdr, differential_expression
from scvi_core.files import UserError
from scvi_core.model import build

ARCHITECTURE = """
group reference gene_id gene_name lfc_mean lfc_median lfc_std lfc_ci_low
lfc_ci_high proba_de proba_not_de bayes_factor scale_group scale_reference raw_mean_group
raw_mean_reference nonzero_group nonzero_reference is_de rank
"""


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
