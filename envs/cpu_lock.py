"""Derive cpu.lock from cuda.lock: without NVIDIA's packages, and admitting PyTorch's CPU builds.

envs/cpu_lock.py CUDA_LOCK CPU_LOCK HASHES; HASHES has lines of `sha256sum`, a CPU build each.
"""

import re
import sys
from pathlib import Path

CUDA_ONLY = re.compile(r"(nvidia|cuda|triton)\b")


def entries(text: str) -> list[str]:
    """One text per requirement, its hashes included."""
    return re.findall(r"^\S.*?(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)


def main(source: Path, out: Path, builds: Path) -> None:
    """Write `out`."""
    hashes = [f"--hash=sha256:{line.split()[0]}" for line in builds.read_text().splitlines()]
    kept = [entry for entry in entries(source.read_text()) if not CUDA_ONLY.match(entry)]
    for i, entry in enumerate(kept):
        if entry.startswith("torch=="):
            # Linux: the CPU builds' hashes alone, as pip prefers an index's file of a known hash to a newer local one
            pin, *others = [line.strip(" \\") for line in entry.strip().splitlines()]
            linux = [f"{pin} ; sys_platform == 'linux'", *sorted(hashes)]
            rest = [f"{pin} ; sys_platform != 'linux'", *others]
            kept[i] = "".join(" \\\n    ".join(lines) + "\n" for lines in (linux, rest))
    out.write_text("".join(kept))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
