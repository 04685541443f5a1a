"""Which device computes, on how many threads, and in which precision."""

from __future__ import annotations

import os
import sys

import torch

from scvi_core.files import UserError
from scvi_core.log import log


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

    `auto` takes bfloat16 on a GPU that has it. On a CPU it is float32: PyTorch's products in bfloat16 bring threads of
    their own, which wait for one another, and on two cores are no sooner than the compiled ones in float32.
    """
    found = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    half = precision == "bf16" or (precision == "auto" and found)
    log.info("matrix products in %s (asked for: %s)", "bfloat16" if half else "float32", precision)
    return half


def use_threads(threads: int) -> None:
    """Run torch and numba on this many threads: how sums are split decides their last bits."""
    # numba reads its number once, and refuses another for as long as the process lives: a command is a process of its
    # own, but a caller who has numba at work already keeps what it has and is only limited
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    else:
        os.environ["NUMBA_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
