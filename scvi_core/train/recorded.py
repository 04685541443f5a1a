"""Training steps on a GPU, recorded as CUDA graphs: a step is replayed, and the host does nothing in between.

Counts lie on the device, packed, and minibatches are taken from them where they lie. Where they do not fit, they stay
in the computer's memory, or on disk, and a thread gathers the next minibatch and sends it over while the device works.
What changes from step to step (cells, rates, where the ELBO goes) lies in tables on the device, one an epoch, read at
the step's number; the noise is drawn by a generator that is seeded before every replay, as for steps that are not
recorded. So a fit that is interrupted goes on bit for bit, on the same device.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from scvi_core.config import TrainConfig
from scvi_core.counts import Counts, Minibatch, map_tensors
from scvi_core.files import UserError
from scvi_core.kernels import gpu
from scvi_core.log import log
from scvi_core.model import SCVI, Noise
from scvi_core.train.schedule import Schedule
from scvi_core.train.state import State
from scvi_core.train.step import Rates, noise_seed, step

WARM_UP = 3  # runs of a step before it is recorded: libraries set themselves up, kernels are compiled
VALIDATION = 1024  # cells of a block when the held-out ELBO is measured (loop.elbo_of)


def bytes_to_train(model: SCVI, size: int, fused: bool) -> int:
    """What a fit needs besides the counts, about: weights, gradients, Adam's moments, copies of these, and tiles.

    Parameters
    ----------
    size : cells of a minibatch. fused : whether Triton's kernels do the work; autograd keeps more.
    """
    heads = sum(hasattr(model, name) for name in ("rho", "dropout_logit", "log_theta"))
    wide = (2 if model.half else 4) * 2 * heads + 4 * 3  # logits and gradients; counts, those by theta, one to spare
    if model.config.likelihood != "poisson" and model.config.dispersion != "gene":  # always in float32
        wide += 4 * 2  # theta of each cell, and its inverse
        wide += 4 * 2 * (model.config.dispersion == "gene-batch")  # its logarithm, taken by batch, and the gradient
    # what is recorded keeps its room; beside it come, by turns, runs before the next recording, and the held-out ELBO,
    # always in float32
    tile = size * wide + max(size * wide, VALIDATION * (4 * heads + 12)) if fused else 4 * 20 * max(size, VALIDATION)
    weights = sum(p.numel() for p in model.parameters())
    return round(1.1 * (tile * model.rho.out_features + 8 * 4 * weights)) + 2**28  # and libraries' own room


def place(counts: Counts, needed: int, size: int, device: torch.device) -> Counts:
    """Counts on the device if they fit beside the `needed` bytes, else where they are; said in the log.

    Raises
    ------
    UserError
        When not even a step, on `size` cells, fits.
    """
    free = gpu.free_bytes(device)
    if needed > free:
        raise UserError(
            f"train.batch_size: a step on {size} cells x {counts.n_genes} genes needs {needed / 1e9:.2f} GB of GPU "
            f"memory, of which {free / 1e9:.2f} GB are free; lower train.batch_size, or genes.n_top, or free the GPU"
        )
    placed = counts.to(device, needed)
    if type(placed) is Counts:
        sizes = counts.nbytes / 1e9, needed / 1e9, free / 1e9
        log.info("counts on the device: %.2f GB packed, beside %.2f GB for training; %.2f GB were free", *sizes)
    return placed


@contextlib.contextmanager
def naming_memory(size: int):
    """A GPU that runs out of memory after all, as when others use it too, says which setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).split(". ")[0]
        raise UserError(
            f"train: the GPU ran out of memory ({line}); lower train.batch_size (minibatches have {size} cells), or "
            "train.memory_gb so that counts stream from the computer's memory"
        ) from None


class Recorded:
    """:class:`scvi_core.train.loop.Plain` on a GPU: steps recorded once for each size of minibatch, then replayed.

    Parameters
    ----------
    state : of the fit; changed in place. counts : on the device, or elsewhere (see :class:`Feed`).
    """

    def __init__(self, state: State, counts: Counts, config: TrainConfig, schedule: Schedule, seed: int):
        self.state, self.counts, self.config, self.schedule, self.seed = state, counts, config, schedule, seed
        self.device = state.weights[0].device
        self.feed = None if type(counts) is Counts else Feed(counts, self.device)
        self.recorded: dict[int, tuple[Noise, torch.cuda.CUDAGraph | None]] = {}  # by size
        self.pool, self.failed = None, False
        # what a replay reads and writes
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.rates_b4 = torch.zeros(schedule.steps, 4, device=self.device)
        self.starts_b = torch.zeros(schedule.steps, dtype=torch.int64, device=self.device)
        self.elbo_b = torch.zeros(schedule.steps, dtype=torch.float64, device=self.device)
        self.order_n = torch.zeros(0, dtype=torch.int64, device=self.device)

    def begin(self, minibatches: list[np.ndarray], first: int) -> torch.Tensor:
        """Get ready for an epoch, from its step `first` on; (steps,) float64 on the device, as of ``Plain``."""
        self.sizes = [len(rows) for rows in minibatches]
        done = self.state.epoch * self.schedule.steps
        rates = [Rates.of(self.schedule, done + i) for i in range(self.schedule.steps)]
        self.rates_b4.copy_(torch.tensor([[*one.adam, one.kl_weight, one.rate] for one in rates]))
        self.starts_b.copy_(torch.from_numpy(np.cumsum([0, *self.sizes[:-1]])))
        self.elbo_b.zero_()
        if self.feed is not None:
            self.feed.begin(minibatches, first)
        else:
            order_n = torch.from_numpy(np.concatenate(minibatches))
            if len(self.order_n) != len(order_n):
                self.order_n = torch.empty(len(order_n), dtype=torch.int64, device=self.device)
            self.order_n.copy_(order_n)
        return self.elbo_b

    def __call__(self, i: int, *flags: bool) -> tuple[bool, ...]:
        """The epoch's step `i`."""
        size = self.sizes[i]
        if self.feed is not None:
            self.feed.fill(i)
        self.at.fill_(i)
        if size not in self.recorded:
            self.recorded[size] = self._record(size)
        noise, graph = self.recorded[size]
        noise.generator.manual_seed(noise_seed(self.seed, self.state.step))
        if graph is None:
            self._run(size, noise)
        else:
            graph.replay()
        return flags

    def _run(self, size: int, noise: Noise) -> None:
        adam, kl_weight, rate = self.rates_b4.index_select(0, self.at)[0].split([2, 1, 1])
        elbo, _ = step(self.state, self._cells(size), noise, Rates(kl_weight, rate, adam), self.config)
        self.elbo_b.index_copy_(0, self.at, elbo[None])

    def _cells(self, size: int) -> Minibatch:
        """The minibatch, where it lies."""
        counts, rows_n = self.counts, torch.arange(size, device=self.device)
        if self.feed is not None:
            counts = self.feed.room
        else:
            rows_n = self.order_n.index_select(0, self.starts_b.index_select(0, self.at) + rows_n)
        ends = (counts.indptr_n.index_select(0, rows_n + end) for end in (0, 1))
        return counts.minibatch(rows_n, gpu.Rows(*ends, counts.genes_m, counts.values_m, counts.n_genes))

    def _record(self, size: int) -> tuple[Noise, torch.cuda.CUDAGraph | None]:
        """Record the step; without a GPU, or where that fails, it is run kernel by kernel. Changes nothing."""
        if self.device.type != "cuda" or self.failed:
            return Noise(0, self.device), None
        state = self.state
        changed = [*state.weights, *state.means, *state.squares, self.elbo_b, *state.model.buffers()]
        before = [t.detach().clone() for t in changed]
        noise, graph, stream = Noise(0, self.device), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        side = _side(self.device)
        try:
            side.wait_stream(stream)
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self._run(size, noise)
            finally:  # what it has begun ends before its changes are undone
                stream.wait_stream(side)
            graph.register_generator_state(noise.generator)
            # the thread that sends minibatches may go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                self._run(size, noise)
            self.pool = graph.pool()  # sizes take turns, so they share their room
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            line = str(error).split("\n")[0]
            log.warning("steps run kernel by kernel, more slowly: they could not be recorded (%s)", line)
            self.failed = True  # the allocator may believe that the recording goes on: no second is tried
            noise, graph = Noise(0, self.device), None
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own behind
        with torch.no_grad():
            for t, old in zip(changed, before, strict=True):
                t.copy_(old)
        return noise, graph


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are run before they are recorded, and recorded: one for all, as libraries keep memory
    for every stream that they have met.
    """
    return torch.cuda.Stream(device)


class Feed:
    """Minibatches of counts that are not on the device, packed: the next is gathered and sent while one is worked on.

    The one at hand is copied into tensors that stay where they are, as a recorded step wants; with room for the longest
    cells there are, so that no size depends on which come.
    """

    def __init__(self, counts: Counts, device: torch.device):
        self.counts, self.device = counts, device
        self.worker = ThreadPoolExecutor(1)
        # of the streams of high priority, none of which can be the one that a step is recorded on (_side)
        self.side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.room: Counts | None = None

    def begin(self, minibatches: list[np.ndarray], first: int) -> None:
        """Get ready for an epoch, from its step `first` on."""
        self.minibatches = minibatches
        if self.room is None:
            self.room = self._room(max(map(len, minibatches)))
        self.coming: Future[Counts] = self.worker.submit(self._send, first)

    def _room(self, size: int) -> Counts:
        most = int(self.counts.indptr_n.diff().topk(size).values.sum())
        one = self.counts.subset(np.arange(1))
        long = {id(one.indptr_n): size + 1, id(one.genes_m): most, id(one.values_m): most}
        new = lambda t: t.new_zeros(long.get(id(t), size), *t.shape[1:], device=self.device)  # noqa: E731
        return map_tensors(one, new)

    def _send(self, i: int) -> Counts:
        """In the thread: gather, and copy from pinned memory on a stream beside the one that computes."""
        cells = self.counts.subset(self.minibatches[i])
        if self.side is None:
            return cells
        with torch.cuda.stream(self.side):
            return map_tensors(cells, lambda t: t.pin_memory().to(self.device))  # returns when it is there

    def fill(self, i: int) -> None:
        """Put minibatch `i` into the room, and have the next one sent."""
        cells = self.coming.result()
        for old, new in zip(vars(self.room).values(), vars(cells).values(), strict=True):
            if isinstance(new, torch.Tensor):
                old[: len(new)].copy_(new)
                if self.side is not None:  # its memory is not given to the next one before this copy is made
                    new.record_stream(torch.cuda.current_stream())
        if i + 1 < len(self.minibatches):
            self.coming = self.worker.submit(self._send, i + 1)
