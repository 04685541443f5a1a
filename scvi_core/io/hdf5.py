"""Readers of AnnData (HDF5 and zarr), 10x ``.h5`` and loom files; see :func:`scvi_core.io.read_counts`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks
from scvi_core.io.blocks import Read, Reader, Scratch, by_cell, turned
from scvi_core.io.checks import FIND_COUNTS, listed, nearest
from scvi_core.io.identity import as_text, gene_expression_only


def hdf5_format(path: Path) -> tuple[str, Reader]:
    """Which of the HDF5 formats, by the keys; the file is checked for reaching outside itself on the way."""
    with _hdf5(path) as file:
        checks.check_hdf5(file, path)
        groups = [key for key in file if isinstance(file.get(key), h5py.Group)]
        if "matrix" in groups and "features" in file["matrix"]:
            return "10x h5 (v3)", read_10x_v3
        if "matrix" in file and {"row_attrs", "col_attrs"} <= set(groups):
            return "loom", read_loom
        if {"obs", "var"} <= set(file):
            return "AnnData h5ad", read_h5ad
        if any("barcodes" in file[key] and "genes" in file[key] for key in groups):
            return "10x h5 (v2)", read_10x_v2
        raise UserError(
            f"{path}: an HDF5 file, but not AnnData, 10x or loom (it holds: {', '.join(sorted(file)[:8])}); "
            "export the counts as h5ad"
        )


def _hdf5(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)  # inputs may lie where no lock can be taken


def read_h5ad(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """AnnData in HDF5."""
    return _read_anndata(scratch.enter_context(_hdf5(path)), path, config.layer, scratch)


def read_zarr(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """AnnData in a zarr folder (format 2 or 3)."""
    import zarr

    checks.check_zarr(path)
    root = zarr.open_group(str(path), mode="r", use_consolidated=False)
    if not {"obs", "var"} <= set(root.keys()):
        raise UserError(f"{path}: a zarr store, but not AnnData (it holds: {', '.join(sorted(root.keys())[:8])})")
    return _read_anndata(root, path, config.layer, scratch)


def _read_anndata(root: Any, path: Path, layer: str, scratch: Scratch) -> Read:
    """Only the matrix asked for and the two tables: other layers and embeddings stay on disk."""
    layers = sorted(root["layers"].keys()) if "layers" in root else []
    raw = next((key for key in ("raw/X", "raw.X") if key in root), None)  # the second until anndata 0.7
    others = [
        name for name in ["X", *layers, *(["raw"] if raw else [])] if name != layer and (name != "X" or "X" in root)
    ]
    remedy = (
        f"set input.layer to where the raw counts are (this file has {listed(others)})"
        if others
        else f"the file has no other layer: {FIND_COUNTS}"
    )
    key = {"X": "X", "raw": raw}.get(layer, f"layers/{layer}")
    if key is None or key not in root or _encoding(root[key]) == "null":
        raise UserError(f"{path}: nothing in {layer!r}{nearest(layer, others)}; {remedy}")
    obs = _frame(root, "obs")
    var = _frame(root, raw.replace("X", "var") if layer == "raw" else "var")
    blocks, shape = _stored_counts(root[key], f"{path}: {key}", remedy, scratch)
    return Read(blocks, shape, obs, var)


def _stored_counts(
    item: Any, where: str, remedy: str, scratch: Scratch
) -> tuple[Iterator[sp.csr_matrix], tuple[int, int]]:
    """Blocks and shape of a matrix as AnnData stores it, dense, CSR or CSC, in HDF5 or zarr."""
    if not hasattr(item, "keys"):
        if len(item.shape) != 2:
            raise UserError(f"{where} has the shape {item.shape}; counts are cells x genes")
        return checks.dense_blocks(item, where, remedy), item.shape
    shape = item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2 or not {"data", "indices", "indptr"} <= set(item.keys()):
        raise UserError(f"{where} is not a sparse matrix of AnnData; {remedy}")
    n_cells, n_genes = (int(n) for n in shape)
    arrays = item["data"], item["indices"], item["indptr"]
    if _encoding(item).startswith("csc"):
        genes = checks.compressed_blocks(*arrays, (n_genes, n_cells), where, remedy)
        blocks = by_cell(turned(genes), n_cells, where, scratch)
    else:
        blocks = checks.compressed_blocks(*arrays, (n_cells, n_genes), where, remedy)
    return blocks, (n_cells, n_genes)


def _encoding(item: Any) -> str:
    found = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", ""))
    return found.decode() if isinstance(found, bytes) else str(found)


def _frame(root: Any, key: str) -> pd.DataFrame:
    if isinstance(root[key], h5py.Dataset):  # until anndata 0.7: one compound dataset, levels kept in uns
        values = root[key][()]
        frame = pd.DataFrame({name: values[name] for name in values.dtype.names})
        for name in frame.columns:
            if f"uns/{name}_categories" in root:
                levels = np.append(as_text(root[f"uns/{name}_categories"][()]), None)
                frame[name] = levels[frame[name]]
            elif frame[name].dtype == object:
                frame[name] = as_text(frame[name])
        return frame.set_index(frame.columns[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.io.read_elem(root[key])


def read_10x_v3(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """10x ``.h5`` of Cell Ranger 3 and later: one matrix, features of several types."""
    matrix = scratch.enter_context(_hdf5(path))["matrix"]
    features = matrix["features"]
    table = {"gene_ids": as_text(features["id"][()])}
    for column in ("feature_type", "genome"):
        if column in features:
            table[column] = as_text(features[column][()])
    var = pd.DataFrame(table, index=as_text(features["name"][()]))
    return gene_expression_only(_read_10x(matrix, f"{path}: matrix", var), path, decisions)


def read_10x_v2(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """10x ``.h5`` of Cell Ranger 2: a group a genome; only files of one genome are taken."""
    file = scratch.enter_context(_hdf5(path))
    genomes = [key for key in file if isinstance(file[key], h5py.Group) and "barcodes" in file[key]]
    if len(genomes) > 1:
        raise UserError(
            f"{path}: holds {len(genomes)} genomes ({listed(genomes)}), each with cells of its own; write one "
            f"with scanpy.read_10x_h5(path, genome={genomes[0]!r}).write_h5ad(...) and name that file"
        )
    group = file[genomes[0]]
    var = pd.DataFrame({"gene_ids": as_text(group["genes"][()])}, index=as_text(group["gene_names"][()]))
    return _read_10x(group, f"{path}: {genomes[0]}", var)


def _read_10x(group: h5py.Group, where: str, var: pd.DataFrame) -> Read:
    # stored as CSC of features x barcodes, which is CSR of barcodes x features
    n_features, n_barcodes = (int(n) for n in group["shape"][()])
    arrays = group["data"], group["indices"], group["indptr"]
    blocks = checks.compressed_blocks(*arrays, (n_barcodes, n_features), where, FIND_COUNTS)
    return Read(blocks, (n_barcodes, n_features), pd.DataFrame(index=as_text(group["barcodes"][()])), var)


def read_loom(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """loom: genes x cells, dense, with named attributes."""
    with _hdf5(path) as file:
        layers = sorted(file["layers"]) if "layers" in file else []
        key = "matrix" if config.layer == "X" else f"layers/{config.layer}"
        remedy = (
            f"set input.layer to where the raw counts are (this file has {listed(layers)})" if layers else FIND_COUNTS
        )
        if key not in file:
            raise UserError(f"{path}: no layer {config.layer!r}{nearest(config.layer, layers)}; {remedy}, or to X")
        n_genes, n_cells = file[key].shape
        by_gene = checks.dense_blocks(file[key], f"{path}: {key}", remedy)
        blocks = by_cell(turned(by_gene), n_cells, str(path), scratch)  # which has read all of it
        var, obs = _loom_table(file["row_attrs"], n_genes), _loom_table(file["col_attrs"], n_cells)
    genes = next((name for name in ("Gene", "gene", "var_names", "Accession") if name in var), None)
    cells = next((name for name in ("CellID", "obs_names", "cell_id", "barcode", "Barcode") if name in obs), None)
    if genes is None or cells is None:
        field, table = ("row_attrs/Gene", var) if genes is None else ("col_attrs/CellID", obs)
        raise UserError(f"{path}: no {field} (found {listed(list(table)) or 'none'}); a loom file needs names; add it")
    return Read(blocks, (n_cells, n_genes), obs.set_index(cells), var.set_index(genes))


def _loom_table(group: h5py.Group, n: int) -> pd.DataFrame:
    columns = {}
    for name, item in group.items():
        if isinstance(item, h5py.Dataset) and item.shape in ((n,), (n, 1)):
            values = item[()].reshape(n)
            columns[name] = values if values.dtype.kind in "biuf" else as_text(values)
    return pd.DataFrame(columns, index=pd.RangeIndex(n))
