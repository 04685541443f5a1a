"""The linear decoder: one matrix from z to genes, its loadings, and the prior that makes them sparse."""

import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from _data import brief, cells, packed
from scipy.optimize import linear_sum_assignment, minimize_scalar
from scipy.special import logsumexp
from scipy.stats import rankdata

import scvi_core as sv
from scvi_core import cli
from scvi_core.config import ModelConfig, load_config
from scvi_core.files import UserError
from scvi_core.model import Noise, build
from scvi_core.train import Interrupted, train
from scvi_core.train.step import soft_threshold

LINEAR = ModelConfig(n_hidden=8, n_latent=2, decoder="linear")
CPU = torch.device("cpu")


def fit(adata=None, **more):
    more = {"batch_key": "batch", "model": LINEAR, "train": brief(), "device": "cpu", "progress": False, **more}
    return sv.fit(cells() if adata is None else adata, **more)


# ---- the model


@pytest.mark.parametrize("covariates", [True, False])
def test_log_rho_is_the_equation(covariates):
    """log softmax(a + W z + B s), in numpy and float64; only the heads exist, and all have a gradient."""
    adata = cells(20)
    _, counts = packed(adata, *((("day",), ("age",)) if covariates else ()))
    config = ModelConfig(n_hidden=7, n_latent=3, n_layers=2, decoder="linear", dispersion="gene-cell")
    model, minibatch = build(config, 25, 2, 4 if covariates else 0, 0), counts.gather(torch.arange(20))
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "rho", "dropout_logit", "log_theta"}
    n_design = 6 if covariates else 2
    assert all(head.weight.shape == (25, 3 + n_design) for head in (model.rho, model.dropout_logit, model.log_theta))
    z_nk = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    hidden_nh = model.hidden(z_nk, minibatch.batch_n, minibatch.covariates_nc)
    weight, bias = (value.detach().double().numpy() for value in (model.rho.weight, model.rho.bias))
    dense = np.concatenate([np.eye(2)[minibatch.batch_n.numpy()], minibatch.covariates_nc.double().numpy()], 1)
    logit = bias + z_nk.double().numpy() @ weight[:, :3].T + dense @ weight[:, 3:].T
    expected = logit - logsumexp(logit, axis=1, keepdims=True)
    np.testing.assert_allclose(model.log_rho(hidden_nh).detach().numpy(), expected, atol=2e-6)
    np.testing.assert_array_equal(model.loadings_gk, model.rho.weight.detach()[:, :3])
    sum(model.elbo_terms(minibatch, Noise(0))[:2]).mean().backward()
    for name, parameter in model.named_parameters():
        assert name.endswith("linear.bias") or (parameter.grad != 0).any(), name


def test_every_question_has_an_answer(tmp_path):
    adata = cells(120)
    model = fit(adata, train=brief(max_epochs=20), categorical_covariates=["day"], continuous_covariates=["age"])
    assert model.history["validation_elbo"].iloc[-1] > model.history["validation_elbo"].iloc[0]
    z, elbo = model.latent(adata), model.elbo(adata)
    assert z.shape == (120, 2) and np.isfinite(elbo).all()
    assert (model.marginal_log_likelihood(adata, 200).mean() > elbo.mean()).all()
    rho = model.normalized_expression(adata, library_size=1.0)
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-5)
    one = model.normalized_expression(adata, ["G3"], 1.0, transform_batch="b1")
    assert ((one["G3"] != rho["G3"]) == (adata.obs["batch"] == "b0")).all()
    found = model.differential_expression(adata, "kind")
    assert set(found["group"]) == {"T", "B", "NK"} and found.drop(columns="gene_name").notna().all(axis=None)
    model.save(tmp_path / "m")
    again = sv.load(tmp_path / "m")
    assert again.model == model.model and np.array_equal(again.latent(adata), z)
    pd.testing.assert_frame_equal(again.loadings(), model.loadings())


def test_models_from_before_the_linear_decoder_load(tmp_path):
    """And from before checksums: format 2."""
    model = fit(model=ModelConfig(n_hidden=8, n_latent=2))
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    about = json.loads(path.read_text())
    del about["model"]["decoder"], about["model"]["loadings_l1"]
    path.write_text(json.dumps(about | {"format_version": 2}))  # but a checksum, so this is none of format 2
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        sv.load(tmp_path / "m")
    del about["checksum"]
    path.write_text(json.dumps(about | {"format_version": 2}))
    assert np.array_equal(sv.load(tmp_path / "m").latent(cells()), model.latent(cells()))


# ---- loadings


def test_loadings_tell_the_decoder(tmp_path, monkeypatch):
    """The table, and the table alone, says how a cell's shares change with z; as the command writes it, too."""
    adata = cells()
    for l1 in (0.0, 0.3):
        model = fit(adata, model=LINEAR.model_copy(update={"loadings_l1": l1}))
        table = model.loadings()
        assert (
            list(table.columns) == ["gene_id", "gene_name", "z_0", "z_1"] and (table.dtypes.iloc[2:] == "float32").all()
        )
        assert list(table["gene_id"]) == model.gene_ids and list(table["gene_name"]) == model.gene_names
        w_gk = table[["z_0", "z_1"]].to_numpy("float64")
        if l1:
            assert (w_gk == 0).any()
        else:
            np.testing.assert_allclose(w_gk.mean(0), 0, atol=1e-7)
        z_nk = torch.tensor([[0.5, -1.0], [0.0, 0.0]])
        log_rho_ng = model.network.log_rho(model.network.hidden(z_nk, torch.ones(2).long(), torch.zeros(2, 0)))
        change = (log_rho_ng[0] - log_rho_ng[1]).detach().double().numpy()
        expected = w_gk @ [0.5, -1.0]
        np.testing.assert_allclose(change - change.mean(), expected - expected.mean(), atol=1e-5)
        model.save(tmp_path / "m")
        command(monkeypatch, "loadings", "--model", tmp_path / "m", "--out", tmp_path / "loadings.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "loadings.parquet"), table)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scvi-core", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_a_network_has_no_loadings(tmp_path, monkeypatch, capsys):
    model = fit(model=ModelConfig(n_hidden=8, n_latent=2), train=brief(max_epochs=1))
    with pytest.raises(UserError, match=r"'network' has no loadings; fit a model with model\.decoder: linear"):
        model.loadings()
    model.save(tmp_path / "m")
    code = command(monkeypatch, "loadings", "--model", tmp_path / "m", "--out", tmp_path / "loadings.parquet")
    assert code == 1 and "error: model.decoder: 'network'" in capsys.readouterr().err
    assert not (tmp_path / "loadings.parquet").exists()
    with pytest.raises(UserError, match=r"loadings_l1: 0\.3, but a network decoder has no loadings"):
        fit(model=ModelConfig(n_hidden=8, n_latent=2, loadings_l1=0.3))
    with pytest.raises(UserError, match=r"model\.decoder.*'matrix'"):
        load_config({"model": {"decoder": "matrix"}})


# ---- the prior


def test_soft_threshold_is_the_proximal_step():
    """The least of |u - w|^2 / 2 + by |u|, by search; nothing moves by 0, and what is not a number stays none."""
    weights = torch.tensor([-2.0, -0.3, -0.1, 0.0, 0.05, 0.25, 0.3, 1.0])
    for by in (0.0, 0.1, 0.25, 5.0):
        ours = weights.clone()
        soft_threshold(ours, by)
        for u, w in zip(ours.tolist(), weights.tolist(), strict=True):
            least = minimize_scalar(lambda u, w=w, by=by: (u - w) ** 2 / 2 + by * abs(u), bounds=(-3, 3)).x
            assert u == pytest.approx(least, abs=1e-5)
        assert (ours == 0).tolist() == (weights.abs() <= torch.tensor(by)).tolist()
    ours = torch.tensor([torch.nan, torch.inf])
    soft_threshold(ours, 0.1)
    assert ours[0].isnan() and ours[1] == torch.inf


def simulated(n=500, g=200, k=4, marked=20, seed=0):
    """Poisson counts of cells whose `k` factors each move `marked` of the genes, and those loadings, (genes, k)."""
    rng = np.random.default_rng(seed)
    w_gk = np.zeros((g, k))
    for j in range(k):
        w_gk[rng.choice(g, marked, replace=False), j] = rng.choice([-1, 1], marked) * rng.uniform(0.4, 1.0, marked)
    logit = rng.normal(0, 1, g) + rng.normal(size=(n, k)) @ w_gk.T
    rho = np.exp(logit - logsumexp(logit, axis=1, keepdims=True))
    x = rng.poisson(rho * rng.lognormal(np.log(600), 0.2, (n, 1)))
    names = [f"G{i}" for i in range(g)]
    return ad.AnnData(
        sp.csr_matrix(x), pd.DataFrame(index=[f"c{i}" for i in range(n)]), pd.DataFrame(index=names)
    ), w_gk


def support_auc(found_gk, true_gk):
    """How well |loadings| tell a factor's genes from the others, each true factor beside the found one most like it."""
    k = true_gk.shape[1]
    unit = lambda w_gk: w_gk / np.maximum(np.linalg.norm(w_gk, axis=0), 1e-12)  # noqa: E731
    rows, columns = linear_sum_assignment(-np.abs(unit(found_gk).T @ unit(true_gk)))
    total = 0.0
    for i, j in zip(rows, columns, strict=True):
        rank, marked = rankdata(np.abs(found_gk[:, i])), true_gk[:, j] != 0
        n1, n0 = marked.sum(), (~marked).sum()
        total += (rank[marked].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    return total / k


def test_the_prior_finds_which_genes_a_factor_moves():
    """More of it gives more exact zeros; a moderate one recovers the support; the ELBO falls gently."""
    adata, w_gk = simulated(seed=2)
    sizes = {"n_hidden": 32, "n_latent": 4, "likelihood": "poisson", "decoder": "linear", "dropout": 0.0}
    config = brief(max_epochs=40, batch_size=32, learning_rate=0.06, schedule="cosine", early_stopping=False)
    config = config.model_copy(update={"precision": "float32"})
    elbo, zeros, auc = [], [], []
    for l1 in (0.0, 0.2, 0.6, 4.0):
        model = fit(adata, batch_key=None, model=ModelConfig(**sizes, loadings_l1=l1), train=config)
        found_gk = model.loadings().filter(like="z_").to_numpy("float64")
        elbo.append(model.card["metrics"]["validation_elbo"])
        zeros.append((found_gk == 0).mean())
        auc.append(support_auc(found_gk, w_gk))
    assert zeros[0] == 0 and zeros[-1] == 1 and sorted(zeros) == zeros and zeros[1] > 0.2
    assert auc[1] > 0.97 and auc[1] > auc[0] + 0.03
    assert elbo[1] > 1.02 * elbo[0]
    assert elbo[1] > elbo[2] > elbo[3] > 1.5 * elbo[0]


def test_a_fit_with_the_prior_goes_on_bit_for_bit(tmp_path):
    """As from one go; and the prior is of the loadings alone."""
    _, counts = packed(cells())
    rows = np.arange(60)

    def fitted(l1, stop=lambda: False, checkpoint=None):
        network = build(LINEAR.model_copy(update={"loadings_l1": l1}), 25, 2, 0, 0)
        train(network, counts, rows, rows[:0], brief(), 0, CPU, checkpoint, "me", progress=False, stop=stop)
        return {name: value.clone() for name, value in network.state_dict().items()}

    asked = iter(range(100))
    with pytest.raises(Interrupted):
        fitted(0.3, lambda: next(asked) == 5, tmp_path / "state")
    whole, resumed = fitted(0.3), fitted(0.3, checkpoint=tmp_path / "state")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    loadings_gk, plain_gk = whole["rho.weight"][:, :2], fitted(0.0)["rho.weight"][:, :2]
    assert (loadings_gk == 0).any() and (plain_gk != 0).all()
    assert (whole["rho.weight"][:, 2:] != 0).all()  # the batches' columns
