"""All that a running fit is, and its checkpoints: saved whole, it resumes bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scvi_core import parallel
from scvi_core.config import TrainConfig
from scvi_core.files import UserError, canonical_json, replacing
from scvi_core.log import log
from scvi_core.model import SCVI

Trainable = Mapping[str, bool | torch.Tensor]  # a parameter's name -> whether, or which of its entries, are trained


@dataclasses.dataclass
class State:
    """All that a fit in progress is, besides its inputs.

    Attributes
    ----------
    names, weights : of the parameters that are trained.
    masks : of each, where it is trained; None is everywhere.
    means, squares : Adam's moments of their gradients.
    step, epoch : optimiser steps and epochs done.
    elbo_sum : over the cells of the running epoch, as far as they were seen before the fit was resumed.
    best : the model's state after `best_epoch`, where early stopping keeps it.
    """

    model: SCVI
    names: list[str]
    weights: list[torch.Tensor]
    masks: list[torch.Tensor | None]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    step: int = 0
    epoch: int = 0
    elbo_sum: float = 0.0
    best_elbo: float = -math.inf
    best_epoch: int = 0
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    history: list[list[float]] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(model: SCVI, trainable: Trainable | None = None) -> State:
        """Before the first step. Weights that are not trained ask for no gradient from now on.

        Raises
        ------
        UserError
            When `trainable` names no parameter of the model, or a mask is not of its shape.
        """
        weights = dict(model.named_parameters())
        for name in trainable or {}:
            if name not in weights:
                raise UserError(f"trainable: the model has no weights {name!r} (it has {', '.join(weights)})")
        kept = {}
        for name, weight in weights.items():
            given = True if trainable is None else trainable.get(name, False)
            mask = torch.tensor(given) if isinstance(given, bool) else given
            if mask.dtype != torch.bool or (mask.dim() and mask.shape != weight.shape):
                raise UserError(f"trainable: {name!r} wants True, False, or a boolean tensor of {tuple(weight.shape)}")
            weight.requires_grad_(bool(mask.any()))
            if weight.requires_grad:
                kept[name] = None if mask.all() else mask.contiguous().to(weight.device)
        trained = [weights[name] for name in kept]
        if not trained:
            raise UserError("trainable: no weight is left to train")
        moments = ([torch.zeros_like(w, requires_grad=False) for w in trained] for _ in range(2))
        return State(model, list(kept), trained, list(kept.values()), *moments)

    def ready(self) -> None:
        """Put the model in train mode, but parts all of whose weights are frozen: they have no dropout, and their batch
        norms go by the running moments and leave them as they are.
        """
        self.model.train()
        for part in self.model.modules():
            weights = list(part.parameters())
            if weights and not any(w.requires_grad for w in weights):
                part.eval()

    def save(self, elbo_b: torch.Tensor, path: Path | None, identity: str) -> None:
        """Write it as one safetensors file, atomically; the first process alone does.

        `elbo_b` are the running epoch's, of which the state keeps the sum.
        """
        elbo_sum = self.elbo_sum + float(parallel.summed(elbo_b).sum())
        if path is None or parallel.rank():
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for kind, moments in (("mean", self.means), ("square", self.squares)):
            tensors |= {f"adam.{kind}.{name}": v for name, v in zip(self.names, moments, strict=True)}
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        scalars = {name: getattr(self, name) for name in ("step", "epoch", "best_elbo", "best_epoch")}
        scalars |= {"elbo_sum": elbo_sum, "best_elbo": None if self.best_elbo == -math.inf else self.best_elbo}
        history = [[None if math.isnan(v) else v for v in row] for row in self.history]
        about = canonical_json({"identity": identity, "scalars": scalars, "history": history})
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"state": about, "sha256": _digest(tensors, about)})

    def resume(self, path: Path, identity: str) -> None:
        """Load a state in place; one that is torn or belongs to another fit is left alone, and said so."""
        try:
            with safe_open(path, "pt") as file:
                told = {"state": "{}", "sha256": ""} | (file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            saved = json.loads(told["state"])
            if saved.get("identity") != identity:
                log.warning("%s: a checkpoint of another fit; starting from the beginning", path)
                return
            if told["sha256"] != _digest(tensors, told["state"]):
                raise ValueError("its content is not what was written")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s: not a whole checkpoint (%s); starting from the beginning", path, error)
            return
        for name, value in saved["scalars"].items():
            setattr(self, name, -math.inf if name == "best_elbo" and value is None else value)
        self.history = [[math.nan if v is None else v for v in row] for row in saved["history"]]
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.model.load_state_dict(part("model."))
        self.best = {k: v.to(self.weights[0].device) for k, v in part("best.").items()}
        for name, mean, square in zip(self.names, self.means, self.squares, strict=True):
            mean.copy_(tensors[f"adam.mean.{name}"])
            square.copy_(tensors[f"adam.square.{name}"])
        log.info("resuming at epoch %d, step %d from %s", self.epoch + 1, self.step, path)


def _digest(tensors: dict[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def check(state: State, config: TrainConfig, elbo_b: torch.Tensor, checkpoint: Path | None) -> None:
    """Refuse to go on when a loss of the running epoch was not finite, or the last step's update is not."""
    lost = (~torch.isfinite(parallel.summed(elbo_b))).nonzero()[:, 0]
    steps = len(elbo_b)
    if len(lost):
        raise UserError(diagnosis(state, config, int(lost[0]), steps, checkpoint))
    if not torch.stack([torch.isfinite(value).all() for value in state.model.state_dict().values()]).all():
        raise UserError(diagnosis(state, config, (state.step - 1) % steps, steps, checkpoint))


def diagnosis(state: State, config: TrainConfig, step: int, steps: int, checkpoint: Path | None) -> str:
    """What to say of a loss that is not finite: where, why, and what to do."""
    where = f"epoch {state.epoch + 1}, step {step + 1} of {steps}"
    cause = "counts out of range; look for outlier cells (qc.max_counts)"
    if any(not torch.isfinite(p).all() for p in state.model.parameters()):
        cause = f"weights have overflowed; lower train.learning_rate (now {config.learning_rate:g})"
    kept = f"; {checkpoint} holds the last sound state" if checkpoint is not None and checkpoint.exists() else ""
    return f"train: the loss is not finite at {where}: {cause}, or set train.gradient_clip{kept}"
