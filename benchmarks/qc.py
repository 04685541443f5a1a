"""Doublets: how well planted ones are found and how many are called, and what `scvi-core qc` costs by sample size.

    python benchmarks/qc.py baron_human_pancreas.h5ad kang_muscat.h5ad pbmc3k.h5ad --seeds 0 1
    python benchmarks/qc.py baron_human_pancreas.h5ad --sizes 1000 10000 100000

A planted doublet is the sum of two cells that then leave the set: of two types (`obs.cell_type`), or of one, which is
reported apart, as no method finds those. Each cell has one part at most. The methods are our own, Scrublet as scanpy
calls it where scikit-image can be imported, and pyscdblfinder where that can. With `--given` each is told the planted
rate; else our own and pyscdblfinder go by the number of cells, Scrublet by its default. Real doublets that a set holds
count as cells.

With `--sizes` samples of many cells are drawn from the set instead, a Poisson draw around a random cell of it, 6 %
planted, and judged by the command itself in a process of its own. OMP_NUM_THREADS=1 keeps threads from competing.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import average_precision_score

from scvi_core.files import seal

MEASURED = """
import resource, sys
from scvi_core.cli import main
sys.argv[1:1] = ["qc"]
try:
    main()
finally:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(spent.ru_utime + spent.ru_stime, peak / 1e6)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, help="h5ad of raw counts, with obs.cell_type")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.06, 0.12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--given", action="store_true", help="tell each method the planted rate")
    parser.add_argument("--cells", type=int, help="take only so many cells of each set, at random")
    parser.add_argument("--sizes", nargs="+", type=int, help="judge drawn samples of so many cells by scvi-core qc")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    methods = {name: METHODS[name] for name in options.methods}
    for name, package in (("scrublet", "skimage"), ("pyscdblfinder", "pyscdblfinder")):
        if name in methods and importlib.util.find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
            del methods[name]
    rows = []
    for path in options.sets:
        for seed in options.seeds:
            counts, types = read(path, options.cells, seed)
            about = {"set": path.stem, "seed": seed}
            rows += [about | cost(counts, types, n, seed) for n in options.sizes or ()]
            if not options.sizes:
                rows += [
                    about | row
                    for rate in options.rates
                    for row in compare(counts, types, rate, seed, methods, options.given)
                ]
    table = pd.DataFrame(rows)
    if options.sizes:
        print(table.to_string(index=False))
        return
    numbers = ["ap", "ap_same_type", "called", "cpu_s"]
    print(table.groupby(["set", "rate", "method"])[numbers].mean().unstack("method").round(3).to_string())
    overall = table.groupby("method")[numbers].mean()
    overall["within_1.5"] = table["called"].between(1 / 1.5, 1.5).groupby(table["method"]).mean()
    print("\nall (called: cells called, as a multiple of the planted)\n" + overall.round(3).to_string())


def read(path: Path, n: int | None, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts and types of the cells that have one, or of `n` of them."""
    adata = ad.read_h5ad(path)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isin(types, ["nan", "unlabelled"])))[:n]
    return sp.csr_matrix(adata.X)[rows].astype(np.int64), types[rows]


def plant(counts: sp.csr_matrix, types: np.ndarray, rate: float, seed: int, same: bool = False):
    """The set with a share `rate` of doublets, of cells of the same type or of two; which rows they are."""
    rng = np.random.default_rng(seed)
    wanted = max(1, round(rate * len(types) / (1 + rate)))
    free, pairs = list(rng.permutation(len(types))), []
    while len(pairs) < wanted and len(free) > 1:
        a = free.pop()
        at = next((i for i in range(len(free) - 1, -1, -1) if (types[free[i]] == types[a]) == same), None)
        if at is not None:
            pairs.append((a, free.pop(at)))
    first, second = np.array(pairs).T
    single = np.setdiff1d(np.arange(len(types)), pairs)
    order = rng.permutation(len(single) + len(pairs))
    counts = sp.vstack([counts[single], counts[first] + counts[second]], format="csr")
    return counts[order], order >= len(single)


def compare(counts, types, rate: float, seed: int, methods: dict, tell: bool) -> list[dict]:
    planted, truth = plant(counts, types, rate, seed)
    alike, of_one_type = plant(counts, types, rate, seed, same=True)
    given = truth.mean() if tell else None
    rows = []
    for name, method in methods.items():
        began = time.process_time()
        score, called = method(planted, given, seed)
        row = {"rate": rate, "method": name, "cpu_s": time.process_time() - began, "ap": np.nan, "ap_same_type": np.nan}
        if np.isfinite(score).all():
            row["ap"] = average_precision_score(truth, score)
            row["ap_same_type"] = average_precision_score(of_one_type, method(alike, given, seed)[0])
        rows.append(row | {"called": called.sum() / truth.sum()})
    return rows


def own(counts: sp.csr_matrix, rate: float | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from scvi_core.config import QcConfig
    from scvi_core.preprocess.qc import qc

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.h5ad"
        write(path, counts.shape[1], [counts])
        frame, _ = qc(path, QcConfig(drop=(), expected_doublet_rate=rate), seed)
    return frame["doublet_score"].to_numpy(), frame["predicted_doublet"].to_numpy()


def scrublet(counts: sp.csr_matrix, rate: float | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import scanpy as sc

    cells = ad.AnnData(counts.astype(np.float32))
    rate = {} if rate is None else {"expected_doublet_rate": rate}
    sc.pp.scrublet(cells, random_state=seed, use_approx_neighbors=False, verbose=False, **rate)
    called = cells.obs.get("predicted_doublet", pd.Series(False, cells.obs_names)).fillna(False)
    return cells.obs["doublet_score"].to_numpy(), called.to_numpy(dtype=bool)


def pyscdblfinder(counts: sp.csr_matrix, rate: float | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import pyscdblfinder as port

    found = port.sc_dbl_finder(counts.T.tocsr(), dbr=rate, random_state=seed, progress=False).table
    found = found[found["type"] == "real"]
    return found["score"].to_numpy(), (found["class"] == "doublet").to_numpy()


METHODS = {"own": own, "scrublet": scrublet, "pyscdblfinder": pyscdblfinder}


def write(path: Path, n_genes: int, blocks) -> None:
    """A counts.h5ad as `scvi-core ingest` writes it, block of cells by block."""
    with h5py.File(path, "w") as file:
        empty = sp.csr_matrix((0, n_genes), dtype=np.uint16)
        uns = {"gene_ids": "symbol", "organism": "unknown", "content_sha256": ""}
        names = [f"g{i}" for i in range(n_genes)]
        var = pd.DataFrame({"gene_name": names}, index=names)
        ad.io.write_elem(file, "/", ad.AnnData(empty, var=var, uns=uns))
        X, indptr = file["X"], [0]
        kind = {"data": np.uint16, "indices": np.int32}
        for name, dtype in kind.items():
            del X[name]
            X.create_dataset(
                name, (0,), dtype, maxshape=(None,), chunks=(1 << 16,), compression="gzip", compression_opts=1
            )
        for block in blocks:
            last = indptr[-1]
            for name in kind:
                X[name].resize((last + block.nnz,))
                X[name][last:] = getattr(block, name)
            indptr += list(last + block.indptr[1:].astype(np.int64))
        del X["indptr"], file["obs"]
        X["indptr"] = np.array(indptr)
        n = len(indptr) - 1
        X.attrs["shape"] = (n, n_genes)
        cells = [f"c{i}" for i in range(n)]
        same = {column: pd.Categorical.from_codes(np.zeros(n, np.int8), ["s"]) for column in ("sample", "batch")}
        ad.io.write_elem(file, "obs", pd.DataFrame({"barcode": cells, **same}, index=cells))
    seal(path, append=True)


def cost(counts: sp.csr_matrix, types: np.ndarray, n: int, seed: int, rate: float = 0.06) -> dict:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < rate
    numbers = pd.factorize(types)[0]

    def draw():
        for start in range(0, n, 2000):
            doublet = truth[start : start + 2000]
            first, second = rng.integers(len(types), size=(2, len(doublet)))
            while (alike := doublet & (numbers[first] == numbers[second])).any():
                second[alike] = rng.integers(len(types), size=alike.sum())
            block = (counts[first] + sp.diags(doublet.astype(np.int64)) @ counts[second]).tocsr()
            block.data = rng.poisson(block.data)
            block.eliminate_zeros()
            block.sort_indices()
            yield block

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "counts.h5ad", Path(folder) / "qc.parquet"
        write(path, counts.shape[1], draw())
        with h5py.File(path) as file:
            stored = file["X/data"].shape[0]
        command = [sys.executable, "-c", MEASURED, path, "--out", out, "--figure", out.with_suffix(".png")]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        frame = pd.read_parquet(out)
    row = {"cells": n, "counts_1e6": round(stored / 1e6, 1), "cpu_s": float(told[0]), "peak_GB": float(told[1])}
    scored = frame["doublet_score"].notna().to_numpy()
    row["ap"] = average_precision_score(truth[scored], frame["doublet_score"][scored]) if scored.any() else np.nan
    return row | {"called": frame["predicted_doublet"].sum() / truth.sum()}


if __name__ == "__main__":
    main()
