import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _data import brief, cells

import scvi_core as sv
from scvi_core import api
from scvi_core.config import ModelConfig
from scvi_core.files import UserError, read_json, write_json
from scvi_core.mapping import embed

SMALL = ModelConfig(n_hidden=8, n_latent=2)


def fit(adata=None, **more):
    more = {"batch_key": "batch", "model": SMALL, "train": brief(), "device": "cpu", "progress": False, **more}
    return sv.fit(cells() if adata is None else adata, **more)


@pytest.fixture(scope="module")
def fitted():
    adata = cells()
    model = fit(adata, categorical_covariates=["day"], continuous_covariates=["age"])
    return adata, model


def test_save_and_load_answer_alike(tmp_path, fitted):
    adata, model = fitted
    model.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["history.parquet", "model.json", "model.safetensors"]
    again = sv.load(tmp_path / "m")
    for ask in (
        lambda m: m.latent(adata),
        lambda m: m.elbo(adata),
        lambda m: m.marginal_log_likelihood(adata, 5),
        lambda m: m.normalized_expression(adata, ["G3", "Name4"], transform_batch="b1").to_numpy(),
        lambda m: m.differential_expression(adata, "kind").to_numpy().astype(str),
    ):
        assert np.array_equal(ask(model), ask(again))
    for name in ("schema", "model", "train", "seed", "gene_names", "gene_ids", "fingerprint"):
        assert getattr(model, name) == getattr(again, name), name
    assert again.history["seconds"].isna().all()
    ours, theirs = (m.history.drop(columns="seconds") for m in (model, again))
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    again.save(tmp_path / "twice")  # a loaded model saves as itself
    for name in ("model.safetensors", "model.json", "history.parquet"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_names_that_checks_call(fitted):
    adata, model = fitted
    assert list(model.history.columns) == [
        "epoch", "seconds", "train_elbo", "validation_elbo", "kl_weight", "learning_rate",
    ]  # fmt: skip
    z, elbo = model.latent(adata), model.elbo(adata, n_samples=3, seed=1)
    assert z.shape == (60, 2) and z.dtype == np.float32 and elbo.shape == (60,) and elbo.dtype == np.float64
    frame = model.normalized_expression(adata)
    assert list(frame.columns) == list(adata.var_names) and list(frame.index) == list(adata.obs_names)
    np.testing.assert_allclose(frame.sum(axis=1), 1e4, rtol=1e-5)
    assert list(model.differential_expression(adata, groupby="kind").columns) == sv.de.DE_COLUMNS
    for ask, match in (
        (lambda: model.normalized_expression(adata, ["nope"]), "'nope' is not one of the model's 25 genes"),
        (lambda: model.normalized_expression(adata, transform_batch="b7"), "'b7' is not one of b0, b1"),
        (lambda: model.differential_expression(adata, "nope"), "no cell column 'nope'"),
    ):
        with pytest.raises(UserError, match=match):
            ask()


def test_loads_with_pickle_blocked(tmp_path, fitted, monkeypatch):
    import pickle

    adata, model = fitted
    model.save(tmp_path / "m")

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(np, "load", refuse)
    assert np.array_equal(sv.load(tmp_path / "m").latent(adata), model.latent(adata))


def refused(path):
    with pytest.raises(UserError) as error:
        sv.load(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_damaged_bundles_are_refused_in_one_line(tmp_path, fitted):
    _, model = fitted
    model.save(tmp_path / "whole")
    number = iter(range(1000))

    def copy():
        return shutil.copytree(tmp_path / "whole", tmp_path / str(next(number)))

    assert "no model.safetensors" in refused(tmp_path / "absent")
    for name in ("model.safetensors", "model.json", "history.parquet"):
        path = copy()
        (path / name).unlink()
        assert f"no {name}" in refused(path)
        path = copy()
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
        refused(path)
        (path / name).write_bytes(b"")
        refused(path)
    path = copy()
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert "not the weights that model.json names" in refused(path)
    about = read_json(tmp_path / "whole" / "model.json", "train")
    for change, match in (
        ({"format_version": 99}, "format 99 is newer than this scvi-core"),
        ({"format_version": 1}, "format 1 is older than this scvi-core"),
        ({"format_version": "new"}, "not a whole model"),
        ({"model": {"n_latent": 3}}, "not a whole model"),
        ({"model": {"nonsense": 3}}, "not a whole model"),
        ({"model": None}, "not a whole model"),
        ({"covariates": {"categorical": [], "continuous": {}}}, "not a whole model"),
        ({"covariates": None}, "not a whole model"),
        ({"gene_ids": about["gene_ids"][:-1]}, "not a whole model"),
        ({"weights_sha256": None}, "not the weights"),
    ):
        path = copy()
        write_json(path / "model.json", {**about, **change}, checksum=True)
        assert match in refused(path), change
    for key in ("format_version", "weights_sha256", "model", "train", "seed", "gene_ids", "batches", "gene_names"):
        path = copy()
        write_json(path / "model.json", {k: v for k, v in about.items() if k != key}, checksum=True)
        assert "not a whole model" in refused(path), key
    (path / "model.json").write_text(json.dumps(about | {"gene_ids": about["gene_ids"][::-1]}))
    assert "model.json: damaged" in refused(path)
    (path / "model.json").write_text("[]")
    refused(path)


def test_the_same_seed_gives_the_same_file(tmp_path):
    adata = cells()
    first, again, other = (fit(adata, seed=seed) for seed in (0, 0, 1))
    assert api.bundle_bytes(first) == api.bundle_bytes(again) != api.bundle_bytes(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    first.save(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("model.json", "history.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_replaces_whole_or_not_at_all(tmp_path, fitted, monkeypatch):
    _, model = fitted
    fit().save(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(api, "write_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    model.save(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_holdout():
    adata = cells()
    held = [5, 2, 40]
    model = fit(adata, holdout=held, train=brief(early_stopping=False))
    assert model.card["metrics"]["n_train"] == 57 and model.card["metrics"]["n_validation"] == 3
    changed = adata.copy()
    changed.X = changed.X.toarray()
    changed.X[held] = 7
    again = fit(changed, holdout=np.array(held), train=brief(early_stopping=False))
    assert api.bundle_bytes(model) == api.bundle_bytes(again) and model.fingerprint != again.fingerprint
    assert fit(adata, holdout=[1, 2]).fingerprint != fit(adata, holdout=[1, 3]).fingerprint
    none = fit(adata, holdout=[])
    assert none.history["validation_elbo"].isna().all() and none.card["metrics"]["validation_elbo"] is None
    mask = np.zeros(60, bool)
    mask[held] = True
    for wrong, match in (([60], "0..59"), ([-1], "0..59"), (mask, "np.flatnonzero"), ([0.5], "positions of cells")):
        with pytest.raises(UserError, match=match):
            fit(adata, holdout=wrong)
    with pytest.raises(UserError, match="seed: -1"):
        fit(adata, seed=-1)


def test_layer(tmp_path):
    adata = cells()
    plain = fit(adata)
    layered = ad.AnnData(adata.X.toarray() * 0.37, adata.obs, adata.var, layers={"counts": adata.X})
    model = fit(layered, layer="counts")
    assert api.bundle_bytes(model) == api.bundle_bytes(plain)
    assert np.array_equal(model.latent(layered), plain.latent(adata))
    assert np.array_equal(model.latent(adata), plain.latent(adata))  # cells without that layer: X
    model.save(tmp_path / "m")
    assert np.array_equal(sv.load(tmp_path / "m").latent(layered), plain.latent(adata))
    with pytest.raises(UserError, match=r"no layer 'nope' .layers: counts"):
        fit(layered, layer="nope")
    with pytest.raises(UserError, match="look normalised"):
        fit(layered)


def test_covariates_and_designs():
    adata = cells()
    model = fit(adata, categorical_covariates=["day"], continuous_covariates=["age"])
    assert model.schema.categorical == {"day": ("d0", "d1", "d2")} and "age" in model.schema.continuous
    assert model.network.decoder[0].linear.in_features == 2 + 2 + 3 + 1
    assert model.fingerprint != fit(adata).fingerprint
    adata.obs["one"] = "x"
    for more, match in (
        ({"categorical_covariates": ["one"]}, "'one' has one level"),
        ({"batch_key": None, "model": SMALL.model_copy(update={"dispersion": "gene-batch"})}, "needs two batches"),
        ({"batch_key": "nope"}, "no column 'nope'"),
        ({"continuous_covariates": ["kind"]}, "not numbers"),
    ):
        with pytest.raises(UserError, match=match):
            fit(adata, **more)


def test_kept_epoch_is_the_one_whose_weights_are_kept():
    """The validation ELBO may be higher while the KL term is still warming up; those weights are not kept."""
    for share in (0.3, 1.0):
        config = brief(max_epochs=20, kl_warmup=share, learning_rate=0.1, adam_eps=1e-8, patience=30)
        model = fit(train=config)
        kept = model.card["metrics"]["kept_epoch"]
        row = model.history.set_index("epoch").loc[kept]
        assert row["kl_weight"] == 1.0
        assert model.card["metrics"]["validation_elbo"] == pytest.approx(row["validation_elbo"], abs=1e-4)
        if share == 1.0:
            assert kept == 20


def test_new_cells_need_neither_batch_nor_covariates(fitted):
    adata, model = fitted
    bare = ad.AnnData(adata.X, var=adata.var, obs=pd.DataFrame(index=adata.obs_names))
    assert np.array_equal(model.latent(bare), model.latent(adata))
    with pytest.raises(UserError, match="no column 'batch'"):
        model.elbo(bare)


def test_new_cells_in_another_layer_and_without_counts():
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 2  # whole numbers, but not the counts
    model = fit(adata, layer="counts")
    assert np.array_equal(embed(model, adata).iloc[:, 1:].to_numpy(), model.latent(adata))
    some = cells()
    counts = some.X.toarray()
    counts[3] = 0
    some.X = counts
    frame = embed(model, some)
    assert "cell3" not in set(frame["cell_id"]) and len(frame) == some.n_obs - 1


def test_covariates_are_what_was_asked_for():
    config = SMALL.model_copy(update={"continuous_covariates": ("age",)})
    model = fit(categorical_covariates="day", model=config)
    assert list(model.schema.categorical) == ["day"] and list(model.schema.continuous) == ["age"]
    with pytest.raises(UserError, match="another role"):
        fit(categorical_covariates=["batch"])
    assert "scVI" in repr(model) and len(repr(model)) < 200


def test_what_a_call_would_not_do_is_refused(fitted):
    adata, model = fitted
    as_counts = lambda x: ad.AnnData(x, adata.obs, adata.var)  # noqa: E731
    brief_fit = lambda given=adata, **more: fit(given, train=brief(max_epochs=1), **more)  # noqa: E731
    for device in ("gpu", "cuda:0", "mps", None, "CPU"):
        with pytest.raises(UserError, match=r"device: .*; give auto, cpu or cuda"):
            sv.fit(adata, device=device)
    for seed in (True, 1.5, "0", None, -1, 2**40, np.nan):
        with pytest.raises(UserError, match="seed: "):
            brief_fit(seed=seed)
        with pytest.raises(UserError, match="seed: "):
            model.elbo(adata, seed=seed)
    for call in (model.elbo, model.marginal_log_likelihood, model.normalized_expression):
        for n in (0, -1, 2.0, None):
            with pytest.raises(UserError, match="n_samples: "):
                call(adata, n_samples=n)
    x = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    for odd in (x + 0j, x.astype(str)):
        with pytest.raises(UserError, match="give raw counts"):
            brief_fit(as_counts(odd))
    with pytest.raises(UserError, match="a DataFrame; give an anndata"):
        sv.fit(adata.to_df())
    with pytest.raises(UserError, match="model: a dict; give a ModelConfig"):
        sv.fit(adata, model={"n_latent": 3})
    with pytest.raises(UserError, match=r"batch_key: \['batch'\]"):
        sv.fit(adata, batch_key=["batch"])
    assert np.array_equal(model.elbo(adata, n_samples=np.int64(2), seed=np.uint8(3)), model.elbo(adata, 2, 3))
    assert np.array_equal(model.latent(as_counts(x.astype(np.float16))), model.latent(as_counts(x.astype(np.float32))))


def test_weights_that_are_not_finite_are_refused(fitted, tmp_path):
    from safetensors.torch import load_file, save_file

    from scvi_core.files import sha256_file

    _, model = fitted
    for value in (float("nan"), float("inf")):
        model.save(tmp_path / "m")
        weights = load_file(tmp_path / "m/model.safetensors")
        name = sorted(weights)[0]
        weights[name].view(-1)[0] = value
        save_file(weights, tmp_path / "m/model.safetensors")
        about = read_json(tmp_path / "m/model.json", "train")
        about["weights_sha256"] = sha256_file(tmp_path / "m/model.safetensors")
        write_json(tmp_path / "m/model.json", about, checksum=True)
        with pytest.raises(UserError, match=r"model\.safetensors: .* is not finite"):
            sv.load(tmp_path / "m")
