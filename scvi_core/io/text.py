"""Readers of text: 10x ``mtx`` folders, CSV and TSV tables; see :func:`scvi_core.io.read_counts`."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks, identity
from scvi_core.io.blocks import Read, Scratch, Spool, by_cell, by_row, turned
from scvi_core.io.checks import FIND_COUNTS, listed
from scvi_core.io.identity import as_text, gene_expression_only


def matrices(folder: Path) -> list[Path]:
    """The ``matrix.mtx`` files of a folder, zipped or not, with or without something in front of the name."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(r".*matrix\.mtx(\.gz)?", p.name))


def read_mtx(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """Matrix Market with the barcodes and features beside it, as 10x and STARsolo write them; folder or matrix."""
    found = matrices(path) if path.is_dir() else [path]
    if len(found) > 1:
        raise UserError(f"{path}: several matrices ({listed(m.name for m in found)}); name one of them as path")
    matrix = found[0]
    barcodes = _beside(matrix, ("barcodes",))[0].to_numpy()
    features = _beside(matrix, ("features", "genes"))
    rows, columns, entries, form, field, symmetry = scipy.io.mminfo(matrix)
    if field not in ("integer", "real", "unsigned-integer") or symmetry != "general":
        raise UserError(f"{matrix}: a {symmetry} matrix of type {field}; counts are general, integer or real")
    checks.check_size(entries, matrix.stat().st_size, str(matrix))
    n_cells, n_genes = len(barcodes), len(features)
    if (rows, columns) == (n_genes, n_cells):
        as_cells = False
    elif (columns, rows) == (n_genes, n_cells):
        as_cells = True
        decisions.add("orientation", "cells_as_rows", "the matrix has as many rows as there are barcodes")
    else:
        raise UserError(
            f"{matrix}: {rows:,} x {columns:,}, but there are {n_genes:,} features and {n_cells:,} "
            "barcodes; the three files are not of one export"
        )
    stripes = (
        by_row(*((row, column) if as_cells else (column, row)), counts, (n_cells, n_genes), str(matrix))
        for row, column, counts in _mtx_entries(matrix, (rows, columns), entries, form, field)
    )
    blocks = by_cell(stripes, n_cells, str(matrix), scratch)
    var = pd.DataFrame({"gene_ids": features[0].to_numpy()}, index=features[1 if 1 in features else 0].to_numpy())
    if 2 in features:
        var["feature_type"] = features[2].to_numpy()
    return gene_expression_only(Read(blocks, (n_cells, n_genes), pd.DataFrame(index=barcodes), var), path, decisions)


def _mtx_entries(
    matrix: Path, shape: tuple[int, int], entries: int, form: str, field: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, columns (from 0) and counts of a Matrix Market file, some lines at a time, given to scipy as a file."""
    lines = seen = 0
    with (gzip.open if zipped(matrix) else open)(matrix, "rb") as handle:
        for line in handle:
            lines += 1
            if line.strip() and not line.startswith(b"%"):  # the sizes, which mminfo has read
                break
        while text := handle.read(8 * checks.BLOCK):
            text += handle.readline()
            n = ends = text.count(b"\n") + (not text.endswith(b"\n"))
            try:
                read = _mtx_lines(text, n, shape, form, field, lines)
            except ValueError:  # are some of them blank? if not, the same is said again
                if not (n := sum(bool(line.strip()) for line in text.splitlines())):
                    continue
                read = _mtx_lines(text, n, shape, form, field, lines)
            if form == "coordinate":
                yield read.row, read.col, checks.pack_counts(read.data, str(matrix), FIND_COUNTS)
            else:  # all values, column by column
                at = np.flatnonzero(read)
                column, row = np.divmod(seen + at, shape[0])
                yield row, column, checks.pack_counts(read.reshape(-1)[at], str(matrix), FIND_COUNTS)
            lines, seen = lines + ends, seen + n
    if seen != entries:
        raise ValueError(
            f"{'truncated' if seen < entries else 'too long'}: {seen:,} entries where {entries:,} are declared"
        )


def _mtx_lines(text: bytes, n: int, shape: tuple[int, int], form: str, field: str, before: int) -> Any:
    """What scipy makes of `n` lines of a Matrix Market file; `before`: how many lines of the file are before them."""
    sizes = f"{shape[0]} {shape[1]} {n}" if form == "coordinate" else f"{n} 1"
    try:
        return scipy.io.mmread(io.BytesIO(f"%%MatrixMarket matrix {form} {field} general\n{sizes}\n".encode() + text))
    except ValueError as error:
        if (found := re.match(r"Line (\d+)", str(error))) is None:
            raise
        raise ValueError(f"Line {int(found[1]) - 2 + before}{str(error)[found.end() :]}") from None


def _beside(matrix: Path, names: tuple[str, ...]) -> pd.DataFrame:
    """The tab-separated table of barcodes or features that lies beside a matrix.mtx; columns are numbered."""
    prefix = re.sub(r"(matrix)?\.mtx(\.gz)?$", "", matrix.name)  # GEO puts the accession in front of all three
    for name in [f"{p}{n}.tsv{gz}" for p in dict.fromkeys((prefix, "")) for n in names for gz in (".gz", "")]:
        path = matrix.with_name(name)
        if path.exists():
            return pd.read_csv(
                path,
                sep="\t",
                header=None,
                dtype=str,
                keep_default_na=False,
                quoting=csv.QUOTE_NONE,
                compression="gzip" if zipped(path) else None,
            )
    files = " or ".join(f"{prefix}{name}.tsv" for name in names)
    raise UserError(f"{matrix}: no {files} (or .gz) beside it; put the export's files together")


def zipped(path: Path) -> bool:
    """Whether a file is gzip data, by its first bytes."""
    with path.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


def read_table(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """A dense table, its delimiter by its name, read some rows at a time."""
    opened = gzip.open if zipped(path) else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as handle:
        first, second = handle.readline(), handle.readline()
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in (".csv", ".tsv", ".tab", ".txt"):
        raise UserError(f"{path}: text, but not named .csv, .tsv or .txt (or with .gz); rename it by its delimiter")
    delimiter = "," if suffix == ".csv" else "\t"
    if suffix == ".txt" and "\t" not in first:
        delimiter = "," if "," in first else " "
    header, row = next(csv.reader([first], delimiter=delimiter)), next(csv.reader([second], delimiter=delimiter), [])
    if not row:
        raise UserError(f"{path}: no row below the header, so no counts; check the export, or leave the sample out")
    if len(header) < 2 and len(row) < 2:
        name = {",": "comma", "\t": "tab", " ": "space"}[delimiter]
        raise UserError(f"{path}: no {name} in its first lines; is another delimiter used? .csv: comma, .tsv: tab")
    names = header if len(row) == len(header) + 1 else header[1:]  # R leaves the corner out
    columns = as_text(np.array(names, object))
    rows: list[str] = []  # known when all is read
    as_cells = config.orientation == "cells_as_rows"
    read = _table_blocks(path, delimiter, columns, rows)
    if as_cells:
        blocks = Spool(scratch)
        for block in read:
            blocks.add(block)
        cells, genes = np.array(rows, object), columns
    else:
        blocks = by_cell(turned(read), len(columns), str(path), scratch)
        cells, genes = columns, np.array(rows, object)
    if (identity.looks_like_genes(cells) and not identity.looks_like_genes(genes)) or (
        identity.looks_like_barcodes(genes) and not identity.looks_like_barcodes(cells)
    ):
        other = "genes_as_rows" if as_cells else "cells_as_rows"
        raise UserError(
            f"{path}: with input.orientation {config.orientation} the cells would be {cells[0]!r}... and the genes "
            f"{genes[0]!r}...; set input.orientation to {other}"
        )
    example = f"cells such as {cells[0]}, genes such as {genes[0]}" if len(cells) and len(genes) else "no values"
    decisions.add("orientation", config.orientation, f"as configured: {example}")
    return Read(blocks, (len(cells), len(genes)), pd.DataFrame(index=cells), pd.DataFrame(index=genes))


def _table_blocks(path: Path, delimiter: str, columns: np.ndarray, rows: list[str]) -> Iterator[sp.csr_matrix]:
    """Counts of a table below its header, some rows at a time; their names are added to `rows`."""
    reading = pd.read_csv(
        path,
        sep=delimiter,
        header=None,
        skiprows=1,
        index_col=0,
        dtype={0: str},
        na_values=[""],  # "NA" stays text: as a gene's name it is one, as a count it is none
        keep_default_na=False,
        encoding="utf-8-sig",
        compression="gzip" if zipped(path) else None,
        chunksize=max(1, checks.BLOCK // max(1, len(columns))),
    )
    for chunk in reading:
        for column, kind in enumerate(chunk.dtypes):
            if kind.kind not in "iuf":
                values = chunk.iloc[:, column]
                bad = next((v for v in values if pd.isna(pd.to_numeric(v, errors="coerce"))), values.iloc[0])
                at = columns[column] if column < len(columns) else column + 1
                raise UserError(f"{path}: column {at!r} has {bad!r}, not a number; keep names and counts only")
        if chunk.shape[1] != len(columns):
            raise UserError(f"{path}: {len(columns):,} names in the header, {chunk.shape[1]:,} values in a row")
        rows.extend(as_text(chunk.index))
        yield checks.dense_counts(chunk.to_numpy(), str(path), FIND_COUNTS)
