"""Every format gives the same counts; every bad or hostile input gives one clear line."""

import contextlib
import gzip
import json
import os
import pickle
import tempfile
import types
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scvi_core import files, io
from scvi_core.config import InputConfig, Sample
from scvi_core.files import Decisions, UserError
from scvi_core.io import blocks, checks, identity
from scvi_core.io import write as sample_file

N_CELLS, N_GENES = 7, 5
BARCODES = [f"{'ACGT'[i % 4] * 8}{'ACGTACGT'[: i + 1]}-1" for i in range(N_CELLS)]
IDS = [f"ENSG0000000000{i}" for i in range(N_GENES)]
NAMES = ["ACTB", "GAPDH", "MALAT1", "B2M", "FTL"]
X = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES))
X[0, 0] = 300  # needs 16 bits


def h5ad(path, x=None, obs=None, var=None, **more):
    x = sp.csr_matrix(X.astype(np.float32)) if x is None else x
    obs = (
        pd.DataFrame({"type": pd.Categorical(["b", "a"] * 3 + ["b"]), "n": range(N_CELLS)}, BARCODES)
        if obs is None
        else obs
    )
    var = pd.DataFrame({"gene_ids": IDS}, NAMES) if var is None else var
    anndata.AnnData(x, obs=obs, var=var, **more).write_h5ad(path)
    return path


def tenx_v3(path, types=None, extra=0):
    x = sp.csr_matrix(np.hstack([X, np.ones((N_CELLS, extra), int)]))
    with h5py.File(path, "w") as file:
        m = file.create_group("matrix")
        m["data"], m["indices"], m["indptr"] = x.data.astype("i4"), x.indices.astype("i8"), x.indptr.astype("i8")
        m["shape"] = np.array(x.shape[::-1], "i4")
        m["barcodes"] = np.array(BARCODES, "S")
        m["features/id"] = np.array(IDS + [f"CD{i}" for i in range(extra)], "S")
        m["features/name"] = np.array(NAMES + [f"CD{i}" for i in range(extra)], "S")
        m["features/feature_type"] = np.array(
            types or ["Gene Expression"] * N_GENES + ["Antibody Capture"] * extra, "S"
        )
    return path


def tenx_v2(path, genomes=("GRCh38",)):
    x = sp.csr_matrix(X)
    with h5py.File(path, "w") as file:
        for genome in genomes:
            g = file.create_group(genome)
            g["data"], g["indices"], g["indptr"] = x.data, x.indices, x.indptr
            g["shape"] = np.array(x.shape[::-1])
            g["barcodes"], g["genes"], g["gene_names"] = (np.array(v, "S") for v in (BARCODES, IDS, NAMES))
    return path


def loom(path, x=X, **layers):
    with h5py.File(path, "w") as file:
        file["matrix"] = x.T
        for name, layer in layers.items():
            file[f"layers/{name}"] = layer.T
        file["row_attrs/Gene"], file["row_attrs/Accession"] = NAMES, IDS
        file["col_attrs/CellID"], file["col_attrs/n"] = BARCODES, np.arange(N_CELLS)
    return path


def mtx(folder, zipped=False, features="features.tsv", extra=0, prefix="", x=None, dense=False):
    folder.mkdir()
    x = np.hstack([X, np.ones((N_CELLS, extra), int)]).T if x is None else x
    scipy.io.mmwrite(folder / f"{prefix}matrix.mtx", x if dense else sp.coo_matrix(x))
    rows = [f"{i}\t{n}" + ("\tGene Expression" if "feat" in features else "") for i, n in zip(IDS, NAMES, strict=True)]
    rows += [f"CD{i}\tCD{i}\tAntibody Capture" for i in range(extra)]
    (folder / f"{prefix}{features}").write_text("\n".join(rows) + "\n")
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(BARCODES) + "\n")
    for file in list(folder.iterdir()) if zipped else []:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return folder


def table(path, orientation="genes_as_rows", ids=IDS, corner=True, x=X):
    frame = pd.DataFrame(x, BARCODES, ids)
    frame = frame.T if orientation == "genes_as_rows" else frame
    sep = "," if ".csv" in path.name else "\t"
    text = frame.to_csv(sep=sep)
    text = text if corner else text.removeprefix(sep)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def zarr_store(path, **kwargs):
    with anndata.settings.override(zarr_write_format=kwargs.pop("format", 2)):
        adata = anndata.read_h5ad(h5ad(path.with_suffix(".h5ad"), **kwargs))
        adata.write_zarr(path)
    return path


def ingest(path, out=None, **config):
    """What is written, read again by plain anndata, and the decisions."""
    sample = Sample(sample="s1", path=str(path), batch="b1", metadata={"age": "7"})
    with tempfile.TemporaryDirectory() as folder:
        out = out or Path(folder) / "counts.h5ad"
        digest, decisions = io.ingest(path, out, sample, InputConfig(**config))
        assert [p.name for p in out.parent.glob("*counts*")] == [out.name]  # nothing of what was temporary
        adata = anndata.read_h5ad(out)
    assert digest == adata.uns["content_sha256"] == io.content_sha256(adata)
    return adata, decisions


def other_layers(path, dense):
    x = np.log1p(X).astype(np.float32)
    return h5ad(path, x=x, layers={"counts": X if dense else sp.csc_matrix(X)})


def with_raw(path):
    adata = anndata.AnnData(
        sp.csr_matrix(X), obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame({"gene_ids": IDS}, NAMES)
    )
    adata.raw = adata
    adata = adata[:, :3].copy()
    adata.X = adata.X.astype(np.float32) * 0.5
    adata.write_h5ad(path)
    return path


FORMATS = {
    "h5ad": lambda d: (h5ad(d / "a.h5ad"), {}),
    "h5ad dense float64": lambda d: (h5ad(d / "a.h5ad", x=X.astype(float)), {}),
    "h5ad csc": lambda d: (h5ad(d / "a.h5ad", x=sp.csc_matrix(X.astype(np.float32))), {}),
    "h5ad layer": lambda d: (other_layers(d / "a.h5ad", True), {"layer": "counts"}),
    "h5ad csc layer": lambda d: (other_layers(d / "a.h5ad", False), {"layer": "counts"}),
    "h5ad raw": lambda d: (with_raw(d / "a.h5ad"), {"layer": "raw"}),
    "zarr 2": lambda d: (zarr_store(d / "a.zarr"), {}),
    "zarr 3": lambda d: (zarr_store(d / "a.zarr", format=3), {}),
    "zarr dense": lambda d: (zarr_store(d / "a.zarr", x=X.astype(np.float32)), {}),
    "10x v3": lambda d: (tenx_v3(d / "a.h5"), {}),
    "10x v3 antibodies": lambda d: (tenx_v3(d / "a.h5", extra=3), {}),
    "10x v2": lambda d: (tenx_v2(d / "a.h5"), {}),
    "loom": lambda d: (loom(d / "a.loom"), {}),
    "loom layer": lambda d: (loom(d / "a.loom", np.log1p(X), counts=X), {"layer": "counts"}),
    "mtx": lambda d: (mtx(d / "m"), {}),
    "mtx gz": lambda d: (mtx(d / "m", zipped=True, extra=2), {}),
    "mtx v2": lambda d: (mtx(d / "m", features="genes.tsv"), {}),
    "mtx dense": lambda d: (mtx(d / "m", dense=True), {}),
    "mtx cells as rows": lambda d: (mtx(d / "m", x=X), {}),
    "mtx file": lambda d: (mtx(d / "m") / "matrix.mtx", {}),
    "mtx prefix": lambda d: (mtx(d / "m", prefix="GSM1_", zipped=True), {}),
    "csv": lambda d: (table(d / "a.csv"), {}),
    "csv gz": lambda d: (table(d / "a.csv.gz"), {}),
    "csv gz cells": lambda d: (table(d / "a.csv.gz", "cells_as_rows"), {"orientation": "cells_as_rows"}),
    "tsv without corner": lambda d: (table(d / "a.tsv", corner=False), {}),
    "txt": lambda d: (table(d / "a.txt.gz", "cells_as_rows"), {"orientation": "cells_as_rows"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_counts(tmp_path, name):
    path, config = FORMATS[name](tmp_path)
    adata, decisions = ingest(path, **config)
    assert isinstance(adata.X, sp.csr_matrix) and adata.X.dtype == np.uint16
    assert adata.X.has_canonical_format and (adata.X.data > 0).all()
    np.testing.assert_array_equal(adata.X.toarray(), X)
    assert list(adata.obs_names) == [f"s1:{b}" for b in BARCODES]
    assert list(adata.var_names) == IDS and adata.uns["gene_ids"] == "ensembl" and adata.uns["organism"] == "human"
    assert list(adata.var["gene_name"]) == (IDS if "csv" in name or "ts" in name or "txt" in name else NAMES)
    assert list(adata.obs.columns) == ["barcode", "sample", "batch", "age"]
    assert (
        list(adata.obs["barcode"]) == BARCODES and set(adata.obs["batch"]) == {"b1"} and set(adata.obs["age"]) == {"7"}
    )
    assert {"format", "gene_ids", "organism"} <= {d.what for d in decisions}
    assert adata.uns["content_sha256"] == DIGEST


DIGEST = io.content_sha256(
    anndata.AnnData(sp.csr_matrix(X), pd.DataFrame(index=[f"s1:{b}" for b in BARCODES]), pd.DataFrame(index=IDS))
)


def test_other_features_are_counted(tmp_path):
    for path in (tenx_v3(tmp_path / "a.h5", extra=3), mtx(tmp_path / "m", extra=3)):
        _, decisions = ingest(path)
        dropped = next(d for d in decisions if d.what == "features_dropped")
        assert dropped.n_genes == 3 and "3 Antibody Capture" in dropped.reason


def test_written_bytes_are_the_same_and_read_back(tmp_path):
    adata, _ = ingest(h5ad(tmp_path / "a.h5ad"), tmp_path / "out" / "counts.h5ad", metadata=("type", "n"))
    back, _ = ingest(tmp_path / "a.h5ad", tmp_path / "counts.h5ad", metadata=("type", "n"))
    assert (tmp_path / "out" / "counts.h5ad").read_bytes() == (tmp_path / "counts.h5ad").read_bytes()
    assert back.X.dtype == np.uint16 and back.obs["n"].dtype == np.int64 and io.content_sha256(back) == DIGEST
    assert back.obs_names.name == "cell_id" and back.var_names.name == "gene_id"
    assert list(back.obs["type"].cat.categories) == ["a", "b"]
    adata.X = adata.X.astype(np.float64)
    assert io.content_sha256(adata) == DIGEST  # whatever type holds them
    adata.X[0, 0] += 1
    assert io.content_sha256(adata) != DIGEST


def test_metadata_columns_become_plain_types(tmp_path):
    mixed = pd.DataFrame(
        {
            "mixed": ["x", 1, None, "y", "x", 2.5, "z"],
            "flag": [True, False] * 3 + [True],
            "holes": pd.array([1, None, 3, 4, 5, 6, 7], "Int64"),
            "float": np.float32([1, np.nan, 3, 4, 5, 6, 7]),
            "empty": pd.Categorical([None] * 7),
        },
        BARCODES,
    )
    for name, kind in (("flag", bool), ("holes", np.float64), ("float", np.float64)):
        assert io._clean_column(mixed[name], mixed.index).dtype == kind
    assert list(io._clean_column(mixed["mixed"], mixed.index).cat.categories) == ["1", "2.5", "x", "y", "z"]
    path = h5ad(tmp_path / "a.h5ad", obs=mixed.drop(columns="mixed"))
    back = ingest(path, metadata=("flag", "holes", "float", "empty"))[0].obs
    assert back["holes"].isna().sum() == 1 and back["empty"].isna().all()


# --- gene identity ------------------------------------------------------------------------------------------------


def identity_of(index, choice="auto", **columns):
    decisions = Decisions("ingest")
    ids, names, kind = identity.gene_identity(
        pd.DataFrame(columns, index=index), InputConfig(gene_ids=choice), "file", decisions
    )
    return list(ids), list(names), kind, decisions


def test_gene_identity():
    ids, names, kind, _ = identity_of(NAMES)
    assert (ids, names, kind) == (NAMES, NAMES, "symbol")
    ids, names, kind, _ = identity_of(IDS, feature_name=NAMES)
    assert (ids, names, kind) == (IDS, NAMES, "ensembl")
    ids, names, kind, _ = identity_of(IDS, feature_name=NAMES, choice="symbol")
    assert (ids, names, kind) == (NAMES, NAMES, "symbol")
    ids, names, kind, _ = identity_of([str(i) for i in range(5)], whatever=IDS, Gene=NAMES, n=range(5))
    assert (ids, names, kind) == (IDS, NAMES, "ensembl")
    ids, names, kind, decisions = identity_of([f" {i}.{k}" for k, i in enumerate(IDS)])
    assert (ids, names, kind) == (IDS, IDS, "ensembl")
    assert next(d for d in decisions if d.what == "gene_versions_cut").n_genes == 5
    ids, names, _, decisions = identity_of([*NAMES, "EGFP"], gene_ids=[*IDS, None])
    assert ids == [*IDS, "EGFP"] and names == [*NAMES, "EGFP"]
    assert next(d for d in decisions if d.what == "gene_ids_missing").n_genes == 1
    ids, names, _, _ = identity_of(["ENSG00000182378.15_PAR_Y", *IDS, *(f"ENSMUSG0000000000{i}" for i in range(9))])
    assert ids[0] == "ENSG00000182378_PAR_Y"
    with pytest.raises(UserError, match=r"set input\.gene_ids to symbol"):
        identity_of(NAMES, "ensembl", other=["x"] * 5)
    with pytest.raises(UserError, match=r"set input\.gene_ids to ensembl"):
        identity_of(IDS, "symbol")


def test_genes_of_one_id_are_summed_and_nameless_ones_dropped(tmp_path):
    x = np.full((N_CELLS, N_GENES), 200, np.uint8)
    var = pd.DataFrame(index=["B", "A", "B", "", "B"])
    adata, decisions = ingest(h5ad(tmp_path / "a.h5ad", x=sp.csr_matrix(x), var=var))
    assert list(adata.var_names) == ["B", "A"] and adata.X.dtype == np.uint16
    np.testing.assert_array_equal(adata.X.toarray(), [[600, 200]] * N_CELLS)
    counted = {d.what: d.n_genes for d in decisions}
    assert counted["genes_merged"] == 2 and counted["genes_without_name"] == 1


def test_organism():
    human = [f"{a}{b}{i}" for a in "ABC" for b in "DEF" for i in range(3)]
    mouse = [f"{a}{b.lower()}x{i}" for a in "ABC" for b in "DEF" for i in range(3)]
    empty = np.array([], object)
    assert identity.guess_organism(np.array([f"ENSMUSG{i:011d}" for i in range(9)], object), empty) == "mouse"
    assert identity.guess_organism(np.array([f"ENSRNOG{i:011d}" for i in range(9)], object), empty) == "rat"
    assert identity.guess_organism(np.array([f"ENSXETG{i:011d}" for i in range(9)], object), empty) == "unknown"
    for names, organism in ((human, "unknown"), ([f"GENE{h}" for h in human], "human"), (mouse, "mouse")):
        assert identity.guess_organism(np.array(names, object), np.array(names, object)) == organism


# --- bad input: one clear line each -------------------------------------------------------------------------------


def refused(path, match, **config):
    with pytest.raises(UserError, match=match) as caught:
        ingest(path, **config)
    assert "\n" not in str(caught.value) and str(path.name) in str(caught.value)
    return str(caught.value)


def replaced(values, dtype=float):
    x = X.astype(dtype)
    x[0, : len(values)] = values
    return x


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([-3], "negative values.*-3.*not counts"),
        ([0.5], r"not whole numbers \(such as 0.5\).*normalised or log-transformed.*layers?: counts|has counts, raw"),
        ([np.nan], "not finite.*nan"),
        ([np.inf], "not finite.*inf"),
        ([2.0**33], "8589934592.*32 bits"),
    ],
)
def test_values_that_are_no_counts(tmp_path, form, values, match):
    path = tmp_path / "a.h5ad"
    adata = anndata.AnnData(form(replaced(values)), obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=NAMES))
    adata.layers["counts"] = X
    adata.raw = adata
    adata.write_h5ad(path)
    assert "set input.layer" in refused(path, match, layer="X")


def test_samples_without_counts(tmp_path):
    refused(h5ad(tmp_path / "a.h5ad", x=np.zeros((N_CELLS, N_GENES))), "all counts are zero")
    refused(h5ad(tmp_path / "b.h5ad", x=X[:0], obs=pd.DataFrame(index=[])), "no cells")
    refused(h5ad(tmp_path / "c.h5ad", x=X[:, :0], var=pd.DataFrame(index=[])), "no genes")
    (tmp_path / "d.csv").write_text("," + ",".join(BARCODES) + "\n")
    refused(tmp_path / "d.csv", "no row below the header")


def test_cells_and_layers(tmp_path):
    obs = pd.DataFrame({"celltype": ["a"] * 7, "n_counts": range(7)}, [*BARCODES[:-1], BARCODES[0]])
    refused(h5ad(tmp_path / "a.h5ad", obs=obs), f"barcode '{BARCODES[0]}' appears more than once")
    refused(h5ad(tmp_path / "n.h5ad", obs=obs.set_index(pd.Index([*BARCODES[:-1], "a\nb"]))), "control characters")
    path = h5ad(tmp_path / "b.h5ad", obs=obs.set_index(pd.Index(BARCODES)), layers={"counts": X})
    refused(path, "did you mean 'celltype'", metadata=("cell_type",))
    refused(path, "n_counts.*rename", metadata=("n_counts",))
    refused(path, "did you mean 'counts'", layer="count")
    refused(path, "nothing in 'raw'.*X, counts", layer="raw")
    refused(loom(tmp_path / "c.loom"), "no layer 'spliced'", layer="spliced")
    with pytest.raises(UserError, match="'keep' is one that scvi-core writes"):
        io.ingest(
            path, tmp_path / "x.h5ad", Sample(sample="s", path="p", batch="b", metadata={"keep": "1"}), InputConfig()
        )


def test_files_that_are_not_what_they_should_be(tmp_path):
    refused(tmp_path / "none.h5ad", "no such file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "neither matrix.mtx nor a zarr")
    for name, content, match in (
        ("empty.h5ad", b"", "empty file"),
        ("text.h5ad", b"a,b\n1,2\n", "named .h5ad, but it is not an HDF5"),
        ("text.mtx", b"1 2 3\n", "MatrixMarket"),
        ("text.dat", b"a,b\n", "not named .csv"),
        ("data.csv", pickle.dumps({"a": 1}), "pickle"),
        ("data.rds", gzip.compress(b"X\n\x00\x00\x00\x03"), "R object"),
        ("zip.csv", b"PK\x03\x04", "zip"),
        ("noise.csv", b"ab\x00\xff", "not a format"),
        ("latin.csv", "gène,x\na,1\n".encode("latin-1"), "not UTF-8"),
        ("semi.csv", b"a;b\nc;1\n", "semicolons"),
        ("pipe.csv", b"a|b\nc|1\n", "no comma"),
        ("words.csv", b"gene,A,B\nx,1,2\ny,3,liver\n", "column 'B' has 'liver', not a number"),
        ("holes.csv", b"gene,A,B\nx,1,2\ny,3,\n", "column 'B' has 'nan', not a number.*row 'y'"),
        ("long.csv", b"gene,A,B\nx,1,2\ny,3,4,5\n", "Expected 3 fields"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, match)
    path = h5ad(tmp_path / "a.h5ad")
    path.rename(tmp_path / "a.csv")
    refused(tmp_path / "a.csv", "named .csv, but it is an HDF5")
    (tmp_path / "cut.h5").write_bytes(tenx_v3(tmp_path / "t.h5").read_bytes()[:-2000])
    refused(tmp_path / "cut.h5", "truncated")
    (tmp_path / "cut.csv.gz").write_bytes(table(tmp_path / "t.csv.gz").read_bytes()[:-20])
    refused(tmp_path / "cut.csv.gz", "truncated")
    refused(tenx_v2(tmp_path / "v2.h5", ("hg19", "mm10")), "2 genomes")
    refused(tenx_v3(tmp_path / "ab.h5", ["Antibody Capture"] * N_GENES), "no feature is a gene.*5 Antibody Capture")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["stuff"] = [1]
    refused(tmp_path / "other.h5", "not AnnData, 10x or loom")


def test_orientation_the_wrong_way_round(tmp_path):
    refused(table(tmp_path / "a.csv", "cells_as_rows"), "to cells_as_rows", orientation="genes_as_rows")
    refused(table(tmp_path / "b.csv", ids=NAMES), "to genes_as_rows", orientation="cells_as_rows")


def test_mtx_folders_that_do_not_fit(tmp_path):
    folder = mtx(tmp_path / "m")
    (folder / "barcodes.tsv").write_text("\n".join(BARCODES[:-1]) + "\n")
    refused(folder, "5 features and 6 barcodes")
    (folder / "barcodes.tsv").unlink()
    refused(folder, "no barcodes.tsv")
    folder = mtx(tmp_path / "twice")
    text = (folder / "matrix.mtx").read_text().splitlines()
    text[2:3] = [f"{N_GENES} {N_CELLS} {len(text) - 2}", text[-1]]
    (folder / "matrix.mtx").write_text("\n".join(text) + "\n")
    refused(folder, "stored twice")
    folder = mtx(tmp_path / "cut")
    (folder / "matrix.mtx").write_text("\n".join((folder / "matrix.mtx").read_text().splitlines()[:-2]))
    refused(folder, "truncated|cannot be read")
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n5 7 999999999999\n1 1 1\n")
    refused(folder, "declares 999,999,999,999 values")


# --- hostile files ------------------------------------------------------------------------------------------------


def test_hdf5_that_reaches_outside_is_refused(tmp_path):
    outside = h5ad(tmp_path / "outside.h5ad")
    (tmp_path / "raw.bin").write_bytes(b"\0" * 64)
    layout = h5py.VirtualLayout((4,), "i4")
    layout[:] = h5py.VirtualSource(str(outside), "X/data", (4,))[:]
    makers = {
        "link to another file": lambda f: f.__setitem__("uns/more", h5py.ExternalLink(str(outside), "/X")),
        "in other files": lambda f: f.create_dataset("x", (4,), "i4", external=[(str(tmp_path / "raw.bin"), 0, 16)]),
        "virtual dataset": lambda f: f.create_virtual_dataset("v", layout),
        "declares 1,000,000,000,000 values": lambda f: f.create_dataset("b", (10**12,), "u1", chunks=(4096,)),
    }
    for i, (match, make) in enumerate(makers.items()):
        path = h5ad(tmp_path / f"h{i}.h5ad")
        with h5py.File(path, "a") as file:
            make(file)
        refused(path, match)


def test_rings_of_links_end(tmp_path):
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["uns/ring"] = file["uns"]
        file["uns/soft"] = h5py.SoftLink("/uns")
    ingest(path)


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("indptr", lambda a: a[:-1], "indptr has the shape"),
        ("indptr", lambda a: np.r_[a[:2], a[1] - 1, a[3:]], "does not rise"),
        ("indices", lambda a: np.r_[a[:-1], 99], "indices has 99"),
        ("indices", lambda a: a[:-1], "should be one number"),
        ("indices", lambda a: np.r_[a[1], a[1:]], "twice"),
    ],
)
def test_sparse_arrays_that_contradict_each_other(tmp_path, key, change, match):
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        values = file[f"X/{key}"][()]
        del file[f"X/{key}"]
        file[f"X/{key}"] = change(values)
    refused(path, match)


@pytest.mark.parametrize("fmt", [2, 3])
def test_hostile_zarr(tmp_path, fmt):
    path = zarr_store(tmp_path / "a.zarr", format=fmt)
    meta = path / "X" / "data" / ("zarr.json" if fmt == 3 else ".zarray")
    clean = json.loads(meta.read_text())
    evil = {"codecs": [{"name": "numcodecs.pickle"}]} if fmt == 3 else {"filters": [{"id": "pickle"}]}
    meta.write_text(json.dumps(clean | evil))
    refused(path, "pickled objects")
    meta.write_text(json.dumps(clean | {"shape": [10**13]}))
    refused(path, "declares 10,000,000,000,000")
    meta.write_text(json.dumps(clean))
    ingest(path)
    (path / "X" / "link").symlink_to("/etc")
    refused(path, "link out of the folder")


# --- block by block -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 4, 11])
def few(request, monkeypatch):
    """Few values a block, and files for what is put aside however little it is."""
    monkeypatch.setattr(checks, "BLOCK", request.param)
    monkeypatch.setattr(blocks, "SMALL", 1)
    return request.param


def read_blocks(path, **config):
    with blocks.Scratch() as scratch:
        return list(io.open_input(path, InputConfig(**config), Decisions("ingest"), scratch)[1].blocks)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_do_not_show(tmp_path, monkeypatch, few, name):
    path, config = FORMATS[name](tmp_path)
    first, decisions = ingest(path, tmp_path / "out" / "counts.h5ad", **config)
    assert first.uns["content_sha256"] == DIGEST and first.X.dtype == np.uint16
    parts = read_blocks(path, **config)
    np.testing.assert_array_equal(sp.vstack(parts).toarray(), X)
    assert all(p.has_canonical_format and p.data.all() and p.nnz == p.data.size for p in parts)
    # tiny arrays of zarr are one chunk, which is read whole
    assert name == "zarr dense" or all(p.shape[0] == 1 or p.nnz <= few or "dense" in name for p in parts)
    assert name == "zarr dense" or len(parts) > 1
    monkeypatch.undo()
    whole, at_once = ingest(path, tmp_path / "whole" / "counts.h5ad", **config)
    assert whole.X.dtype == first.X.dtype and list(decisions) == list(at_once) and len(read_blocks(path, **config)) == 1
    same = (tmp_path / folder / "counts.h5ad" for folder in ("out", "whole"))
    assert len({file.read_bytes() for file in same}) == 1


def test_read_counts_is_the_same_in_memory(tmp_path, few):
    for name in ("h5ad csc", "10x v3 antibodies", "mtx gz", "csv"):
        (tmp_path / name).mkdir()
        path, config = FORMATS[name](tmp_path / name)
        adata = io.read_counts(path, InputConfig(**config), Decisions("map"))
        np.testing.assert_array_equal(adata.X.toarray(), X)
        assert adata.X.has_canonical_format and adata.X.dtype == np.uint16 and list(adata.obs_names) == BARCODES


def lines_of(folder):
    head, sizes, *lines = [line for line in (folder / "matrix.mtx").read_text().splitlines() if line != "%"]
    return head, sizes, lines


def test_mtx_in_any_order_and_layout(tmp_path, few):
    folder = mtx(tmp_path / "m")
    head, sizes, lines = lines_of(folder)
    rng = np.random.default_rng(0)
    for end, blank in (("\n", ""), ("\r\n", ""), ("\n", "\n"), ("\r\n", " \r\n")):
        shuffled = [
            f"{line.replace(' ', '  ')}{end}{blank if i % 3 else ''}" for i, line in enumerate(rng.permutation(lines))
        ]
        text = f"{head}{end}%{end}{end}{sizes}{end}{''.join(shuffled)}"
        for cut in (len(text), len(text.rstrip())):
            (folder / "matrix.mtx").write_bytes(text[:cut].encode())
            assert ingest(folder)[0].uns["content_sha256"] == DIGEST
    text = "\n".join([head, sizes, *lines[:-1], lines[3]])
    (folder / "matrix.mtx").write_text(text)
    refused(folder, "1 entries are stored twice")
    (folder / "matrix.mtx").write_text("\n".join([head, sizes, *lines[:-2], "1 99 1", lines[-1]]))
    refused(folder, f"Line {len(lines) + 1}: its row or column lies outside of 5 x 7")
    (folder / "matrix.mtx").write_text("\n".join([head, sizes, *lines, "1 1 1"]))
    refused(folder, f"too long: {len(lines) + 1} entries, {len(lines)}")
    (folder / "matrix.mtx").write_text("\n".join([head, sizes, *lines[:-1]]))
    refused(folder, "truncated")


def test_what_is_wrong_is_found_in_later_blocks(tmp_path, few):
    x = sp.csr_matrix(X.astype(float))
    for form in (sp.csr_matrix, sp.csc_matrix, sp.csr_matrix.toarray):
        late = x.tolil()
        late[N_CELLS - 1, N_GENES - 1] = 0.5
        refused(h5ad(tmp_path / "late.h5ad", form(late.tocsr())), r"not whole numbers \(such as 0.5\)")
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        end = file["X/indptr"][-1]
        assert end - file["X/indptr"][-2] > 1
        file["X/indices"][end - 1] = file["X/indices"][end - 2]
    refused(path, f"the entry at row {N_CELLS - 1}, column .* twice")


def test_genes_are_merged_in_every_block(tmp_path, few):
    """Also where their sum needs more bits in one block only, and where genes between them are dropped."""
    x = np.random.default_rng(1).poisson(0.7, (9, 6))
    x[7] = 200
    var = pd.DataFrame(index=["B", "A", "B", "", "C", "A"])
    for form in (sp.csr_matrix, sp.csc_matrix):
        adata, _ = ingest(h5ad(tmp_path / "a.h5ad", form(x), pd.DataFrame(index=[f"c{i}" for i in range(9)]), var))
        assert list(adata.var_names) == ["B", "A", "C"] and adata.X.dtype == np.uint16
        np.testing.assert_array_equal(adata.X.toarray(), np.c_[x[:, 0] + x[:, 2], x[:, 1] + x[:, 5], x[:, 4]])
        assert adata.X.has_canonical_format and adata.X.data.all()


@pytest.mark.parametrize("seed", range(5))
def test_by_cell(tmp_path, few, seed):
    """Stripes of entries in no order, some empty, some cells too: the sum of all, in blocks of few entries."""
    rng = np.random.default_rng(seed)
    n_cells, n_genes, n_stripes = rng.integers(1, [40, 30, 6])
    x = rng.poisson(0.2, (n_cells, n_genes)) * rng.integers(1, 1000, (n_cells, 1))
    place = rng.integers(0, n_stripes + 1, x.shape) % n_stripes
    stripes = [sp.csr_matrix((x * (place == i)).astype(np.uint32)) for i in range(n_stripes)]
    scratch = blocks.Scratch(tmp_path)
    parts = list(blocks.by_cell(stripes, n_cells, "here", scratch))
    np.testing.assert_array_equal(sp.vstack(parts).toarray(), x)
    assert all(p.has_canonical_format and (p.nnz <= few or p.shape[0] == 1) for p in parts)
    assert not list(tmp_path.iterdir())
    if x.any():
        with pytest.raises(UserError, match="stored twice"):
            list(blocks.by_cell([*stripes, sp.csr_matrix(x.astype(np.uint32))], n_cells, "here", scratch))
    scratch.close()


def test_take_columns():
    x = sp.random(30, 8, 0.5, "csr", random_state=0, data_rvs=lambda n: np.arange(n) % 250 + 1).astype(np.uint8)
    for to in ([0, 1, 2, 3, 4, 5, 6, 7], [0, -1, 1, 2, -1, 3, 4, 5], [0, 1, 0, 2, -1, 2, 2, 3], [-1] * 7 + [0]):
        product = np.zeros((8, max(to) + 1), int)
        product[np.flatnonzero(np.array(to) >= 0), [t for t in to if t >= 0]] = 1
        taken = blocks.take_columns(x, np.array(to), max(to) + 1)
        np.testing.assert_array_equal(taken.toarray(), x.toarray().astype(int) @ product)
        assert taken.has_canonical_format and taken.data.dtype == np.min_scalar_type(taken.data.max())


def test_layout_of_what_is_written(tmp_path):
    ingest(h5ad(tmp_path / "a.h5ad"), tmp_path / "counts.h5ad")
    with h5py.File(tmp_path / "counts.h5ad") as file:
        assert [file["X"][name].dtype for name in ("data", "indices", "indptr")] == [np.uint16, np.int32, np.int64]
        assert dict(file["X"].attrs)["encoding-type"] == "csr_matrix" and tuple(file["X"].attrs["shape"]) == X.shape


# --- full disks ---------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_gives_one_line(tmp_path, monkeypatch):
    """Whenever it does; HDF5 is not told, or it would end the process."""
    path, out = tenx_v3(tmp_path / "a.h5"), tmp_path / "out" / "counts.h5ad"
    ingest(path, out)
    size, before = out.stat().st_size - len(files.BLANK), out.read_bytes()  # the checksum is written after HDF5
    real = os.write
    for room in [0, 1, *range(100, size, size // 25), size - 1]:
        left = room

        def write(handle, content):
            nonlocal left
            if not left:
                raise OSError(28, "No space left on device")
            content = content[:left]  # as much as there is room for
            left -= len(content)
            return real(handle, content)

        monkeypatch.setattr(sample_file, "os", types.SimpleNamespace(write=write))
        with pytest.raises(UserError, match=r"counts\.h5ad: no space left on the device"):
            ingest(path, out)
        assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["10x v3", "h5ad csc", "csv gz cells"])
def test_a_disk_too_small_for_temporary_files(tmp_path, monkeypatch, few, name):
    class Full(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)
            self.seek = self.close = lambda *_: None

        def write(self, content):
            raise OSError(28, "No space left on device")

    path, config = FORMATS[name](tmp_path)
    monkeypatch.setattr(blocks.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(UserError, match="no space left on the device for temporary files"):
        ingest(path, **config)


# --- real files ---------------------------------------------------------------------------------------------------


def test_real_10x_file_equals_its_h5ad(real_data):
    first, decisions = ingest(real_data("pbmc_1k_citeseq.h5"))
    second, _ = ingest(real_data("pbmc_1k_citeseq_scarf.h5ad"))
    assert first.shape == (892, 36601) and first.uns == second.uns
    assert next(d for d in decisions if d.what == "features_dropped").n_genes == 10


def test_real_symbols(real_data):
    adata, _ = ingest(real_data("baron_mouse_pancreas.h5ad"), metadata=("cell_type", "donor"))
    assert adata.shape == (1886, 14877) and adata.uns["gene_ids"] == "symbol" and adata.uns["organism"] == "mouse"
    assert adata.obs["cell_type"].nunique() == 13
