"""Readers of AnnData (HDF5 and zarr), MuData, 10x ``.h5`` and loom files; see :func:`scvi_core.io.read_counts`.

Only what is asked for is read: the counts, names, text columns of the gene table, and the cell columns that the
configuration names. Whatever else a file holds may be broken, or of a kind that this version of AnnData does not know.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks, packed
from scvi_core.io.blocks import Read, Reader, Scratch, by_cell, turned
from scvi_core.io.checks import Field, listed, nearest
from scvi_core.io.identity import NUMBER, as_text

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401 - where it is installed, HDF5 reads zstd, blosc and the like

COUNT_LAYERS = ("counts", "raw_counts", "count", "umi", "umis", "umi_counts", "raw")  # what people call them
RNA = ("rna", "gex", "gene_expression", "gene expression")  # the modality of a MuData file that has genes
FILTERS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}
# HDF5 files of others, by some of their keys, and what to do with them
OF_OTHERS = (
    ({"assays", "cell.names"}, "an h5Seurat file; in R: SeuratDisk::Convert(path, dest = 'h5ad'), and take that"),
    ({"barcode_idx", "feature_idx"}, "Cell Ranger's molecule_info.h5; take filtered_feature_bc_matrix.h5 beside it"),
    ({"assays", "colData"}, "an R object in HDF5 (SingleCellExperiment); in R, write it as h5ad (anndataR)"),
    ({"assay001"}, "an R object's counts (saveHDF5SummarizedExperiment), without names; in R, write it as h5ad"),
    ({"droplet_latents"}, "CellBender's latents without the counts; take its output _filtered.h5"),
)
LOOKED_AT = 100_000  # values, twice, by which a matrix is taken for one of counts; all are checked when it is read


def hdf5_format(path: Path) -> tuple[str, Reader]:
    """Which of the HDF5 formats, by the keys; the file is checked for reaching outside itself on the way."""
    checks.try_hdf5(path)
    with _hdf5(path) as file:
        checks.check_hdf5(file, path)
        groups = [key for key in file if isinstance(file.get(key), h5py.Group)]
        if "matrix" in groups and "features" in file["matrix"]:
            return "10x h5 (v3)", read_10x_v3
        if "matrix" in file and {"row_attrs", "col_attrs"} <= set(groups):
            return "loom", read_loom
        if "mod" in groups:
            return "MuData h5mu", read_h5mu
        if {"obs", "var"} <= set(file):
            return "AnnData h5ad", read_h5ad
        if any("barcodes" in file[key] and "genes" in file[key] for key in groups):
            return "10x h5 (v2)", read_10x_v2
        for keys, what in OF_OTHERS:
            if keys <= set(file):
                raise UserError(f"{path}: {what}")
        raise UserError(
            f"{path}: an HDF5 file, but not AnnData, 10x or loom (it holds: {', '.join(sorted(file)[:8])}); "
            "export the counts as h5ad"
        )


def _hdf5(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)  # inputs may lie where no lock can be taken


def read_h5ad(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """AnnData in HDF5."""
    return _read_anndata(scratch.enter_context(_hdf5(path)), str(path), config, decisions, scratch)


def read_h5mu(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """MuData: the modality of genes, which is an AnnData of its own."""
    modalities = scratch.enter_context(_hdf5(path))["mod"]
    found = [name for name in modalities if name.lower() in RNA]
    if len(found) != 1:
        raise UserError(
            f"{path}: MuData with the modalities {listed(modalities)}; one of them has to be called rna, or write the "
            "one with genes as h5ad: mudata.read_h5mu(path)[name].write_h5ad(...)"
        )
    others = [name for name in modalities if name != found[0]]
    decisions.add("modality", found[0], f"of a MuData file; left out: {listed(others) or 'none'}")
    return _read_anndata(modalities[found[0]], f"{path}: mod/{found[0]}", config, decisions, scratch)


def read_zarr(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """AnnData in a zarr folder (format 2 or 3)."""
    import zarr

    checks.check_zarr(path)
    root = zarr.open_group(str(path), mode="r", use_consolidated=False)
    if not {"obs", "var"} <= set(root.keys()):
        raise UserError(f"{path}: a zarr store, but not AnnData (it holds: {', '.join(sorted(root.keys())[:8])})")
    return _read_anndata(root, str(path), config, decisions, scratch)


def _read_anndata(root: Any, where: str, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """Only the matrix asked for and what is needed of the two tables: all else stays on disk."""
    matrices = {"X": "X"} if "X" in root and _encoding(root["X"]) != "null" else {}
    matrices |= {name: f"layers/{name}" for name in sorted(root["layers"].keys())} if "layers" in root else {}
    raw = next((key for key in ("raw/X", "raw.X") if key in root), None)  # the second until anndata 0.7
    if raw:
        matrices["raw"] = raw
    layer, others = config.layer, [name for name in matrices if name != config.layer]
    remedy = (
        f"set input.layer to where the raw counts are (this file has {listed(others)})"
        if others
        else f"the file has no other layer: {checks.FIND_COUNTS}"
    )
    if layer == "auto":
        layer, remedy = _counts_layer(root, matrices, where, decisions)
    if layer not in matrices:
        raise UserError(f"{where}: nothing in {layer!r}{nearest(layer, others)}; {remedy}")
    field = Field(f"{where}: {matrices[layer]}", remedy)
    obs, columns = _frame(root, "obs", where, decisions, config.cell_columns)
    var, _ = _frame(root, raw.replace("X", "var") if raw and layer == "raw" else "var", where, decisions)
    if raw and layer == "raw" and not len(var.columns) and raw != "raw.X":
        whole, _ = _frame(root, "var", where, decisions)
        # scanpy's raw may have names alone, and var their ids and types
        if var.index.equals(whole.index):
            var = whole
        elif whole.index.is_unique and var.index.isin(whole.index).all():
            var = whole.loc[var.index]
    if raw and layer == "raw" and _numbered(var):
        whole, _ = _frame(root, "var", where, decisions)
        if len(whole) == len(var) and not _numbered(whole):
            text = "its genes are only numbered, and as many as in var, whose names are taken in that order"
            decisions.add("raw/var", "var", text, n_genes=len(var), warn=True)
            var = whole
    blocks, shape = _stored_counts(root[matrices[layer]], field, (len(obs), len(var)), scratch)
    return Read(blocks, shape, obs, var, field, columns)


def _numbered(var: pd.DataFrame) -> bool:
    """Whether neither the index nor a column of a gene table can name genes."""
    texts = [as_text(var.index), *(as_text(var[name]) for name in var if var[name].dtype.kind not in "biuf")]
    return not any(len(set(names)) > 0.5 * len(names) and not all(map(NUMBER.fullmatch, names)) for names in texts)


def _counts_layer(root: Any, matrices: dict[str, str], where: str, decisions: Decisions) -> tuple[str, str]:
    """Which matrix holds the counts, for ``input.layer: auto``, and what to do if there turns out to be none."""
    if not matrices:
        raise UserError(f"{where}: no matrix in it, neither X nor a layer; export the counts")
    if len(matrices) < 2:
        return next(iter(matrices), "X"), f"the file has no other layer: {checks.FIND_COUNTS}"
    whole = [name for name, key in matrices.items() if _looks_counted(root[key])]
    known = [name for name in whole if name.lower() in COUNT_LAYERS]
    named = sorted(known, key=lambda name: (name != "raw", COUNT_LAYERS.index(name.lower())))
    others = [name for name in whole if name not in (*named, "X")]
    looked = f"looked at {listed(matrices)}"
    if len(others) > 1 and not named and "X" not in whole:
        raise UserError(
            f"{where}: several layers hold whole numbers ({listed(others)}); set input.layer to one of them"
        )
    if not whole:
        return "X" if "X" in matrices else next(iter(matrices)), f"no layer holds counts ({looked}); find the raw ones"
    layer = [*named, *(["X"] if "X" in whole else []), *others][0]
    decisions.add("layer", layer, f"input.layer is auto: the first of {listed(whole)} with whole numbers; {looked}")
    return layer, f"set input.layer to where the raw counts are (this file has {listed(matrices)})"


def _looks_counted(item: Any) -> bool:
    """Whether a stored matrix seems to hold counts, by some of its values: whole, and not all of them 0 or 1."""
    try:
        values = item["data"] if hasattr(item, "keys") else item
        _check_whole(values, "looked at")
        step = LOOKED_AT if len(values.shape) == 1 else -(-LOOKED_AT // max(1, values.shape[1]))
        middle, largest = values.shape[0] // 2, 0
        for part in (slice(0, step), slice(middle, middle + step)):
            counts = checks.pack_counts(np.asarray(values[part]).reshape(-1), Field("looked at"))
            largest = max(largest, int(counts.max(initial=0)))
    except Exception:  # it cannot be read or holds no counts: either way it is not the one
        return False
    return largest > 1


def _stored_counts(
    item: Any, field: Field, names: tuple[int, int], scratch: Scratch
) -> tuple[Iterator[sp.csr_matrix], tuple[int, int]]:
    """Blocks and shape of a matrix as AnnData stores it, dense, CSR or CSC, in HDF5 or zarr; `names`: cells, genes."""
    if not hasattr(item, "keys"):
        if len(item.shape) != 2:
            raise UserError(f"{field.where} has the shape {item.shape}; counts are cells x genes")
        checks.check_names(item.shape, *names, field.where)
        _check_whole(item, field.where)
        return checks.dense_blocks(item, field), item.shape
    shape = item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2 or not {"data", "indices", "indptr"} <= set(item.keys()):
        raise UserError(f"{field.where} is not a sparse matrix of AnnData; {field.remedy}")
    n_cells, n_genes = (int(n) for n in shape)
    checks.check_names((n_cells, n_genes), *names, field.where)
    arrays = item["data"], item["indices"], item["indptr"]
    for name, array in zip(("data", "indices", "indptr"), arrays, strict=True):
        _check_whole(array, f"{field.where}/{name}")
    if _encoding(item).startswith("csc"):
        genes = checks.compressed_blocks(*arrays, (n_genes, n_cells), field)
        blocks = by_cell(turned(genes), n_cells, field.where, scratch)
    else:
        blocks = checks.compressed_blocks(*arrays, (n_cells, n_genes), field)
    return blocks, (n_cells, n_genes)


def _check_whole(item: Any, where: str) -> None:
    """Refuse an array of which parts are lost, or that was packed in a way that cannot be unpacked here."""
    if isinstance(item, h5py.Dataset):
        plist = item.id.get_create_plist()
        for i in range(plist.get_nfilters()):
            code, name = plist.get_filter(i)[0], plist.get_filter(i)[3]
            if not h5py.h5z.filter_avail(code):
                called = FILTERS.get(code) or name.decode("utf-8", "replace")[:40] or f"number {code}"
                raise UserError(
                    f"{where} is compressed by the HDF5 filter {called}, which is not installed here: `pip install "
                    "hdf5plugin`, or write the file again with gzip"
                )
        packed.check_hdf5(item, where)
    elif hasattr(item, "nchunks_initialized") and item.nchunks_initialized < item.nchunks:
        lost = item.nchunks - item.nchunks_initialized
        raise UserError(
            f"{where}: {lost:,} of {item.nchunks:,} chunks are missing, which would read as zeros; copy the whole "
            "store (if they are zeros: write it again with zarr.config.set({'array.write_empty_chunks': True}))"
        )
    else:
        packed.check_zarr(Path(str(item.store_path.store.root), item.path), where)


def _encoding(item: Any) -> str:
    found = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", ""))
    return found.decode() if isinstance(found, bytes) else str(found)


def _frame(
    root: Any, key: str, where: str, decisions: Decisions, asked: Iterable[str] | None = None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The index and some columns of a stored table, and what columns there are.

    Those that were `asked` for have to be readable; None takes what can be read.
    """
    table = root[key]
    if isinstance(table, h5py.Dataset):  # until anndata 0.7: one compound dataset, levels kept in uns
        _check_whole(table, f"{where}: {key}")
        values = table[()]
        names = values.dtype.names
        frame = pd.DataFrame({name: values[name] for name in names})
        for name in frame.columns:
            if f"uns/{name}_categories" in root:
                levels = np.append(as_text(root[f"uns/{name}_categories"][()]), None)
                codes = frame[name].to_numpy()
                if len(codes) and (codes.dtype.kind not in "iu" or codes.min() < -1 or codes.max() > len(levels) - 2):
                    raise UserError(f"{where}: {key}/{name} has codes without a category; {checks.DAMAGED}")
                frame[name] = levels[codes]
            elif frame[name].dtype == object:
                frame[name] = as_text(frame[name])
        return frame.set_index(frame.columns[0]), names[1:]
    index = table.attrs.get("_index", next((name for name in ("_index", "index") if name in table), None))
    index = index.decode() if isinstance(index, bytes) else index
    if index is None or index not in table:
        raise UserError(f"{where}: {key} has no index (_index), so no names; write the file again with anndata")
    columns = tuple(str(name) for name in table.keys() if name not in (index, "__categories"))  # noqa: SIM118 - zarr
    _check_whole(table[index], f"{where}: {key}/{index}")
    frame = pd.DataFrame(index=pd.Index(as_text(_column(table, index))))
    for name in columns if asked is None else [name for name in asked if name in columns]:
        try:
            values = _column(table, name, f"{where}: {key}/{name}")
            frame[name] = pd.Series(getattr(values, "array", values), index=frame.index)
        except Exception as error:  # anndata, h5py and zarr raise every type there is
            line = " ".join(str(error).split())[:200]
            if asked is None:
                decisions.add(f"{key}/{name}", "not read", f"{type(error).__name__}: {line}", warn=True)
                continue
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{where}: {key}/{name} cannot be read ({type(error).__name__}: {line}); write it again, or leave it "
                "out of the configuration"
            ) from error
    return frame, columns


def _column(table: Any, name: str, where: str = "") -> Any:
    """One column of a stored table, whatever version of AnnData wrote it."""
    item = table[name]
    if hasattr(item, "keys"):
        for part in item.keys():  # noqa: SIM118 - zarr
            one_level = part == "codes" and "categories" in item and getattr(item["categories"], "shape", 0) == (1,)
            if where and not one_level and not hasattr(item[part], "keys"):
                _check_whole(item[part], f"{where}/{part}")
    elif where:
        _check_whole(item, where)
    if not hasattr(item, "keys") and "categories" in item.attrs:  # anndata 0.7: codes, and the levels elsewhere
        levels = item.attrs["categories"]
        levels = table[f"__categories/{name}"] if "__categories" in table else item.file[levels]
        return pd.Categorical.from_codes(item[()], pd.Index(as_text(levels[()])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.io.read_elem(item)


def read_10x_v3(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """10x ``.h5`` of Cell Ranger 3 and later, and CellBender's: one matrix, features of several types."""
    matrix = scratch.enter_context(_hdf5(path))["matrix"]
    features = matrix["features"]
    table = {"gene_ids": _texts(features["id"])}
    for column in ("feature_type", "genome"):
        if column in features:
            table[column] = _texts(features[column])
    return _read_10x(matrix, Field(f"{path}: matrix"), pd.DataFrame(table, index=_texts(features["name"])))


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
    var = pd.DataFrame({"gene_ids": _texts(group["genes"])}, index=_texts(group["gene_names"]))
    return _read_10x(group, Field(f"{path}: {genomes[0]}"), var)


def _read_10x(group: h5py.Group, field: Field, var: pd.DataFrame) -> Read:
    # stored as CSC of features x barcodes, which is CSR of barcodes x features
    n_features, n_barcodes = (int(n) for n in group["shape"][:2])
    barcodes = _texts(group["barcodes"])
    checks.check_names((n_barcodes, n_features), len(barcodes), len(var), field.where)
    arrays = group["data"], group["indices"], group["indptr"]
    for array in arrays:
        _check_whole(array, f"{field.where}/{array.name.rpartition('/')[2]}")
    blocks = checks.compressed_blocks(*arrays, (n_barcodes, n_features), field)
    return Read(blocks, (n_barcodes, n_features), pd.DataFrame(index=barcodes), var, field)


def _texts(item: h5py.Dataset) -> np.ndarray:
    """A stored array of names, looked at first."""
    _check_whole(item, f"{item.file.filename}: {item.name.lstrip('/')}")
    return as_text(item[()])


def read_loom(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """loom: genes x cells, dense, with named attributes."""
    with _hdf5(path) as file:
        layers = sorted(file["layers"]) if "layers" in file else []
        layer = config.layer
        if layer == "auto" and not _looks_counted(file["matrix"]):
            matrices = {"X": "matrix"} | {name: f"layers/{name}" for name in layers}
            layer, _ = _counts_layer(file, matrices, str(path), decisions)
        key = "matrix" if layer in ("auto", "X") else f"layers/{layer}"
        remedy = (
            f"set input.layer to where the raw counts are (this file has {listed(layers)})"
            if layers
            else checks.FIND_COUNTS
        )
        if key not in file:
            raise UserError(f"{path}: no layer {layer!r}{nearest(layer, layers)}; {remedy}, or to X")
        n_genes, n_cells = file[key].shape
        field = Field(f"{path}: {key}", remedy)
        _check_whole(file[key], field.where)
        blocks = by_cell(turned(checks.dense_blocks(file[key], field)), n_cells, str(path), scratch)  # reads all of it
        var, obs = _loom_table(file["row_attrs"], n_genes), _loom_table(file["col_attrs"], n_cells)
    called = ("Gene", "gene", "var_names", "gene_names", "Accession", "ensembl_ids")
    genes = next((name for name in called if name in var), None)
    called = ("CellID", "obs_names", "cell_id", "cell_names", "barcode", "Barcode")
    cells = next((name for name in called if name in obs), None)
    if genes is None or cells is None:
        named, table = ("row_attrs/Gene", var) if genes is None else ("col_attrs/CellID", obs)
        raise UserError(f"{path}: no {named} (found {listed(list(table)) or 'none'}); a loom file needs names; add it")
    obs = obs.set_index(cells)
    return Read(blocks, (n_cells, n_genes), obs, var.set_index(genes), field, tuple(obs.columns))


def _loom_table(group: h5py.Group, n: int) -> pd.DataFrame:
    columns = {}
    for name, item in group.items():
        if isinstance(item, h5py.Dataset) and item.shape in ((n,), (n, 1)):
            _check_whole(item, f"{item.file.filename}: {item.name.lstrip('/')}")
            values = item[()].reshape(n)
            columns[name] = values if values.dtype.kind in "biuf" else as_text(values)
    return pd.DataFrame(columns, index=pd.RangeIndex(n))
