"""A model with another loss is trained on it, by the same step; weights that are frozen stay, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from _data import brief, cells, choose, packed

from scvi_core import kernels
from scvi_core.config import ModelConfig
from scvi_core.files import UserError
from scvi_core.model import SCVI, Noise
from scvi_core.train import Interrupted, train
from scvi_core.train.step import gradients

CPU = torch.device("cpu")
SIZES = {"n_hidden": 16, "n_latent": 3}


class Labelled(SCVI):
    """scVI with a term of labels: alpha times the cross-entropy of a classifier of the posterior mean."""

    alpha, n_labels = 5.0, 2

    def __init__(self, *args):
        super().__init__(*args)
        self.classifier = torch.nn.Linear(self.config.n_latent, self.n_labels)

    def loss(self, cells, noise, kl_weight):
        loss_n, elbo_n = super().loss(cells, noise, kl_weight)
        logit_ny = kernels.linear(self.encode(cells, noise).mean_nk, self.classifier.weight, self.classifier.bias)
        cross_n = torch.nn.functional.cross_entropy(logit_ny, cells.batch_n, reduction="none")
        return loss_n + self.alpha * cross_n, elbo_n


def made(kind=SCVI, dtype=torch.float32, n=40, **how):
    torch.manual_seed(0)
    _, counts = packed(cells(n), ("day",), ("age",))
    model = kind(ModelConfig(**{**SIZES, **how}), 25, 2, 4, torch.zeros(2), torch.ones(2)).to(dtype)
    minibatch = counts.gather(torch.arange(n))
    minibatch.x.x_m = minibatch.x.x_m.to(dtype)
    minibatch.library_n, minibatch.covariates_nc = minibatch.library_n.to(dtype), minibatch.covariates_nc.to(dtype)
    return model.train(), minibatch, counts


class Given:
    """Noise that is the same in every precision."""

    n_cells = None

    def __init__(self):
        self.i = itertools.count()

    def normal(self, like):
        drawn = np.random.default_rng(next(self.i)).normal(size=tuple(like.shape))
        return torch.from_numpy(drawn).float().to(like.dtype)


# ---- another loss


def test_the_gradient_of_another_loss_is_its_finite_difference():
    """Of every tensor along random directions, of the loss in float64; and it is not that of scVI's loss."""
    model, minibatch, _ = made(Labelled, dropout=0.0, library="latent", dispersion="gene-batch")
    gradients(model, minibatch, Given(), 0.7)
    found = {name: p.grad.double() for name, p in model.named_parameters()}
    other, minibatch, _ = made(SCVI, dropout=0.0, library="latent", dispersion="gene-batch")
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "classifier" not in k})
    gradients(other, minibatch, Given(), 0.7)
    moved = found["encoder.mean.weight"] - other.encoder.mean.weight.grad
    assert moved.abs().max() > 0.01 * found["encoder.mean.weight"].abs().max() and found["classifier.weight"].any()

    exact, minibatch, _ = made(Labelled, torch.float64, dropout=0.0, library="latent", dispersion="gene-batch")
    exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    rng = np.random.default_rng(0)
    with torch.no_grad():
        loss = lambda: float(exact.loss(minibatch, Given(), 0.7)[0].mean())  # noqa: E731
        for name, weight in exact.named_parameters():
            unit = float(found[name.replace("linear.bias", "norm.bias")].norm())
            for _ in range(3):
                way = torch.from_numpy(rng.normal(size=tuple(weight.shape)))
                way *= 1e-6 / way.norm()
                weight += way
                after = loss()
                weight -= 2 * way
                slope = (after - loss()) / 2e-6
                weight += way
                expected = float((found[name] * way).sum() * 1e6)
                assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5 * unit + 1e-6), name


@pytest.mark.parametrize("how", ["compiled", "plain"])
def test_a_subclass_is_trained_on_its_own_loss(how, monkeypatch):
    """In whole fits: cross-entropy falls where it is in the loss, far below what it is where it is not."""
    choose(how, monkeypatch)
    cross = {}
    for alpha in (0.0, 5.0):
        monkeypatch.setattr(Labelled, "alpha", alpha)
        model, minibatch, counts = made(Labelled)
        config = brief(max_epochs=60, learning_rate=1e-2, early_stopping=False)
        train(model, counts, np.arange(40), np.arange(0), config, 0, CPU, progress=False)
        with torch.no_grad():
            logit_ny = model.classifier(model.encode(minibatch).mean_nk)
            cross[alpha] = float(torch.nn.functional.cross_entropy(logit_ny, minibatch.batch_n))
    assert cross[5.0] < 0.5 < cross[0.0]


class Renamed(SCVI):
    """Another class, the same loss."""


def test_the_class_of_a_model_makes_no_difference_to_its_step():
    fitted = []
    for kind in (SCVI, Renamed):
        model, _, counts = made(kind)
        train(model, counts, np.arange(40), np.arange(0), brief(), 0, CPU, progress=False)
        fitted.append(model.state_dict())
    assert all(torch.equal(value, fitted[1][name]) for name, value in fitted[0].items())


# ---- frozen weights


def fit(trainable, how=None, **more):
    model, _, counts = made(**(how or {}))
    for name, value in model.state_dict().items():
        if name.endswith(("norm.bias", "running_mean")):
            value.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = brief(max_epochs=5, weight_decay=0.1, gradient_clip=5.0, early_stopping=False)
    train(model, counts, np.arange(40), np.arange(0), config, 0, CPU, progress=False, trainable=trainable, **more)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training
    return before, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["compiled", "plain"])
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_what_is_frozen_stays_bit_for_bit(how, library, monkeypatch):
    """A decoder's columns of one batch alone are trained: all other weights, and every norm's moments, stay."""
    choose(how, monkeypatch)
    columns = torch.zeros(16, 3 + 2 + 4, dtype=torch.bool)
    columns[:, 4] = True  # of batch b1
    rows = torch.zeros(2, 25, dtype=torch.bool)
    rows[1] = True
    trainable = {"decoder.0.linear.weight": columns, "log_theta_sg": rows}
    before, after = fit(trainable, {"library": library, "dispersion": "gene-batch"})
    assert set(before) == set(after)
    for name, old in before.items():
        mask = trainable.get(name, torch.zeros_like(old, dtype=torch.bool))
        assert torch.equal(old[~mask], after[name][~mask]), name
        assert (old[mask] != after[name][mask]).all(), name


def test_layers_that_are_trained_have_minibatch_norms_and_frozen_ones_have_not():
    """The decoder alone is trained: its moments move, the encoder's do not, and its dropout is off."""
    names = [name for name, _ in made()[0].named_parameters()]
    before, after = fit({name: True for name in names if not name.startswith("encoder")})
    for name, old in before.items():
        assert torch.equal(old, after[name]) == name.startswith("encoder"), name
    affine = {"decoder.0.norm.weight": True}
    before, after = fit(affine)
    assert [name for name, old in before.items() if not torch.equal(old, after[name])] == [
        "decoder.0.norm.weight", "decoder.0.norm.running_mean", "decoder.0.norm.running_var",
        "decoder.0.norm.num_batches_tracked",
    ]  # fmt: skip


def test_frozen_parts_give_in_training_what_they_give_after():
    """A frozen encoder normalises by its running moments: the same minibatch has the same moments of z."""
    from scvi_core.train.state import State

    model, minibatch, _ = made()
    model.encoder.layers[0].norm.running_mean.normal_()
    expected = model.eval().encode(minibatch).mean_nk
    state = State.of(model, {"rho.bias": True})
    state.ready()
    assert model.training and torch.equal(model.encode(minibatch, Noise(0)).mean_nk, expected)
    gradients(model, minibatch, Noise(0), 1.0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["rho.bias"]


def test_loadings_that_are_frozen_are_not_thresholded():
    mask = torch.zeros(25, 9, dtype=torch.bool)
    mask[:, 0] = True
    how = {"decoder": "linear", "loadings_l1": 0.5, "likelihood": "poisson"}
    before, after = fit({"rho.weight": mask}, how)
    assert (
        torch.equal(before["rho.weight"][:, 1:], after["rho.weight"][:, 1:]) and (after["rho.weight"][:, 0] == 0).any()
    )
    before, after = fit({"rho.bias": True}, how)
    assert torch.equal(before["rho.weight"], after["rho.weight"])


def test_a_fit_of_some_weights_goes_on_bit_for_bit(tmp_path):
    mask = torch.rand(25, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    trainable = {"rho.weight": mask, "rho.bias": True}
    _, whole = fit(trainable)
    asked = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        fit(trainable, checkpoint=tmp_path / "state", stop=lambda: next(asked))
    _, resumed = fit(trainable, checkpoint=tmp_path / "state")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("trainable", "match"),
    [
        ({"rho.wieght": True}, "no weights 'rho.wieght'"),
        ({"rho.weight": torch.ones(3, dtype=torch.bool)}, r"boolean tensor of \(25, 16\)"),
        ({"rho.weight": torch.ones(25, 16)}, "boolean tensor"),
        ({"rho.weight": False}, "no weight is left"),
    ],
)
def test_what_cannot_be_frozen_so_is_said(trainable, match):
    with pytest.raises(UserError, match=match):
        fit(trainable)
