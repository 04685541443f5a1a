"""Readers of text: matrix market files as pipelines write them, CSV and TSV; see :func:`scvi_core.io.read_counts`."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks, identity
from scvi_core.io.blocks import Read, Scratch, Spool, by_cell, by_row, turned
from scvi_core.io.checks import Field, listed
from scvi_core.io.identity import ID_COLUMNS, SYMBOL_COLUMNS, TYPE_COLUMNS, as_text

MOST_TEXT = 2**28  # bytes of a table of barcodes or features: over ten million
MOST_LINE = 2**27  # bytes of a line: names of some million cells
MOST_SEEN = 2**30  # bytes that any file may have, however small it is packed
EXPANDS = 200  # times its size that a file of over 2^30 bytes is: gzip packs counts to a twentieth, nothing to a 1032nd

# A matrix' name, and what the tables beside it are called then: by 10x, STARsolo, BD Rhapsody and GEO; by kb, also of
# RNA velocity; by alevin-fry; by Parse's split-pipe; by GEO, by the Single Cell Expression Atlas; and otherwise.
LAYOUTS = (
    (r"(?P<before>.*)matrix(?P<after>[^/]*)\.mtx", "{before}barcodes{after}",
     ("{before}features{after}", "{before}genes{after}")),
    (r"(?P<before>cells_x_[a-z]+)(?P<after>\.[a-z]+)?\.mtx", "{before}.barcodes", ("{before}.genes",)),
    (r"(?P<before>spliced|unspliced)(?P<after>)\.mtx", "{before}.barcodes", ("{before}.genes",)),
    (r"(?P<before>.*)quants_mat(?P<after>)\.mtx", "{before}quants_mat_rows", ("{before}quants_mat_cols",)),
    (r"(?P<before>.*)(?:DGE|count_matrix)(?P<after>[^/]*)\.mtx", "{before}cell_metadata",
     ("{before}all_genes", "{before}genes")),
    (r"(?P<before>.*[_.-])counts?(?P<after>)\.mtx", "{before}barcodes", ("{before}features", "{before}genes")),
    (r"(?P<before>.*[_.-]counts?)(?P<after>)\.mtx", "{before}.mtx_cols", ("{before}.mtx_rows",)),
    (r"(?P<before>)[^/]*(?P<after>)\.mtx", "barcodes", ("features", "genes")),
)  # fmt: skip
BY_CELLS = "|".join(re.sub(r"[?]P<[a-z]+>", "?:", pattern) for pattern, _, _ in LAYOUTS[1:5])  # cells are rows there
VELOCITY = re.compile(r"(?:spliced|unspliced|ambiguous)\.mtx|cells_x_genes\.(?!mtx|total)")  # part of what was counted
BARCODE_COLUMNS = ("bc_wells", "cell_barcode", "barcode", "barcodes", "cell_id", "cell", "cells")
# in the first line of a table that should have none
HEADER = {"", "x", "0", "feature", "features", "names", *ID_COLUMNS, *SYMBOL_COLUMNS, *BARCODE_COLUMNS}
# columns of tables that hold no counts: of featureCounts, of genes, of cells
ANNOTATION = {  # as `plain` writes them
    "chr", "chrom", "chromosome", "start", "end", "strand", "length", "width", "description", "gene_description",
    "gene_type", "gene_biotype", "biotype", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol",
    "gene_id", "gene_ids", "geneid", "ensembl_id", "genename", "sum", "mean", "cluster", "clusters",
    "seurat_clusters", "assigned_cluster", "louvain", "leiden", "cell_type", "celltype", "cell_ontology_class",
    "orig_ident", "sample", "sample_id", "donor", "donor_id", "batch", "condition", "barcode", "tissue",
}  # fmt: skip
SUMS = re.compile(
    r"n_?(?:counts?|features?|genes?|umis?|reads)(?:_\w+)?|(?:percent|pct|total)_[a-z]\w*|percent|total"
    r"|\w+_snn_res_.*|unnamed_?:_?\d*|entrez\w*|gene_?len\w*"
)  # and of kinds that have many names: Seurat's, scanpy's, and pandas' of a column without one


def _is_annotation(name: str) -> bool:
    return identity.plain(name) in ANNOTATION or SUMS.fullmatch(identity.plain(name)) is not None


def matrices(folder: Path) -> list[Path]:
    """The matrix market files of a folder that bear a name that some pipeline gives."""
    named = re.compile("|".join(f"(?:{re.sub(r'[?]P<[a-z]+>', '?:', pattern)})" for pattern, _, _ in LAYOUTS[:-1]))
    return sorted(p for p in folder.iterdir() if named.fullmatch(p.name.removesuffix(".gz")))


def read_mtx(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """Matrix Market with the barcodes and features beside it, as pipelines write them; folder or matrix."""
    found = matrices(path) if path.is_dir() else [path]
    if len(found) > 1:
        which = "name one of them as path"
        if VELOCITY.match(found[0].name):
            which = "take the export of all molecules (STARsolo's Gene or GeneFull, kb's total), or " + which
        raise UserError(f"{path}: several matrices ({listed(m.name for m in found)}); {which}")
    matrix = found[0]
    if VELOCITY.match(matrix.name):
        text = "counts of some molecules only, as RNA velocity needs them; is there a matrix of all of them?"
        decisions.add("molecules", matrix.name.partition(".")[0], text, warn=True)
    if path.is_dir():
        checks.check_links(path)
    remedy = checks.FIND_COUNTS
    whole = next(
        (matrix.with_name(n) for n in ("matrix.mtx", "matrix.mtx.gz") if matrix.with_name(n).is_file()), matrix
    )
    if whole != matrix:
        remedy = f"take {whole.name} beside it, which has the counts"
    field = Field(str(matrix), remedy)
    head = _mtx_head(matrix)
    checks.check_size(head.entries, matrix.stat().st_size, str(matrix))
    cells, genes = _tables_beside(matrix, decisions)
    cells, genes, as_cells = _fitting(matrix, head, cells, genes, decisions)
    n_cells, n_genes = len(cells), len(genes)
    stripes = (
        by_row(*((row, column) if as_cells else (column, row)), counts, (n_cells, n_genes), str(matrix))
        for row, column, counts in _mtx_entries(matrix, head, field)
    )
    blocks = by_cell(stripes, n_cells, str(matrix), scratch)
    obs = pd.DataFrame(index=as_text(np.array([row[0] if row else "" for row in cells], object)))
    return Read(blocks, (n_cells, n_genes), obs, _gene_table(genes), field)


@dataclasses.dataclass(frozen=True)
class _Head:
    """What a Matrix Market file says in front of its entries; `lines` of it are read."""

    rows: int
    columns: int
    entries: int
    dense: bool
    lines: int


def _mtx_head(matrix: Path) -> _Head:
    lines, sizes = 0, b""
    with _open(matrix) as handle:
        banner = handle.readline(1024).decode("ascii", "replace").lower().split()
        while not sizes.strip() or sizes.startswith(b"%"):
            lines += 1
            sizes = handle.readline(2**16)
            if not sizes:
                raise UserError(f"{matrix}: truncated before its line of sizes; fetch it again")
    form, field, symmetry = (*banner[2:5], *3 * [""])[:3]
    if (
        banner[:2] != ["%%matrixmarket", "matrix"]
        or form not in ("coordinate", "array")
        or field not in ("integer", "unsigned-integer", "real", "double", "float")
        or symmetry != "general"
    ):
        raise UserError(
            f"{matrix}: a matrix of type {' '.join(banner[1:5]) or 'unknown'}; counts are general, integer or real"
        )
    try:
        told = [float(token) for token in sizes.split()]  # R writes 1e+05
        if len(told) != (3 if form == "coordinate" else 2) or any(n < 0 or n != int(n) for n in told):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"{matrix}: its sizes are {sizes.strip()[:80]!r}, not whole numbers; fetch it again") from None
    rows, columns, *entries = (int(n) for n in told)
    return _Head(rows, columns, entries[0] if entries else rows * columns, form == "array", lines + 1)


def _mtx_entries(matrix: Path, head: _Head, field: Field) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, columns (from 0) and counts of a Matrix Market file, some lines at a time."""
    seen, lines = 0, head.lines
    with _open(matrix) as handle:
        for _ in range(head.lines):
            handle.readline(2**16)
        for text in _line_blocks(handle, matrix, 8):
            *places, values = _mtx_columns(text, 1 if head.dense else 3, matrix, lines)
            lines += text.count(b"\n")
            if not len(values):
                continue
            if head.dense:  # all values, column by column
                at = np.flatnonzero(values)
                column, row = np.divmod(seen + at, head.rows)
                yield row, column, checks.pack_counts(values[at], field)
            else:
                row, column = places
                outside = (row < 0) | (column < 0) | (row >= head.rows) | (column >= head.columns)
                if outside.any():
                    filled = [i for i, line in enumerate(text.splitlines()) if line.strip()]
                    at = lines - text.count(b"\n") + filled[int(outside.argmax())] + 1
                    raise UserError(
                        f"{matrix}: Line {at}: its row or column lies outside of {head.rows:,} x {head.columns:,} "
                        "(counted from 1); fetch it again"
                    )
                yield row, column, checks.pack_counts(values, field)
            seen += len(values)
    if seen != head.entries:
        raise ValueError(
            f"{'truncated' if seen < head.entries else 'too long'}: {seen:,} entries, {head.entries:,} are declared"
        )


def _mtx_columns(text: bytes, per_line: int, matrix: Path, before: int) -> list[np.ndarray]:
    """The numbers of whole lines of text by column, each token parsed whole; places from 0.

    scipy's parser is the fastest, but stops in silence where a token has a character that it does not expect, and at
    what follows the third one: it sees digits only, three numbers a line. pandas' is strict.
    """
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    if _tokens(text) == per_line * lines:
        try:
            if per_line == 3 and not text.translate(None, b"0123456789 \t\r\n"):
                sizes = f"{2**31 - 1} {2**31 - 1} {lines}\n"  # whether places lie within is looked at by who asks
                head = f"%%MatrixMarket matrix coordinate integer general\n{sizes}"
                end = b"" if text.endswith(b"\n") else b"\n"  # else it looks for one beyond the end of the text
                read = scipy.io.mmread(io.BytesIO(head.encode() + text + end))
                return [read.row, read.col, read.data]
            options = {"sep": r"\s+", "header": None, "names": range(per_line), "index_col": False, "na_filter": False}
            table = pd.read_csv(io.BytesIO(text), dtype=np.float64, **options)
            if len(table) == lines:
                return _placed([table[i].to_numpy() for i in range(per_line)], matrix)
        except (ValueError, OverflowError):
            pass  # said below, with its line
    rows = []
    for number, line in enumerate(text.splitlines(), before + 1):
        fields = line.split()
        if not fields:
            continue
        try:
            if per_line == 3 and len(fields) == 5 and number < before + 10:
                raise UserError(
                    f"{matrix}: Line {number}: three counts an entry, as STARsolo writes spliced, unspliced and "
                    "ambiguous ones (Velocyto); take its folder Gene or GeneFull"
                )
            if len(fields) != per_line:
                raise ValueError
            rows.append([float(token) for token in fields])
        except ValueError:
            raise UserError(
                f"{matrix}: Line {number}: {line[:80].decode('utf-8', 'replace')!r} is not {per_line} number"
                f"{'s' * (per_line > 1)}; write it again, with a point for decimals"
            ) from None
    return _placed(list(np.array(rows, np.float64).reshape(-1, per_line).T), matrix)


def _placed(columns: list[np.ndarray], matrix: Path) -> list[np.ndarray]:
    """Columns of floats, of which all but the last are places that count from 1."""
    for i, places in enumerate(columns[:-1]):
        if (places != np.floor(places)).any():
            raise UserError(f"{matrix}: an entry's row or column is no whole number; fetch it again")
        columns[i] = (
            places.astype(np.int32) - 1 if len(places) and places.max() < 2**31 else places.astype(np.int64) - 1
        )
    return columns


def _tokens(text: bytes) -> int:
    """How many stretches without white space there are."""
    inside = np.frombuffer(text, np.uint8) > 32
    return int(np.count_nonzero(inside[1:] & ~inside[:-1])) + bool(len(inside) and inside[0])


def _tables_beside(matrix: Path, decisions: Decisions) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the tables of barcodes and of features that lie beside a matrix."""
    name = matrix.name.removesuffix(".gz")
    tried: dict[str, list[str]] = {"barcodes": [], "features": []}
    tables: dict[str, list[list[str]]] = {}
    for pattern, barcodes, features in LAYOUTS:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        parts = {key: value or "" for key, value in match.groupdict().items()}
        for kind, names in (("barcodes", (barcodes,)), ("features", features)):
            # the names of 10x may also lie there without what GEO puts around them
            for stems in ([n.format(**parts) for n in names], [n.format(before="", after="") for n in names]):
                tried[kind] += stems
                there = [
                    path
                    for stem in stems
                    for end in (("",) if ".mtx_" in stem else (".tsv", ".txt", ".csv"))
                    for path in (matrix.with_name(f"{stem}{end}.gz"), matrix.with_name(f"{stem}{end}"))
                    if path.is_file()
                ]
                if there and kind not in tables:
                    tables[kind] = _rows(there[0], decisions)
                    for other in there[1:]:
                        if [row[:2] for row in _rows(other, decisions)] != [row[:2] for row in tables[kind]]:
                            raise UserError(
                                f"{matrix}: {there[0].name} and {other.name} beside it differ; take out the wrong one"
                            )
    if "features" not in tables:  # GEO has one for a whole series
        series = [p for p in matrix.parent.iterdir() if re.fullmatch(r".*(features|genes).*\.tsv(\.gz)?", p.name)]
        if len(series) == 1:
            decisions.add("features", series[0].name, "the only table of features in the folder")
            tables["features"] = _rows(series[0], decisions)
    symbols = matrix.with_name(f"{re.split(r'[.]', name)[0]}.genes.names.txt")  # of kb, the ids in the other table
    if "features" in tables and symbols.is_file() and all(len(row) == 1 for row in tables["features"]):
        names = _rows(symbols, decisions)
        if len(names) != len(tables["features"]):
            raise UserError(
                f"{symbols}: {len(names):,} names, but {len(tables['features']):,} genes in the table beside it; put "
                "one export's files together"
            )
        rows = zip(tables["features"], names, strict=True)
        tables["features"] = [[*gene, name[0].removeprefix("nan")] for gene, name in rows]
    for kind in ("barcodes", "features"):
        if kind not in tables:
            stems = dict.fromkeys(tried[kind])
            names = " or ".join(stem if ".mtx_" in stem else f"{stem}.tsv" for stem in stems)
            raise UserError(f"{matrix}: no {names} (or .gz) beside it; put the export's files together")
    return tables["barcodes"], tables["features"]


def _rows(path: Path, decisions: Decisions) -> list[list[str]]:
    """The fields of a small table's lines, without the quotes and the numbers that R puts around and before them."""
    with checks.one_line(path), _open(path) as handle:
        content = handle.read(MOST_TEXT)
        if len(content) == MOST_TEXT:
            raise UserError(f"{path}: over {MOST_TEXT:,} bytes of text where names are expected; fetch it again")
        checks.check_utf16(content, path)
        text = content.decode("utf-8-sig")
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line]
    if not lines:
        raise UserError(f"{path}: an empty file; fetch it again")
    table = path.name.removesuffix(".gz").endswith(".csv")
    rows = list(csv.reader(lines)) if table else [line.split("\t") for line in lines]
    other = next((mark for mark in ";, " if all(mark in line and "\t" not in line for line in lines)), None)
    if not table and other and identity.ENSEMBL.match(lines[-1]):
        raise UserError(f"{path}: its columns are separated by {other!r}; write it with tabs, as its name says")
    quoted = sum(line[0] == line[-1] and line[0] in "\"'" and len(line) > 1 for line in lines)
    if not table and quoted >= 0.9 * len(lines):
        decisions.add("quotes", path.name, "its lines or fields are in quotes, which were taken off")
        rows = [[field.strip("\"'") for field in row] for row in rows]
    shift = 0 if rows[0][0] in ("0", "1") and len(rows[0]) > 1 else 1  # a header has no number
    body = rows[shift:]
    if body and min(map(len, body)) > 1 and all(row[0].isdecimal() for row in body):
        distinct = {row[1] for row in body if not row[1].isdecimal()}  # rows may have been taken out since
        first = int(body[0][0])
        rising = first < 2 and all(row[0] == str(first + i) for i, row in enumerate(body))
        if rising or len(distinct) > 0.9 * len(body):
            decisions.add("row_numbers", path.name, "its lines are numbered, and the numbers were left out")
            rows = [row[1:] if len(row) == len(body[0]) else row for row in rows]
    return rows


def _fitting(
    matrix: Path, head: _Head, cells: list[list[str]], genes: list[list[str]], decisions: Decisions
) -> tuple[list[list[str]], list[list[str]], bool]:
    """Barcodes and features as many as the matrix has, without the headers that some have; whether cells are rows."""

    def headed(rows: list[list[str]]) -> bool:
        names = [identity.plain(field.strip("\"'")) for field in rows[0]]
        if any(name in HEADER or re.fullmatch(r"v\d+", name) for name in names):  # R calls columns V1, V2 ...
            return True
        first, *rest = (row[0] if row else "" for row in rows)
        return any(
            not like.fullmatch(first) and sum(like.fullmatch(name) is not None for name in rest) > 0.9 * len(rest)
            for like in (identity.BARCODE, identity.ENSEMBL)
        )

    for c in range(1 + headed(cells)):
        for g in range(1 + headed(genes)):
            shape = (len(genes) - g, len(cells) - c)
            if shape in ((head.rows, head.columns), (head.columns, head.rows)):
                if c or g:
                    which = " and ".join(["barcodes"] * c + ["features"] * g)
                    decisions.add("headers", c + g, f"{which}: the first line is a header, and was left out")
                of_cells = re.fullmatch(BY_CELLS, matrix.name.removesuffix(".gz")) is not None
                as_cells = of_cells if head.rows == head.columns else shape != (head.rows, head.columns)
                if as_cells:
                    decisions.add("orientation", "cells_as_rows", "the matrix has as many rows as there are barcodes")
                cells = _by_header(cells, (BARCODE_COLUMNS,)) if c else cells
                genes = _by_header(genes, (ID_COLUMNS, SYMBOL_COLUMNS, TYPE_COLUMNS)) if g else genes
                return cells, genes, as_cells
    raise UserError(
        f"{matrix}: {head.rows:,} x {head.columns:,}, but there are {len(genes):,} features and {len(cells):,} "
        "barcodes; the three files are not of one export"
    )


def _by_header(rows: list[list[str]], kinds: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """The rows below a header, of which the columns that it calls by known names are taken, if there is the first."""
    names = [identity.plain(name) for name in rows[0]]
    found = [next((names.index(known) for known in kind if known in names), None) for kind in kinds]
    if found[:2] == [None] * len(found[:2]):
        return rows[1:]
    first = next(at for at in found if at is not None)  # a table of names alone is one of ids, too
    taken = [first if at is None else at for at in found[:2]] + [at for at in found[2:] if at is not None]
    return [[row[at] if at < len(row) else "" for at in taken] for row in rows[1:]]


def _gene_table(rows: list[list[str]]) -> pd.DataFrame:
    """Features as a gene table: ids, names and kinds, in 10x's order of columns."""
    width = max(map(len, rows), default=0)
    columns = [
        as_text(np.array([row[i] if i < len(row) else "" for row in rows], object)) for i in range(min(width, 3))
    ]
    if not columns:
        return pd.DataFrame()
    var = pd.DataFrame({"gene_ids": columns[0]}, index=columns[1 if len(columns) > 1 else 0])
    if len(columns) > 2:
        var["feature_type"] = columns[2]
    return var


def zipped(path: Path) -> bool:
    """Whether a file is gzip data, by its first bytes."""
    with path.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


class _Bounded(io.BufferedIOBase):
    """Reads as a file does, until it turns out to hold far more than is stored of it: packed zeros, and holes."""

    def __init__(self, path: Path):
        self.path, self.seen = path, 0
        self.file = gzip.open(path, "rb") if zipped(path) else path.open("rb")  # noqa: SIM115 - closed by close()
        self.most = max(MOST_SEEN, EXPANDS * _stored(path))

    def _told(self, data: bytes) -> bytes:
        self.seen += len(data)
        if self.seen > self.most:
            raise UserError(
                f"{self.path}: unpacks to over {EXPANDS} times its size, {self.most:,} bytes; {checks.DAMAGED} (of a "
                "table that is nearly all zeros: write it as h5ad or mtx)"
            )
        return data

    def read(self, size: int | None = -1) -> bytes:
        return self._told(self.file.read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._told(self.file.readline(size))

    def close(self) -> None:
        self.file.close()
        super().close()


def _stored(path: Path) -> int:
    """Bytes of a file without its holes, as far as the file system tells them."""
    with path.open("rb") as handle:
        at, held, size = 0, 0, handle.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError, AttributeError):  # no data behind here; nobody tells of holes
            while at < size:
                start = os.lseek(handle.fileno(), at, os.SEEK_DATA)
                at = os.lseek(handle.fileno(), start, os.SEEK_HOLE)
                held += at - start
    return held or size


def _open(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where its content (not its name) says that it is packed."""
    if not path.is_file():
        raise UserError(f"{path}: not a file; put the export's files together")
    return cast(BinaryIO, _Bounded(path))


def _line_blocks(handle: BinaryIO, path: Path, per_value: int) -> Iterator[bytes]:
    """Whole lines of a file, as many at a time as have about ``checks.BLOCK`` values of so many bytes."""
    while text := handle.read(per_value * checks.BLOCK):
        rest = handle.readline(MOST_LINE)
        if len(rest) == MOST_LINE:
            raise UserError(f"{path}: a line of over {MOST_LINE:,} bytes; {checks.DAMAGED}")
        yield text + rest


def read_table(path: Path, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
    """A dense table, its delimiter by its name, read some rows at a time."""
    with _open(path) as handle:
        skip, first = 0, handle.readline(MOST_LINE)
        second = handle.readline(MOST_LINE)
        tab = b"\t" if b"\t" in second else b","
        # BD Rhapsody, featureCounts and Drop-seq's tools write what they did in front
        while first.startswith(b"#") and (second.startswith(b"#") or first.count(tab) < second.count(tab)):
            skip, first, second = skip + 1, second, handle.readline(MOST_LINE)
            tab = b"\t" if b"\t" in second else b","
        if MOST_LINE in (len(first), len(second)):
            raise UserError(f"{path}: a line of over {MOST_LINE:,} bytes; {checks.DAMAGED}")
        first, second = first.decode("utf-8-sig"), second.decode("utf-8")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in (".csv", ".tsv", ".tab", ".txt"):
        raise UserError(f"{path}: text, but not named .csv, .tsv or .txt (or with .gz); rename it by its delimiter")
    delimiter = "," if suffix == ".csv" else "\t"
    if suffix == ".txt" and "\t" not in first:
        delimiter = "," if "," in first else " "
    header, row = next(csv.reader([first], delimiter=delimiter)), next(csv.reader([second], delimiter=delimiter), [])
    if len(header) < 2 and ";" in first:
        raise UserError(
            f"{path}: its columns are separated by semicolons, as spreadsheets of some languages write them; save it "
            "with commas, or tabs (.tsv), and a point for decimals"
        )
    if not row:
        raise UserError(f"{path}: no row below the header, so no counts; check the export, or leave the sample out")
    if len(header) < 2 and len(row) < 2:
        name = {",": "comma", "\t": "tab", " ": "space"}[delimiter]
        raise UserError(f"{path}: no {name} in its first lines; is another delimiter used? .csv: comma, .tsv: tab")
    no_corner = len(row) == len(header) + 1 and row[-1] != ""  # as R writes tables
    names = as_text(np.array(header if no_corner else header[1:], object))
    beside = np.flatnonzero([not name or _is_annotation(name) for name in names])
    table = _Table(path, delimiter, skip + 1, names, beside, Field(str(path)))
    return table.read(config, decisions, scratch)


@dataclasses.dataclass
class _Table:
    """A dense table on disk: what is in its columns, and, as it is read, what its rows are called.

    Attributes
    ----------
    before : lines in front of the values.
    names : (columns,) of the header, but for that of the rows' names.
    beside : which columns hold no counts.
    rows, sums, annotation : the rows' names, those of rows without counts, and the columns beside, as they are read.
    """

    path: Path
    delimiter: str
    before: int
    names: np.ndarray
    beside: np.ndarray
    field: Field
    rows: list[str] = dataclasses.field(default_factory=list)
    sums: list[str] = dataclasses.field(default_factory=list)
    annotation: list[pd.DataFrame] = dataclasses.field(default_factory=list)

    def read(self, config: InputConfig, decisions: Decisions, scratch: Scratch) -> Read:
        columns = np.delete(self.names, self.beside)
        blocks = self.blocks()
        first = next(blocks)
        oriented = self.orientation(config.orientation, columns)
        as_cells = oriented == "cells_as_rows"
        read = (block for part in ([first], blocks) for block in part)
        if as_cells:
            spool = Spool(scratch)
            for block in read:
                spool.add(block)
                if scratch.enough(block.nnz):
                    break
            counts, rows = spool, np.array(self.rows, object)
        else:
            counts = by_cell(turned(read), len(columns), str(self.path), scratch)
            rows = np.array(self.rows, object)
        self.orientation(oriented, columns)  # now that all rows are known
        cells, genes = (rows, columns) if as_cells else (columns, rows)
        beside = (
            pd.concat(self.annotation, ignore_index=True) if self.annotation else pd.DataFrame(index=range(len(rows)))
        )
        if len(self.beside):
            text = f"columns of names known for annotation hold no counts: {listed(self.names[self.beside][:10])}"
            decisions.add("annotation_columns", len(self.beside), text, warn=True)
        if self.sums:
            text = f"rows of names known for sums and annotation hold no counts: {listed(self.sums[:10])}"
            decisions.add("annotation_rows", len(self.sums), text, warn=True)
        if pd.Index(genes).duplicated().sum() > 0.5 * len(genes):
            raise UserError(
                f"{self.path}: most of its genes repeat (such as {genes[0]!r}), as in a long table of one count a row; "
                "write it with one column a cell"
            )
        self.unlike(cells, decisions)
        example = f"cells such as {cells[0]}, genes such as {genes[0]}" if len(cells) and len(genes) else "no values"
        why = "by the names of genes and cells" if config.orientation == "auto" else "as configured"
        decisions.add("orientation", oriented, f"{why}: {example}")
        obs, var = pd.DataFrame(index=cells), pd.DataFrame(index=genes)
        if as_cells:
            obs = beside.set_index(cells)
        else:
            var = beside.set_index(genes)
        return Read(counts, (len(cells), len(genes)), obs, var, self.field, tuple(obs.columns))

    def orientation(self, asked: str, columns: np.ndarray) -> str:
        """What a row is, as asked for, if names do not say otherwise, or as they say."""
        rows = np.array(self.rows, object)
        in_rows, in_columns = identity.gene_evidence(rows), identity.gene_evidence(columns)
        genes = "genes_as_rows" if in_rows > in_columns else "cells_as_rows" if in_columns > in_rows else None
        if max(in_rows, in_columns) < 3 or min(in_rows, in_columns) > 0.5 * max(in_rows, in_columns):
            bars = identity.looks_like_barcodes(rows), identity.looks_like_barcodes(columns)
            genes = {(True, False): "cells_as_rows", (False, True): "genes_as_rows"}.get(bars)
        names = f"rows such as {listed(rows[:2])}, columns such as {listed(columns[:2])}"
        if asked == "auto" and genes is None:
            raise UserError(
                f"{self.path}: neither rows nor columns have names that are known as genes or barcodes ({names}); set "
                "input.orientation to genes_as_rows or cells_as_rows"
            )
        if asked != "auto" and genes not in (None, asked):
            cell, gene = (rows, columns) if asked == "cells_as_rows" else (columns, rows)
            raise UserError(
                f"{self.path}: with input.orientation {asked} the cells would be {cell[0]!r}... and the genes "
                f"{gene[0]!r}...; set input.orientation to {genes}"
            )
        return genes if asked == "auto" else asked

    def unlike(self, cells: np.ndarray, decisions: Decisions) -> None:
        """Warn of a few names without nucleotides among barcodes: sums, lengths and the like."""
        if len(cells) > 20 and identity.looks_like_barcodes(cells):
            odd = [name for name in cells if not identity.looks_like_barcodes(np.array([name], object))]
            if odd:
                text = (
                    f"names that are unlike the other cells' ({listed(odd[:5])}): are these cells? else take them out"
                )
                decisions.add("odd_cells", len(odd), text, n_cells=len(odd), warn=True)

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Counts below the header, some rows at a time; at least one block."""
        count = np.setdiff1d(np.arange(len(self.names)), self.beside)
        empty = True
        with _open(self.path) as handle:
            for _ in range(self.before):
                handle.readline(MOST_LINE)
            for text in _line_blocks(handle, self.path, 2):  # a digit and a delimiter
                if not text.strip():
                    continue
                if b"\0" in text:
                    raise UserError(f"{self.path}: NUL bytes in it, which no text has; {checks.DAMAGED}")
                chunk = pd.read_csv(
                    io.BytesIO(text),
                    sep=self.delimiter,
                    header=None,
                    index_col=0,
                    dtype={0: str},
                    na_values=[""],  # "NA" stays text: as a gene's name it is one, as a count it is none
                    keep_default_na=False,
                    encoding="utf-8",
                )
                if chunk.shape[1] != len(self.names):
                    raise UserError(
                        f"{self.path}: {len(self.names):,} names in the header, {chunk.shape[1]:,} values in the row "
                        f"of {str(chunk.index[0])[:80]!r}; take out delimiters at the ends of lines"
                    )
                self.check_numbers(chunk, count)
                rows = as_text(chunk.index)
                no_counts = np.array([_is_annotation(name) for name in rows], bool)
                self.sums.extend(rows[no_counts])
                chunk = chunk[~no_counts]
                self.rows.extend(rows[~no_counts])
                if len(self.beside):
                    beside = chunk.iloc[:, self.beside].reset_index(drop=True)
                    self.annotation.append(beside.set_axis(self.names[self.beside], axis=1))
                empty = False
                counted = chunk.iloc[:, count] if len(self.beside) else chunk
                yield checks.dense_counts(counted.to_numpy(), self.field)
        if empty:
            yield sp.csr_matrix((0, len(count)), dtype=np.uint8)

    def check_numbers(self, chunk: pd.DataFrame, count: np.ndarray) -> None:
        lost = chunk.isna().any(axis=0).to_numpy()
        for column in count:
            if chunk.dtypes.iloc[column].kind in "iuf" and not lost[column]:
                continue
            values = chunk.iloc[:, column]
            at = int(pd.to_numeric(values, errors="coerce").isna().to_numpy().argmax())
            bad, remedy = values.iloc[at], "keep names and counts only"
            if str(bad) in ("NA", "N/A", "nan", "NaN", ""):
                remedy = f"write 0 where nothing was counted (row {str(values.index[at])[:80]!r})"
            elif len(self.names) < 6:
                remedy += ", one column a cell (this may be a long table, of one count a row)"
            raise UserError(f"{self.path}: column {self.names[column]!r} has {str(bad)!r}, not a number; {remedy}")
