"""The training loop: minibatches, warm-up of the KL term, validation, early stopping, checkpoints.

One state, :class:`State`, is all there is to a running fit: saved whole after an epoch and on request, it resumes
bit for bit, because the order of cells depends on (seed, epoch) and the noise on (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scvi_core.config import TrainConfig
from scvi_core.counts import Counts, Minibatch
from scvi_core.files import UserError, canonical_json, replacing
from scvi_core.log import log
from scvi_core.model import SCVI

HISTORY = ["epoch", "seconds", "train_elbo", "validation_elbo", "kl_weight", "learning_rate"]


class Interrupted(Exception):  # noqa: N818 (an outcome, not a fault)
    """Training was asked to stop; its checkpoint is written, and running again continues it."""


@dataclasses.dataclass
class State:
    """All that a fit in progress is, besides its inputs."""

    model: SCVI
    optimiser: torch.optim.Optimizer
    step: int = 0  # optimiser steps done
    epoch: int = 0  # epochs done
    elbo_sum: float = 0.0  # over the cells seen in the running epoch
    best_elbo: float = -math.inf
    best_epoch: int = 0
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    history: list[list[float]] = dataclasses.field(default_factory=list)


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device, said in the log.

    Raises
    ------
    UserError
        When CUDA is asked for and there is none: never a silent change to the CPU.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UserError("device: 'cuda' was asked for but PyTorch sees no CUDA device; use device: cpu or auto")
    chosen = torch.device("cuda" if found and device != "cpu" else "cpu")
    name = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device = %s (%s; asked for: %s)", chosen, name, device)
    return chosen


def n_epochs(config: TrainConfig, n_cells: int) -> int:
    """Epochs to run at most: as configured, else fewer the more cells there are.

    `auto` is 200 for 2,000 cells and falls with the root of their number, so that a large atlas takes more steps than a
    small one but fewer looks at each cell; never under 10, never over 400.
    """
    if config.max_epochs != "auto":
        return config.max_epochs
    return max(10, min(400, round(200 * math.sqrt(2000 / n_cells))))


def hold_out(config: TrainConfig, n_cells: int, seed: int) -> np.ndarray:
    """Positions of the cells set aside for validation, drawn at random, sorted."""
    order = np.random.default_rng([seed, 2**31]).permutation(n_cells)
    return np.sort(order[: round(config.validation_fraction * n_cells)])


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of one step: constant, or a linear rise over the first tenth and a half cosine down to zero."""
    if config.schedule == "constant":
        return config.learning_rate
    rise = 0.1 * total
    if step < rise:
        return config.learning_rate * min(1.0, (step + 1) / rise)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def n_steps(config: TrainConfig, n_cells: int) -> int:
    """Minibatches an epoch. They are of nearly equal size, so that the last is never a single cell."""
    return min(math.ceil(n_cells / config.batch_size), n_cells // 2)


def kl_weight(config: TrainConfig, step: int, total: int) -> float:
    """Weight of the KL term in one step's loss: a linear rise over the warm-up's share of all steps, then full."""
    warmup = config.kl_warmup * total
    return config.kl_weight * min(1.0, (step + 1) / warmup) if warmup else config.kl_weight


def train(
    model: SCVI,
    counts: Counts,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> pd.DataFrame:
    """Fit `model` in place.

    Parameters
    ----------
    model : with fresh weights. It is moved to `device` and left there, with the best weights, in eval mode.
    counts : all cells, packed.
    train_rows, validation_rows : positions of the cells; the second are never trained on, and may be none.
    config, seed : with the data and the initial weights they decide the result.
    checkpoint : file that holds the state of the fit while it runs; if there is one of the same `identity`, the fit
        goes on from there. The caller removes it when the result is safe.
    identity : what the checkpoint belongs to (the fingerprint).
    stop : asked after every step; true writes the checkpoint and raises :class:`Interrupted`.

    Returns
    -------
    pandas.DataFrame
        A row an epoch: epoch, seconds, train_elbo, validation_elbo (nats a cell, KL weight 1), kl_weight,
        learning_rate.

    Raises
    ------
    UserError
        When the loss is not finite: names epoch, step and likely cause; the checkpoint of the last whole epoch stays.
    Interrupted
        When `stop` said so.
    """
    model.to(device)
    if len(train_rows) < 2:
        raise UserError(f"train: {len(train_rows)} cells to train on; at least 2 are needed")
    counts = counts.to(device)
    _set_library_prior(model, counts, torch.from_numpy(train_rows).to(device))
    optimiser = torch.optim.Adam(
        model.parameters(), config.learning_rate, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )
    state = State(model, optimiser)
    if checkpoint is not None and checkpoint.exists():
        _resume(state, checkpoint, identity)
    epochs = n_epochs(config, len(train_rows))
    steps = n_steps(config, len(train_rows))
    noise = torch.Generator(device)
    cells = None
    with _bar(progress, epochs, state.epoch) as show:
        while state.epoch < epochs and not _has_stalled(state, config):
            began = time.perf_counter()
            order = np.random.default_rng([seed, state.epoch]).permutation(train_rows)
            batches = np.array_split(order, steps)
            model.train()
            for rows in batches[state.step - state.epoch * steps :]:
                noise.manual_seed(seed * 1_000_003 + state.step)
                cells = counts.gather(torch.from_numpy(rows).to(device))
                reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(cells, noise)
                loss = (kl_weight(config, state.step, epochs * steps) * kl_z_n + kl_l_n - reconstruction_n).mean()
                optimiser.param_groups[0]["lr"] = learning_rate(config, state.step, epochs * steps)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if config.gradient_clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
                optimiser.step()
                state.step += 1
                elbo = float((reconstruction_n - kl_z_n - kl_l_n).detach().sum())
                if not math.isfinite(elbo):
                    raise UserError(_diagnosis(state, config, cells, steps, checkpoint))
                state.elbo_sum += elbo
                if stop():
                    _check_weights(state, config, cells, steps, checkpoint)
                    if checkpoint is not None:
                        _save(state, checkpoint, identity)
                    raise Interrupted
            # the last step's update is not in its loss; nothing that is not finite may reach the checkpoint
            _check_weights(state, config, cells, steps, checkpoint)
            validation_elbo = elbo_of(model, counts, validation_rows, seed) if len(validation_rows) else math.nan
            if len(validation_rows) and not math.isfinite(validation_elbo):
                raise UserError(_diagnosis(state, config, cells, steps, checkpoint))
            state.epoch += 1
            train_elbo, state.elbo_sum = state.elbo_sum / len(train_rows), 0.0
            seconds = time.perf_counter() - began
            schedule = [rule(config, state.step - 1, epochs * steps) for rule in (kl_weight, learning_rate)]
            state.history.append([state.epoch, seconds, train_elbo, validation_elbo, *schedule])
            show(train_elbo, validation_elbo, len(train_rows) / seconds)
            # the ELBO of a model still under warm-up is no measure of it, so the best is sought from its end
            warm = schedule[0] == config.kl_weight
            if len(validation_rows) and config.early_stopping and warm and validation_elbo > state.best_elbo:
                state.best_elbo, state.best_epoch = validation_elbo, state.epoch
                state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if checkpoint is not None:
                _save(state, checkpoint, identity)
    if _has_stalled(state, config):
        log.info("early stopping after epoch %d: no better validation ELBO in %d", state.epoch, config.patience)
    if state.best:
        model.load_state_dict(state.best)
    model.eval()
    return pd.DataFrame(state.history, columns=HISTORY).astype({"epoch": np.int64})


@torch.no_grad()
def elbo_of(model: SCVI, counts: Counts, rows: np.ndarray, seed: int, block: int = 1024) -> float:
    """Mean ELBO of some cells (nats, KL weight 1), by one draw each whose noise is the same at every call."""
    model.eval()
    device = counts.indptr_n.device
    noise = torch.Generator(device).manual_seed(seed)
    total = 0.0
    for start in range(0, len(rows), block):
        cells = counts.gather(torch.from_numpy(rows[start : start + block]).to(device))
        reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(cells, noise)
        total += float((reconstruction_n - kl_z_n - kl_l_n).double().sum())
    return total / len(rows)


def _set_library_prior(model: SCVI, counts: Counts, rows: torch.Tensor) -> None:
    """Moments of log library size within each batch's training cells (Lopez et al. 2018, Methods)."""
    if model.config.library != "latent":
        return
    log_library_n = counts.library()[rows].log()
    batch_n = counts.batch_n[rows]
    for s in range(model.n_batches):
        mine_n = log_library_n[batch_n == s]
        if len(mine_n) < 2:
            raise UserError(f"batch number {s}: {len(mine_n)} training cells; a latent library size needs 2 or more")
        model.library_mean_s[s] = mine_n.mean()
        model.library_variance_s[s] = mine_n.var().clamp_min(1e-4)


def _has_stalled(state: State, config: TrainConfig) -> bool:
    """Whether early stopping ends the fit: a question to the state alone, so that a resumed fit ends alike."""
    return bool(state.best) and state.epoch - state.best_epoch >= config.patience


def _check_weights(
    state: State, config: TrainConfig, cells: Minibatch | None, steps: int, checkpoint: Path | None
) -> None:
    if not all(torch.isfinite(value).all() for value in state.model.state_dict().values()):
        raise UserError(_diagnosis(state, config, cells, steps, checkpoint))


def _diagnosis(state: State, config: TrainConfig, cells: Minibatch | None, steps: int, checkpoint: Path | None) -> str:
    where = f"epoch {state.epoch + 1}, step {(state.step - 1) % steps + 1} of {steps}"
    if any(not torch.isfinite(p).all() for p in state.model.parameters()):
        cause = f"weights have overflowed; lower train.learning_rate (now {config.learning_rate:g})"
    else:
        largest = "" if cells is None else f", such as the count of {int(cells.x_ng.max())} in this minibatch"
        cause = f"values out of range{largest}; look for outlier cells (qc.max_counts)"
    kept = f"; {checkpoint} holds the last whole epoch" if checkpoint is not None and checkpoint.exists() else ""
    return f"train: the loss is not finite at {where}: {cause}, or set train.gradient_clip{kept}"


def _bar(progress: bool, total: int, done: int):
    """A progress bar on a terminal; a line an epoch in ten otherwise, so that log files stay short."""
    import contextlib
    import sys

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def bar():
        text = "ELBO {:.1f}  validation {:.1f}  {:,.0f} cells/s"
        if not progress:
            yield lambda *_: None
        elif not sys.stderr.isatty():
            epoch = done

            def line(train_elbo: float, validation_elbo: float, rate: float) -> None:
                nonlocal epoch
                epoch += 1
                if epoch % max(1, total // 10) == 0 or epoch == total:
                    log.info("epoch %d/%d  %s", epoch, total, text.format(train_elbo, validation_elbo, rate))

            yield line
        else:
            from rich.console import Console

            columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
                task = bars.add_task("", total=total, completed=done)
                yield lambda *values: bars.update(task, advance=1, description=text.format(*values))

    return bar()


def _save(state: State, path: Path, identity: str) -> None:
    """Write the whole state as one safetensors file, atomically."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in state.best.items()}
    for index, slot in state.optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": v for k, v in slot.items()}
    scalars = {
        f.name: getattr(state, f.name)
        for f in dataclasses.fields(State)
        if f.name not in ("model", "optimiser", "best", "history")
    }
    scalars["best_elbo"] = None if state.best_elbo == -math.inf else state.best_elbo
    history = [[None if math.isnan(v) else v for v in row] for row in state.history]
    text = canonical_json({"identity": identity, "scalars": scalars, "history": history})
    with replacing(path) as temporary:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, {"state": text})


def _resume(state: State, path: Path, identity: str) -> None:
    """Load a state in place; one that is torn or belongs to another fit is left alone, and said so."""
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s: not a whole checkpoint (%s); starting from the beginning", path, error)
        return
    if saved.get("identity") != identity:
        log.warning("%s: a checkpoint of another fit; starting from the beginning", path)
        return
    for name, value in saved["scalars"].items():
        setattr(state, name, -math.inf if name == "best_elbo" and value is None else value)
    state.history = [[math.nan if v is None else v for v in row] for row in saved["history"]]
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    state.model.load_state_dict(part("model."))
    device = next(state.model.parameters()).device
    state.best = {k: v.to(device) for k, v in part("best.").items()}
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("adam.").items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    packed = state.optimiser.state_dict()
    packed["state"] = slots
    state.optimiser.load_state_dict(packed)
    log.info("resuming at epoch %d, step %d from %s", state.epoch + 1, state.step, path)
