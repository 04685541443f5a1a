"""What a step on a GPU has to do, counted without one: machine instructions, registers and bytes.

    pip install --no-deps --target .venv-triton triton     # where PyTorch did not bring it
    PYTHONPATH=.venv-triton python benchmarks/gpu_count.py

Instructions are those of Triton's code for an H100 (sm_90) in all loops of a kernel, for a gene of a cell or for one of
its non-zeros, as the commonest likelihood has them: ZINB, theta by gene, logits in bfloat16. Bytes are what the
operations of a step are given and give, each tensor once an operation, over cells x genes. A cache saves some of what
one operation gives and the next takes. Neither is a time; `gpu.py` measures.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scvi_core as sv
from scvi_core.counts import Counts
from scvi_core.kernels import gpu, triton_kernels
from scvi_core.model import Noise, build
from scvi_core.train import Schedule
from scvi_core.train.recorded import Recorded
from scvi_core.train.state import State

META = torch.device("meta")
SECTOR = 32  # bytes that a GPU's memory moves at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1032, help="of a minibatch; default: as of 1.3 million cells")
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--density", type=float, default=0.1, help="share of counts that are not zero")
    options = parser.parse_args()
    print("| kernel | registers | spilled bytes | for each | instructions | of which float64 |")
    print("|---|---:|---:|---|---:|---:|")
    for name in ("zeros", "nonzeros", "zeros_gradient", "nonzeros_gradient", "log1p", "adam"):
        print("| {} | {} | {} | {} | {:.0f} | {:.0f} |".format(name, *instructions(f"{name}_kernel")))
    print(f"\n| {options.cells:,} cells x {options.genes:,} genes | bytes a cell and gene |\n|---|---:|")
    moved, operations = traffic(options.cells, options.genes, options.density)
    rows = moved.most_common(12)
    for what, size in [*rows, ("others", moved.total() - sum(size for _, size in rows)), ("all", moved.total())]:
        print(f"| {what} | {size / options.cells / options.genes:.1f} |")
    print(f"\n{operations} operations a step")


def compiled(name: str, kind: int = 2, biased: bool = True, genes: str = "*i16", values: str = "*u8") -> Any:
    """A kernel for an H100; `kind` and `biased` as the kernels have them, the others Triton's names of types."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    constants = {"BLOCK": gpu.BLOCK, "SOME": gpu.SOME, "KIND": kind, "BIASED": biased}
    types = dict.fromkeys(("n_genes", "theta_stride", "n"), "i32") | dict.fromkeys(("begin_n", "end_n"), "*i64")
    logits = "*bf16" if biased else "*fp32"
    types |= dict.fromkeys(("rho", "pi", "grad_rho", "grad_pi", "grad_theta"), logits)
    types |= dict.fromkeys(("mean_rate", "square_rate", "eps", "decay"), "fp32")
    types |= {"genes_m": genes, "values_m": values, "state_n5": "*fp64"}
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}
    given = {(i,): constants[a] for i, a in enumerate(kernel.arg_names) if a in constants}
    aligned = lambda kind: kind.startswith("*") or kind == "i32"  # noqa: E731
    hints = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if aligned(kind)}
    return triton.compile(ASTSource(kernel, signature, given, hints), target=GPUTarget("cuda", 90, 32))


def instructions(name: str) -> tuple[int, int, str, float, float]:
    """Registers, bytes spilled, what is gone through, and instructions, all and float64, for each of it."""
    names, built = getattr(triton_kernels, name).arg_names, compiled(name)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = [
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-sass", "-res-usage")
        ]
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(\w+)(\S*)\s*(.*)", told[0], re.MULTILINE)
    at = [int(address, 16) for address, *_ in found]
    loops: list[tuple[int, int]] = []
    for address, (_, operation, _, rest) in zip(
        at, found, strict=True
    ):  # a jump back; one around others is theirs, too
        target = re.search(r"0x([0-9a-f]+)", rest)
        if operation == "BRA" and target and int(target[1], 16) < address:
            first = int(target[1], 16)
            loops = [*(loop for loop in loops if loop[0] < first), (first, address)]
    within = lambda a: not loops or any(first <= a <= last for first, last in loops)  # noqa: E731
    body = [line for line, a in zip(found, at, strict=True) if within(a)]
    per = (gpu.SOME if "SOME" in names else gpu.BLOCK) / (32 * built.metadata.num_warps)
    doubles = sum(operation in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") for _, operation, *_ in body)
    each = "non-zero" if "SOME" in names else "weight" if "weights" in names else "gene"
    usage = {key: int(re.search(rf"{key}:(\d+)", told[1])[1]) for key in ("REG", "STACK")}
    return usage["REG"], usage["STACK"], each, len(body) / per, doubles / per


class Bytes(TorchDispatchMode):
    """Counts what operations read and write, on a device that holds no numbers."""

    def __init__(self):
        super().__init__()
        self.moved: collections.Counter[str] = collections.Counter()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ("empty", "empty_like", "new_empty", "detach")):
            sizes = {id(t): t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            self.moved[name] += sum(sizes.values())
            self.operations += 1
        return out


def traffic(n: int, genes: int, density: float) -> tuple[collections.Counter[str], int]:
    """Bytes that a recorded step moves, by operation, and how many operations it has; validation cells left out."""
    length = round(density * genes)
    counts = Counts(
        indptr_n=torch.arange(n + 1) * length,
        genes_m=torch.zeros(n * length, dtype=torch.int16), values_m=torch.ones(n * length, dtype=torch.uint8),
        library_n=torch.ones(n, dtype=torch.float64), batch_n=torch.zeros(n, dtype=torch.int64),
        categories_nc=torch.zeros(n, 0, dtype=torch.int64), continuous_nc=torch.zeros(n, 0), n_genes=genes, levels=(),
    ).to(META)  # fmt: skip
    watch = Bytes()

    def launcher(name: str) -> Any:
        def launch(*args: Any, **_: Any) -> None:
            watch.operations += 1
            for tensor in {id(t): t for t in args if isinstance(t, torch.Tensor)}.values():
                share = 1.0
                if tensor.numel() == n * genes and ("nonzeros" in name or "log1p" in name):
                    share = 1 - (1 - density) ** (SECTOR / tensor.element_size())  # of a tile, what its non-zeros touch
                watch.moved[name] += round(share * tensor.nbytes)

        return collections.defaultdict(lambda: launch)

    kernels = SimpleNamespace(**{name: launcher(name) for name in vars(triton_kernels) if name.endswith("_kernel")})
    model = build(sv.ModelConfig(), genes, 2, 0, 0).to(META).train()
    model.half = True
    with (
        mock.patch.object(gpu, "_triton", lambda: (kernels, "")),
        mock.patch.object(gpu, "serves", lambda t: t.is_meta),
    ):
        config = sv.TrainConfig(batch_size=n, max_epochs=10)
        step = Recorded(State.of(model), counts, config, Schedule.of(config, n), 0)
        step.begin([np.arange(n)], 0)
        noise = Noise(0)
        noise.generator = None  # there is none for such a device
        with watch:
            step._run(n, noise)
    return watch.moved, watch.operations


if __name__ == "__main__":
    main()
