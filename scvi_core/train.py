"""The training loop: minibatches, warm-up of the KL term, validation, early stopping, checkpoints.

One state, :class:`State`, is all there is to a running fit: saved whole every half minute and on request, it resumes
bit for bit, because the order of cells depends on (seed, epoch) and the noise on (seed, step) alone. Several processes
may run the loop together (:mod:`scvi_core.parallel`): each takes its share of every minibatch, and the first writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scvi_core import engine, gpu, kernels, parallel
from scvi_core.config import TrainConfig
from scvi_core.counts import Counts, Minibatch
from scvi_core.files import UserError, canonical_json, replacing
from scvi_core.log import log
from scvi_core.model import SCVI, Noise

CHECKED = 100  # steps between two looks at whether the loss is finite: each waits for the device
HISTORY = ["epoch", "seconds", "train_elbo", "validation_elbo", "kl_weight", "learning_rate"]


class Interrupted(Exception):  # noqa: N818 (an outcome, not a fault)
    """Training was asked to stop; its checkpoint is written, and running again continues it."""


@dataclasses.dataclass
class State:
    """All that a fit in progress is, besides its inputs."""

    model: SCVI
    mean: torch.Tensor  # Adam's moments of the gradient, (weights,)
    square: torch.Tensor
    step: int = 0  # optimiser steps done
    epoch: int = 0  # epochs done
    elbo_sum: float = 0.0  # over the cells of the running epoch, as far as they were seen before the fit was resumed
    best_elbo: float = -math.inf
    best_epoch: int = 0
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    history: list[list[float]] = dataclasses.field(default_factory=list)


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device, said in the log.

    Raises
    ------
    UserError
        When CUDA is asked for and there is none: never a silent change to the CPU. Slurm's giving a GPU to the job
        is asking, too.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {device!r}; give auto, cpu or cuda (which card: CUDA_VISIBLE_DEVICES)")
    found = torch.cuda.is_available()
    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if device == "auto" and given and not found:
        raise UserError(
            f"device: Slurm gave this job GPU {given} but PyTorch sees none; mend the driver, container (--nv) or "
            "PyTorch's build, or use device: cpu"
        )
    if device == "cuda" and not found:
        raise UserError("device: 'cuda' was asked for but PyTorch sees no CUDA device; use device: cpu or auto")
    chosen = torch.device("cuda" if found and device != "cpu" else "cpu")
    name = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device = %s (%s; asked for: %s)", chosen, name, device)
    return chosen


def resolve_precision(precision: str, device: torch.device) -> bool:
    """`auto`, `float32` or `bf16` -> whether the decoder's heads multiply in bfloat16, said in the log.

    `auto` takes bfloat16 where the processor multiplies in it (AVX512-BF16, AMX, or a GPU that has it).
    """
    if device.type == "cuda":
        found = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        found = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    half = precision == "bf16" or (precision == "auto" and found)
    log.info("matrix products in %s (asked for: %s)", "bfloat16" if half else "float32", precision)
    return half


def n_epochs(config: TrainConfig, n_cells: int) -> int:
    """Epochs to run at most: as configured, else fewer the more cells there are.

    `auto` is 60 up to 2,000 cells and then falls with the root of their number, so that a large atlas takes more steps
    than a small one but fewer looks at each cell; never under 10.
    """
    if config.max_epochs != "auto":
        return config.max_epochs
    return max(10, round(60 * math.sqrt(2000 / max(2000, n_cells))))


def hold_out(config: TrainConfig, n_cells: int, seed: int) -> np.ndarray:
    """Positions of the cells set aside for validation, drawn at random, sorted: the share asked for, 10,000 at most."""
    order = np.random.default_rng([seed, 2**31]).permutation(n_cells)
    return np.sort(order[: min(10_000, round(config.validation_fraction * n_cells))])


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of one step: constant, or a linear rise over the first tenth and a half cosine down to zero."""
    if config.schedule == "constant":
        return config.learning_rate
    rise = 0.1 * total
    if step < rise:
        return config.learning_rate * min(1.0, (step + 1) / rise)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def n_steps(config: TrainConfig, n_cells: int) -> int:
    """Minibatches an epoch. They are of nearly equal size, so that the last is never a single cell.

    `auto` makes them of 128 cells at most, up to 20,000 cells, and larger with the root of their number beyond: an
    atlas takes more steps than a small data set, but not in proportion, as each is then less noisy.
    """
    size = config.batch_size
    if size == "auto":
        size = round(128 * max(1.0, math.sqrt(n_cells / 20_000)))
    return min(math.ceil(n_cells / size), n_cells // 2)


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
    every: float = 30.0,
) -> pd.DataFrame:
    """Fit `model` in place.

    Parameters
    ----------
    model : with fresh weights. It is moved to `device` and left there, with the best weights, in eval mode.
    counts : all cells, packed in memory, or :class:`scvi_core.stream.Stream`.
    train_rows, validation_rows : positions of the cells; the second are never trained on, and may be none.
    config, seed : with the data and the initial weights they decide the result.
    checkpoint : file that holds the state of the fit while it runs; if there is one of the same `identity`, the fit
        goes on from there. The caller removes it when the result is safe.
    identity : what the checkpoint belongs to (the fingerprint).
    stop : asked at every step; true writes the checkpoint and raises :class:`Interrupted`.
    every : seconds between two checkpoints.

    Returns
    -------
    pandas.DataFrame
        A row an epoch: epoch, seconds, train_elbo, validation_elbo (nats a cell, KL weight 1), kl_weight,
        learning_rate.

    Raises
    ------
    UserError
        When the loss is not finite: names epoch, step and likely cause; the last checkpoint stays.
    Interrupted
        When `stop` said so.
    """
    model.to(device)
    epochs, steps = n_epochs(config, len(train_rows)), n_steps(config, len(train_rows))
    if len(train_rows) < 2:
        raise UserError(f"train: {len(train_rows)} cells to train on; at least 2 are needed")
    if parallel.world() > len(train_rows) // steps:
        raise UserError(
            f"train: {parallel.world()} processes for minibatches of {len(train_rows) // steps} cells; ask for fewer "
            "--devices or raise train.batch_size"
        )
    which, reason = kernels.kind(model.rho.weight)
    if which == "plain":
        log.warning("kernels in plain PyTorch, several times slower: %s", reason)
    model.half = resolve_precision(config.precision, device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums within a product are float32
    _set_library_prior(model, counts, train_rows)
    held = counts.subset(validation_rows).to(device) if len(validation_rows) else None
    recording = which == "triton" and parallel.world() == 1
    if recording or device.type == "cuda":
        from scvi_core import graph  # which takes its rules from here

        size = -(-len(train_rows) // steps)
        counts = graph.place(counts, graph.bytes_to_train(model, size, recording), size, device)
    weights, gradient = _flatten(model)
    gradients = engine.gradients if engine.serves(model) and parallel.world() == 1 else autograd_gradients
    state = State(model, torch.zeros_like(weights), torch.zeros_like(weights))
    if checkpoint is not None and checkpoint.exists():
        _resume(state, checkpoint, identity)
    recorded = graph.Step(state, weights, gradient, counts, config, seed, steps, epochs) if recording else None
    saved = time.monotonic()
    progress = progress and parallel.rank() == 0
    with _bar(progress, epochs, state.epoch) as show, _frozen(), _naming_memory(len(train_rows) // steps):
        while state.epoch < epochs and not _has_stalled(state, config):
            began = time.perf_counter()
            order = counts.order(train_rows, np.random.default_rng([seed, state.epoch]))
            minibatches = np.array_split(order, steps)
            first = state.step - state.epoch * steps
            if recorded is None:  # a minibatch's sum, left on the device
                elbo_b = torch.zeros(steps, dtype=torch.float64, device=device)
            else:
                elbo_b = recorded.begin(minibatches, first)
            model.train()
            for i in range(first, steps):
                due = checkpoint is not None and time.monotonic() - saved > every
                if recorded is not None:
                    stopping = stop()
                    recorded(i)
                    state.step += 1
                else:
                    mine = parallel.share(len(minibatches[i]))
                    rows_n = torch.from_numpy(minibatches[i][mine]).to(counts.indptr_n.device)
                    noise = Noise(seed * 1_000_003 + state.step, device, len(minibatches[i]), mine)
                    weight = kl_weight(config, state.step, epochs * steps)
                    with gpu.tf32(model.half and device.type == "cuda"):  # as in a recorded step
                        elbo_n = gradients(model, counts.gather(rows_n).to(device), noise, weight)
                    stopping, due = parallel.sum_gradients(gradient, stop(), due)
                    if config.gradient_clip:
                        gradient *= (config.gradient_clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
                    rate = learning_rate(config, state.step, epochs * steps)
                    state.step += 1
                    moments = state.mean, state.square, state.step
                    kernels.adam(weights, gradient, *moments, rate, config.adam_eps, config.weight_decay)
                    if model.config.loadings_l1:
                        soft_threshold(model.loadings_gk, rate * model.config.loadings_l1)
                    elbo_b[i] = elbo_n.sum()
                last = i == steps - 1
                if last or stopping or due or state.step % CHECKED == 0:
                    _check(state, config, elbo_b, checkpoint)
                if (stopping or due) and not last:
                    _save(state, elbo_b, checkpoint, identity)
                    saved = time.monotonic()
                if stopping and not last:
                    raise Interrupted
            validation_elbo = math.nan if held is None else elbo_of(model, held, seed)
            if held is not None and not math.isfinite(validation_elbo):
                raise UserError(_diagnosis(state, config, steps - 1, steps, checkpoint))
            state.epoch += 1
            train_elbo = (state.elbo_sum + float(parallel.summed(elbo_b).sum())) / len(train_rows)
            state.elbo_sum, elbo_b = 0.0, elbo_b[:0]
            seconds = time.perf_counter() - began
            schedule = [rule(config, state.step - 1, epochs * steps) for rule in (kl_weight, learning_rate)]
            state.history.append([state.epoch, seconds, train_elbo, validation_elbo, *schedule])
            show(train_elbo, validation_elbo, len(train_rows) / seconds)
            # the ELBO of a model still under warm-up is no measure of it, so the best is sought from its end
            warm = schedule[0] == config.kl_weight
            if held is not None and config.early_stopping and warm and validation_elbo > state.best_elbo:
                state.best_elbo, state.best_epoch = validation_elbo, state.epoch
                state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if stopping or due or state.epoch == epochs:
                _save(state, elbo_b, checkpoint, identity)
                saved = time.monotonic()
            if stopping:
                raise Interrupted
    if _has_stalled(state, config):
        log.info("early stopping after epoch %d: no better validation ELBO in %d", state.epoch, config.patience)
    if state.best:
        model.load_state_dict(state.best)
    for p in model.parameters():  # free of the vectors again
        p.data, p.grad = p.data.clone(), None
    model.eval()
    return pd.DataFrame(state.history, columns=HISTORY).astype({"epoch": np.int64})


def soft_threshold(weights: torch.Tensor, by: float) -> None:
    """Move every weight towards zero by `by`, and to zero exactly where it is nearer, in place.

    The proximal step of `by` × the sum of absolute weights, which is a Laplace prior's. Taken beside Adam's step, not
    through its gradient, the pull is the same share of every weight's step, whatever the size of its gradient: so
    ``loadings_l1`` weighs the loadings of rare and of abundant genes alike. A loading holds out against it only if the
    mean of its gradient over minibatches, at zero, is more than ``loadings_l1`` times their root mean square. In terms
    of the objective -ELBO summed over N cells + sum of lambda_g |W_g|, lambda_g is ``loadings_l1`` × N × that root.
    """
    weights -= weights.clamp(-by, by)


@contextlib.contextmanager
def _naming_memory(size: int):
    """A GPU that runs out of memory after all, as when others use it too, says which setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ")[0]
        raise UserError(
            f"train: the GPU ran out of memory ({line}); lower train.batch_size (minibatches have {size} cells), or "
            "train.memory_gb so that counts stream from the computer's memory"
        ) from None


@contextlib.contextmanager
def _frozen():
    """What is alive now stays: the garbage collector, woken every few steps, need not walk through it each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def autograd_gradients(model: SCVI, cells: Minibatch, noise: Noise, kl_weight: float) -> torch.Tensor:
    """Gradients of one minibatch's loss, left in ``.grad``, by autograd: for any device, and for several processes.

    See Also
    --------
    scvi_core.engine.gradients : the same by hand, for the CPU.
    """
    reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(cells, noise)
    n_cells = noise.n_cells or len(cells.batch_n)
    for p in model.parameters():
        p.grad.zero_()
    ((kl_weight * kl_z_n + kl_l_n - reconstruction_n).sum() / n_cells).backward()
    return (reconstruction_n - kl_z_n - kl_l_n).detach()


def _flatten(model: SCVI) -> tuple[torch.Tensor, torch.Tensor]:
    """Move all weights into one vector, and their gradients into another, of which they are then views.

    So that the optimiser, and whatever else looks at all of them, makes one step and not one a tensor.
    """
    aligned = 16  # numbers: each tensor begins where a cache line does
    sizes = [-(-p.numel() // aligned) * aligned for p in model.parameters()]
    weights = torch.zeros(sum(sizes), device=next(model.parameters()).device)
    gradient = torch.zeros_like(weights)
    for p, w, g in zip(model.parameters(), weights.split(sizes), gradient.split(sizes), strict=True):
        w[: p.numel()] = p.detach().flatten()
        p.data, p.grad = w[: p.numel()].view_as(p), g[: p.numel()].view_as(p)
    return weights, gradient


@torch.no_grad()
def elbo_of(model: SCVI, counts: Counts, seed: int, block: int = 1024) -> float:
    """Mean ELBO of cells (nats, KL weight 1), by one draw each whose noise is the same at every call."""
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(counts), block):
        rows_n = torch.arange(start, min(start + block, len(counts)), device=device)
        mine = parallel.share(len(rows_n))
        noise = Noise(seed * 1_000_003 + start, device, len(rows_n), mine)
        terms = model.elbo_terms(counts.gather(rows_n[mine]), noise)
        total += (terms[0] - terms[1] - terms[2]).double().sum()
    return float(parallel.summed(total)) / len(counts)


def _set_library_prior(model: SCVI, counts: Counts, rows: np.ndarray) -> None:
    """Moments of log library size within each batch's training cells (Lopez et al. 2018, Methods)."""
    if model.config.library != "latent":
        return
    log_library_n = counts.library_n[rows].log()
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


def _check(state: State, config: TrainConfig, elbo_b: torch.Tensor, checkpoint: Path | None) -> None:
    """Refuse to go on when a loss of the running epoch was not finite, or the last step's update is not."""
    lost = (~torch.isfinite(parallel.summed(elbo_b))).nonzero()[:, 0]
    steps = len(elbo_b)
    if len(lost):
        raise UserError(_diagnosis(state, config, int(lost[0]), steps, checkpoint))
    if not torch.stack([torch.isfinite(value).all() for value in state.model.state_dict().values()]).all():
        raise UserError(_diagnosis(state, config, (state.step - 1) % steps, steps, checkpoint))


def _diagnosis(state: State, config: TrainConfig, step: int, steps: int, checkpoint: Path | None) -> str:
    where = f"epoch {state.epoch + 1}, step {step + 1} of {steps}"
    cause = "counts out of range; look for outlier cells (qc.max_counts)"
    if any(not torch.isfinite(p).all() for p in state.model.parameters()):
        cause = f"weights have overflowed; lower train.learning_rate (now {config.learning_rate:g})"
    kept = f"; {checkpoint} holds the last sound state" if checkpoint is not None and checkpoint.exists() else ""
    return f"train: the loss is not finite at {where}: {cause}, or set train.gradient_clip{kept}"


def _bar(progress: bool, total: int, done: int):
    """A progress bar on a terminal; a line an epoch in ten otherwise, so that log files stay short."""
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


def _save(state: State, elbo_b: torch.Tensor, path: Path | None, identity: str) -> None:
    """Write the whole state as one safetensors file, atomically; the first process alone does.

    `elbo_b` are the running epoch's, of which the state keeps the sum.
    """
    elbo_sum = state.elbo_sum + float(parallel.summed(elbo_b).sum())
    if path is None or parallel.rank():
        return
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in state.best.items()}
    tensors |= {"adam.mean": state.mean, "adam.square": state.square}
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    scalars = {
        f.name: getattr(state, f.name)
        for f in dataclasses.fields(State)
        if f.name not in ("model", "mean", "square", "best", "history")
    } | {"elbo_sum": elbo_sum}
    scalars["best_elbo"] = None if state.best_elbo == -math.inf else state.best_elbo
    history = [[None if math.isnan(v) else v for v in row] for row in state.history]
    about = canonical_json({"identity": identity, "scalars": scalars, "history": history})
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"state": about, "sha256": _digest(tensors, about)})


def _digest(tensors: dict[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _resume(state: State, path: Path, identity: str) -> None:
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
        setattr(state, name, -math.inf if name == "best_elbo" and value is None else value)
    state.history = [[math.nan if v is None else v for v in row] for row in saved["history"]]
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    state.model.load_state_dict(part("model."))
    device = next(state.model.parameters()).device
    state.best = {k: v.to(device) for k, v in part("best.").items()}
    state.mean.copy_(tensors["adam.mean"])
    state.square.copy_(tensors["adam.square"])
    log.info("resuming at epoch %d, step %d from %s", state.epoch + 1, state.step, path)
