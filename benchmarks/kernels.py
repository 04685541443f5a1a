"""What a step of training is made of: the likelihood kernel alone, and the matrix products beside the whole step.

    python benchmarks/kernels.py --threads 1 2 --json kernels.json

Forward and gradients of the log-likelihood of a minibatch, softmax over genes and library size included, by the
compiled kernel, by the same function in plain PyTorch, by autograd through the equations as they stand
(scvi_core.likelihood) and, where it is installed, through scvi-tools' distributions as its model calls them. Then a
whole step (gradients and Adam), and the share of it that its matrix products take at the rate measured beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scvi_core as sv
from scvi_core import kernels
from scvi_core.counts import Minibatch
from scvi_core.files import write_json
from scvi_core.kernels import Nonzeros, likelihood, native
from scvi_core.model import Noise, build
from scvi_core.train.state import State
from scvi_core.train.step import Rates, step

LIKELIHOODS = ("zinb", "nb", "poisson")
BUDGET = 0.5  # seconds that the repeats of one measurement may take together, or `--repeats` of them


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore")
    if native.library is None:
        print(f"no compiled kernels: {native.reason}", file=sys.stderr)
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): medians of short runs mislead", file=sys.stderr)
    likelihoods, machines, steps = [], [], []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rates = machine(options)
        machines.append({"threads": threads} | rates)
        for genes in options.genes:
            for name in LIKELIHOODS:
                likelihoods += _likelihood(options, threads, genes, name)
                print(f"{threads} threads, {genes} genes, {name}: done", file=sys.stderr, flush=True)
            steps += _step(options, threads, genes)
    about = (
        f"{options.cells} cells, density {options.density:g}, milliseconds, medians; torch {torch.__version__}; "
        f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(f"Log-likelihood, forward and gradients ({about}):\n\n{_likelihood_table(likelihoods)}\n")
    print(f"Rates measured in the same run:\n\n{_machine_table(machines)}\n")
    print(f"A whole step, zinb:\n\n{_step_table(steps)}")
    if options.json:
        write_json(options.json, {"about": about, "likelihood": likelihoods, "machine": machines, "step": steps})


# The likelihood alone.


def _likelihood(options: argparse.Namespace, threads: int, genes: int, name: str) -> list[dict[str, Any]]:
    """Milliseconds of each way to get value and gradients, on the same numbers."""
    x, inputs = _inputs(options, genes, name)
    x_ng = x.dense()
    ways: dict[str, Callable[[], Any]] = {}
    if native.library is not None:
        ways["compiled"] = lambda: _by_autograd(lambda *leaves: kernels.log_likelihood(x, *leaves).sum(), inputs)
        if (in_step := _in_step(x, inputs)) is not None:
            ways["compiled, as the step calls it"] = in_step
    ways["plain PyTorch, fused"] = lambda: _without_compiled(
        lambda: _by_autograd(lambda *leaves: kernels.log_likelihood(x, *leaves).sum(), inputs)
    )
    ways["autograd, as the equations stand"] = lambda: _by_autograd(lambda *leaves: _equations(x_ng, *leaves), inputs)
    if importlib.util.find_spec("scvi") is not None:
        version = importlib.metadata.version("scvi-tools")
        ways[f"scvi-tools {version}, autograd"] = lambda: _by_autograd(lambda *leaves: _peer(x_ng, *leaves), inputs)
    values = {way: run() for way, run in ways.items() if way != "compiled, as the step calls it"}
    first = next(iter(values.values()))
    for way, value in values.items():  # a faster answer is worth nothing if it is another one
        if abs(value - first) > 1e-3 * abs(first):
            print(f"{way}: {value:.6g}, not {first:.6g}", file=sys.stderr)
    return [
        {"threads": threads, "genes": genes, "likelihood": name, "way": way, "ms": _milliseconds(run, options.repeats)}
        for way, run in ways.items()
    ]


def _inputs(options: argparse.Namespace, genes: int, name: str) -> tuple[Nonzeros, list[torch.Tensor | None]]:
    """Counts of which `density` are not zero, and logits as a network in training gives them."""
    rng = np.random.default_rng(0)
    x_ng = rng.geometric(0.4, (options.cells, genes)) * (rng.random((options.cells, genes)) < options.density)
    x_ng[:, 0] += 1  # no empty cell
    x = Nonzeros.of(torch.from_numpy(x_ng.astype(np.float32)))
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    log_theta_1g = None if name == "poisson" else normal(1, genes)
    logit_pi_ng = normal(options.cells, genes) if name == "zinb" else None
    return x, [normal(options.cells, genes), x.totals().log().float(), log_theta_1g, logit_pi_ng]


def _by_autograd(value: Callable[..., torch.Tensor], inputs: list[torch.Tensor | None]) -> float:
    """Forward and backward of a scalar; the observed library size has no gradient, as in the model's default."""
    leaves = [t if t is None else t.detach().requires_grad_(i != 1) for i, t in enumerate(inputs)]
    total = value(*leaves)
    total.backward()
    for t in leaves:
        if t is not None:
            t.grad = None
    return float(total.detach())


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    library, native.library = native.library, None
    try:
        yield
    finally:
        native.library = library


def _without_compiled(run: Callable[[], float]) -> float:
    with _plain():
        return run()


def _in_step(x: Nonzeros, inputs: list[torch.Tensor | None]) -> Callable[[], Any] | None:
    """The call that a step makes: gradients take the place of the logits, and nothing passes through autograd."""
    logit_rho_ng, log_library_n, log_theta_1g, logit_pi_ng = inputs
    logits = [t for t in (logit_rho_ng, logit_pi_ng) if t is not None]
    room = [torch.empty_like(t) for t in logits]

    def call() -> None:
        for to, t in zip(room, logits, strict=True):
            to.copy_(t)  # what a product would leave there
        native.tile(x, room, None, log_library_n, log_theta_1g, None, True)

    try:
        call()
    except (TypeError, AttributeError) as error:  # an inner function, which may change without notice
        print(f"native.tile is not what it was ({error}); left out", file=sys.stderr)
        return None
    return call


def _equations(x_ng, logit_rho_ng, log_library_n, log_theta_1g, logit_pi_ng) -> torch.Tensor:
    log_mu_ng = torch.log_softmax(logit_rho_ng, 1) + log_library_n[:, None]
    if log_theta_1g is None:
        return likelihood.poisson(x_ng, log_mu_ng).sum()
    if logit_pi_ng is None:
        return likelihood.negative_binomial(x_ng, log_mu_ng, log_theta_1g).sum()
    return likelihood.zero_inflated_negative_binomial(x_ng, log_mu_ng, log_theta_1g, logit_pi_ng).sum()


def _peer(x_ng, logit_rho_ng, log_library_n, log_theta_1g, logit_pi_ng) -> torch.Tensor:
    """As scvi.module.VAE.generative and its loss do."""
    from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

    scale_ng = torch.softmax(logit_rho_ng, -1)
    mu_ng = torch.exp(log_library_n[:, None]) * scale_ng
    if log_theta_1g is None:
        px = Poisson(rate=mu_ng, scale=scale_ng)
    elif logit_pi_ng is None:
        px = NegativeBinomial(mu=mu_ng, theta=log_theta_1g[0].exp(), scale=scale_ng)
    else:
        given = {"mu": mu_ng, "theta": log_theta_1g[0].exp(), "zi_logits": logit_pi_ng, "scale": scale_ng}
        px = ZeroInflatedNegativeBinomial(**given)
    return px.log_prob(x_ng).sum(-1).sum()


# The machine, and a whole step on it.


def machine(options: argparse.Namespace) -> dict[str, float]:
    """Multiplications at their best (square matrices) and bytes copied, each way counted."""
    size = 1024
    a, b = torch.randn(2, size, size)
    rates = {"sgemm_gflops": 2 * size**3 / _milliseconds(lambda: a @ b, options.repeats) / 1e6}
    a, b = a.bfloat16(), b.bfloat16()
    rates["bf16_gflops"] = 2 * size**3 / _milliseconds(lambda: a @ b, options.repeats) / 1e6
    source = torch.ones(1 << 25)  # 128 MiB: beyond any cache
    target = torch.empty_like(source)
    rates["copy_gb_s"] = 2 * 4 * len(source) / _milliseconds(lambda: target.copy_(source), options.repeats) / 1e6
    return rates


def _step(options: argparse.Namespace, threads: int, genes: int) -> list[dict[str, Any]]:
    """A training step in float32 and, where training would take it, in bfloat16; its products timed at their shapes."""
    rows = []
    for half in (False, True):
        if half and not any(torch.cpu.get_capabilities().get(f"{of}_bf16") for of in ("avx512", "amx")):
            continue
        model, run = _stepper(options, genes, half)
        hidden = model.config.n_hidden
        kind = torch.bfloat16 if half else torch.float32
        h_nh, w_gh = torch.randn(options.cells, hidden).to(kind), torch.randn(genes, hidden).to(kind)
        tile_ng = torch.randn(options.cells, genes).to(kind)
        products = lambda: (h_nh @ w_gh.t(), tile_ng @ w_gh, tile_ng.t() @ h_nh)  # noqa: B023, E731
        heads = sum(hasattr(model, name) for name in ("rho", "dropout_logit"))
        step, product = _together([run, products], options.repeats)
        rows.append({
            "threads": threads, "genes": genes, "precision": "bf16" if half else "float32", "step_ms": step,
            "heads_ms": heads * product, "share": heads * product / step,
            "heads_gflops": 6 * options.cells * hidden * genes / product / 1e6,
            "cells_per_second": options.cells / step * 1e3,
        })  # fmt: skip
    return rows


def _stepper(options: argparse.Namespace, genes: int, half: bool) -> tuple[Any, Callable[[], None]]:
    """A model of the default sizes, and what does one step of its training."""
    x, (_, log_library_n, *_) = _inputs(options, genes, "zinb")
    model = build(sv.ModelConfig(), genes, 1, 0, 0)
    model.half = half
    model.train()
    config = sv.TrainConfig()
    state = State.of(model)
    rates = Rates(1.0, 1e-3, kernels.corrected(1e-3, 1000))
    nothing = torch.zeros(options.cells, dtype=torch.int64), torch.zeros(options.cells, 0)
    cells = Minibatch(x, log_library_n.exp(), *nothing)
    seed = itertools.count()

    def run() -> None:
        with contextlib.nullcontext() if half else native.our_threads():  # as the loop has it
            step(state, cells, Noise(next(seed)), rates, config)

    return model, run


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    return _together([run], repeats)[0]


def _together(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each, by turns, so that what else the machine does falls on all alike."""
    for run in runs:  # the first one allocates
        run()
    taken: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    while len(taken[0]) < repeats or time.perf_counter() - began < BUDGET * len(runs):
        for run, of in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            of.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(of) for of in taken]


def _likelihood_table(rows: list[dict[str, Any]]) -> str:
    """A row a way and number of threads, a column a likelihood and number of genes; times slower than the first."""
    columns = list(dict.fromkeys((row["likelihood"], row["genes"]) for row in rows))
    lines = ["| | threads | " + " | ".join(f"{name}, {genes:,} genes" for name, genes in columns) + " |"]
    lines.append("|---|---:|" + "---:|" * len(columns))
    found = {(r["way"], r["threads"], r["likelihood"], r["genes"]): r["ms"] for r in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for threads in dict.fromkeys(row["threads"] for row in rows):
        for way in ways:
            cells = []
            for column in columns:
                mine, first = (found.get((w, threads, *column)) for w in (way, ways[0]))
                cells.append("-" if mine is None else f"{mine:.2f}" + f" ({mine / first:.1f}x)" * (way != ways[0]))
            lines.append(f"| {way} | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| threads | float32 products, GFLOP/s | bfloat16 products, GFLOP/s | copy, GB/s (read + written) |"]
    lines.append("|---:|---:|---:|---:|")
    for r in rows:
        lines.append(f"| {r['threads']} | {r['sgemm_gflops']:.0f} | {r['bf16_gflops']:.0f} | {r['copy_gb_s']:.1f} |")
    return "\n".join(lines)


def _step_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| threads | genes | products in | step, ms | cells/s | heads' products, ms | GFLOP/s | share of the step |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['threads']} | {r['genes']:,} | {r['precision']} | {r['step_ms']:.2f} | {r['cells_per_second']:,.0f} "
            f"| {r['heads_ms']:.2f} | {r['heads_gflops']:.0f} | {r['share']:.0%} |"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=128, help="of a minibatch")
    parser.add_argument("--genes", nargs="+", type=int, default=[2_000, 10_000])
    parser.add_argument("--density", type=float, default=0.1, help="share of counts that are not zero")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement, at least")
    parser.add_argument("--json", type=Path, help="also write every number here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
