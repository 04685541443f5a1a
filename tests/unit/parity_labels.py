"""Our scANVI beside scvi-tools' at equal weights and noise; as ``parity.py``, whose cells and names it shares.

    python tests/unit/parity_labels.py     # where scvi-tools is: writes parity_labels.safetensors anew

A case is a classifier (linear or with a hidden layer), a likelihood and a number of labels, in eval or in train mode
(batch norm by the minibatch; no dropout). scvi-tools takes the classifier's loss on a second minibatch of labelled
cells; here that is the same minibatch, all of whose cells have labels. It gives the loss in three parts a cell: what
the KL weight leaves alone, what it scales, and the cross-entropy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import parity
import torch
from parity import BATCHES, CELLS, GENES, HIDDEN, LATENT
from safetensors import safe_open
from safetensors.torch import save_file

from scvi_core.counts import Minibatch
from scvi_core.kernels import Nonzeros
from scvi_core.scanvi import SCANVI

FILE = Path(__file__).with_name("parity_labels.safetensors")
PARTS = ("free", "weighted", "cross_entropy")
KL_WEIGHT, ALPHA = 0.3, 50.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination, and the mode both models are in."""

    classifier: str
    likelihood: str
    n_labels: int
    train: bool

    def __str__(self) -> str:
        return f"{self.classifier}-{self.likelihood}-{self.n_labels}" + "-train" * self.train

    @property
    def base(self) -> parity.Case:
        """Of the part that is scVI's: with zinb a latent library, whose divergence the KL weight scales too."""
        library = "latent" if self.likelihood == "zinb" else "observed"
        return parity.Case(self.likelihood, "gene", library, covariates=False, train=self.train)


CASES = [Case(*which) for which in itertools.product(("linear", "mlp"), ("nb", "zinb"), (1, 2, 14), (False, True))]
NAMES = [
    (r"^encoder_z2_z1\.encoder\.fc_layers\.", "upper_encoder.layers."),
    (r"^decoder_z1_z2\.decoder\.fc_layers\.", "upper_decoder.layers."),
    (r"^encoder_z2_z1\.", "upper_encoder."),
    (r"^decoder_z1_z2\.", "upper_decoder."),
    (r"^classifier\.classifier\.0\.fc_layers\.", "classifier."),
    (r"^classifier\.classifier\.[01]\.", "label_logit."),
    (r"Layer (\d+)\.0\.", r"\1.linear."),
    (r"Layer (\d+)\.1\.", r"\1.norm."),
    (r"mean_(en|de)coder", "mean"),
    (r"var_(en|de)coder", "log_variance"),
]


def noise_of(case: Case) -> torch.Tensor:
    """(cells, labels, latent) for the upper state."""
    rng = np.random.default_rng(case.n_labels)
    return torch.from_numpy(rng.normal(size=(CELLS, case.n_labels, LATENT)).astype(np.float32))


def transfer(case: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of scvi-tools' SCANVAE, or gradients by them, as ours."""
    upper = {k: v for k, v in state.items() if re.match(r"classifier|encoder_z2|decoder_z1", k)}
    base = {k: v for k, v in state.items() if k not in upper and k != "y_prior"}
    out = parity.transfer(base, case.base.config, 0)
    for name, value in upper.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = value.contiguous()
    return out


def ours(case: Case, state: dict[str, torch.Tensor], cells: dict[str, torch.Tensor], dtype: torch.dtype):
    """Parts of the loss (name -> (cells,)) and gradients of the mean (our name -> tensor)."""
    reach_vy = torch.eye(case.n_labels, dtype=torch.bool)
    moments = torch.zeros(BATCHES), torch.ones(BATCHES)
    model = SCANVI(case.base.config, GENES, BATCHES, 0, *moments, reach_vy, None, case.classifier == "linear", ALPHA)
    own = {name: value for name, value in model.state_dict().items() if name in ("weight_v", "reach_vy")}
    model.to(dtype).load_state_dict(transfer(case, state) | own)
    x = Nonzeros.of(cells["x_ng"])
    x = dataclasses.replace(x, x_m=x.x_m.to(dtype))
    label_n = torch.arange(CELLS) % case.n_labels
    minibatch = Minibatch(x, x.totals().to(dtype), cells["batch_n"], torch.zeros(CELLS, 0, dtype=dtype), label_n)
    library = [cells["noise_n"]] if case.base.library == "latent" else []

    def noise():
        draws = iter((cells["noise_nk"], *library, noise_of(case)))
        return SimpleNamespace(normal=lambda like: next(draws).to(like.dtype).view_as(like))

    loss_n, elbo_n = model.train(case.train).loss(minibatch, noise(), KL_WEIGHT)
    loss_n.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        t = model.label_terms(minibatch, noise())
    free_n, weighted_n = t["entropy"] - t["reconstruction"] - t["prior"], t["kl_u"] + t["kl_y"] + t["kl_l"]
    whole_n = free_n + KL_WEIGHT * weighted_n + ALPHA * t["cross_entropy"]
    assert torch.allclose(whole_n, loss_n, rtol=1e-6) and torch.allclose(elbo_n, -free_n - weighted_n, rtol=1e-6)
    return dict(zip(PARTS, (free_n, weighted_n, t["cross_entropy"]), strict=True)), gradients


def module_of(case: Case):
    """scvi-tools' module of a case, with its own weights."""
    from scvi.module import SCANVAE

    return SCANVAE(
        GENES, n_batch=BATCHES, n_labels=case.n_labels, n_hidden=HIDDEN, n_latent=LATENT, n_layers=1, dropout_rate=0.0,
        gene_likelihood=case.likelihood, use_observed_lib_size=case.base.library == "observed",
        linear_classifier=case.classifier == "linear",
        library_log_means=np.zeros((1, BATCHES)), library_log_vars=np.ones((1, BATCHES)),
    )  # fmt: skip


def theirs(case: Case, state: dict[str, torch.Tensor], cells: dict[str, torch.Tensor]):
    """Parts of the loss and gradients (scvi-tools' names) of scvi-tools' module, in float64.

    So that what deviates is not its rounding, which batch norm by small minibatches magnifies.
    """
    module = module_of(case).double().train(case.train)
    cells = {name: value.double() if value.is_floating_point() else value for name, value in cells.items()}
    module.load_state_dict(state | {"y_prior": module.y_prior.data}, strict=False)
    labels = torch.arange(CELLS)[:, None] % case.n_labels
    tensors = {"X": cells["x_ng"], "batch": cells["batch_n"][:, None], "labels": labels}
    upper = noise_of(case).double().permute(1, 0, 2).flatten(0, 1)  # theirs goes label by label
    library = [cells["noise_n"][:, None]] if case.base.library == "latent" else []
    draws = iter((cells["noise_nk"], *library, upper, cells["noise_nk"]))

    def normal(shape, **_):
        drawn = next(draws)
        assert tuple(shape) == tuple(drawn.shape)
        return drawn

    def prior(self, batch_n1):  # its own takes the rows by a product in float32
        return self.library_log_means[0][batch_n1], self.library_log_vars[0][batch_n1]

    how = {"kl_weight": KL_WEIGHT, "labelled_tensors": tensors, "classification_ratio": ALPHA}
    with (
        mock.patch("torch.distributions.normal._standard_normal", normal),
        mock.patch.object(type(module), "_compute_local_library_params", prior),
    ):
        _, _, loss = module(tensors, loss_kwargs=how)
    loss.loss.backward()
    cross_n = torch.nn.functional.cross_entropy(loss.logits, labels[:, 0], reduction="none")
    assert torch.allclose(
        cross_n.mean(),
        next(iter(loss.classification_loss.values()))
        if isinstance(loss.classification_loss, dict)
        else loss.classification_loss,
    )
    parts = (next(iter(loss.reconstruction_loss.values())), next(iter(loss.kl_local.values())), cross_n)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: part.detach() for name, part in zip(PARTS, parts, strict=True)}, gradients


def deviations(case: Case, got, expected) -> dict[str, float]:
    """Largest relative deviation of every part and every gradient (our names), as ``parity.deviations`` measures it.

    The cross-entropy may be next to 0: it and all parts are measured against 1 nat where they are less. A gradient that
    is zero everywhere, of one label, must be zero.
    """
    (parts, gradients), (expected_parts, expected_gradients) = got, expected
    if set(gradients) != set(expected_gradients):
        raise ValueError(f"{case}: gradients differ: {sorted(set(gradients) ^ set(expected_gradients))}")
    out = {}
    for name, value in expected_parts.items():
        out[name] = float(((parts[name].double() - value.double()).abs() / value.abs().clamp(min=1)).max())
    for name, value in expected_gradients.items():
        lost = case.train and name.endswith("linear.bias")  # batch norm takes its gradient away
        scale = expected_gradients[name.replace("linear.bias", "norm.bias") if lost else name].abs().max()
        out[f"d/d {name}"] = float((gradients[name].double() - value.double()).abs().max() / (scale or 1.0))
    return out


def weights(case: Case) -> dict[str, torch.Tensor]:
    """Of a case's architecture, in scvi-tools' names, drawn wider than at their start."""
    torch.manual_seed(case.n_labels)
    state = module_of(case).state_dict()
    for name, value in sorted(state.items()):
        if name.endswith(("running_var", ".1.weight")) and value.ndim == 1:
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and name != "y_prior":
            value.normal_(0.0, 0.7 * value.shape[1] ** -0.5 if value.ndim == 2 else 0.5)
    state["decoder.px_scale_decoder.0.bias"][:2] += 3.0  # the abundant genes
    for name in ("z_encoder.var_encoder", "encoder_z2_z1.var_encoder", "decoder.px_scale_decoder.0"):
        state[f"{name}.weight"] /= 3
    if case.base.library == "latent":
        state["library_log_means"].normal_(4.0, 0.5)
        state["library_log_vars"].uniform_(0.2, 0.8)
        state["l_encoder.mean_encoder.bias"].fill_(4.0)
        state["l_encoder.var_encoder.weight"] /= 3
    return {name: value for name, value in state.items() if parity.reads(case.base, name) and name != "y_prior"}


def write(path: Path = FILE) -> None:
    """Weights in float32, scvi-tools' parts and gradients of all cases in float64."""
    import scvi

    cells, tensors = parity.simulate(), {}
    for case in CASES:
        state = weights(case)
        parts, gradients = theirs(case, state, cells)
        tensors |= {f"weights/{str(case).removesuffix('-train')}/{name}": value for name, value in state.items()}
        tensors[f"parts/{case}"] = torch.stack([parts[name] for name in PARTS])
        tensors |= {f"gradients/{case}/{name}": value for name, value in gradients.items()}
    versions = {"scvi-tools": scvi.__version__, "torch": torch.__version__, "numpy": np.__version__}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"by": json.dumps(versions)})


def read(case: Case, path: Path = FILE):
    """(weights, (parts, gradients) of scvi-tools) of a case, in scvi-tools' names."""
    with safe_open(path, "pt") as stored:

        def under(prefix):
            names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            return {name.removeprefix(prefix): stored.get_tensor(name) for name in names}

        state, gradients = under(f"weights/{str(case).removesuffix('-train')}/"), under(f"gradients/{case}/")
        parts = dict(zip(PARTS, stored.get_tensor(f"parts/{case}"), strict=True))
    return state, (parts, gradients)


if __name__ == "__main__":
    write()
    cells = parity.simulate()
    for case in CASES:
        state, (parts, gradients) = read(case)
        expected = parts, transfer(case, gradients)
        worst = [max(deviations(case, ours(case, state, cells, dtype), expected).items(), key=lambda item: item[1])
                 for dtype in (torch.float32, torch.float64)]  # fmt: skip
        print(f"{case!s:24}", *(f"{value:.1e} ({name})" for name, value in worst))
