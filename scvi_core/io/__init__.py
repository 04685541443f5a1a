"""Count matrices in, one checked form out: the sample file that all later steps start from.

What a file is, is told by its content; its name only has to agree. :func:`read_counts` reads, :func:`ingest` adds
gene identity, cell ids and metadata, and writes: the same bytes for the same counts, block by block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.config import PLUGINS, InputConfig, Sample, is_reserved, level_text, same_column
from scvi_core.files import Decisions, UserError, replacing
from scvi_core.io import checks, hdf5, identity, text
from scvi_core.io.blocks import Read, Reader, Scratch, Spool, stacked, take_columns
from scvi_core.io.checks import listed, nearest
from scvi_core.io.identity import as_text
from scvi_core.io.write import content_sha256, write_counts
from scvi_core.log import progress

__all__ = ["content_sha256", "ingest", "open_input", "read_counts"]

HDF5 = b"\x89HDF\r\n\x1a\n"
HDF5_NAMES = (".h5", ".h5ad", ".hdf5", ".hdf", ".loom")
TEXT_NAMES = (".csv", ".tsv", ".txt", ".tab", ".mtx")
# How files begin that are none of ours to read, and what to do with them.
_R = (
    "an R object (.rds, .RData or .qs); in R, write its counts as mtx (DropletUtils::write10xCounts) or h5ad (anndataR)"
)
OF_OTHERS = (
    (b"BZh", "packed by bzip2; bunzip2 it (or pack it by gzip)"),
    (b"\xfd7zXZ\x00", "packed by xz; unxz it (or pack it by gzip)"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unzstd it (or pack it by gzip)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x80", "a Python pickle, which can run code when read; export it as h5ad"),
    *((magic, _R) for magic in (b"RDX", b"RDA", b"X\n\x00\x00\x00", b"A\n2\n", b"A\n3\n", b"\x0b\x0e\x0a\x0c")),
    (b"PAR1", "a Parquet table; write its counts as h5ad, or as CSV"),
    (b"ARROW1", "a Feather table; write its counts as h5ad, or as CSV"),
    (b"\x93NUMPY", "a NumPy array, which has no names of genes and cells; write it as h5ad"),
    (b"BUS\x00", "a BUS file of kallisto's; take what `kb count` or `bustools count` writes"),
    (b"BAM\x01", "aligned reads (BAM); count them first, with Cell Ranger, STARsolo or kb"),
    (b"SQLite format 3", "an SQLite database; export its counts as h5ad or mtx"),
    (b"%PDF", "a PDF"),
    (b"<!DOCTYPE html", "a web page, not what it should be; fetch the file itself"),
    (b"<html", "a web page, not what it should be; fetch the file itself"),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
C1 = re.compile(r"[\x80-\x84\x86-\x9f]")  # orders to terminals, too; U+0085 is what "..." of Windows-1252 turns into


def read_counts(path: str | Path, config: InputConfig, decisions: Decisions) -> anndata.AnnData:
    """Read the raw counts of one input into memory, whatever its format, and check them.

    Parameters
    ----------
    path : AnnData ``.h5ad`` or zarr folder; 10x ``.h5`` (Cell Ranger 2, 3 and later); a 10x folder of ``matrix.mtx``,
        ``barcodes.tsv`` and ``genes.tsv`` or ``features.tsv``, or that ``matrix.mtx`` itself; loom; CSV or TSV.
        All text formats may be gzipped.
    config : which layer, and what a row of a CSV or TSV is.
    decisions : what was chosen, dropped or taken for granted is added.

    Returns
    -------
    anndata.AnnData
        X : CSR (cells, genes), the smallest unsigned integers, sorted indices, no stored zeros; obs : the input's
        cell table, indexed by barcode (unique); var : the input's gene table (may repeat).

    Raises
    ------
    UserError
        One line, for a file that is missing, damaged, mis-named, hostile or empty, and for values that are no counts.
    """
    path = Path(path)
    with Scratch() as scratch:
        kind, read = open_input(path, config, decisions, scratch)
        counts = stacked(read.blocks, read.shape[1])
    _told(path, kind, read.shape, counts.nnz, read.field, decisions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gene names may repeat here
        return anndata.AnnData(counts, obs=read.obs, var=read.var)


def open_input(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> tuple[str, Read]:
    """An input's format, and what its reader gives, checked but for the counts, which are checked as they are read."""
    with checks.one_line(path):
        kind, reader = _format(path)
        if config.layer not in ("auto", "X") and kind.startswith(("10x", "text")):
            raise UserError(
                f"{path}: layer is {config.layer!r}, but a file of this format has only one matrix; leave it out (in "
                "the sample sheet, call a column that describes the tissue otherwise)"
            )
        read = reader(path, config, decisions, scratch)
    n_cells, n_genes = read.shape
    obs, var = read.obs, read.var
    if not n_cells or not n_genes:
        raise UserError(
            f"{path}: no {'genes' if n_cells else 'cells'} in it; check the export, or leave the sample out"
        )
    checks.check_names(read.shape, len(obs), len(var), str(path))
    for name in config.cell_columns:
        if name not in obs:
            raise UserError(
                f"{path}: the cell column {name!r} is asked for (input.metadata, batch_column, sample_column), which "
                f"is not there{nearest(name, read.columns)}; found {listed(read.columns[:20]) or 'no columns'}"
            )
    given = as_text(obs.index)
    if (barcodes := identity.unquoted(given)) is not given:
        text = (
            f"cells' names are in quotes, or bytes that were written as text (such as {given[0]}), which is taken off"
        )
        decisions.add("barcodes", "unquoted", text, n_cells=n_cells, warn=True)
    _check_turned(path, barcodes, as_text(var.index))
    index = pd.Index(barcodes)
    apart = (
        pd.MultiIndex.from_arrays([_levels(path, obs, config.sample_column), index]) if config.sample_column else index
    )
    if apart.has_duplicates:
        twice = index[apart.duplicated()]
        raise UserError(
            f"{path}: barcode {twice[0]!r} appears more than once ({len(twice):,} such rows); make barcodes unique, or "
            "name the column that tells libraries apart as input.sample_column"
            f"{f' (found {listed(read.columns[:10])})' if read.columns else ''}"
        )
    odd = [b for b in barcodes if not b or CONTROL.search(b) or C1.search(b)]
    if odd:
        raise UserError(f"{path}: barcode {odd[0]!r} is empty or has control characters; give every cell a plain name")
    if odd := [name for name in as_text(var.index) if CONTROL.search(name)]:
        raise UserError(f"{path}: gene {odd[0]!r} has control characters; give every gene a plain name")
    obs.index, var.index = index, pd.Index(as_text(var.index))
    with checks.one_line(path):
        read = identity.genes_only(read, str(path), config, decisions)

    def blocks() -> Iterator[sp.csr_matrix]:
        with checks.one_line(path):  # what happens to a block after it was yielded is not meant
            yield from read.blocks

    return kind, dataclasses.replace(read, blocks=blocks())


def _check_turned(path: Path, cells: np.ndarray, genes: np.ndarray) -> None:
    """Refuse a matrix whose cells are called as genes are."""
    if (
        identity.looks_like_genes(cells)
        and len(cells) > 10
        and 5 * identity.gene_evidence(genes) < (identity.gene_evidence(cells))
    ):
        raise UserError(
            f"{path}: its cells are called as genes are ({listed(cells[:2])}), and its genes {listed(genes[:2])}: the "
            "matrix is turned; write it cells x genes (adata.T in Python)"
        )


def _told(
    path: Path, kind: str, shape: tuple[int, int], entries: int, field: checks.Field, decisions: Decisions
) -> None:
    """What is known of an input once all its counts are read."""
    n_cells, n_genes = shape
    decisions.add(
        "format",
        kind,
        f"format recognised from the file: {n_cells:,} cells x {n_genes:,} genes, {entries:,} counts above zero",
    )
    if field.rounded:
        text = f"values that were whole but for the noise of floating point (within {checks.NOISE:g} of it)"
        decisions.add("rounded", field.rounded, text, warn=True)
    if not entries:
        raise UserError(f"{path}: all counts are zero; check the export, or leave the sample out")


def _levels(path: Path, obs: pd.DataFrame, column: str) -> np.ndarray:
    """(cells,) texts of a column that says which sample or batch a cell is of."""
    levels = np.array([level_text(value) for value in as_text(obs[column])], object)
    odd = [level for level in set(levels.tolist()) if not level or CONTROL.search(level) or len(level) > 200]
    if odd:
        raise UserError(
            f"{path}: cell column {column!r} has {odd[0][:80]!r} (empty, long or unprintable), which names "
            "no sample or batch; fill it in"
        )
    return levels


def _format(path: Path) -> tuple[str, Reader]:
    """What an input is, by its first bytes and its keys, and which function reads it."""
    if not path.exists():
        if str(path).partition(":/")[0] in PLUGINS:  # one slash, as in a Path
            raise UserError(f"{path}: a URL, where a file is needed; fetch it, or name it in a workflow's sample sheet")
        raise UserError(f"{path}: no such file or folder; check column 'path' of the sample sheet")
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
            return "AnnData zarr", hdf5.read_zarr
        if text.matrices(path):
            return "10x mtx", text.read_mtx
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        below = sorted(
            {
                p.parent.relative_to(path).as_posix()
                for depth in ("*", "*/*", "*/*/*")
                for p in path.glob(f"{depth}/*.mtx*")
            }
        )
        hint = f"; name one of the folders in it that have one: {listed(below[:6])}" if below else "; name one"
        packed = sorted(p.name for p in path.iterdir() if re.search(r"\.mtx\.(?:bz2|xz|zst|zip|7z)$", p.name))
        hint = f"; unpack {packed[0]} and what lies beside it, or pack them by gzip" if packed else hint
        raise UserError(f"{path}: a folder with neither matrix.mtx nor a zarr store in it (found: {found}){hint}")
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; check column 'path' of the sample sheet")
    with open(path, "rb") as handle:
        start = handle.read(512)
    if not start:
        raise UserError(f"{path}: an empty file (0 bytes); fetch it again")
    if text.zipped(path):
        with gzip.open(path) as handle:
            start = handle.read(512)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    for magic, what in OF_OTHERS:
        if start.startswith(magic):
            raise UserError(f"{path}: {what}")
    if start[:8] == HDF5:
        if text.zipped(path):
            raise UserError(f"{path}: an HDF5 file that was gzipped; gunzip it first")
        if suffix in TEXT_NAMES:
            raise UserError(f"{path}: named {suffix}, but it is an HDF5 file; give it its own name (.h5ad, .h5, .loom)")
        return hdf5.hdf5_format(path)
    checks.check_utf16(start, path)
    if start.startswith(b"PK\x03\x04") and _is_workbook(path):
        raise UserError(
            f"{path}: an Excel workbook; save the sheet with the counts as CSV, or better: take the original file"
        )
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: a zip archive; unpack it")
    if start[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; unpack it, and name the folder or file inside")
    if suffix in HDF5_NAMES:
        raise UserError(
            f"{path}: named {suffix}, but it is not an HDF5 file (it starts with {start[:12]!r}); rename it"
        )
    if start.startswith(b"%%MatrixMarket"):
        return "10x mtx", text.read_mtx
    if suffix == ".mtx":
        raise UserError(f"{path}: named .mtx, but does not start with %%MatrixMarket; fetch it again, or rename it")
    if b"\x00" in start:
        raise UserError(f"{path}: not a format that is read here (it starts with {start[:12]!r}); see config/README.md")
    return "text table", text.read_table


def _is_workbook(path: Path) -> bool:
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return any(name.startswith("xl/") for name in archive.namelist())
    return False


def ingest(path: str | Path, out: str | Path, sample: Sample, config: InputConfig) -> tuple[str, Decisions]:
    """Read one sample and write it in the form that every later step reads (``counts.h5ad``), block by block.

    Parameters
    ----------
    path : the input; see :func:`read_counts`.
    out : AnnData file to write, whole or absent. X : CSR (cells, genes), the smallest unsigned integers; obs : index
        ``{sample}:{barcode}``, columns barcode, sample, batch, the sample sheet's further columns, the input's own
        columns that config names; var : index gene id (unique), column gene_name; uns : sample, gene_ids, organism,
        content_sha256. Temporary files of some 6 bytes a count, 12 where the input is not in the order of cells, lie
        beside it meanwhile.
    sample : its row of the sample sheet.
    config : how to read it.

    Returns
    -------
    digest : what is in uns as content_sha256; see :func:`content_sha256`.
    decisions : what was chosen, dropped and merged.

    Raises
    ------
    UserError
        As :func:`read_counts`; also for unknown, repeated or reserved metadata columns, and for a full disk.
    """
    path = Path(path)
    decisions, of_genes = Decisions("ingest", sample.sample), Decisions("ingest", sample.sample)
    with replacing(out) as temporary, Scratch(temporary.parent) as scratch:
        kind, read = open_input(path, config, decisions, scratch)
        obs = _cell_table(path, read.obs, sample, config)
        ids, names, id_kind = identity.gene_identity(read.var, config, str(path), of_genes)
        to, ids, names = identity.merge_genes(ids, names, of_genes)
        spool, entries, left, totals = Spool(scratch), 0, 0, []
        of_gene = np.zeros(len(ids), np.int64)
        for block in progress(read.blocks, "ingest: cells read", read.shape[0], lambda block: block.shape[0]):
            taken = take_columns(block, to, len(ids))
            spool.add(taken)
            of_gene += np.bincount(taken.indices, taken.data, len(ids)).astype(np.int64)
            totals.append(np.asarray(block.sum(axis=1, dtype=np.int64)).ravel())
            entries, left = entries + block.nnz, left + taken.nnz
        _told(path, kind, read.shape, entries, read.field, decisions)
        total = np.concatenate(totals)
        if len(total) > 10 and total.min() >= 0.999 * total.max():
            text = f"all cells have the same total, so these are hardly counts; {read.field.remedy}"
            decisions.add("equal_totals", int(total.max()), text, n_cells=len(total), warn=True)
        empty = int((total == 0).sum())
        if empty > 0.01 * len(total) and any(d.what == "layer" for d in decisions):
            text = "cells have no count in the layer that was taken; if another holds them, set input.layer"
            decisions.add("cells_without_counts", empty, text, n_cells=empty, warn=True)
        if not identity.looks_like_genes(names) and not identity.looks_like_barcodes(obs["barcode"].to_numpy(object)):
            _look_at_sums(total, of_gene, decisions)
        decisions.extend(of_genes)  # told after the format, which counts the entries
        if not left:
            raise UserError(f"{path}: no counts left after genes without a name were dropped; name the genes")
        organism = identity.guess_organism(ids, names)
        decisions.add("organism", organism, "guessed from gene ids and how symbols are written")
        var = pd.DataFrame({"gene_name": names}, index=pd.Index(ids, name="gene_id"))
        uns = {"sample": sample.sample, "gene_ids": id_kind, "organism": organism}
        digest = write_counts(temporary, obs, var, uns, spool)
    return digest, decisions


def _look_at_sums(of_cells: np.ndarray, of_genes: np.ndarray, decisions: Decisions) -> None:
    """Warn of what may be a turned matrix, where names say nothing: sums of genes are the more uneven ones."""

    def uneven(sums: np.ndarray) -> float:  # Gini's coefficient: 0 where all are equal, 1 where one has it all
        ranks = np.arange(1, len(sums) + 1)
        return float(2 * (ranks * np.sort(sums)).sum() / (len(sums) * max(1, sums.sum())) - (len(sums) + 1) / len(sums))

    cells, genes = uneven(of_cells.astype(float)), uneven(of_genes.astype(float))
    if min(len(of_cells), len(of_genes)) > 10 and cells > genes + 0.2:
        text = (
            f"totals of cells are more uneven (Gini {cells:.2f}, {np.mean(of_cells == 0):.0%} zero) than of genes "
            f"({genes:.2f}, {np.mean(of_genes == 0):.0%} zero), which is the other way round in most samples: are "
            "these cells? else see input.orientation"
        )
        decisions.add("turned?", round(cells - genes, 3), text, n_cells=len(of_cells), warn=True)


def _cell_table(path: Path, given: pd.DataFrame, sample: Sample, config: InputConfig) -> pd.DataFrame:
    """The cell table that is written, from the input's own, indexed by barcode."""
    barcodes = given.index.to_numpy(object)
    of_cell = {
        "sample": _levels(path, given, config.sample_column) if config.sample_column else [sample.sample] * len(given),
        "batch": _levels(path, given, config.batch_column) if config.batch_column else [sample.batch] * len(given),
        **{column: [value] * len(given) for column, value in sample.metadata.items()},
    }
    names = [f"{name}:{barcode}" for name, barcode in zip(of_cell["sample"], barcodes, strict=True)]
    obs = pd.DataFrame({"barcode": barcodes}, index=pd.Index(names, name="cell_id"))
    for column, values in of_cell.items():
        if column in sample.metadata and (is_reserved(column) or same_column(column, ("sample", "batch"))):
            raise UserError(f"sample sheet: column {column!r} is one that scvi-core writes itself; rename it")
        levels = sorted(set(values))
        obs[column] = pd.Categorical(values, categories=pd.Index(levels, dtype=object))
    for column in config.metadata:
        if is_reserved(column) or same_column(column, obs.columns):
            raise UserError(
                f"{path}: input.metadata names {column!r}, a column that scvi-core or the sample sheet writes itself "
                "(case is ignored); rename it in the file, or leave it out"
            )
        obs[column] = _clean_column(given[column], obs.index)
    return obs


def _clean_column(column: pd.Series, index: pd.Index) -> pd.Series:
    """A cell column as one plain type: booleans, integers, floats, else categories in sorted order."""
    missing = column.isna().to_numpy()
    kind = getattr(column.dtype, "kind", "O")
    if isinstance(column.dtype, pd.CategoricalDtype):
        kind = "O"
    if kind == "b" and not missing.any():
        return pd.Series(column.to_numpy(bool), index)
    if kind in "iu" and not missing.any() and column.max() < 2**63:
        return pd.Series(column.to_numpy(np.int64), index)
    if kind in "iuf":
        return pd.Series(column.astype(object).where(~missing, np.nan).to_numpy(np.float64), index)
    text = as_text(column)
    levels = sorted(set(text[~missing]))
    codes = np.where(missing, -1, np.searchsorted(np.array(levels, object), text) if levels else -1)
    return pd.Series(pd.Categorical.from_codes(codes, pd.Index(levels, dtype=object)), index)
