"""An atlas of any size, from files to report: each rule's seconds and peak memory, and what it asked for.

    python benchmarks/million.py hemato_tusi.h5ad --cells 1300000 --samples 13
    python benchmarks/million.py hemato_tusi.h5ad --cells 260000 --samples 10

Samples are 10x .h5 files, made by the block from a real set: a cell of it and one of its nearest neighbours are added
up, and each molecule is kept with a chance of about a half, which differs by sample. Needs the workflow's environment
and 10 kB of disk a cell. Timings are of this machine with nothing else running.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
import yaml

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 10_000  # cells made at a time
AROUND = 200  # megabytes of the Snakemake that a cluster's plugin starts around each job, asked for too
CHUNK = 80_000  # values a chunk, as Cell Ranger writes them


def pairs(X: sp.csr_matrix, seed: int) -> np.ndarray:
    """(cells, 10) the nearest cells of each, by principal components of log counts."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import NearestNeighbors

    logged = sp.diags(1e4 / np.asarray(X.sum(1)).ravel()) @ X
    logged.data = np.log1p(logged.data)
    z = TruncatedSVD(30, random_state=seed).fit_transform(logged)
    return NearestNeighbors(n_neighbors=11).fit(z).kneighbors(return_distance=False)[:, 1:]


def write_10x(path: Path, X: sp.csr_matrix, near: np.ndarray, genes: list[str], n_cells: int, seed: int) -> int:
    """Write one sample of `n_cells` resampled cells; the number of stored counts."""
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.4, 0.6)
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        kinds = {"data": np.int32, "indices": np.int64}
        arrays = {
            name: matrix.create_dataset(
                name,
                (0,),
                kind,
                maxshape=(None,),
                chunks=(CHUNK,),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
            for name, kind in kinds.items()
        }
        lengths = []
        for start in range(0, n_cells, BLOCK):
            n = min(BLOCK, n_cells - start)
            one = rng.integers(X.shape[0], size=n)
            both = X[one] + X[near[one, rng.integers(near.shape[1], size=n)]]
            both.data = rng.binomial(both.data.astype(np.int64), chance)
            both.eliminate_zeros()
            lengths.append(np.diff(both.indptr))
            at = arrays["data"].shape[0]
            for name, array in arrays.items():
                array.resize((at + both.nnz,))
                array[at:] = getattr(both, name)
        matrix["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        matrix["shape"] = np.array([len(genes), n_cells], np.int32)
        letters = np.array(list("ACGT"))
        codes = (np.arange(n_cells)[:, None] // 4 ** np.arange(16)) % 4
        matrix["barcodes"] = np.array(["".join(row) + "-1" for row in letters[codes]], "S18")
        features = matrix.create_group("features")
        features["id"] = features["name"] = np.array(genes, "S")
        features["feature_type"] = np.array(["Gene Expression"] * len(genes), "S")
        features["genome"] = np.array(["mm10"] * len(genes), "S")
        return int(matrix["indptr"][-1])


def make(folder: Path, source: Path, cells: int, samples: int, seed: int, config: dict) -> None:
    """Samples, sheet and configuration, unless they are there."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    adata = ad.read_h5ad(source)
    X = sp.csr_matrix(adata.X)
    genes = [str(g) for g in adata.var_names]
    sizes = [len(part) for part in np.array_split(np.arange(cells), samples)]
    names = [f"s{i:02d}" for i in range(samples)]
    near, entries = None, 0
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        path = folder / "data" / f"{name}.h5"
        if not path.exists():
            near = pairs(X, seed) if near is None else near
            entries += write_10x(path.with_suffix(".part"), X, near, genes, size, seed * 1000 + i)
            path.with_suffix(".part").rename(path)
            print(f"made {path.name}: {size:,} cells", flush=True)
    sheet = {"sample": names, "path": [f"data/{n}.h5" for n in names], "batch": names}
    (folder / "config").mkdir(exist_ok=True)
    pd.DataFrame(sheet).to_csv(folder / "config" / "samples.tsv", sep="\t", index=False)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


class Peak(threading.Thread):
    """The largest memory that a process and all it started held at one time, in bytes of resident memory."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.bytes = psutil.Process(pid), 0

    def run(self) -> None:
        while True:
            total = 0
            try:
                for one in [self.process, *self.process.children(recursive=True)]:
                    try:
                        total += one.memory_info().rss
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.bytes = max(self.bytes, total)
            time.sleep(0.5)


def build(folder: Path, cores: int) -> tuple[float, float, int]:
    """Run the workflow; seconds, peak memory in GB, exit code."""
    command = [Path(sys.executable).parent / "snakemake", "-s", ROOT / "Snakefile", "--directory", folder]
    command += ["--cores", str(cores), "--benchmark-extended", "--quiet", "progress"]
    began = time.time()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment) as process:
        peak = Peak(process.pid)
        peak.start()
        code = process.wait()
    return time.time() - began, peak.bytes / 1e9, code


def table(results: Path) -> pd.DataFrame:
    """A row a rule: jobs, seconds and CPU-seconds of all, the largest job's memory and what it had asked for."""
    rows = []
    for path in sorted((results / "benchmarks").glob("*.tsv")):
        one = pd.read_csv(path, sep="\t").iloc[-1]
        asked = ast.literal_eval(one["resources"]) if isinstance(one.get("resources"), str) else {}
        rows.append(
            {
                "rule": path.stem.split(".")[0],
                "seconds": one["s"],
                "cpu": one["cpu_time"],
                "mb": one["max_pss"],  # what processes share counts once
                "asked_mb": asked.get("mem_mb", np.nan),
                "asked_min": asked.get("runtime", np.nan),
            }
        )
    frame = pd.DataFrame(rows)
    out = frame.groupby("rule", sort=False).agg(
        jobs=("mb", "size"),
        seconds=("seconds", "sum"),
        longest=("seconds", "max"),
        cpu=("cpu", "sum"),
        mb=("mb", "max"),
        asked_mb=("asked_mb", "max"),
        asked_min=("asked_min", "max"),
    )
    out["asked/used"] = (out["asked_mb"] / (out["mb"] + AROUND)).round(2)
    return out.sort_values("seconds", ascending=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a real set, .h5ad of raw counts")
    parser.add_argument("--cells", type=int, default=260_000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="default: results/million/CELLS; kept, so that a rerun goes on")
    parser.add_argument("--config", default="{}", help="further configuration, as JSON")
    parser.add_argument("--make-only", action="store_true", help="write the samples, build nothing")
    arguments = parser.parse_args()
    folder = (arguments.folder or ROOT / "results" / "million" / str(arguments.cells)).resolve()
    config = {"atlas": "big", "samples": "config/samples.tsv", "threads": arguments.cores}
    config |= json.loads(arguments.config)
    make(folder, arguments.source, arguments.cells, arguments.samples, arguments.seed, config)
    if arguments.make_only:
        return
    seconds, gigabytes, code = build(folder, arguments.cores)
    results = folder / "results" / "big"
    with pd.option_context("display.width", 160, "display.max_columns", None):
        print(table(results).round(1).to_string())
    print(f"{arguments.cells:,} cells, {arguments.samples} samples: {seconds / 60:.1f} minutes, all processes together "
          f"{gigabytes:.2f} GB at most, exit code {code}")  # fmt: skip
    sys.exit(code)


if __name__ == "__main__":
    main()
