"""A small good input of every format that is read, for what damages them: test_hostile.py and benchmarks/fuzz.py."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

N, G = 12, 9
BARCODES = [f"{''.join('ACGT'[(i + k * k) % 4] for k in range(8))}{'ACGT'[i % 4] * (i + 1)}-1" for i in range(N)]
NAMES = ["ACTB", "GAPDH", "MALAT1", "B2M", "FTL", "CD74", "LYZ", "MT-ND1", "MT-CO1"]
X = np.random.default_rng(0).poisson(2.0, (N, G)) + np.eye(N, G, dtype=int)


def adata_of(x) -> anndata.AnnData:
    return anndata.AnnData(x, pd.DataFrame({"kind": ["T", "B"] * (N // 2)}, BARCODES), pd.DataFrame(index=NAMES))


def h5ad(folder: Path, make=sp.csr_matrix) -> Path:
    adata_of(make(X.astype(np.float32))).write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad"


def zarr(folder: Path, version: int, make=sp.csr_matrix) -> Path:
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata_of(make(X.astype(np.float32))).write_zarr(folder / "a.zarr")
    (folder / "a.zarr" / ".zmetadata").unlink(missing_ok=True)
    return folder / "a.zarr"


def tenx(folder: Path, group: str = "matrix") -> Path:
    cells = sp.csr_matrix(X.astype(np.int32))
    with h5py.File(folder / "a.h5", "w") as file:
        at = file.create_group(group)
        at["data"], at["indices"], at["indptr"] = cells.data, cells.indices, cells.indptr
        at["shape"], at["barcodes"] = np.array([G, N], np.int32), np.array(BARCODES, "S")
        ids, names = np.array([f"ENSG{i:011d}" for i in range(G)], "S"), np.array(NAMES, "S")
        if group == "matrix":
            at["features/id"], at["features/name"] = ids, names
            at["features/feature_type"] = np.array(["Gene Expression"] * G, "S")
        else:
            at["genes"], at["gene_names"] = ids, names
    return folder / "a.h5"


def loom(folder: Path) -> Path:
    with h5py.File(folder / "a.loom", "w") as file:
        file.create_dataset("matrix", data=X.T.astype(np.float32), chunks=(4, 4))
        file["row_attrs/Gene"], file["col_attrs/CellID"] = np.array(NAMES, "S"), np.array(BARCODES, "S")
        file.create_group("layers")
    return folder / "a.loom"


def h5mu(folder: Path) -> Path:
    with h5py.File(h5ad(folder)) as one, h5py.File(folder / "a.h5mu", "w") as file:
        one.copy("/", file.require_group("mod"), "rna")
        for table in ("obs", "var"):
            file.create_group(table)
    (folder / "a.h5ad").unlink()
    return folder / "a.h5mu"


def table(folder: Path, name: str, turned: bool = False) -> Path:
    frame = pd.DataFrame(X, BARCODES, NAMES)
    content = (frame.T if turned else frame).to_csv(sep="," if ".csv" in name else "\t").encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def mtx(folder: Path, packed_up: bool = False) -> Path:
    matrix = folder / "m"
    matrix.mkdir()
    entries = sp.coo_matrix(X.T)
    lines = [f"{i + 1} {j + 1} {v}" for i, j, v in zip(entries.row, entries.col, entries.data, strict=True)]
    head = ["%%MatrixMarket matrix coordinate integer general", f"{G} {N} {entries.nnz}"]
    features = [f"ENSG{i:011d}\t{name}\tGene Expression" for i, name in enumerate(NAMES)]
    for name, rows in (("matrix.mtx", head + lines), ("features.tsv", features), ("barcodes.tsv", BARCODES)):
        content = ("\n".join(rows) + "\n").encode()
        (matrix / (name + ".gz" * packed_up)).write_bytes(gzip.compress(content) if packed_up else content)
    return matrix


def dense(x):
    return np.asarray(x)


# formats in HDF5, and where they keep what
SPARSE = {"values": "X/data", "columns": "X/indices", "ends": "X/indptr", "cells": "obs/_index", "genes": "var/_index"}
HDF5 = {
    "h5ad": (h5ad, SPARSE),
    "h5ad-csc": (lambda folder: h5ad(folder, sp.csc_matrix), SPARSE),
    "h5ad-dense": (
        lambda folder: h5ad(folder, dense),
        {k: v for k, v in SPARSE.items() if "X" not in v} | {"values": "X"},
    ),
    "h5mu": (h5mu, {k: f"mod/rna/{v}" for k, v in SPARSE.items()}),
    "10x-v3": (
        tenx,
        {"values": "matrix/data", "columns": "matrix/indices", "ends": "matrix/indptr"}
        | {"cells": "matrix/barcodes", "genes": "matrix/features/name"},
    ),
    "10x-v2": (
        lambda folder: tenx(folder, "hg19"),
        {"values": "hg19/data", "columns": "hg19/indices", "ends": "hg19/indptr"}
        | {"cells": "hg19/barcodes", "genes": "hg19/gene_names"},
    ),
    "loom": (loom, {"values": "matrix", "cells": "col_attrs/CellID", "genes": "row_attrs/Gene"}),
}
ZARR = {"zarr2": lambda folder: zarr(folder, 2), "zarr3": lambda folder: zarr(folder, 3)}
TEXT = {
    "csv": lambda folder: table(folder, "a.csv"),
    "tsv": lambda folder: table(folder, "a.tsv", turned=True),
    "csv.gz": lambda folder: table(folder, "a.csv.gz"),
}
MTX = {"mtx": mtx, "mtx.gz": lambda folder: mtx(folder, packed_up=True)}
FILES = {name: make for name, (make, _) in HDF5.items()} | TEXT
FORMATS = FILES | ZARR | MTX
