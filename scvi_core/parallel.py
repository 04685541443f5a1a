"""Several processes that fit one model. Each holds its share of every minibatch; sums go over all of them.

The minibatch, its noise and its batch norm are those of one process that holds it whole, so N processes find the
weights that one finds, but for rounding. Processes know one another by the environment variables of ``torchrun``
(RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which may start them too, on several machines; :func:`launch` starts
them on this one. gloo joins CPUs, NCCL joins GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from scvi_core.files import UserError
from scvi_core.log import log

_PARENT = os.getppid()
RUN_AGAIN = 75  # sysexits' EX_TEMPFAIL: interrupted with a checkpoint on disk; the same command goes on
LOST = 76  # of a process that lost another, which is the one to blame


class LostError(Exception):
    """Another process is gone."""


def _add_up(tensor: torch.Tensor) -> torch.Tensor:
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise LostError(str(error).partition("\n")[0]) from None
    return tensor


def world() -> int:
    """How many processes fit this model."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first alone writes files."""
    return dist.get_rank() if world() > 1 else 0


def share(n: int) -> slice:
    """Which of a minibatch's `n` cells this process takes; the parts are of nearly equal size."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, through which gradients flow: each process' loss is a part of the whole."""
    return _Sum.apply(tensor) if world() > 1 else tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return _add_up(tensor.clone())

    @staticmethod
    def backward(ctx, outer):
        return _add_up(outer.clone())


def sum_gradients(gradients: Sequence[torch.Tensor], *flags: bool) -> tuple[bool, ...]:
    """Add up tensors over all processes, in place, and say of each flag whether any of them raised it."""
    if world() == 1:
        return flags
    said = gradients[0].new_tensor([float(flag) for flag in flags])
    message = _add_up(torch.cat([*(gradient.flatten() for gradient in gradients), said]))
    *parts, said = message.split([*(gradient.numel() for gradient in gradients), len(flags)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return tuple(bool(raised > 0) for raised in said)


class BatchNorm(torch.nn.BatchNorm1d):
    """Batch norm of (cells, units), in training over the cells of all processes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(cells, units) -> the same."""
        if not self.training or world() == 1:
            return super().forward(x)
        n = summed(x.new_tensor(float(len(x))))
        mean = summed(x.sum(0)) / n
        variance = summed(((x - mean) ** 2).sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def started() -> bool:
    """Whether this process is one of several, by its environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def first() -> bool:
    """Whether this process is to write files: it is alone, or the first of several, by its environment."""
    return not started() or os.environ["RANK"] == "0"


def join(device: torch.device) -> torch.device:
    """Meet the other processes; each on its own GPU, if the device is one."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    log.info("process %d of %d on %s", rank() + 1, world(), device)
    return device


def abandoned() -> bool:
    """Whether the process that started this one has gone: there is nobody left to hear of the result."""
    return world() > 1 and os.getppid() != _PARENT


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launch(n: int, command: Sequence[str]) -> int:
    """Run ``scvi-core COMMAND`` as `n` processes on this machine, and end with the exit status of the first.

    SIGTERM, SIGINT and SIGUSR1 are passed on. When one process dies the others are stopped, within seconds. What the
    first says is shown; what another says, only if it is that one that dies.

    Raises
    ------
    UserError
        Naming the process that died.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    workers: list[subprocess.Popen] = []

    asked: list[int] = []

    def pass_on(signum, _frame):
        asked.append(-signum)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signum)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with contextlib.ExitStack() as stack:
        said = [None, *(stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(1, n))]
        try:
            for i in range(n):
                environment = os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)}
                program = [sys.executable, "-m", "scvi_core.cli", *command]
                workers.append(subprocess.Popen(program, env=environment, stderr=said[i]))
            while all(worker.poll() in (None, 0) for worker in workers):
                if all(worker.poll() == 0 for worker in workers):
                    return 0
                time.sleep(0.05)
            ended = [i for i, worker in enumerate(workers) if worker.poll() not in (None, 0)]
            _finish(workers)
        finally:
            _finish(workers, patience=0)
            for s, handler in before.items():
                signal.signal(s, handler)
        codes = [worker.returncode for worker in workers]
        if asked and all(codes[i] in (RUN_AGAIN, LOST, *asked) for i in ended):
            return RUN_AGAIN  # some had not begun to listen
        first = min(ended, key=lambda i: (codes[i] == LOST, codes[i] > 0, i))
        died = codes[first]
        if died > 0 and codes[0] == died:
            return died  # it said why itself
        how = f"was killed by {signal.Signals(-died).name}" if died < 0 else f"ended with status {died}"
        text = ""
        if said[first] is not None:
            said[first].seek(0)
            text = (said[first].read().strip().splitlines() or [""])[-1].removeprefix("error: ")
        raise UserError(
            f"train: process {first + 1} of {n} {how}{f' ({text})' if text else ''}, so the others were stopped; run "
            "the same command again to go on from the last checkpoint"
        )


def _finish(workers: Sequence[subprocess.Popen], patience: float = 5.0) -> None:
    """Let processes end by themselves for a while, then end them."""
    until = time.monotonic() + patience
    while time.monotonic() < until and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
