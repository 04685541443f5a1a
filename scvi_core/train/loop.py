"""The training loop: minibatches, validation, early stopping, checkpoints.

One state (:mod:`scvi_core.train.state`) is all there is to a running fit: saved whole every half minute and on request,
it resumes bit for bit, because the order of cells depends on (seed, epoch) and the noise on (seed, step) alone. Several
processes may run the loop together (:mod:`scvi_core.parallel`): each takes its share of every minibatch, and the first
writes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from scvi_core import kernels, parallel
from scvi_core.config import TrainConfig
from scvi_core.counts import Counts
from scvi_core.device import resolve_precision
from scvi_core.files import UserError
from scvi_core.kernels import native
from scvi_core.log import log
from scvi_core.model import SCVI, Noise
from scvi_core.train import recorded
from scvi_core.train.progress import bar
from scvi_core.train.schedule import Schedule
from scvi_core.train.state import State, Trainable, check, diagnosis
from scvi_core.train.step import Rates, noise_seed, step

CHECKED = 100  # steps between two looks at whether the loss is finite: each waits for the device
HISTORY = ["epoch", "seconds", "train_elbo", "validation_elbo", "kl_weight", "learning_rate"]


class Interrupted(Exception):  # noqa: N818 (an outcome, not a fault)
    """Training was asked to stop; its checkpoint is written, and running again continues it.

    Attributes
    ----------
    history : of a model that was to be kept as it was then, else None. Its last row is of the part of an epoch that was
        done. step, steps : how many were done, and how many there would have been.
    """

    def __init__(self, history: pd.DataFrame | None = None, step: int = 0, steps: int = 0):
        super().__init__()
        self.history, self.step, self.steps = history, step, steps


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
    trainable: Trainable | None = None,
    keep: bool = False,
) -> pd.DataFrame:
    """Fit `model` in place: to whatever its ``loss`` is.

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
    trainable : a parameter's name -> True, or a boolean mask of its shape. What it does not name or leaves out stays as
        it is, bit for bit, and so do the moments of batch norms whose weights stay, and the prior of library sizes.
        None trains all.
    keep : whether a fit that `stop` ends early leaves the model as after a whole one: measured, with its best weights.

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
    if len(train_rows) < 2:
        raise UserError(f"train: {len(train_rows)} cells to train on; at least 2 are needed")
    schedule = Schedule.of(config, len(train_rows))
    epochs, steps = schedule.epochs, schedule.steps
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
    if trainable is None:
        _set_library_prior(model, counts, train_rows)
    held = counts.subset(validation_rows).to(device) if len(validation_rows) else None
    recording = which == "triton" and parallel.world() == 1
    if recording or device.type == "cuda":
        counts = recorded.place(counts, recorded.bytes_to_train(model, schedule.size, recording), schedule.size, device)
    state = State.of(model, trainable)
    if checkpoint is not None and checkpoint.exists():
        state.resume(checkpoint, identity)
    run = (recorded.Recorded if recording else Plain)(state, counts, config, schedule, seed)
    threads = native.our_threads() if which == "compiled" and not model.half else contextlib.nullcontext()
    saved, stopping = time.monotonic(), False
    progress = progress and parallel.rank() == 0
    with (
        bar(progress, epochs, state.epoch) as show,
        _without_collection(),
        threads,
        recorded.naming_memory(schedule.size),
    ):
        while state.epoch < epochs and not _has_stalled(state, config):
            began = time.perf_counter()
            order = counts.order(train_rows, np.random.default_rng([seed, state.epoch]))
            first = state.step - state.epoch * steps
            minibatches = np.array_split(order, steps)
            elbo_b = run.begin(minibatches, first)  # a minibatch's sum each, left on the device
            state.ready()
            for i in range(first, steps):
                due = checkpoint is not None and time.monotonic() - saved > every
                stopping, due = run(i, stop(), due)
                state.step += 1
                last = i == steps - 1
                if last or stopping or due or state.step % CHECKED == 0:
                    check(state, config, elbo_b, checkpoint)
                if (stopping or due) and not last:
                    state.save(elbo_b, checkpoint, identity)
                    saved = time.monotonic()
                if stopping and not last:
                    if not keep:
                        raise Interrupted
                    break
            validation_elbo = math.nan if held is None else elbo_of(model, held, seed)
            if held is not None and not math.isfinite(validation_elbo):
                raise UserError(diagnosis(state, config, steps - 1, steps, checkpoint))
            state.epoch += 1
            n_seen = sum(map(len, minibatches[: i + 1]))
            train_elbo = (state.elbo_sum + float(parallel.summed(elbo_b).sum())) / n_seen
            state.elbo_sum, elbo_b = 0.0, elbo_b[:0]
            seconds = time.perf_counter() - began
            kl_weight, rate = schedule.kl_weight_t[state.step - 1], schedule.rate_t[state.step - 1]
            state.history.append([state.epoch, seconds, train_elbo, validation_elbo, kl_weight, rate])
            show(train_elbo, validation_elbo, n_seen / seconds)
            # the ELBO of a model still under warm-up is no measure of it, so the best is sought from its end
            warm = kl_weight == config.kl_weight
            if held is not None and config.early_stopping and warm and validation_elbo > state.best_elbo:
                state.best_elbo, state.best_epoch = validation_elbo, state.epoch
                state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if last and (stopping or due or state.epoch == epochs):
                state.save(elbo_b, checkpoint, identity)
                saved = time.monotonic()
            if stopping:
                if not keep:
                    raise Interrupted
                break
    if _has_stalled(state, config):
        log.info("early stopping after epoch %d: no better validation ELBO in %d", state.epoch, config.patience)
    if state.best:
        model.load_state_dict(state.best)
    for p in model.parameters():
        p.grad = None
    model.requires_grad_(True).eval()
    history = pd.DataFrame(state.history, columns=HISTORY).astype({"epoch": np.int64})
    if stopping and state.step < epochs * steps:
        raise Interrupted(history, state.step, epochs * steps)
    return history


class Plain:
    """Steps run one after another; :class:`scvi_core.train.recorded.Recorded` does the same on a GPU."""

    def __init__(self, state: State, counts: Counts, config: TrainConfig, schedule: Schedule, seed: int):
        self.state, self.counts, self.config, self.schedule, self.seed = state, counts, config, schedule, seed
        self.device = state.weights[0].device

    def begin(self, minibatches: list[np.ndarray], first: int) -> torch.Tensor:
        """Get ready for an epoch; (steps,) float64, where each step leaves the sum of its cells' ELBO."""
        self.minibatches = minibatches
        self.elbo_b = torch.zeros(len(minibatches), dtype=torch.float64, device=self.device)
        return self.elbo_b

    def __call__(self, i: int, *flags: bool) -> tuple[bool, ...]:
        """The epoch's step `i`; of each flag, whether any process raised it."""
        rows, state = self.minibatches[i], self.state
        mine = parallel.share(len(rows))
        cells = self.counts.gather(torch.from_numpy(rows[mine]).to(self.counts.indptr_n.device)).to(self.device)
        noise = Noise(noise_seed(self.seed, state.step), self.device, len(rows), mine)
        self.elbo_b[i], flags = step(state, cells, noise, Rates.of(self.schedule, state.step), self.config, *flags)
        return flags


@torch.no_grad()
def elbo_of(model: SCVI, counts: Counts, seed: int, block: int = 1024) -> float:
    """Mean ELBO of cells (nats, KL weight 1), by one draw each whose noise is the same at every call."""
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(counts), block):
        rows_n = torch.arange(start, min(start + block, len(counts)), device=device)
        mine = parallel.share(len(rows_n))
        noise = Noise(noise_seed(seed, start), device, len(rows_n), mine)
        total += model.loss(counts.gather(rows_n[mine]), noise, 1.0)[1].double().sum()
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


@contextlib.contextmanager
def _without_collection():
    """What is alive now stays: the garbage collector, woken every few steps, need not walk through it each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
