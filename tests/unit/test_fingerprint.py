"""Fingerprints, the version of the numerics that they name, and bundles of every format since the second."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _data import brief, cells, choose
from safetensors import safe_open
from safetensors.torch import save_file

import scvi_core as sv
from scvi_core.config import ModelConfig, ModelSection, TrainConfig
from scvi_core.counts import Schema
from scvi_core.fingerprint import NUMERICS, fingerprint

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "golden.safetensors"
BUNDLES = sorted(DATA.glob("model-*"))


def golden_fit():
    model = sv.ModelConfig(n_hidden=8, n_latent=2, library="latent", dispersion="gene-batch")
    train = brief(max_epochs=6, precision="float32", schedule="cosine", early_stopping=False)
    fitted = sv.fit(cells(), "batch", model=model, train=train, device="cpu", progress=False)
    return {name: value for name, value in fitted.network.state_dict().items() if value.is_floating_point()}


def about():
    """What the golden file says of itself, from here: version, defaults, and this machine's bits."""
    defaults = json.dumps([ModelConfig().model_dump(), TrainConfig().model_dump()], default=str)
    kind = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"
    return {"numerics": str(NUMERICS), "defaults": hashlib.sha256(defaults.encode()).hexdigest()}, kind


def digest(weights):
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize("how", ["compiled", "plain"])
def test_the_numerics_are_those_of_their_version(how, monkeypatch):
    """If this fails, the same inputs give other weights than before: mend it, or raise NUMERICS and write the file anew
    (``python tests/unit/test_fingerprint.py``). To the bit on a machine like the one that wrote it; elsewhere, and by
    plain PyTorch, within what rounding makes of six epochs.
    """
    choose(how, monkeypatch)
    with safe_open(GOLDEN, "pt") as file:
        told = file.metadata()
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    now, kind = about()
    assert now["numerics"] == told["numerics"], "write tests/data/golden.safetensors anew"
    weights = golden_fit()
    if how == "compiled" and kind == told["kind"]:
        assert digest(weights) == told["sha256"], "other weights: raise NUMERICS in scvi_core/fingerprint.py"
    for name, value in expected.items():
        if not name.endswith(("linear.bias", "running_mean")):  # before a batch norm: moved by rounding alone
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_defaults_are_those_of_their_version():
    """A default that changes changes no fingerprint: NUMERICS has to. Where a setting is new, write the file anew."""
    with safe_open(GOLDEN, "pt") as file:
        assert file.metadata()["defaults"] == about()[0]["defaults"], "a default changed: raise NUMERICS"


def schema():
    return Schema(("G0", "G1"), "batch", ("a", "b"), {}, {})


def test_every_input_has_a_part_in_the_fingerprint_and_a_new_setting_has_none():
    base = {"schema": schema(), "data": {"cells": "x"}, "model": ModelConfig(), "train": TrainConfig(), "seed": 0}
    others = [
        {"schema": Schema(("G1", "G0"), "batch", ("a", "b"), {}, {})}, {"data": {"cells": "y"}}, {"seed": 1},
        {"model": ModelConfig(n_latent=11)}, {"train": TrainConfig(max_epochs=3)}, {"holdout": np.arange(3)},
    ]  # fmt: skip
    digests = {fingerprint(**base | other) for other in [{}, *others]}
    assert len(digests) == 1 + len(others)
    section = ModelSection(reuse="never")  # how a model is looked up decides no weights
    assert fingerprint(**base | {"model": section}) == fingerprint(**base)

    class Newer(TrainConfig):
        momentum: float = 0.5

    assert fingerprint(**base | {"train": Newer()}) == fingerprint(**base)
    assert fingerprint(**base | {"train": Newer(momentum=0.6)}) != fingerprint(**base)


def test_another_version_of_the_numerics_is_another_fingerprint(monkeypatch):
    before = fingerprint(schema(), {}, ModelConfig(), TrainConfig(), 0)
    monkeypatch.setattr("scvi_core.fingerprint.NUMERICS", NUMERICS + 1)
    assert fingerprint(schema(), {}, ModelConfig(), TrainConfig(), 0) != before


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
def test_bundles_ever_written_load_with_the_numbers_they_gave(path, tmp_path):
    told, adata = json.loads((path / "numbers.json").read_text()), cells()
    model = sv.load(path)
    assert model.fingerprint == told["fingerprint"]
    near = {"rtol": 2e-5, "atol": 2e-6}
    np.testing.assert_allclose(model.latent(adata), told["latent"], **near)
    np.testing.assert_allclose(model.elbo(adata), told["elbo"], **near)
    found = model.normalized_expression(adata, ["G3", "G1"], transform_batch="b1")
    np.testing.assert_allclose(found, told["normalized_expression"], **near)
    if "novelty" in told:
        np.testing.assert_allclose(model.label_probabilities(adata, "all"), told["label_probabilities"], **near)
        np.testing.assert_allclose(model.annotate(adata)["novelty"], told["novelty"], rtol=1e-3, atol=1e-4)
    model.save(tmp_path / "again")
    assert np.array_equal(sv.load(tmp_path / "again").latent(adata), model.latent(adata))


def test_there_are_bundles_of_every_format():
    formats = {json.loads((path / "model.json").read_text())["format_version"] for path in BUNDLES}
    assert formats == set(range(2, sv.api.FORMAT_VERSION + 1))


if __name__ == "__main__":
    made = golden_fit()
    now, kind = about()
    save_file(made, GOLDEN, now | {"kind": kind, "sha256": digest(made)})
