"""One flipped bit in any file that a step hands to the next: the next step has to refuse it, and to say what to do.

    python benchmarks/flips.py results/ATLAS --flips 20

copies the atlas, flips one random bit at a time in every file that another step reads, and runs the command that reads
it. It has to end with 1 and one line that names the file and the command that makes it anew, and write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

from scvi_core.cli import main as command


def steps(atlas: Path, out: Path) -> dict[Path, tuple[str, list[str]]]:
    """Of each file that a step reads: the command that wrote it, and one that reads it."""
    counts = sorted(map(str, atlas.glob("samples/*/counts.h5ad")))
    store, model = ["--store", str(atlas / "counts.zarr")], ["--model", str(atlas / "model")]
    embed = ["embed", *store, *model, "--out", str(out / "latent.parquet")]
    report = ["report", str(atlas)]
    read = {Path(file): ("ingest", ["qc", file, "--out", str(out / "qc.parquet")]) for file in counts}
    read |= {
        p: ("qc", ["genes", *counts, "--out", str(out / "genes.parquet")]) for p in atlas.glob("samples/*/qc.parquet")
    }
    genes = str(atlas / "genes.parquet")
    read[Path(genes)] = "genes", ["store", *counts, "--genes", genes, "--out", str(out / "counts.zarr")]
    read |= {
        p: ("store", embed) for p in atlas.glob("counts.zarr/**/*") if p.is_file() and p.name != ".snakemake_timestamp"
    }
    read |= {atlas / "model" / name: ("train", embed) for name in ("model.json", "model.safetensors")}
    latent, clusters, cells = (str(atlas / f"{name}.parquet") for name in ("latent", "clusters", "cells"))
    read[Path(latent)] = "embed", ["cluster", *store, "--latent", latent, "--out", str(out / "clusters.parquet")]
    read[Path(clusters)] = "cluster", ["cells", *store, "--clusters", clusters, "--out", str(out / "cells.parquet")]
    read[Path(cells)] = "cells", ["de", *store, *model, "--cells", cells, "--out", str(out / "de.parquet")]
    read |= {atlas / "model/history.parquet": ("train", report), atlas / "de.parquet": ("de", report)}
    read |= {p: ("criticism", report) for p in atlas.glob("criticism/*") if not p.name.startswith(".")}
    for path in atlas.glob("decisions/*.jsonl"):
        step = path.name.partition(".")[0]
        if step not in ("lookup", "train", "report"):  # of those the log tells
            read[path] = step, report
    read[atlas / "logs/train_run.json"] = "train", ["register", str(atlas), "--out", str(out / "model_ref.json")]
    return {path: of for path, of in read.items() if path.is_file()}


def run(arguments: list[str]) -> tuple[int, str]:
    """A command in this process: its exit code, and what it said."""
    told, code, argv = io.StringIO(), 0, sys.argv
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        sys.argv = ["scvi-core", *arguments]
        try:
            command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.argv = argv
    return code, told.getvalue()


def flipped(path: Path, rng: random.Random) -> int:
    """Flip one bit of a file; says which byte it is in."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    return at // 8


def wrong(atlas: Path, flips: int, seed: int = 0, of_store: int | None = None) -> tuple[int, list[str]]:
    """How many bits were flipped, and what was not as it should be; the atlas is put back after each.

    Parameters
    ----------
    flips : a file.
    of_store : as many files of counts.zarr, drawn at random; None: all.
    """
    rng, tried, found = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        read = steps(atlas, out)
        chunks = [path for path in read if atlas / "counts.zarr" in path.parents]
        for path in rng.sample(chunks, len(chunks) - of_store) if of_store is not None else ():
            del read[path]
        for path, (maker, reads) in read.items():
            whole = path.read_bytes()
            named = atlas / "counts.zarr" if atlas / "counts.zarr" in path.parents else path
            for _ in range(flips if whole else 0):
                at, tried = flipped(path, rng), tried + 1
                code, told = run(reads)
                path.write_bytes(whole)
                line = next((line for line in told.splitlines() if line.startswith("error: ")), "")
                of_bundle = path.parent.name == "model" and f"{path.parent}" in line
                if code != 1 or not (str(named) in line or of_bundle) or not re.search(rf"scvi-core {maker}\b", line):
                    found.append(f"{path.relative_to(atlas)}, byte {at}: exit {code}: {line or told[-200:]!r}")
                if left := list(out.iterdir()):
                    found.append(f"{path.relative_to(atlas)}, byte {at}: wrote {left[0].name}")
    return tried, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("atlas", type=Path, help="results/ATLAS of a finished build")
    parser.add_argument("--flips", type=int, default=20, help="bits of each file, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        copy = Path(shutil.copytree(given.atlas, Path(home) / given.atlas.name))
        n, bad = wrong(copy, given.flips, given.seed)
    print(*bad, sep="\n")
    print(f"{n} bits flipped, one at a time: {n - len(bad)} refused, by file and command; {len(bad)} not")
    raise SystemExit(bool(bad))
