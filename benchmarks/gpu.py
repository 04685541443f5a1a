"""Everything that needs a GPU, in one run of less than 8 minutes: is it right, how fast is it, and what bounds it?

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --tiny          # the same code on toy sizes, on any machine; its times say nothing

Parts, in this order; one that would begin after `--minutes`, or that fails, is said to be missing:

ceilings   Bytes copied on the device and from pinned memory; multiplications in bfloat16, TF32 and float32.
correct    ELBO and gradients of a step against float64 on the CPU, by autograd through the equations; two fits of one
           seed; the held-out ELBO of fits on GPU and CPU.
kernels    The kernels of a step against the bytes that they cannot but move, plain PyTorch beside them; a whole step,
           recorded and not, against the step's floor: 40 G bytes and 2,560 G operations a cell of G genes.
fit        1.3 million cells, from packed counts in the computer's memory to a saved model, defaults untouched.
stream     Two epochs with the counts left in the computer's memory, beside two with them on the device.
peer       scvi-tools on the same device and cells, where it is installed: two epochs on some of the cells, from which
           the time of a whole fit is extrapolated, by cells and epochs.
de         Embedding all cells, and differential expression of 20 groups.

The cells are drawn on the device from a small model, fitted to counts made by code, so nothing large has to be brought.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import scvi_core as sv
from scvi_core import de, kernels, posterior
from scvi_core.api import fit_counts
from scvi_core.counts import Counts, OnHost, Schema, small_types, tensor_of, unsigned
from scvi_core.device import resolve_precision
from scvi_core.files import write_json
from scvi_core.kernels import gpu
from scvi_core.model import SCVI, Noise, build
from scvi_core.train import Schedule, hold_out, recorded
from scvi_core.train.state import State
from scvi_core.train.step import Rates, gradients
from scvi_core.train.step import step as one_step

GROUPS = 20  # of cells
REPEATS = 20  # of a measurement, of which the median counts


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore")
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU; --tiny runs the same code on the CPU")
    run(options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every part that there is time for; results are written after each."""
    began = time.perf_counter()
    device = torch.device("cpu" if options.tiny else "cuda")
    found: dict[str, Any] = {"about": about(device), "missing": {}}
    data: dict[int, tuple[Counts, Schema, np.ndarray]] = {}  # by genes: one size at a time
    models: dict[int, sv.Model] = {}

    def cells(genes: int) -> tuple[Counts, Schema, np.ndarray]:
        if genes not in data:
            data.clear()
            data[genes] = simulated(options.cells, genes, device)
        return data[genes]

    def fit(genes: int) -> dict[str, Any]:
        told, models[genes] = fitted(*cells(genes)[:2], device)
        if "ceilings" in found:  # of the median epoch, its validation, the shuffling and all else within
            told["share_of_floor"] = floor_ms(told["n_train"], genes, found) / 1e3 / told["epoch_seconds"]
        return told

    parts: list[tuple[str, Callable[[], Any]]] = [
        ("ceilings", lambda: ceilings(device, options)),
        ("correct", lambda: correct(device, options)),
    ]
    parts += [(f"kernels {g}", lambda g=g: step_parts(g, device, options, found)) for g in options.genes]
    for g in options.genes:
        parts += [
            (f"fit {g}", lambda g=g: fit(g)),
            (f"de {g}", lambda g=g: asked(models[g], *cells(g), device)),
            (f"stream {g}", lambda g=g: streamed(*cells(g)[:2], device)),
            (f"peer {g}", lambda g=g: peer(*cells(g)[:2], device, options, found.get(f"fit {g}", {}))),
        ]
    for name, part in parts:
        if time.perf_counter() - began > 60 * options.minutes:
            found["missing"][name] = "no time was left"
        else:
            try:
                found[name] = part()
            except Exception as error:  # the other parts still say something
                found["missing"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        left = found["missing"].get(name, "done")
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {left}", file=sys.stderr, flush=True)
        if options.json:
            write_json(options.json, _told(found))
    print(table(found))
    return found


def about(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    version = lambda name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None  # noqa: E731
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    which, reason = kernels.kind(torch.zeros(1, device=device))
    told = {"device": name, "kernels": which, "reason": reason, "torch": torch.__version__, "cuda": torch.version.cuda}
    return told | {"triton": version("triton"), "python": platform.python_version()}


# Rates of the machine.


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS, calls: int = 1) -> float:
    """Median, after two that do not count, of so many `calls` in a row: one alone is shorter than to wait for it."""
    taken = []
    for i in range(repeats + 2):
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        if i > 1:
            taken.append(1e3 * (time.perf_counter() - began) / calls)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """GB/s (copies: read and written) and TFLOP/s."""
    n = (1 << 12) if options.tiny else (1 << 28)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 8 * n / milliseconds(lambda: target.copy_(source), device) / 1e6}
    if device.type == "cuda":
        pinned = torch.ones(n).pin_memory()
        ms = milliseconds(lambda: target.copy_(pinned, non_blocking=True), device, 5)
        found["pinned_to_device_gb_s"] = 4 * n / ms / 1e6
    size = 64 if options.tiny else 8192
    a, b = torch.randn(2, size, size, device=device)
    for name, kind, precision in (("bf16", torch.bfloat16, None), ("tf32", None, "high"), ("float32", None, "highest")):
        x, y = (a.to(kind), b.to(kind)) if kind else (a, b)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision or before)
        ms = milliseconds(lambda: x @ y, device, 5)  # noqa: B023
        torch.set_float32_matmul_precision(before)
        found[f"{name}_tflop_s"] = 2 * size**3 / ms / 1e9
    return found


# Is it right?


class Given:
    """Noise that is the same on every device and in every precision."""

    n_cells = None

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(tuple(like.shape))).to(like)

    def kept(self, like: torch.Tensor, dropout: float) -> torch.Tensor:
        return torch.from_numpy(self.rng.random(tuple(like.shape)) > dropout).to(like.device)


# of the deviations below; bfloat16 keeps 8 bits, so a product is off by up to 0.4 %
TOLERANCE = {
    "float32": {"elbo": 1e-5, "gradient": 1e-3}, "bf16": {"elbo": 1e-2, "gradient": 5e-2}, "held-out": 5e-3,
}  # fmt: skip


def correct(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Largest deviations, and whether they are within TOLERANCE.

    Of a cell's ELBO, relative; of a weight's gradient, relative to its tensor's largest; of the held-out ELBO of a fit
    from the CPU's, relative.
    """
    n, genes = (12, 20) if options.tiny else (512, 2000)
    counts, schema, _ = simulated(n, genes, device)
    found: dict[str, Any] = {}
    for likelihood, half in itertools.product(("zinb", "nb", "poisson"), (False, True)):
        answers = []
        for exact in (True, False):
            where, kind = (torch.device("cpu"), torch.float64) if exact else (device, torch.float32)
            model = build(sv.ModelConfig(likelihood=likelihood), genes, len(schema.batches), 0, 0).to(where, kind)
            model.half = half and not exact
            model.train()
            cells = counts.to(where).gather(torch.arange(n, device=where))
            if exact:
                cells.library_n, cells.covariates_nc = cells.library_n.double(), cells.covariates_nc.double()
            elbo_n = gradients(model, cells, Given(), 0.5)
            answers.append((elbo_n.double().cpu(), {k: p.grad.double().cpu() for k, p in model.named_parameters()}))
        (elbo_n, exact_of), (got_n, got_of) = answers
        # the bias before a batch norm has no gradient but rounding's
        names = [k for k in exact_of if not k.endswith("linear.bias")]
        precision = "bf16" if half else "float32"
        off = {
            "elbo": float(((got_n - elbo_n) / elbo_n).abs().max()),
            "gradient": max(float((got_of[k] - exact_of[k]).abs().max() / exact_of[k].abs().max()) for k in names),
        }
        within = all(off[what] <= most for what, most in TOLERANCE[precision].items())
        found[f"{likelihood}, {precision}"] = off | {"within": within}
    n = 60 if options.tiny else 5000
    counts, schema, _ = simulated(n, genes, device)
    config = sv.TrainConfig(max_epochs=1 if options.tiny else 20)
    fits = [_fit(counts, schema, config, where) for where in (device, device, torch.device("cpu"))]
    weights = [fit.network.cpu().state_dict() for fit in fits]
    found["two fits are the same bits"] = all(torch.equal(a, weights[1][k]) for k, a in weights[0].items())
    ours, _, theirs = (fit.card["metrics"]["validation_elbo"] for fit in fits)
    off = abs(ours - theirs) / abs(theirs)
    found["held-out ELBO"] = {"device": ours, "cpu": theirs, "relative": off, "within": off <= TOLERANCE["held-out"]}
    return found


# Kernels and steps.


def step_parts(genes: int, device: torch.device, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of what a step is made of, on as many cells as a step of the whole fit has."""
    config = sv.TrainConfig()
    n_train = options.cells - len(hold_out(config, options.cells, 0))
    size = Schedule.of(config, n_train).size
    counts, schema, _ = simulated(4 * size, genes, device)
    counts = counts.to(device)
    half = resolve_precision("auto", device)
    kind, wide = (torch.bfloat16, 2) if half else (torch.float32, 4)
    copy, matrix = found["ceilings"]["copy_gb_s"] * 1e6, found["ceilings"]["bf16_tflop_s"] * 1e9  # per millisecond
    rows_n = torch.randperm(len(counts), device=device)[:size]
    cells = counts.gather(rows_n)
    logits = [torch.randn(size, genes, device=device).to(kind) for _ in range(2)]
    biases = [torch.zeros(genes, device=device) for _ in range(2)]
    theta_1g, library_n = torch.zeros(1, genes, device=device), cells.library_n.log()
    repeats, calls = (2, 1) if options.tiny else (REPEATS, 10)
    time_of = lambda run: milliseconds(run, device, repeats, calls)  # noqa: E731

    def by_autograd() -> None:
        leaves = [t.detach().float().requires_grad_() for t in (logits[0], theta_1g, logits[1])]
        kernels.log_likelihood(cells.x, leaves[0], library_n, *leaves[1:]).sum().backward()

    tile = size * genes
    hidden_nh, head_gh = torch.randn(size, 128, device=device), torch.randn(genes, 128, device=device)
    parts: dict[str, tuple[Callable[[], Any], float]] = {}  # with what it takes at best
    if kernels.kind(theta_1g)[0] == "triton":
        ends = counts.indptr_n[rows_n], counts.indptr_n[rows_n + 1]
        rows = gpu.Rows(*ends, counts.genes_m, counts.values_m, genes)
        given = logits, biases, library_n, theta_1g, None, True
        # logits read and gradients written once, those by theta among them
        parts["likelihood and gradients, Triton"] = (
            lambda: gpu.tile(rows, *given), tile * 5 * wide / copy,
        )  # fmt: skip
        parts["encoder's input"] = rows.log1p, tile * 4 / copy
    with mock.patch.object(gpu, "serves", lambda tensor: False):
        plain = time_of(by_autograd)
    products = lambda: (hidden_nh.to(kind) @ head_gh.to(kind).t(), logits[0] @ head_gh.to(kind))  # noqa: E731
    products_ms = max(4 * tile * 128 / matrix, 2 * tile * wide / copy)
    parts["a head's product and one of its gradient's"] = products, products_ms
    told = {name: {"ms": time_of(run), "at_best_ms": floor} for name, (run, floor) in parts.items()}
    told["likelihood and gradients, plain PyTorch"] = {"ms": plain, "at_best_ms": tile * 5 * wide / copy}

    floor = floor_ms(size, genes, found)
    for way in ("recorded", "kernel by kernel", "autograd, plain PyTorch"):
        step = _stepper(counts, schema, size, way, device, half)
        if step is not None:
            told[f"a step, {way}"] = {"ms": time_of(step), "at_best_ms": floor}
    return {"cells": size, "precision": "bf16" if half else "float32", "parts": told}


def floor_ms(n: int, genes: int, found: dict[str, Any]) -> float:
    """What a step's `n` cells take at best: 40 bytes and 2,560 operations a cell and gene, whichever takes longer."""
    ceilings = found["ceilings"]
    return n * genes * max(40 / ceilings["copy_gb_s"] / 1e6, 2560 / ceilings["bf16_tflop_s"] / 1e9)


def _stepper(
    counts: Counts, schema: Schema, size: int, way: str, device: torch.device, half: bool
) -> Callable[[], None] | None:
    """What does one step of a fit after the other; None where it cannot be done that way."""
    model = build(sv.ModelConfig(), counts.n_genes, len(schema.batches), 0, 0).to(device)
    model.half = half
    state = State.of(model)
    state.ready()
    config, number = sv.TrainConfig(batch_size=size, max_epochs=10), itertools.count(1)
    steps = len(counts) // size
    schedule = Schedule.of(config, steps * size)
    if way == "autograd, plain PyTorch":
        rows_n = torch.arange(size, device=device)

        def run() -> None:
            with mock.patch.object(gpu, "serves", lambda tensor: False):
                rates = Rates.of(schedule, next(number) % (10 * steps))
                one_step(state, counts.gather(rows_n), Noise(0, device), rates, config)

        return run
    if kernels.kind(state.weights[0])[0] != "triton":
        return None
    step = recorded.Recorded(state, counts, config, schedule, 0)
    step.begin(np.array_split(np.random.default_rng(0).permutation(steps * size), steps), 0)
    if way == "kernel by kernel":
        step.recorded[size] = Noise(0, device), None
    return lambda: step(next(number) % steps)


# Whole fits.


def fitted(counts: Counts, schema: Schema, device: torch.device) -> tuple[dict[str, Any], sv.Model]:
    """Seconds from packed counts in the computer's memory to a saved model, everything default."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        model = _fit(counts, schema, sv.TrainConfig(), device)
        trained = time.perf_counter() - began
        model.save(Path(folder) / "model")
        seconds = time.perf_counter() - began
    history = model.history
    n_train = model.card["metrics"]["n_train"]
    return {
        "cells": len(counts), "n_train": n_train, "genes": counts.n_genes,
        "density": len(counts.genes_m) / len(counts) / counts.n_genes,
        "packed_gb": counts.nbytes / 1e9, "seconds": seconds, "training_seconds": trained,
        "epochs": len(history), "epoch_seconds": float(history["seconds"].median()),
        "cells_per_second": n_train / float(history["seconds"].median()),
        "validation_elbo": model.card["metrics"]["validation_elbo"], "kernels": model.card["kernels"],
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }, model  # fmt: skip


def _fit(counts: Counts, schema: Schema, config: sv.TrainConfig, device: torch.device) -> sv.Model:
    names = list(schema.gene_ids)
    return fit_counts(counts, schema, names, "simulated", sv.ModelConfig(), config, None, 0, device, progress=False)


def streamed(counts: Counts, schema: Schema, device: torch.device) -> dict[str, Any]:
    """Seconds an epoch, of the second of two, with the counts on the device and beside it."""
    found = {}
    for name, where in (("resident", contextlib.nullcontext()), ("streamed", _kept_on_host())):
        with where:
            model = _fit(counts, schema, sv.TrainConfig(max_epochs=2), device)
        found[name] = {
            "epoch_seconds": float(model.history["seconds"].iloc[1]),
            "validation_elbo": model.card["metrics"]["validation_elbo"],
        }
    return found


def _kept_on_host() -> Any:
    on_host = lambda counts, needed, size, device: OnHost(**vars(counts), device=device)  # noqa: E731
    return mock.patch.object(recorded, "place", on_host)


def asked(
    model: sv.Model, counts: Counts, schema: Schema, group_n: np.ndarray, device: torch.device
) -> dict[str, float]:
    """Seconds of questions to the model."""
    began = time.perf_counter()
    counts = counts.to(device)
    _wait(device)
    found = {"to_device": time.perf_counter() - began}
    began = time.perf_counter()
    posterior.latent(model.network, counts)
    found["embedding"] = time.perf_counter() - began
    groups = pd.Series([f"group {k}" for k in group_n], name="group")
    began = time.perf_counter()
    config = sv.DeConfig(groupby="group", min_cells=1)
    table = de.differential_expression(model.network, counts, groups, model.gene_ids, model.gene_names, config, 0)
    found |= {
        "de": time.perf_counter() - began,
        "groups": table["group"].nunique(),
        "genes_called": int(table["is_de"].sum()),
    }
    return found


def peer(
    counts: Counts, schema: Schema, device: torch.device, options: argparse.Namespace, ours: dict[str, Any]
) -> dict[str, Any]:
    """scvi-tools' own defaults, for two epochs on some of the cells."""
    if importlib.util.find_spec("scvi") is None:
        raise ImportError("scvi-tools is not installed")
    import scvi
    from lightning.pytorch.callbacks import LambdaCallback

    n = min(len(counts), 100_000)
    some = counts.subset(np.arange(n))
    x = sp.csr_matrix(
        (some.values_m.float().numpy(), unsigned(some.genes_m).int().numpy(), some.indptr_n.numpy()), (n, some.n_genes)
    )
    obs = pd.DataFrame({"batch": np.array(schema.batches)[some.batch_n.numpy()]}, index=[str(i) for i in range(n)])
    adata = ad.AnnData(x, obs)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    ends = [time.perf_counter()]

    def ended(*_: Any) -> None:
        _wait(device)
        ends.append(time.perf_counter())

    model.train(
        max_epochs=2, train_size=1.0, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1,
        enable_progress_bar=False, logger=False, callbacks=[LambdaCallback(on_train_epoch_end=ended)],
    )  # fmt: skip
    took = np.diff(ends).tolist()  # the first with all that comes before it, the second an epoch and no more
    rate = n / took[1]
    epochs = max(1, min(round(20_000 / len(counts) * 400), 400))
    found = {
        "version": importlib.metadata.version("scvi-tools"), "cells": n, "epoch_seconds": took,
        "cells_per_second": rate, "extrapolated_epochs": epochs,
        "extrapolated_seconds": epochs * len(counts) / rate,
    }  # fmt: skip
    if ours:
        found["times_slower"] = found["extrapolated_seconds"] / ours["seconds"]
        found["times_slower_an_epoch"] = ours["cells_per_second"] / rate
    return found


# Cells.


@torch.inference_mode()
def simulated(n: int, genes: int, device: torch.device) -> tuple[Counts, Schema, np.ndarray]:
    """Counts in the computer's memory, drawn on the device from a small model; their schema; the group of each cell.

    The model is fitted to 2,000 cells of 20 groups and two batches whose means are log-normal; about a tenth of the
    counts are not zero, at 10,000 genes. A cell is drawn at the posterior mean of one of these, and a little beside it.
    """
    model, counts, group_n = _source(genes, device)
    generator = torch.Generator(device).manual_seed(n)
    mean_nk = torch.from_numpy(posterior.latent(model, counts)).to(device)
    beside_k = 0.1 * mean_nk.std(0)
    gene_type = tensor_of(np.empty(0), small_types(genes, 255)[0]).dtype
    parts, like = [], np.random.default_rng(n).integers(len(mean_nk), size=n)
    for rows in np.array_split(like, -(-n * genes // 2**26)):
        rows_n = torch.from_numpy(rows).to(device)
        cells = counts.gather(rows_n)
        z_nk = mean_nk[rows_n] + beside_k * torch.randn(len(rows), len(beside_k), device=device, generator=generator)
        mu_ng, theta_ng, pi_ng = posterior._parameters(model, cells, z_nk, cells.library_n.log())
        mu_ng *= torch._standard_gamma(theta_ng.expand_as(mu_ng).contiguous(), generator=generator) / theta_ng
        x_ng = torch.poisson(mu_ng, generator=generator).clamp_(max=255)
        x_ng *= torch.rand(x_ng.shape, device=device, generator=generator) >= pi_ng
        x_ng[:, 0] += x_ng.sum(1) == 0  # no empty cell
        cell_m, gene_m = x_ng.nonzero(as_tuple=True)
        values_m = x_ng[cell_m, gene_m].to(torch.uint8).cpu()
        parts.append(((x_ng > 0).sum(1).cpu(), gene_m.to(gene_type).cpu(), values_m, x_ng.sum(1).double().cpu()))
    lengths, genes_m, values_m, library_n = zip(*parts, strict=True)
    drawn = Counts(
        indptr_n=torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)]),
        genes_m=torch.cat(genes_m), values_m=torch.cat(values_m),
        library_n=torch.cat(library_n), batch_n=counts.batch_n.cpu()[torch.from_numpy(like)],
        categories_nc=torch.zeros(n, 0, dtype=torch.int64), continuous_nc=torch.zeros(n, 0), n_genes=genes, levels=(),
    )  # fmt: skip
    return drawn, Schema(tuple(f"gene{g}" for g in range(genes)), "batch", ("one", "two"), {}, {}), group_n[like]


_sources: dict[tuple[int, str], tuple[SCVI, Counts, np.ndarray]] = {}


@torch.inference_mode(False)
def _source(genes: int, device: torch.device) -> tuple[SCVI, Counts, np.ndarray]:
    """The small model, on the device, what it was fitted to, and the groups of those cells."""
    if (genes, device.type) not in _sources:
        rng = np.random.default_rng(genes)
        n = 2000 if device.type == "cuda" else 100
        group_n = rng.integers(GROUPS, size=n)
        base_g = rng.normal(0, 1.6, genes)
        share_kg = np.exp(base_g + rng.normal(0, 0.7, (GROUPS, genes)) * (rng.random((GROUPS, genes)) < 0.2))
        share_kg /= share_kg.sum(1, keepdims=True)
        library_n = 0.25 * genes * rng.lognormal(0, 0.4, n)
        x_ng = rng.poisson(library_n[:, None] * share_kg[group_n] * rng.gamma(2.0, 0.5, (n, genes)))
        x_ng[:, 0] += x_ng.sum(1) == 0
        obs = pd.DataFrame({"batch": np.where(rng.random(n) < 0.5, "one", "two")}, index=[str(i) for i in range(n)])
        adata = ad.AnnData(sp.csr_matrix(x_ng), obs, pd.DataFrame(index=[f"gene{g}" for g in range(genes)]))
        train = sv.TrainConfig(max_epochs=40 if device.type == "cuda" else 1)
        model = sv.fit(
            adata, "batch", model=sv.ModelConfig(library="observed"), train=train, device=device.type, progress=False
        )
        _sources[genes, device.type] = model.network, model._counts(adata), group_n
    return _sources[genes, device.type]


# What is printed.


def table(found: dict[str, Any]) -> str:
    """All numbers as Markdown."""
    lines = [", ".join(f"{k} {v}" for k, v in found["about"].items() if v), ""]
    if "ceilings" in found:
        lines += ["; ".join(f"{k} {v:,.1f}" for k, v in found["ceilings"].items()), ""]
    if "correct" in found:
        lines += ["| a step against float64 | ELBO | gradients |", "|---|---:|---:|"]
        steps = {k: v for k, v in found["correct"].items() if isinstance(v, dict) and "gradient" in v}
        lines += [f"| {k} | {v['elbo']:.1e} | {v['gradient']:.1e} |" for k, v in steps.items()]
        lines += ["", "; ".join(f"{k}: {v}" for k, v in found["correct"].items() if k not in steps), ""]
    for name, part in found.items():
        if name.startswith("kernels"):
            lines += [f"| {name} genes, {part['cells']} cells, {part['precision']} | ms | at best | share |"]
            lines += ["|---|---:|---:|---:|"]
            for what, t in part["parts"].items():
                lines.append(f"| {what} | {t['ms']:.3f} | {t['at_best_ms']:.3f} | {t['at_best_ms'] / t['ms']:.0%} |")
            lines.append("")
    for name, part in found.items():
        if name.split()[0] in ("fit", "de", "stream", "peer"):
            lines.append(f"{name}: " + "; ".join(f"{k} {_brief(v)}" for k, v in part.items()))
    return "\n".join([*lines, *(f"missing: {name} ({why})" for name, why in found["missing"].items())])


def _told(value: Any) -> Any:
    """The same with numbers that are not finite as text: JSON has none, and a fault found is to be told."""
    if isinstance(value, dict):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_told(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _brief(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: whether the code runs")
    parser.add_argument("--cells", type=int, help="of the large fits; default: 1,300,000")
    parser.add_argument("--genes", nargs="+", type=int, help="of the large fits; default: 720 10000")
    parser.add_argument("--minutes", type=float, default=6.5, help="after which no further part begins")
    parser.add_argument("--json", type=Path, help="also write every number here")
    options = parser.parse_args(arguments)
    options.cells = options.cells or (60 if options.tiny else 1_300_000)
    options.genes = options.genes or ([20] if options.tiny else [720, 10_000])
    return options


if __name__ == "__main__":
    main()
