"""``counts.zarr``: kept cells x selected genes of all samples, written sample by sample, read whole and checked.

The counts are never in memory all at once: a first pass finds how many there are and how large, a second one writes
them in chunks of rows. The cell table is small beside them and is made in one piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_core.config import NUMBER, level_text
from scvi_core.files import (
    LITTER,
    Decisions,
    UserError,
    canonical_json,
    damaged,
    read_parquet,
    replacing,
    sha256_file,
    sha256_text,
)
from scvi_core.preprocess.cellcycle import CYCLE_OBS
from scvi_core.preprocess.samples import SampleFile, kept_chunks, open_samples, take_genes

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

ZARR_CHUNK = 1 << 20  # values a file of the store
FIXED_OBS = ("sample", "batch", "n_counts", "n_genes", "pct_mito", "doublet_score")
JUDGED_OBS = (*CYCLE_OBS, "predicted_doublet")  # of QC, too, after the further columns


def write_store(
    out: Path,
    h5ads: Sequence[Path],
    qcs: Sequence[Path],
    genes: pd.DataFrame,
    metadata: Sequence[str] = (),
) -> Decisions:
    """Write the kept cells and selected genes of all samples as one AnnData zarr store.

    Cells are in the order of the samples, then of their files; genes as in `genes`. The same input gives the same
    bytes. A cell without any count of a selected gene has no library size for the model: it is left out, and said so.

    Parameters
    ----------
    out : the store's path; replaced whole, or left as it was when something fails.
    h5ads, qcs : the samples' counts.h5ad and qc.parquet, in sheet order.
    genes : the frame of genes.parquet.
    metadata : columns that come from the inputs' own cell tables and keep their type; the other further columns come
        from the sample sheet and become numbers where every value is one, else categories.

    Returns
    -------
    The decisions: cells left out, types of columns.

    Raises
    ------
    UserError
        When no gene is selected, or a sample has no cell left, or a batch a single one.
    """
    decisions = Decisions("store")
    samples = open_samples(h5ads, qcs)
    chosen = genes.loc[genes["selected"].to_numpy(dtype=bool), ["gene_id", "gene_name"]]
    if not len(chosen):
        raise UserError("genes.parquet: no gene is selected; run genes again with a larger genes.n_top")
    position = {gene: i for i, gene in enumerate(chosen["gene_id"])}
    columns = [np.array([position.get(gene, -1) for gene in s.gene_ids], dtype=np.int64) for s in samples]

    keeps, lengths, largest = [], [], 0
    for sample, column in zip(samples, columns, strict=True):
        keep, length, top = _survey(sample, column, decisions)
        keeps.append(keep)
        lengths.append(length)
        largest = max(largest, top)
    obs = _cell_table(samples, qcs, keeps, metadata, decisions)
    for batch, n in obs["batch"].value_counts().items():
        if n == 1:
            raise UserError(
                f"batch {batch!r}: a single cell is left; give its samples the batch of others in the sample sheet, "
                "loosen qc, or drop it"
            )
    var = chosen.astype(str).set_index("gene_id")
    uns = {"organism": _organism(samples, decisions), "samples": _sample_record(samples, keeps)}
    dtype = np.min_scalar_type(largest)
    with replacing(out, "STORE") as temporary:
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        data, indices = _create(temporary, obs, var, uns, indptr, dtype)
        at = 0
        for sample, column, keep in zip(samples, columns, keeps, strict=True):
            for _, counts in kept_chunks(sample, keep):
                part = take_genes(counts, column, len(chosen))
                data[at : at + part.nnz] = part.data.astype(dtype)
                indices[at : at + part.nnz] = part.indices
                at += part.nnz
        _seal(temporary)
    text = f"{len(obs):,} cells x {len(chosen):,} genes, {at:,} entries, the largest count {largest}"
    decisions.add("stored_as", str(dtype), text)
    return decisions


def _seal(store: Path) -> None:
    """Note the digest of all files in the root's attributes: ``.zattrs`` then stands for the whole folder."""
    import zarr

    zarr.open_group(store, mode="r+").attrs["content_sha256"] = _digest(store)


def _digest(store: Path) -> str:
    """SHA-256 of the lines "SHA-256 path" of a store's files but the root's attributes."""
    files = sorted(p for p in store.rglob("*") if p.is_file() and p.name not in LITTER and p != store / ".zattrs")
    return sha256_text("".join(f"{sha256_file(p)} {p.relative_to(store).as_posix()}\n" for p in files))


def verify_store(path: Path) -> None:
    """Refuse a store that is not, to the bit, what was written.

    Raises
    ------
    UserError
        When the folder is missing, is none, cannot be read, or does not have its digest.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such store; run `scvi-core store`")
    try:
        about = json.loads((path / ".zattrs").read_bytes())
        whole = about["content_sha256"] == _digest(path)
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError):
        whole = False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that, then run again") from error
    if not whole:
        raise damaged(path, "store")


def read_store(path: Path, counts: bool = True) -> AnnData:
    """Read a store that :func:`write_store` wrote, once its digest is compared, counts and all.

    Parameters
    ----------
    path : of counts.zarr.
    counts : False leaves them on disk, for :func:`scvi_core.stream.open_counts`.

    Returns
    -------
    AnnData: X (cells, genes) unsigned integer CSR without stored zeros; obs, var and uns as in the store.

    Raises
    ------
    UserError
        When the folder is missing, is another kind of store, or lacks parts.
    """
    import anndata
    import zarr
    from anndata.io import read_elem

    from scvi_core.io.checks import check_zarr

    path = Path(path)
    verify_store(path)
    check_zarr(path)
    try:
        group = zarr.open_group(path, mode="r")
        told_shape = tuple(group["X"].attrs["shape"])
        if group["X"].attrs["encoding-type"] != "csr_matrix" or group["X"]["data"].dtype.kind != "u":
            raise ValueError("X is not a CSR matrix of unsigned integers")
        if counts:
            adata = anndata.read_zarr(path)
            _check_rows(adata.X)
        else:
            adata = anndata.AnnData(**{key: read_elem(group[key]) for key in ("obs", "var", "uns")})
        samples = json.loads(str(adata.uns["samples"]))
        absent = [c for c in FIXED_OBS if c not in adata.obs] + [c for c in ("gene_name",) if c not in adata.var]
        if absent:
            raise ValueError(f"column {absent[0]} is absent")
        if adata.shape != told_shape:
            raise ValueError(f"X is {told_shape[0]} x {told_shape[1]}, its tables {adata.n_obs} x {adata.n_vars}")
        if adata.n_obs != sum(int(record["n_cells"]) for record in samples.values()):
            raise ValueError("its cells are not those that uns['samples'] counts")
    except Exception as error:  # zarr and anndata raise every type there is on damaged stores
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a whole store of scvi-core ({line}); run `scvi-core store` again") from None
    return adata


def _check_rows(X: Any) -> None:
    """A lost chunk reads as zeros: no count may be 0, and columns rise within a row."""
    rises = np.diff(X.indices) > 0
    starts = X.indptr[1:-1]
    rises[starts[(starts > 0) & (starts < X.nnz)] - 1] = True
    sizes = np.diff(X.indptr)
    if X.indptr[0] != 0 or X.indptr[-1] != len(X.data) or (sizes < 1).any() or not rises.all():
        raise ValueError("X: rows are damaged")
    if (X.data == 0).any() or (X.indices < 0).any() or (X.indices >= X.shape[1]).any():
        raise ValueError("X: counts are damaged")


def _survey(sample: SampleFile, column: np.ndarray, decisions: Decisions) -> tuple[np.ndarray, np.ndarray, int]:
    """First pass over a sample: cells to store (bool, all cells), their numbers of entries, the largest count."""
    length = np.zeros(len(sample.keep), dtype=np.int64)
    largest = 0
    for rows, counts in kept_chunks(sample):
        inside = column[counts.indices] >= 0
        length[rows] = np.diff(np.concatenate([[0], np.cumsum(inside)])[counts.indptr])
        largest = max(largest, int(counts.data[inside].max(initial=0)))
    keep = sample.keep & (length > 0)
    empty = int((sample.keep & (length == 0)).sum())
    if empty:
        text = "kept by QC, but without a count of any selected gene, so without a library size: left out"
        decisions.add("cells_without_selected_genes", empty, text, n_cells=empty, sample=sample.name)
    if not keep.any():
        raise UserError(
            f"sample {sample.name}: no kept cell has a count of a selected gene; raise genes.n_top, or drop the sample"
        )
    return keep, length[keep], largest


def _cell_table(
    samples: list[SampleFile],
    qcs: Sequence[Path],
    keeps: list[np.ndarray],
    metadata: Sequence[str],
    decisions: Decisions,
) -> pd.DataFrame:
    """The store's obs: fixed columns from the QC tables, then the further columns of the samples' files."""
    import h5py
    import pandas as pd
    from anndata.io import read_elem

    tables, further = [], {}
    for sample, table, keep in zip(samples, qcs, keeps, strict=True):
        judged = read_parquet(table, "qc", ["cell_id", *FIXED_OBS, *JUDGED_OBS])[keep]
        with h5py.File(sample.path, locking=False) as file:
            own = read_elem(file["obs"])[keep]
        own = own.drop(columns=[c for c in (*FIXED_OBS, *JUDGED_OBS, "barcode") if c in own])
        further.update(dict.fromkeys(own.columns))
        own.index = judged.index
        tables.append(pd.concat([judged, own.astype({c: object for c in own if own[c].dtype == "category"})], axis=1))
    for column in further:
        missing = [s.name for s, t in zip(samples, tables, strict=True) if column not in t]
        if missing:
            decisions.add(f"column {column}", "missing", f"not in samples {', '.join(missing)}: left empty there")
    obs = pd.concat(tables, ignore_index=True).set_index("cell_id")
    obs.index.name = None
    if obs.index.has_duplicates:
        twice = obs.index[obs.index.duplicated()][0]
        raise UserError(
            f"cell {twice!r} is in two inputs; where input.sample_column takes sample names from the inputs, "
            "a name may repeat only if its barcodes differ"
        )
    for column in ("sample", "batch"):  # categories in order of appearance
        obs[column] = pd.Categorical(obs[column].astype(str), categories=obs[column].astype(str).unique())
    for column in further:
        obs[column] = typed(column, obs[column], column in metadata, decisions)
    return obs[[*FIXED_OBS, *further, *JUDGED_OBS]]


def typed(column: str, values: pd.Series, own: bool, decisions: Decisions) -> pd.Series:
    """Give a column its type: numbers stay; texts of the sheet are numbers where all are; else sorted categories."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values
    empty = values.isna() | (values.astype(str) == "")
    texts = values.astype(str).where(~empty)
    if own and len(filled := texts[~empty].unique()):
        # one input has a level as the number 1, another as 1.0, a third as text: these are one
        as_one = {text: level_text(text) for text in filled}
        if len(set(as_one.values())) < len(as_one) or values[~empty].map(type).nunique() > 1:
            merged = sorted(text for text, level in as_one.items() if text != level)
            decisions.add(
                f"column {column}", "levels as one", f"numbers that differ in writing only ({', '.join(merged[:5])})"
            )
            texts = texts.map(as_one)
    filled = texts[~empty].unique()
    if not own and len(filled) and all(re.fullmatch(NUMBER, text) for text in filled):
        numbers = pd.to_numeric(texts)
        decisions.add(f"column {column}", str(numbers.dtype), "every value in the sample sheet is a number")
        return numbers
    return pd.Series(pd.Categorical(texts, categories=sorted(filled)), index=values.index)


def _organism(samples: list[SampleFile], decisions: Decisions) -> str:
    found = sorted({s.organism for s in samples} - {"unknown"})
    if len(found) > 1:
        decisions.add("organism", "unknown", f"the samples look like {' and '.join(found)}")
    return found[0] if len(found) == 1 else "unknown"


def _sample_record(samples: list[SampleFile], keeps: list[np.ndarray]) -> str:
    """What fingerprints read: for each sample, the digests of its content and of the cells in the store."""
    import h5py
    from anndata.io import read_elem

    record = {}
    for sample, keep in zip(samples, keeps, strict=True):
        with h5py.File(sample.path, locking=False) as file:
            ids = np.asarray(read_elem(file["obs"][file["obs"].attrs["_index"]]))[keep]
        record[sample.name] = {
            "content_sha256": sample.content_sha256,
            "kept_sha256": sha256_text("\n".join(ids)),
            "n_cells": int(keep.sum()),
            "n_cells_total": len(keep),
        }
    return "{" + ",".join(f"{json.dumps(name)}:{canonical_json(value)}" for name, value in record.items()) + "}"


def _create(
    path: Path, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, str], indptr: np.ndarray, dtype: np.dtype
) -> tuple[Any, Any]:
    """An AnnData zarr store (format 2, the one all of anndata's readers know) whose X awaits its data and indices."""
    import zarr
    from anndata.io import write_elem

    store = zarr.open_group(path, mode="w", zarr_format=2)
    store.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for key, value in {"obs": obs, "var": var, "uns": uns}.items():
        write_elem(store, key, value)
    for key in ("layers", "obsm", "obsp", "varm", "varp"):
        write_elem(store, key, {})
    X = store.create_group("X")
    shape = [len(obs), len(var)]
    X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    size = int(indptr[-1])
    made = X.create_array("indptr", shape=indptr.shape, dtype="int64", chunks=(min(len(indptr), ZARR_CHUNK),))
    made[:] = indptr
    chunks = (min(size, ZARR_CHUNK),)
    return (
        X.create_array("data", shape=(size,), dtype=dtype, chunks=chunks),
        X.create_array("indices", shape=(size,), dtype="int32", chunks=chunks),
    )
