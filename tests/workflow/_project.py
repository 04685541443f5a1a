"""A small project made by code: three samples in three formats, one configuration, and a real `snakemake` on it."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import yaml

from scvi_core.cli import main

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
N_CELLS, N_GENES = 150, 300
GENES = [f"GENE{i}" for i in range(N_GENES - 5)] + ["MT-CO1", "MT-ND1", "RPS3", "RPL5", "HBB"]

CONFIG = {
    "atlas": "small",
    "samples": "config/samples.tsv",
    "threads": 1,
    "device": "cpu",
    "qc": {"min_counts": 50, "min_genes": 20, "max_pct_mito": 30},
    "genes": {"n_top": 100},
    "model": {"n_latent": 5, "n_hidden": 32},
    "train": {"max_epochs": 5},
    "cluster": {"resolutions": [0.5], "tsne_perplexity": 10},
    "de": {"n_samples": 500},
    "report": {"title": "Small & <odd>", "labels": ["donor"]},
    "export": {"h5ad": True},
}
SHEET = {
    "sample": ["a", "b", "c"],
    "path": ["data/a.h5ad", "data/b", "data/c.csv.gz"],
    "batch": ["one", "one", "two"],
    "donor": ["d1", "d2", "d3"],
    "age": ["31", "45", "62"],
}


def counts(seed, n_cells=N_CELLS, n_types=3):
    """Cells × genes int64 of `n_types` cell types, and the types; a batch effect by seed."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(1).gamma(0.7, 1.0, (n_types, N_GENES)) + 0.05
    types = np.arange(n_cells) % n_types
    rate = base[types] * np.exp(0.2 * rng.normal(size=N_GENES))
    rate[:, -5:] *= 0.3
    size = rng.lognormal(np.log(600), 0.25, (n_cells, 1))
    return rng.poisson(size * rate / rate.sum(1, keepdims=True)), types


def frame(seed, n_cells=N_CELLS):
    """The same as a table with barcodes and genes."""
    return pd.DataFrame(counts(seed, n_cells)[0], index=[f"CELL{i:03d}-1" for i in range(n_cells)], columns=GENES)


def write_h5ad(path, table, **obs):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = ad.AnnData(sp.csr_matrix(table.to_numpy()), pd.DataFrame(obs, index=table.index))
    cells.var_names = list(table.columns)
    cells.write_h5ad(path)


def write_mtx(folder, table):
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as handle:
        scipy.io.mmwrite(handle, sp.coo_matrix(table.to_numpy().T), field="integer")
    rows = [f"{g}\t{g}\tGene Expression" for g in table.columns]
    for name, lines in (("features.tsv.gz", rows), ("barcodes.tsv.gz", table.index)):
        (folder / name).write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def write_csv(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.T.to_csv(path)  # genes as rows, as GEO has them


def write_sheet(folder, sheet):
    (folder / "config").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(sheet).to_csv(folder / "config" / "samples.tsv", sep="\t", index=False)


def write_config(folder, config):
    (folder / "config").mkdir(parents=True, exist_ok=True)
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def make(folder, config=None, sheet=None):
    """Write inputs, sample sheet and configuration into `folder`."""
    tables = {name: frame(seed) for seed, name in enumerate("abc")}
    write_h5ad(folder / "data" / "a.h5ad", tables["a"], cell_type=[f"type{i % 3}" for i in range(N_CELLS)])
    write_mtx(folder / "data" / "b", tables["b"])
    write_csv(folder / "data" / "c.csv.gz", tables["c"])
    write_sheet(folder, sheet or SHEET)
    write_config(folder, config or CONFIG)
    return folder


def changed(config, **values):
    """The configuration with `section__key` set."""
    out = json.loads(json.dumps(config))
    for name, value in values.items():
        *path, last = name.split("__")
        place = out
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return out


PLACES = ("MLFLOW_TRACKING_URI", "SCVI_CORE_TRACKING_URI")  # which MLflow sets, too, in a process that uses it


def environment():
    own = {name: value for name, value in os.environ.items() if name not in PLACES}
    return own | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def snakemake(folder, *arguments, snakefile=ROOT / "Snakefile"):
    """Run Snakemake in `folder`; gives what it printed and its exit code."""
    command = [BIN / "snakemake", "-s", snakefile, "--directory", folder, "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def cli(folder, *arguments):
    """Run `scvi-core` in `folder`."""
    command = [BIN / "scvi-core", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def here(folder, *arguments):
    """The same in this process: the entry point itself, without the seconds that imports take."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["scvi-core", *map(str, arguments)])
        for name in PLACES:
            patch.delenv(name, raising=False)
        try:
            main()
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # as Python itself does at the end of a program
        err.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


def tree(folder, skip=()):
    """SHA-256 of every file under a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and not any(part in skip for part in p.relative_to(folder).parts)
    }
