"""Our model beside scvi-tools at equal weights: simulated cells, the transfer of weights, both evaluations.

    python tests/unit/parity.py     # where scvi-tools is: writes parity.safetensors anew, prints the largest deviations

``test_parity.py`` reads what this writes. A case is a likelihood, dispersion, library, with or without covariates, in
eval or in train mode (batch norm by the minibatch; no dropout). Both models get the same weights and the same noise.

Where the two differ, and what is done about it:

- scvi-tools adds 1e-8 in the logs of NB and ZINB, ours nothing (nor does scvi-tools in Poisson). A count x of mean mu
  so gains x 1e-8 / mu nats: nothing to speak of in :data:`CASES`, where counts of hundreds have means of some size, but
  a part in a thousand and more in :data:`SHARP`, where some have not. Both are held against :func:`reference`, which is
  independent, float64, and can take this constant: scvi-tools is the reference with it, ours the reference without it.
- scvi-tools takes log-gammas in float32, which costs a count of 500 some 1e-4 nats and one of 1e5 some 0.1. Counts are
  below 500 here, and this is what deviations in the reconstruction are made of.
- Both add 1e-4 to the variances of q.
- scvi-tools gives continuous covariates to the decoder's first layer alone, ours to every layer, as both do with batch
  and categorical covariates. In deeper layers ours gets zero weights for them, whose gradients have no counterpart.
- scvi-tools has parameters that some likelihoods do not read; there ours has none. :func:`reads` names those read.
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
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scvi_core.config import ModelConfig
from scvi_core.counts import Minibatch
from scvi_core.kernels import Nonzeros
from scvi_core.model import SCVI

FILE = Path(__file__).with_name("parity.safetensors")
CELLS, GENES, BATCHES, CATEGORIES, HIDDEN, LATENT = 24, 30, 3, 3, 5, 3
TERMS = ("reconstruction", "kl_z", "kl_l")
EPS = 1e-8  # scvi-tools', in the logs of NB and ZINB


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination, and the mode both models are in."""

    likelihood: str
    dispersion: str
    library: str
    covariates: bool = True
    train: bool = False
    n_layers: int = 1
    sharp: bool = False  # shares of genes far apart
    norm: str = "batch"  # of encoder and decoder
    encode: bool = False  # whether the encoder sees batch and covariates
    first: bool = False  # whether the first hidden layers alone see them

    def __str__(self) -> str:
        on = {"covariates": self.covariates, "train": self.train, "deep": self.n_layers > 1, "sharp": self.sharp}
        on |= {f"{self.norm}norm": self.norm != "batch", "encode": self.encode, "first": self.first}
        return "-".join((self.likelihood, self.dispersion, self.library, *(word for word in on if on[word])))

    @property
    def config(self) -> ModelConfig:
        """Our configuration of it."""
        return ModelConfig(
            likelihood=self.likelihood, dispersion=self.dispersion, library=self.library,
            n_latent=LATENT, n_hidden=HIDDEN, n_layers=self.n_layers, dropout=0.0, encoder_norm=self.norm,
            decoder_norm=self.norm, encode_covariates=self.encode, covariates_in="first" if self.first else "every",
        )  # fmt: skip

    @property
    def pool(self) -> str:
        """The name of the weights that it shares with other cases of its architecture."""
        parts = [self.norm, *(word for word, on in (("encode", self.encode), ("first", self.first)) if on)]
        return f"{self.covariates:d}{self.n_layers}" + "".join(f"-{part}" for part in parts if part != "batch")

    @property
    def stored(self) -> Case:
        """The case whose values are committed for it: Poisson has no dispersion."""
        return dataclasses.replace(self, dispersion="gene") if self.likelihood == "poisson" else self


_grid = (("zinb", "nb", "poisson"), ("gene", "gene-batch", "gene-cell"), ("observed", "latent"))
CASES = [Case(*which, covariates) for covariates in (False, True) for which in itertools.product(*_grid)]
CASES += [Case(*which, train=True) for which in itertools.product(*_grid)]
CASES += [Case("zinb", "gene", "latent", train=train, n_layers=2) for train in (False, True)]
# as the large public models have them (HLCA, Tabula Sapiens): layer norm, or none, and an encoder that sees the batch
CASES += [
    Case(*which, train=train, n_layers=n, norm=norm, encode=encode, first=first)
    for which, n, norm, encode, first in (
        (("nb", "gene", "observed"), 2, "layer", True, True),
        (("zinb", "gene-cell", "latent"), 2, "layer", True, False),
        (("zinb", "gene-batch", "latent"), 1, "none", True, False),
        (("nb", "gene", "latent"), 2, "batch", True, False),
        (("zinb", "gene", "observed"), 2, "batch", False, True),
        (("poisson", "gene", "observed"), 3, "none", False, True),
    )
    for train in (False, True)
]
SHARP = [Case("nb", "gene", "observed", sharp=True), Case("zinb", "gene-cell", "latent", sharp=True)]


def simulate(seed: int = 0) -> dict[str, torch.Tensor]:
    """Counts, some of them in the hundreds, codes of batch and covariates, and noise for one draw of z and log l."""
    rng = np.random.default_rng(seed)
    x_ng = rng.poisson(rng.gamma(0.7, 2.0, (CELLS, GENES)) * rng.lognormal(0.0, 0.7, (CELLS, 1)))
    x_ng[:, :2] = rng.poisson(rng.lognormal(3.5, 1.0, (CELLS, 2)))  # abundant ones
    x_ng[:, 3] = 0  # a gene that is nowhere
    values = {
        "x_ng": x_ng.astype(np.float32),
        "batch_n": np.arange(CELLS) % BATCHES,
        "category_n": rng.integers(0, CATEGORIES, CELLS),
        "number_n": rng.normal(size=CELLS).astype(np.float32),
        "noise_nk": rng.normal(size=(CELLS, LATENT)).astype(np.float32),
        "noise_n": rng.normal(size=CELLS).astype(np.float32),
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


def reads(case: Case, name: str) -> bool:
    """Whether scvi-tools' parameter or buffer `name` has a part in the evidence lower bound of a case."""
    theta = case.likelihood != "poisson"
    parts = {
        "l_encoder": case.library == "latent",
        "library_log_means": case.library == "latent",
        "library_log_vars": case.library == "latent",
        "decoder.px_dropout_decoder": case.likelihood == "zinb",
        "decoder.px_r_decoder": theta and case.dispersion == "gene-cell",
        "px_r": theta and case.dispersion != "gene-cell",
    }
    return next((read for part, read in parts.items() if re.match(rf"{part}(\.|$)", name)), True)


def state_of(case: Case, pool: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A case's part of the weights shared by all: in scvi-tools' names, what the case does not read left out."""
    state = {name: value for name, value in pool.items() if reads(case, name)}
    if "px_r" in state and case.dispersion == "gene":
        state["px_r"] = state["px_r"][:, 0]
    if case.sharp:
        state["decoder.px_scale_decoder.0.weight"] = state["decoder.px_scale_decoder.0.weight"] * 8
    return state


NAMES = [
    (r"^z_encoder\.", "encoder."),
    (r"^l_encoder\.", "library_encoder."),
    (r"encoder\.fc_layers\.", "layers."),
    (r"decoder\.px_decoder\.fc_layers\.", "decoder."),
    (r"Layer (\d+)\.0\.", r"\1.linear."),
    (r"Layer (\d+)\.1\.", r"\1.norm."),
    (r"mean_encoder", "mean"),
    (r"var_encoder", "log_variance"),
    (r"decoder\.px_scale_decoder\.0", "rho"),
    (r"decoder\.px_dropout_decoder", "dropout_logit"),
    (r"decoder\.px_r_decoder", "log_theta"),
    (r"^px_r$", "log_theta_sg"),
    (r"library_log_means", "library_mean_s"),
    (r"library_log_vars", "library_variance_s"),
]


def transfer(
    state: dict[str, torch.Tensor], config: ModelConfig, n_continuous: int, missing: float = 0.0
) -> dict[str, torch.Tensor]:
    """Weights of scvi-tools' VAE as a state of our SCVI, or gradients by the ones as those by the others.

    Parameters
    ----------
    state : in scvi-tools' names, without what the case does not read.
    config : of our model.
    n_continuous : columns of continuous covariates.
    missing : stands for the weights that scvi-tools does not have.
    """
    out = {}
    for theirs, value in state.items():
        name = theirs
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        place = re.fullmatch(r"(.*encoder\.layers|decoder)\.(\d+)\.linear\.weight", name)
        if place:
            first, encoder = place[2] == "0", "encoder" in name
            begin = config.n_hidden if not first else GENES if encoder else config.n_latent
            # theirs: the input, continuous ones in the first layer, one-hots
            here = n_continuous if first and (config.encode_covariates or not encoder) else 0
            numbers, one_hots = value[:, begin : begin + here], value[:, begin + here :]
            if one_hots.shape[1] and not here:
                numbers = torch.full_like(value[:, :n_continuous], missing)
            design = torch.cat([one_hots, numbers], 1)
            if first and encoder:
                stem = name.removesuffix("weight")
                name, value = stem + "weight_gh", value[:, :begin].T
                if design.shape[1]:
                    out[stem + "weight_hc"] = design.contiguous()
            else:
                value = torch.cat([value[:, :begin], design], 1)
        elif name == "log_theta_sg":
            value = value.T if value.ndim == 2 else value[None]
        elif name.startswith("library_") and name.endswith("_s"):
            value = value[0]
        out[name] = value.contiguous()
    return out


def in_our_names(case: Case, values):
    """(terms, gradients) with the gradients as ours are named and laid out; NaN where scvi-tools has no weight."""
    if any(gradient.isnan().any() for gradient in values[1].values()):
        raise ValueError(f"{case}: gradients that are NaN")
    return values[0], transfer(values[1], case.config, int(case.covariates), missing=float("nan"))


def ours(case: Case, state: dict[str, torch.Tensor], cells: dict[str, torch.Tensor], dtype: torch.dtype):
    """Terms (name -> (cells,)) and gradients (our name -> tensor) of our model at scvi-tools' weights."""
    n_covariates = (CATEGORIES + 1) * case.covariates
    model = SCVI(case.config, GENES, BATCHES, n_covariates, torch.zeros(BATCHES), torch.ones(BATCHES))
    model.to(dtype).load_state_dict(transfer(state, case.config, int(case.covariates)))
    x = Nonzeros.of(cells["x_ng"])
    x = dataclasses.replace(x, x_m=x.x_m.to(dtype))
    design = [torch.nn.functional.one_hot(cells["category_n"], CATEGORIES).to(dtype), cells["number_n"][:, None]]
    design_nc = torch.cat([part.to(dtype) for part in design], 1)[:, :n_covariates]
    minibatch = Minibatch(x, x.totals().to(dtype), cells["batch_n"], design_nc)
    draws = iter((cells["noise_nk"], cells["noise_n"]))
    noise = SimpleNamespace(normal=lambda like: next(draws).to(like.dtype))
    terms = model.train(case.train).elbo_terms(minibatch, noise)
    (terms[1] + terms[2] - terms[0]).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}, gradients


def vae_of(case: Case):
    """scvi-tools' module of a case, with its own weights."""
    from scvi.module import VAE

    return VAE(
        GENES, n_batch=BATCHES, n_hidden=HIDDEN, n_latent=LATENT, n_layers=case.n_layers, dropout_rate=0.0,
        n_continuous_cov=int(case.covariates), n_cats_per_cov=[CATEGORIES] if case.covariates else None,
        dispersion=case.dispersion, gene_likelihood=case.likelihood,
        use_observed_lib_size=case.library == "observed", encode_covariates=case.encode,
        deeply_inject_covariates=not case.first, use_batch_norm="both" if case.norm == "batch" else "none",
        use_layer_norm="both" if case.norm == "layer" else "none",
        library_log_means=np.zeros((1, BATCHES)), library_log_vars=np.ones((1, BATCHES)),
    )  # fmt: skip


def theirs(case: Case, state: dict[str, torch.Tensor], cells: dict[str, torch.Tensor]):
    """Terms (name -> (cells,)) and gradients (scvi-tools' name -> tensor) of scvi-tools' module, in float32."""
    vae = vae_of(case).train(case.train)
    unset = vae.load_state_dict(state, strict=False)
    if unset.unexpected_keys or any(reads(case, name) for name in unset.missing_keys):
        raise ValueError(f"{case}: weights do not fit the module: {unset}")
    tensors = {"X": cells["x_ng"], "batch": cells["batch_n"][:, None], "labels": torch.zeros(CELLS, 1).long()}
    if case.covariates:
        tensors |= {"extra_categorical_covs": cells["category_n"][:, None]}
        tensors |= {"extra_continuous_covs": cells["number_n"][:, None]}
    draws = {LATENT: cells["noise_nk"], 1: cells["noise_n"][:, None]}
    with mock.patch("torch.distributions.normal._standard_normal", lambda shape, **_: draws[shape[1]]):
        _, _, loss = vae(tensors)
    loss.loss.backward()
    terms = {
        "reconstruction": -loss.reconstruction_loss["reconstruction_loss"],
        "kl_z": loss.kl_local["kl_divergence_z"],
        "kl_l": loss.kl_local["kl_divergence_l"],
    }
    gradients = {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}
    if set(gradients) != {name for name, _ in vae.named_parameters() if reads(case, name)}:
        raise ValueError(f"{case}: other parameters are read than expected: {sorted(gradients)}")
    return {name: term.detach() for name, term in terms.items()}, gradients


def reference(case: Case, state: dict[str, torch.Tensor], cells: dict[str, torch.Tensor], eps: float = 0.0):
    """The same from the paper's equations alone, in float64 and by autograd, from scvi-tools' names and layout.

    `eps` is what scvi-tools adds in the logs of NB and ZINB.
    """
    state = {name: value.double() for name, value in state.items()}
    weights = {name: value.requires_grad_() for name, value in state.items() if is_parameter(name)}
    x_ng, s = cells["x_ng"].double(), cells["batch_n"]
    eye = torch.eye(max(BATCHES, CATEGORIES), dtype=torch.float64)
    one_hots = [eye[s, :BATCHES], *([eye[cells["category_n"], :CATEGORIES]] if case.covariates else [])]
    numbers = [cells["number_n"][:, None].double()] if case.covariates else []

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer(name, h):
        h = linear(f"{name}.0", h)
        if case.norm != "batch":
            unit = 1.0 if case.norm == "none" else (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return torch.relu((h - (0.0 if case.norm == "none" else h.mean(1, keepdim=True))) / unit)
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        if case.train:
            mean, variance = h.mean(0), ((h - h.mean(0)) ** 2).mean(0)
        return torch.relu((h - mean) / (variance + 1e-3).sqrt() * state[f"{name}.1.weight"] + state[f"{name}.1.bias"])

    def gaussian(name, n_layers):
        h = torch.cat([torch.log(1 + x_ng), *(numbers if case.encode else [])], 1)
        for i in range(n_layers):
            seen = one_hots if case.encode and (i == 0 or not case.first) else []
            h = layer(f"{name}.encoder.fc_layers.Layer {i}", torch.cat([h, *seen], 1))
        return linear(f"{name}.mean_encoder", h), linear(f"{name}.var_encoder", h).exp() + 1e-4

    def divergence(mean, variance, prior_mean, prior_variance):
        return (torch.log(prior_variance / variance) + (variance + (mean - prior_mean) ** 2) / prior_variance - 1) / 2

    mean_nk, variance_nk = gaussian("z_encoder", case.n_layers)
    h = torch.cat([mean_nk + variance_nk.sqrt() * cells["noise_nk"], *numbers], 1)
    kl_z_n = divergence(mean_nk, variance_nk, torch.zeros(()).double(), torch.ones(()).double()).sum(1)
    log_l_n, kl_l_n = x_ng.sum(1).log(), torch.zeros_like(kl_z_n)
    if case.library == "latent":
        mean_n, variance_n = (moment[:, 0] for moment in gaussian("l_encoder", 1))
        log_l_n = mean_n + variance_n.sqrt() * cells["noise_n"]
        kl_l_n = divergence(mean_n, variance_n, state["library_log_means"][0, s], state["library_log_vars"][0, s])
    for i in range(case.n_layers):
        seen = one_hots if i == 0 or not case.first else []
        h = layer(f"decoder.px_decoder.fc_layers.Layer {i}", torch.cat([h, *seen], 1))
    mu = log_l_n.exp()[:, None] * torch.softmax(linear("decoder.px_scale_decoder.0", h), 1)
    if case.likelihood == "poisson":
        log_p = x_ng * mu.log() - mu - torch.lgamma(x_ng + 1)
    else:
        log_theta = linear("decoder.px_r_decoder", h) if case.dispersion == "gene-cell" else state["px_r"]
        theta = log_theta.T[s].exp() if case.dispersion == "gene-batch" else log_theta.exp()
        log_p = torch.lgamma(x_ng + theta) - torch.lgamma(theta) - torch.lgamma(x_ng + 1)
        log_p = log_p + theta * ((theta + eps) / (theta + mu + eps)).log()
        log_p = log_p + x_ng * ((mu + eps) / (theta + mu + eps)).log()
    if case.likelihood == "zinb":
        pi = torch.sigmoid(linear("decoder.px_dropout_decoder", h))
        log_p = torch.where(x_ng == 0, (pi + (1 - pi) * log_p.exp()).log(), (1 - pi).log() + log_p)
    terms = (log_p.sum(1), kl_z_n, kl_l_n)
    (terms[1] + terms[2] - terms[0]).mean().backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    return {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}, gradients


def is_parameter(name: str) -> bool:
    """Whether a name of scvi-tools' state is a parameter, not a buffer."""
    return not re.search(r"running_|num_batches|library_log", name)


def deviations(case: Case, got, expected) -> dict[str, float]:
    """Largest relative deviation of every term, the lower bound and every gradient (our names).

    Terms cell by cell. Gradients against the largest entry of their tensor, as entries are sums over cells in which
    terms of both signs may cancel. Of the bias before a batch norm that takes the minibatch's mean away the gradient
    is zero but for rounding; it is measured against that of the batch norm's own bias.
    """
    (terms, gradients), (expected_terms, expected_gradients) = got, expected
    if set(gradients) != set(expected_gradients):
        raise ValueError(f"{case}: gradients differ: {sorted(set(gradients) ^ set(expected_gradients))}")
    terms, expected_terms = (
        {k: v.double() for k, v in t.items()} | {"elbo": t["reconstruction"].double() - t["kl_z"] - t["kl_l"]}
        for t in (terms, expected_terms)
    )
    out = {}
    for name, value in expected_terms.items():
        scale = torch.where(value == 0, 1.0, value.abs())
        out[name] = float(((terms[name] - value).abs() / scale).max())
    for name, value in expected_gradients.items():
        assert value.shape == gradients[name].shape, name
        lost = case.train and case.norm == "batch"
        scale = expected_gradients[name.replace("linear.bias", "norm.bias") if lost else name]
        there = ~value.isnan()
        difference = (gradients[name].double() - value.double())[there].abs().max()
        out[f"d/d {name}"] = float(difference / scale[~scale.isnan()].abs().max())
    return out


def pools() -> dict[str, dict[str, torch.Tensor]]:
    """Weights for all cases of an architecture: of a module that has every part, drawn wider than at its start."""
    out = {}
    for which, case in sorted({case.pool: case for case in CASES}.items()):
        torch.manual_seed(0)
        whole = {"likelihood": "zinb", "dispersion": "gene-batch", "library": "latent", "train": False, "sharp": False}
        pool = vae_of(dataclasses.replace(case, **whole)).state_dict()
        for name, value in pool.items():
            if name.endswith(("running_var", ".1.weight")):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(0.0, value.shape[1] ** -0.5 if name.endswith(".weight") else 0.7)
        pool["library_log_means"].normal_(4.0, 0.5)
        pool["library_log_vars"].uniform_(0.2, 0.8)
        pool["l_encoder.mean_encoder.bias"].fill_(4.0)
        pool["decoder.px_scale_decoder.0.bias"][:2] += 3.0  # the abundant genes
        for name in ("z_encoder.var_encoder", "l_encoder.var_encoder", "decoder.px_scale_decoder.0"):
            pool[f"{name}.weight"] /= 3  # means of some size
        pool["decoder.px_r_decoder.weight"] /= 3
        out[which] = pool
    return out


def write(path: Path = FILE) -> None:
    """Cells, weights, and scvi-tools' terms and gradients (in the order of the weights) of all cases, as float32."""
    import scvi

    cells = simulate()
    tensors = {f"cells/{name}": value for name, value in cells.items()}
    shared = pools()
    for which, pool in shared.items():
        tensors |= {f"weights/{which}/{name}": value for name, value in pool.items()}
    for case in dict.fromkeys(case.stored for case in CASES + SHARP):
        state = state_of(case, shared[case.pool])
        terms, gradients = theirs(case, state, cells)
        tensors[f"terms/{case}"] = torch.stack([terms[name] for name in TERMS])
        tensors[f"gradients/{case}"] = torch.cat([gradients[n].flatten() for n in sorted(state) if is_parameter(n)])
    versions = {"scvi-tools": scvi.__version__, "torch": torch.__version__, "numpy": np.__version__}
    # as one text: the order of several would change from run to run, and so the file
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"by": json.dumps(versions)})


def read(case: Case, path: Path = FILE):
    """(cells, weights, (terms, gradients) of scvi-tools) of a case, all but the cells in scvi-tools' names."""
    with safe_open(path, "pt") as stored:
        names, get = list(stored.keys()), stored.get_tensor
        prefixes = ("cells/", f"weights/{case.pool}/")
        cells, pool = ({n.removeprefix(p): get(n) for n in names if n.startswith(p)} for p in prefixes)
        terms = dict(zip(TERMS, get(f"terms/{case.stored}"), strict=True))
        flat = get(f"gradients/{case.stored}")
    state = state_of(case, pool)
    shapes = {name: state[name].shape for name in sorted(state) if is_parameter(name)}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    gradients = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return cells, state, (terms, gradients)


def compare(case: Case) -> dict[str, dict[str, float]]:
    """Deviations of a case by what is compared: ours with scvi-tools' committed values, and where they come from."""
    cells, state, peer = read(case)
    values = (peer, *(reference(case, state, cells, eps) for eps in (0.0, EPS)))
    peer, exact, with_eps = (in_our_names(case, value) for value in values)
    single, double = (ours(case, state, cells, dtype) for dtype in (torch.float32, torch.float64))
    return {
        "ours - scvi-tools, float32": deviations(case, single, peer),
        "ours - reference, float32": deviations(case, single, exact),
        "ours - reference, float64": deviations(case, double, exact),
        "scvi-tools' rounding: float32 - reference with its 1e-8": deviations(case, peer, with_eps),
        "scvi-tools' 1e-8: reference with it - without": deviations(case, with_eps, exact),
    }


if __name__ == "__main__":
    write()
    for cases in (CASES, SHARP):
        worst: dict[tuple[str, str], tuple[float, str]] = {}
        for case in cases:
            for title, rows in compare(case).items():
                for name, value in rows.items():
                    row = title, "gradients" if name.startswith("d/d") else name
                    worst[row] = max(worst.get(row, (-1.0, "")), (value, f"{name}, {case}"))
        print(f"largest relative deviations in {len(cases)} cases")
        for (title, row), (value, where) in worst.items():
            print(f"{title:56} {row:15} {value:.1e}  ({where})")
