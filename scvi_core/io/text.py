"""Readers of text: 10x ``mtx`` folders, CSV and TSV tables; see :func:`scvi_core.io.read_counts`."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks, identity
from scvi_core.io.checks import FIND_COUNTS, Read, listed
from scvi_core.io.identity import as_text, gene_expression_only


def matrices(folder: Path) -> list[Path]:
    """The ``matrix.mtx`` files of a folder, zipped or not, with or without something in front of the name."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(r".*matrix\.mtx(\.gz)?", p.name))


def read_mtx(path: Path, config: InputConfig, decisions: Decisions) -> Read:
    """Matrix Market with the barcodes and features beside it, as 10x and STARsolo write them; folder or matrix."""
    found = matrices(path) if path.is_dir() else [path]
    if len(found) > 1:
        raise UserError(f"{path}: several matrices ({listed(m.name for m in found)}); name one of them as path")
    matrix = found[0]
    barcodes = _beside(matrix, ("barcodes",))[0].to_numpy()
    features = _beside(matrix, ("features", "genes"))
    rows, columns, entries, _, field, symmetry = scipy.io.mminfo(matrix)
    if field not in ("integer", "real", "unsigned-integer") or symmetry != "general":
        raise UserError(f"{matrix}: a {symmetry} matrix of type {field}; counts are general, integer or real")
    checks.check_size(entries, matrix.stat().st_size, str(matrix))
    if (rows, columns) == (len(features), len(barcodes)):
        as_cells = False
    elif (columns, rows) == (len(features), len(barcodes)):
        as_cells = True
        decisions.add("orientation", "cells_as_rows", "the matrix has as many rows as there are barcodes")
    else:
        raise UserError(
            f"{matrix}: {rows:,} x {columns:,}, but there are {len(features):,} features and {len(barcodes):,} "
            "barcodes; the three files are not of one export"
        )
    read = scipy.io.mmread(matrix)
    if sp.issparse(read):
        read = sp.coo_matrix(
            (checks.pack_counts(read.data, str(matrix), FIND_COUNTS), (read.row, read.col)), read.shape
        )
    else:
        read = checks.dense_counts(read, str(matrix), FIND_COUNTS)
    counts = (read if as_cells else read.T).tocsr()
    if counts.nnz != read.nnz:
        raise UserError(f"{matrix}: {read.nnz - counts.nnz:,} entries are stored twice; {checks.DAMAGED}")
    var = pd.DataFrame({"gene_ids": features[0].to_numpy()}, index=features[1 if 1 in features else 0].to_numpy())
    if 2 in features:
        var["feature_type"] = features[2].to_numpy()
    return gene_expression_only(
        checks.canonical(counts, str(matrix)), pd.DataFrame(index=barcodes), var, path, decisions
    )


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


def read_table(path: Path, config: InputConfig, decisions: Decisions) -> Read:
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
    parts, rows = [], []
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
        chunksize=max(1, checks.BLOCK // len(names)),
    )
    for chunk in reading:
        for column, kind in enumerate(chunk.dtypes):
            if kind.kind not in "iuf":
                values = chunk.iloc[:, column]
                bad = next((v for v in values if pd.isna(pd.to_numeric(v, errors="coerce"))), values.iloc[0])
                at = columns[column] if column < len(columns) else column + 1
                raise UserError(f"{path}: column {at!r} has {bad!r}, not a number; keep names and counts only")
        parts.append(checks.dense_counts(chunk.to_numpy(), str(path), FIND_COUNTS))
        rows.extend(as_text(chunk.index))
        if parts[-1].shape[1] != len(columns):
            raise UserError(f"{path}: {len(columns):,} names in the header, {parts[-1].shape[1]:,} values in a row")
    counts = checks.stacked(parts, len(columns), str(path))
    genes, cells = np.array(rows, object), columns
    as_cells = config.orientation == "cells_as_rows"
    if as_cells:
        genes, cells = cells, genes
    else:
        counts = checks.canonical(counts.T.tocsr(), str(path))
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
    return counts, pd.DataFrame(index=cells), pd.DataFrame(index=genes)
