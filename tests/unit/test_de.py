import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _data import brief, cells, choose
from _samples import stored
from scipy.stats import norm

import scvi_core as sv
from scvi_core import cli, de, stream
from scvi_core.config import DeConfig, ModelConfig
from scvi_core.counts import Schema, pack
from scvi_core.de import (
    DE_COLUMNS,
    _effective,
    _shares,
    _weights,
    called_at_fdr,
    differential_expression,
    estimate_delta,
    weakest,
)
from scvi_core.files import Decisions, UserError
from scvi_core.model import build
from scvi_core.preprocess.store import read_store

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
    config = DeConfig(**{"n_samples": 2000, "compare": "cells", **more})  # the counts are not those of this decoder
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
    corrected = table(model, counts, adata, batches="all")
    plain = table(model, counts, adata, batches="own")
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


# ---- what may be asked besides


@pytest.mark.parametrize("how", ["compiled", "plain"])
def test_summary_of_pairs(how, monkeypatch):
    """Mean, spread, ranks and shares beyond delta, by NumPy; ties, a constant gene, far outliers."""
    choose(how, monkeypatch)
    rng = np.random.default_rng(0)
    log_gm = rng.normal(size=(6, 900)).astype(np.float32)
    log_gm[1] = 3.0
    log_gm[2] = np.round(log_gm[2])
    log_gm[3, :5] = 1e4
    log_gm[4] *= 1e-4
    for n_pairs in (2, 100, 2001):
        a_m, b_m = (rng.integers(0, 900, n_pairs).astype(np.int32) for _ in range(2))
        one = de.Comparison(
            "a", "b", 0, [1], np.arange(1), np.ones((2, 1)), torch.from_numpy(a_m), torch.from_numpy(b_m)
        )
        mean, median, spread, low, high, proba = de._of_pairs(torch.from_numpy(log_gm), one, 0.25)
        lfc = log_gm[:, a_m] - log_gm[:, b_m]
        np.testing.assert_allclose(mean, lfc.mean(1, dtype=float), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(spread, lfc.std(1, ddof=1, dtype=float), rtol=1e-4, atol=1e-6)
        ordered = np.sort(lfc, 1)
        for got, q in ((low, 0.025), (median, 0.5), (high, 0.975)):
            np.testing.assert_array_equal(got, ordered[:, round(q * (n_pairs - 1))])
        np.testing.assert_allclose(proba, np.maximum((lfc > 0.25).mean(1), (lfc < -0.25).mean(1)))
    log_gm[0, 0] = np.nan  # a damaged model must not crash the process
    de._of_pairs(torch.from_numpy(log_gm), one, 0.25)


def test_pairs_of_groups():
    model, counts, adata, rho = known()
    found = table(model, counts, adata, reference="pairs")
    assert found[["group", "reference"]].drop_duplicates().to_numpy().tolist() == [
        ["high", "low"], ["high", "none"], ["low", "none"]
    ]  # fmt: skip
    c = 0.01 / float(counts.library_n.median())
    for (a, b), part in found.groupby(["group", "reference"]):
        part = part.set_index("gene_id").loc[list(adata.var_names)]
        assert sorted(part["rank"]) == list(range(1, N_GENES + 1))
        np.testing.assert_allclose(part["lfc_mean"], np.log2(rho.loc[a] + c) - np.log2(rho.loc[b] + c), atol=0.05)
        np.testing.assert_allclose(part["scale_reference"], rho.loc[b], rtol=0.02)
        there = (adata.obs["kind"] == b).to_numpy()
        np.testing.assert_allclose(part["raw_mean_reference"], adata.X[there].mean(0), rtol=1e-5)
        np.testing.assert_allclose(part["nonzero_reference"], (adata.X[there] > 0).mean(0), rtol=1e-5)


def test_weakest_of_all_pairs():
    model, counts, adata, rho = known()
    pairs = table(model, counts, adata, reference="pairs")
    least = weakest(pairs)
    assert list(least.columns) == DE_COLUMNS and len(least) == 3 * N_GENES
    c = 0.01 / float(counts.library_n.median())
    for group, part in least.groupby("group"):
        assert part["rank"].tolist() == list(range(1, N_GENES + 1))
        part = part.set_index("gene_id").loc[list(adata.var_names)]
        log = np.log2(rho + c)
        expected = (log.loc[group] - log.drop(index=group)).min()
        np.testing.assert_allclose(part["lfc_median"], expected, atol=0.05)
        np.testing.assert_allclose(part["scale_group"], rho.loc[group], rtol=0.02)
        assert (part["lfc_ci_low"] <= part["lfc_ci_high"]).all() and (part["reference"] != group).all()
        mine = (adata.obs["kind"] == group).to_numpy()
        np.testing.assert_allclose(part["raw_mean_group"], adata.X[mine].mean(0), rtol=1e-5)


def test_vanilla_is_the_papers_bayes_factor():
    model, counts, adata, _ = known(spread=0.0)
    found = table(model, counts, adata, mode="vanilla", reference="pairs")
    np.testing.assert_allclose(
        found["bayes_factor"], np.log((found["proba_de"] + 1e-8) / (1 - found["proba_de"] + 1e-8)), rtol=1e-9
    )
    # z of a cell is normal about log1p of its gene 0, with variance 1: P(rho_a > rho_b) of a gene that rises with z
    one = found[(found["group"] == "high") & (found["reference"] == "none")].set_index("gene_id").loc["G1"]
    assert abs(one["proba_de"] - norm.cdf(np.log(8) / np.sqrt(2))) < 0.02


def test_within_batches():
    """Groups made of different batches in part: what differs by batch alone shows in `own`, and not within batches."""
    model, counts, adata, _ = known(batch_effect=2.0)
    batch_n = counts.batch_n.numpy()
    kinds = np.where(batch_n == 1, "x", "y").astype(object)
    kinds[np.flatnonzero(batch_n == 0)[:10]] = "x"  # x: 75 cells of q and 10 of p; y: p alone
    adata.obs["kind"] = kinds
    late = [f"G{i}" for i in range(30, 40)]
    made = Decisions("de")
    config = DeConfig(n_samples=2000, batches="within")
    ids = list(adata.var_names)
    within = differential_expression(model, counts, adata.obs["kind"], ids, ids, config, 0, made)
    assert not within[within["gene_id"].isin(late)]["is_de"].any()
    told = {d.what: d for d in made}
    assert told["batches compared within"].value == ["x against rest: 1", "y against rest: 1"]
    own = table(model, counts, adata, batches="own")
    lfc = {
        name: t[t["gene_id"].isin(late) & (t["group"] == "x")]["lfc_mean"] for name, t in (("in", within), ("own", own))
    }
    assert lfc["own"].min() > 0.8 and lfc["in"].abs().max() < 0.5
    made = Decisions("de")
    differential_expression(model, counts, adata.obs["kind"], ids, ids, DeConfig(n_samples=500), 0, made)
    assert {d.what: d.value for d in made}["groups absent from batches"] == {"y": 1}
    adata.obs["kind"] = np.where(batch_n == 1, "x", "y")
    with pytest.raises(UserError, match="no batch has 5 cells of two groups"):
        table(model, counts, adata, batches="within")
    with pytest.raises(UserError, match="no group has 75 cells in any one batch"):
        adata.obs["kind"] = np.repeat(["x", "y"], 75)  # half of each in either batch
        table(model, counts, adata, batches="within", min_cells=75, n_samples=100)


def test_means_against_a_bootstrap():
    """The estimate is the model's; its spread that of the counts' means over resampled cells, or over batches."""
    model, counts, adata, rho = known()
    c = 0.01 / float(counts.library_n.median())
    share = adata.X / adata.X.sum(1, keepdims=True)
    rng, kinds, batch = np.random.default_rng(0), adata.obs["kind"].to_numpy(), adata.obs["batch"].to_numpy()

    def means(kind, rows):
        mine = np.flatnonzero((kinds == kind) & rows)
        return share[mine[rng.integers(0, len(mine), (2000, len(mine)))]].mean(1)

    every = np.ones(150, bool)
    boot = np.log2(means("high", every) + c) - np.log2(means("none", every) + c)
    lfc_bg = np.array(
        [np.log2(share[(kinds == "high") & (batch == b)].mean(0) + c)
         - np.log2(share[(kinds == "none") & (batch == b)].mean(0) + c) for b in ("p", "q")]
    )  # fmt: skip
    expected = np.maximum(boot.std(0), np.abs(lfc_bg[0] - lfc_bg[1]) / 2)
    found = table(model, counts, adata, compare="means", reference="pairs", balance=False)
    one = found[(found["group"] == "high") & (found["reference"] == "none")].set_index("gene_id").loc[adata.var_names]
    np.testing.assert_allclose(one["lfc_mean"], np.log2(rho.loc["high"] + c) - np.log2(rho.loc["none"] + c), atol=0.1)
    inside = np.arange(N_GENES) > 0  # gene 0 tells the groups: none has no spread there
    np.testing.assert_allclose(one["lfc_std"][inside], expected[inside], rtol=0.1)
    # the counts' own: both sides' means of the batches, each batch with the same weight in both
    weight, a, b = 0.0, 0.0, 0.0
    for name in ("p", "q"):
        mine, theirs = ((kinds == kind) & (batch == name) for kind in ("high", "none"))
        w = 1 / (1 / mine.sum() + 1 / theirs.sum())
        weight, a, b = weight + w, a + w * share[mine].mean(0), b + w * share[theirs].mean(0)
    counted = np.log2(a / weight + c) - np.log2(b / weight + c)
    above, below = (
        np.minimum(*(norm.sf((0.25 - sign * lfc) / one["lfc_std"]) for lfc in (one["lfc_mean"], counted)))
        for sign in (1, -1)
    )
    np.testing.assert_allclose(one["proba_de"], np.maximum(above, below), rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(one["lfc_ci_high"] - one["lfc_ci_low"], 2 * 1.959964 * one["lfc_std"], rtol=1e-5)


def test_a_gene_never_seen_is_not_surely_changed():
    """The model says that it changes, but no count was ever seen: nothing is known of it."""
    model, counts, adata, _ = known(effect=0.5)
    adata.X[:, 1] = 0
    counts = pack(adata, Schema.of(adata, "batch"))
    found = table(model, counts, adata, compare="means").set_index(["group", "gene_id"])
    for group in ("high", "low", "none"):
        assert found.loc[(group, "G1"), "lfc_std"] > 1 and found.loc[(group, "G1"), "proba_de"] < 0.7
    assert found.loc[("high", "G2"), "lfc_std"] < 0.3


def drawn(effect=1.0, n_cells=900, batches=("p", "q")):
    """Counts of `known`'s decoder, three groups in two batches or, group by group, in one each."""
    model, _, _, rho = known(effect)
    rng = np.random.default_rng(1)
    kind = rng.choice(["none", "low", "high"], n_cells)
    x = rng.poisson(200 * rho.loc[kind].to_numpy())
    x[:, 0] = pd.Series(kind).map({"none": 0, "low": 1, "high": 7})
    batch = np.where(kind == "high", batches[0], batches[1]) if batches[0] == "h" else rng.choice(batches, n_cells)
    obs = pd.DataFrame({"kind": kind, "batch": batch}, index=[f"c{i}" for i in range(n_cells)])
    adata = ad.AnnData(x.astype(np.float32), obs, pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))
    return model, pack(adata, Schema.of(adata, "batch")), adata


def test_means_find_what_is_there_and_nothing_else():
    """By default: groups whose cells come from the decoder, and halves of a group, which differ by nothing."""
    model, counts, adata = drawn()
    found = table(model, counts, adata, compare=DeConfig().compare).set_index(["group", "gene_id"])
    moved = [f"G{i}" for i in (*UP, *DOWN)]
    assert found.loc["high"].loc[moved, "is_de"].all() and (found.loc["high"].loc[moved[:5], "rank"] <= 5).all()
    half = np.where(np.random.default_rng(2).random(adata.n_obs) < 0.5, "x", "y")
    adata.obs["kind"] = pd.Series(half, adata.obs_names).where(adata.obs["kind"] == "low")
    assert not table(model, counts, adata, compare="means")["is_de"].any()


def test_means_need_both_model_and_counts():
    """A model that sees a change where the counts have none, or none where they have one, calls none."""
    model, counts, adata = drawn()
    with torch.no_grad():
        model.rho.weight[1, 0], model.rho.weight[20, 0] = 0, 1  # G1 smoothed away, G20 made up
    found = table(model, counts, adata, compare="means").set_index(["group", "gene_id"])
    assert not found.loc[("high", "G1"), "is_de"] and not found.loc[("high", "G20"), "is_de"]
    assert found.loc[("high", "G2"), "is_de"] and abs(found.loc[("high", "G20"), "lfc_mean"]) > 1


@pytest.mark.parametrize("compare", ["means", "cells"])
def test_groups_that_share_no_batch_keep_what_tells_them_apart(compare):
    """Where each group was a batch, its effect is the batch's: decoded under all, it would vanish."""
    model, counts, adata = drawn(effect=0.0, batches=("h", "o"))
    adata.X[counts.batch_n.numpy() == 1, 30:] *= 3
    counts = pack(adata, Schema.of(adata, "batch"))
    with torch.no_grad():
        model.rho.weight[30:, 1] = np.log(3)  # the decoder knows: batch o has them threefold
    adata.obs["kind"] = adata.obs["batch"]
    late, made = [f"G{i}" for i in range(30, 40)], Decisions("de")
    ids = list(adata.var_names)
    config = DeConfig(compare=compare, n_samples=400)
    found = differential_expression(model, counts, adata.obs["kind"], ids, ids, config, 0, made)
    (told,) = [d for d in made if d.what == "batches"]
    assert told.value == "own" and "no batch holds two groups" in told.reason
    o = found[found["group"] == "o"].set_index("gene_id")
    assert o.loc[late, "is_de"].all() and (o.loc[late, "lfc_mean"] > 0.5).all()
    made = Decisions("de")
    config = config.model_copy(update={"batches": "all"})
    forced = differential_expression(model, counts, adata.obs["kind"], ids, ids, config, 0, made)
    assert not forced["is_de"].any() and any(d.what == "batches" and "taken out" in d.reason for d in made)
    assert any(d.what == "comparisons across batches" and len(d.value) == 2 for d in made)


def test_auto_decodes_under_all_batches_where_they_are_shared():
    model, counts, adata = drawn()
    found = [table(model, counts, adata, batches=batches, n_samples=400) for batches in ("auto", "all")]
    assert found[0].equals(found[1])


def test_the_largest_batch_does_not_decide():
    n_b = np.array([5000, 100, 20, 0])
    batch_n = np.repeat([0, 1, 2], n_b[:3])
    weight_n = _weights(batch_n, n_b)
    shares = np.bincount(batch_n, weight_n)
    np.testing.assert_allclose(shares, np.array([100, 100, 20]) / 220)
    # the rest of a group: 900 : 100 in the first batch, 10 : 90 in the second, which count alike
    n_kb = np.array([[900, 10], [100, 90]])
    np.testing.assert_allclose(_shares(n_kb, DeConfig(), 2)[:, 0], [(0.9 + 0.1) / 2, (0.1 + 0.9) / 2])
    np.testing.assert_allclose(_shares(n_kb, DeConfig(balance=False), 1)[:, 0], [910 / 1100, 190 / 1100])
    # cells of equal weight that tell as much: all of them where weights are equal
    np.testing.assert_allclose(_effective(np.array([[50, 60]]), DeConfig()), [110])
    np.testing.assert_allclose(
        _effective(n_b[None, :3], DeConfig()), [1 / (weight_n**2).sum()], rtol=1e-12
    )  # Kish's effective sample size


def test_delta_by_estimate():
    rng = np.random.default_rng(0)
    lfc = np.concatenate([rng.normal(0, 0.1, 800), rng.normal(2, 0.3, 100), rng.normal(-2, 0.3, 100)])
    assert 0.2 < estimate_delta(lfc) < 1.2
    assert estimate_delta(np.zeros(100)) == 0.1 == estimate_delta(np.ones(3))
    model, counts, adata, _ = known()
    made = Decisions("de")
    ids = list(adata.var_names)
    found = differential_expression(
        model, counts, adata.obs["kind"], ids, ids, DeConfig(compare="cells", delta="auto"), 0, made
    )
    told = next(d for d in made if d.what == "delta").value
    assert set(told) == {"high against rest", "low against rest", "none against rest"} and min(told.values()) >= 0.1
    high = found[found["group"] == "high"].set_index("gene_id")
    assert high.loc[["G1", "G6"], "is_de"].all()


@pytest.mark.parametrize("compare", ["cells", "means"])
@pytest.mark.parametrize("batches", ["all", "within", "own"])
def test_blocks_of_genes_do_not_matter(monkeypatch, compare, batches):
    model, counts, adata, _ = known(spread=-1.0)
    whole = table(model, counts, adata, compare=compare, batches=batches, n_samples=400)
    monkeypatch.setattr(de, "TILE", 3 * 1200)  # three genes at a time
    some = table(model, counts, adata, compare=compare, batches=batches, n_samples=400)
    pd.testing.assert_frame_equal(whole, some, rtol=1e-5, atol=1e-6)


def test_covariates_and_dispersion_by_batch_are_carried_along():
    """A fitted model with covariates and dispersion by batch answers; columns are whole."""
    adata = cells(n=80)
    config = ModelConfig(categorical_covariates=("day",), continuous_covariates=("age",), dispersion="gene-batch")
    model = sv.fit(adata, "batch", model=config, train=brief(max_epochs=1), device="cpu", progress=False)
    found = model.differential_expression(adata, "kind", config=DeConfig(n_samples=200))
    assert found.notna().all(axis=None) and len(found) == 3 * 25


def test_any_cells_against_any():
    adata = cells(n=80)
    model = sv.fit(adata, "batch", train=brief(max_epochs=1), device="cpu", progress=False)
    config = DeConfig(n_samples=200)
    t, b = ((adata.obs["kind"] == kind).to_numpy() for kind in ("T", "B"))
    found = model.differential_expression(adata, cells=t, reference=b, config=config)
    assert (found["group"] == "group").all() and (found["reference"] == "reference").all() and len(found) == 25
    x = adata.X.toarray()[:, [int(g[1:]) for g in found["gene_id"]]]
    np.testing.assert_allclose(found["raw_mean_group"], x[t].mean(0))
    np.testing.assert_allclose(found["raw_mean_reference"], x[b].mean(0))
    rest = model.differential_expression(adata, cells=t, config=config)
    np.testing.assert_allclose(sorted(rest["raw_mean_reference"]), sorted(adata.X.toarray()[~t].mean(0)))
    for given, told in [
        ({}, "give groupby, or a mask"),
        ({"groupby": "kind", "cells": t}, "give groupby, or a mask"),
        ({"cells": t[:5]}, "cells: give True or False for each of the 80 cells"),
        ({"cells": np.arange(80)}, "cells: give True or False"),
        ({"cells": t, "reference": t}, "cells are in both"),
        ({"groupby": "nothing"}, "no cell column 'nothing'"),
        ({"cells": np.zeros(80, bool)}, "1 groups of 'cells and reference' have 5 cells or more"),
    ]:
        with pytest.raises(UserError, match=told):
            model.differential_expression(adata, **given)


def test_streamed_counts_give_the_same(tmp_path, monkeypatch):
    """With room for so few blocks that no minibatch fits at once."""
    path = stored(tmp_path, cells(n=300, g=25))
    there = read_store(path, counts=False)
    schema, ids = Schema.of(there, "batch"), list(there.var_names)
    model = build(ModelConfig(), 25, 2, 0, 0).eval()
    monkeypatch.setattr(stream, "BLOCK", 200)
    whole = stream.open_counts(path, there, schema, 8.0)
    part = stream.open_counts(path, there, schema, 2000e-9)
    assert isinstance(part, stream.Stream)
    groups = pd.Series(np.random.default_rng(0).choice(["x", "y", "z"], 300), name="kind")
    found, same = (
        differential_expression(model, c, groups, ids, ids, DeConfig(n_samples=300), 0) for c in (part, whole)
    )
    assert found.equals(same)


def test_a_store_whose_genes_come_in_another_order(tmp_path, monkeypatch):
    """The command goes by the genes' names, as the library does."""
    store = stored(tmp_path, cells(n=80))
    adata = read_store(store)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    model = sv.fit(adata[:, order].copy(), "batch", train=brief(max_epochs=1), device="cpu", progress=False)
    model.save(tmp_path / "model")
    groups = np.random.default_rng(1).choice(["x", "y"], 80)
    pd.DataFrame({"cell_id": list(adata.obs_names), "cluster": groups}).to_parquet(tmp_path / "cells.parquet")
    command = ["de", "--store", store, "--model", tmp_path / "model", "--cells", tmp_path / "cells.parquet"]
    command += ["--out", tmp_path / "de.parquet", "--config", '{"threads": 1, "de": {"n_samples": 200}}']
    monkeypatch.setattr(sys, "argv", ["scvi-core", *map(str, command)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    adata.obs["cluster"] = groups
    expected = sv.load(tmp_path / "model").differential_expression(adata, "cluster", config=DeConfig(n_samples=200))
    torch.set_num_threads(threads)
    found = pd.read_parquet(tmp_path / "de.parquet")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
