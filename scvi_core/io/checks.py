"""Checks on files that others made: nothing in them is trusted before it has been looked at.

Each check raises :class:`~scvi_core.files.UserError` with one line that names the file, the field, the value and
the remedy. Counts are read in blocks into the smallest unsigned integers that hold them, so that no copy in
floating point is ever as large as the matrix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gzip
import json
import math
import os
import re
import resource
import signal
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

from scvi_core.files import UserError

BLOCK = 2**22  # values read at a time: 32 MB as float64; no block of cells has more, unless it is a single cell
TRIAL = 10  # seconds of computing to look at an HDF5 file's objects, but not at their values
MOST_ITEM = 2**16  # bytes of a stored text
DAMAGED = "it is damaged or was made to harm; fetch or write it again"
FIND_COUNTS = "find the raw counts, before any normalisation"
# Counts that went through floating point (un-logged, scaled and back) are off by rounding: so far, of the value, and at
# most so far, they still are the count next to them.
NOISE, MOST_NOISE = 1e-5, 0.1


@dataclasses.dataclass
class Field:
    """A stored matrix, as messages name it.

    Attributes
    ----------
    where : file and field.
    remedy : what to do if its values are no counts.
    rounded : how many values were not whole but for the noise of floating point; rises as they are read.
    """

    where: str
    remedy: str = FIND_COUNTS
    rounded: int = 0


def listed(names: Iterable[Any]) -> str:
    """Names as a line's part."""
    return ", ".join(map(str, names))


def nearest(name: str, valid: Iterable[Any]) -> str:
    """The valid name closest to a wrong one, as a line's part; "" if none is close."""
    near = difflib.get_close_matches(name, [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn what the reading libraries raise on damaged files into one line."""
    try:
        yield
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path}: may not be read; check its permissions") from None
    except MemoryError as error:
        raise UserError(f"{path}: needs more memory than there is ({error}); give the step more") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or damaged gzip data ({error}); fetch the file again") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.object[error.start]:#x}; Windows-1252, as of spreadsheets?); save "
            "it as UTF-8, or name the file by its format"
        ) from error
    except Exception as error:  # h5py, zarr, anndata, scipy and pandas raise every type there is on damaged files
        line = " ".join(str(error).split())[:300]
        truncated = "truncated" in line or "unexpected end" in line.lower()
        what = "the file is truncated" if truncated else f"cannot be read ({type(error).__name__}: {line})"
        raise UserError(f"{path}: {what}; fetch or write it again") from error


def check_utf16(start: bytes, path: Path) -> None:
    """Refuse text that starts as UTF-16 does."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: UTF-16 text, as spreadsheets save 'Unicode text'; save it as CSV in UTF-8")


def check_size(n_values: int, stored: int, where: str) -> None:
    """Refuse arrays that declare far more values than any compression packs into the bytes there are.

    deflate packs 1032 bytes into one at best, zstd some thousands where all values are equal.
    """
    if n_values > 2**24 and n_values > 5000 * stored:
        raise UserError(f"{where}: declares {n_values:,} values, but the file has {stored:,} bytes; {DAMAGED}")


def check_names(shape: tuple[int, int], n_obs: int, n_var: int, where: str) -> None:
    """Refuse counts that have other sizes than the tables beside them."""
    if shape != (n_obs, n_var):
        raise UserError(
            f"{where}: {shape[0]:,} x {shape[1]:,} counts, but {n_obs:,} cell names and {n_var:,} gene names; {DAMAGED}"
        )


def check_hdf5(file: h5py.File, path: str | Path) -> None:
    """Walk an HDF5 file and refuse whatever reaches outside it: links, external storage, virtual datasets.

    Soft links stay inside the file once no external link is left to pass through; they are not followed here.
    """
    stored = os.path.getsize(path)
    todo, seen = [file["/"]], set()
    while todo:
        group = todo.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:  # hard links may make rings
            continue
        seen.add(address)
        for name in group:
            where = f"{path}: {group.name.rstrip('/')}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise UserError(f"{where} is a link to another file ({link.filename!r}); copy the data into one file")
            if not isinstance(link, h5py.HardLink):
                continue
            try:
                item = group[name]
            except (KeyError, OSError, RuntimeError):  # broken; if it is needed, its reader says so
                continue
            if isinstance(item, h5py.Group):
                todo.append(item)
            elif isinstance(item, h5py.Dataset):
                if item.external:
                    raise UserError(f"{where} keeps its values in other files ({item.external[0][0]!r}); copy them in")
                if item.is_virtual:
                    raise UserError(f"{where} is a virtual dataset, made of other files; copy the data into one file")
                check_size(item.size or 0, stored, where)
                if item.dtype.itemsize > MOST_ITEM and item.dtype.names is None:
                    raise UserError(f"{where} has texts of {item.dtype.itemsize:,} bytes each; {DAMAGED}")


def try_hdf5(path: str | Path) -> None:
    """Let a child look at all of an HDF5 file's objects, as damage can crash the library, or have it run for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):  # what can be said of it is said by the parent
            resource.setrlimit(resource.RLIMIT_CPU, (TRIAL, TRIAL))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with h5py.File(path, "r", locking=False) as file:
                _touch("/", file)
                file.visititems(_touch)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        died = signal.Signals(os.WTERMSIG(status))
        how = f"runs for over {TRIAL} s" if died in (signal.SIGXCPU, signal.SIGKILL) else f"dies of {died.name}"
        raise UserError(f"{path}: HDF5's own library {how} on it; {DAMAGED}")


def _touch(_: str, item: h5py.Group | h5py.Dataset) -> None:
    with contextlib.suppress(Exception):
        dict(item.attrs)
    if isinstance(item, h5py.Dataset) and item.chunks is not None:
        with contextlib.suppress(Exception):
            item.id.get_num_chunks()


def check_links(path: Path) -> None:
    """Refuse a folder with links out of it, or with anything but files and folders, such as a pipe."""
    root = path.resolve()
    for folder, folders, names in os.walk(root):
        for item in (Path(folder, name) for name in [*folders, *names]):
            if item.is_symlink() and not item.resolve().is_relative_to(root):
                raise UserError(f"{path}: {item.relative_to(root)} is a link out of the folder; copy the data in")
            if item.exists() and not (item.is_file() or item.is_dir()):
                raise UserError(f"{path}: {item.relative_to(root)} is neither a file nor a folder; take it out")


def check_zarr(path: Path) -> None:
    """Look through a zarr folder's metadata: no pickle codecs, no links out of the folder, no absurd shapes."""
    check_links(path)
    root, stored, metadata = path.resolve(), 0, []
    for folder, _, names in os.walk(root):
        for name in names:
            item = Path(folder, name)
            if item.exists():
                stored += item.stat().st_size
                if name in ("zarr.json", ".zarray", ".zgroup", ".zmetadata"):
                    metadata.append(item)
    for item in metadata:
        where = f"{path}: {item.relative_to(root)}"
        try:
            content = json.loads(item.read_text("utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not valid JSON; {DAMAGED}") from None
        for name, value in _pairs(content):
            if name in ("id", "name") and isinstance(value, str) and value.rpartition(".")[2].lower() == "pickle":
                raise UserError(f"{where} asks for pickled objects, which can run code; write the store without them")
            size = re.fullmatch(r"[<>|=]?[SUVO](\d+)", value) if name == "dtype" and isinstance(value, str) else None
            if (size and int(size[1]) > MOST_ITEM) or (name == "length_bytes" and value > MOST_ITEM):
                raise UserError(f"{where} has texts of {size[1] if size else value} bytes each; {DAMAGED}")
            if name in ("shape", "chunks", "chunk_shape") and isinstance(value, list):
                check_size(math.prod(int(n) for n in value), stored, where)


def _pairs(content: Any) -> list[tuple[str, Any]]:
    """All (key, value) of nested JSON but the users' own attributes."""
    pairs, todo = [], [content]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, dict):
            inner = [(k, v) for k, v in item.items() if k != "attributes" and not k.endswith(".zattrs")]
            pairs.extend(inner)
            todo.extend(v for _, v in inner)
    return pairs


def pack_counts(values: np.ndarray, field: Field) -> np.ndarray:
    """Check that values are counts, and pack them.

    Parameters
    ----------
    values : any numeric type; floats within ``NOISE`` of a whole number are that number, counted in `field`.
    field : which they are.

    Returns
    -------
    numpy.ndarray
        uint8, uint16 or uint32, the smallest that holds all of them.

    Raises
    ------
    UserError
        For text, non-finite, negative or fractional values, and counts beyond 32 bits.
    """
    if values.dtype.kind not in "biuf":
        raise UserError(f"{field.where} holds {values.dtype}, not numbers; {field.remedy}")
    if not values.size:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = values[~np.isfinite(values)][0]
        raise UserError(f"{field.where} has values that are not finite (such as {bad}, or missing); {field.remedy}")
    if values.dtype.kind in "if" and values.min() < (-NOISE if values.dtype.kind == "f" else 0):
        raise UserError(
            f"{field.where} has negative values (such as {values.min()}), so these are not counts: they look scaled "
            f"or corrected; {field.remedy}"
        )
    if values.dtype.kind == "f":
        whole = np.rint(values)
        off = np.abs(values - whole)
        if off.any():
            fraction = off > np.minimum(NOISE * np.maximum(1, whole), MOST_NOISE)
            if fraction.any():
                raise UserError(
                    f"{field.where} has values that are not whole numbers (such as {values[fraction][0]}), so these "
                    f"are not counts: they look normalised or log-transformed; {field.remedy}"
                )
            field.rounded += np.count_nonzero(off)
        values = whole
    top = int(values.max())
    if top >= 2**32:
        raise UserError(f"{field.where} has the value {top}, beyond what a count can be (32 bits); {field.remedy}")
    return values.astype(np.min_scalar_type(top), copy=False)


def stretches(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of the items that end at `bounds`: as many at a time as have ``BLOCK`` values, at least one.

    Parameters
    ----------
    bounds : (items + 1,) values before each item, and all; rises.
    """
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + BLOCK, side="right")) - 1)
        yield first, last
        first = last


def compressed_blocks(
    data: Any, indices: Any, indptr: Any, shape: tuple[int, int], field: Field
) -> Iterator[sp.csr_matrix]:
    """Checked counts from the three stored arrays of a CSR matrix (for CSC: give the transposed shape).

    Yields
    ------
    scipy.sparse.csr_matrix
        (some rows, columns): smallest unsigned integers, sorted indices, no stored zeros.

    Raises
    ------
    UserError
        For arrays that contradict each other, and for values that are no counts.
    """
    n_rows, n_columns = (int(n) for n in shape)
    where = field.where
    bounds = np.asarray(indptr[...])
    if bounds.dtype.kind not in "iu" or bounds.ndim != 1 or len(bounds) != n_rows + 1:
        raise UserError(
            f"{where}/indptr has the shape {bounds.shape} where {n_rows:,} rows need {n_rows + 1:,}; {DAMAGED}"
        )
    bounds = bounds.astype(np.int64, copy=False)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise UserError(f"{where}/indptr does not rise from 0; {DAMAGED}")
    if (fullest := int(np.diff(bounds).max(initial=0))) > n_columns:
        raise UserError(f"{where}/indptr gives a row {fullest:,} entries, of {n_columns:,} columns; {DAMAGED}")
    if not data.shape == indices.shape == (bounds[-1],):
        raise UserError(
            f"{where} has {data.shape} values, {indices.shape} indices, and an indptr that ends at {bounds[-1]:,}; "
            f"these should be one number: {DAMAGED}"
        )
    for first, last in stretches(bounds):
        span = slice(int(bounds[first]), int(bounds[last]))
        columns = np.asarray(indices[span])
        if columns.size and (columns.dtype.kind not in "iu" or columns.min() < 0 or columns.max() >= n_columns):
            raise UserError(f"{where}/indices has {columns.max()} where {n_columns:,} columns end; {DAMAGED}")
        columns = columns.astype(np.int32 if n_columns < 2**31 else np.int64, copy=False)
        counts = pack_counts(np.asarray(data[span]), field)
        block = sp.csr_matrix((counts, columns, bounds[first : last + 1] - span.start), shape=(last - first, n_columns))
        yield canonical(block, where, first)


def canonical(counts: sp.csr_matrix, where: str, first: int = 0) -> sp.csr_matrix:
    """Sort indices, drop stored zeros, pack; refuse an entry that is stored twice. Works on the arrays in place.

    Parameters
    ----------
    first : which row of the file the first one is, for the message.
    """
    counts = sp.csr_matrix((counts.data, counts.indices, counts.indptr), shape=counts.shape)  # no flag is believed
    counts.sort_indices()
    if not counts.has_canonical_format:
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        twice = np.flatnonzero((np.diff(counts.indices) == 0) & (np.diff(rows) == 0))[0]
        raise UserError(
            f"{where} stores the entry at row {first + rows[twice]}, column {counts.indices[twice]} (from 0) twice; "
            f"{DAMAGED}"
        )
    counts.eliminate_zeros()
    return smallest(counts)


def smallest(counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same matrix with the smallest unsigned integer type that holds its values."""
    counts.data = counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0))), copy=False)
    return counts


def dense_blocks(values: Any, field: Field) -> Iterator[sp.csr_matrix]:
    """Checked counts from a dense two-dimensional array, some rows at a time, as :func:`compressed_blocks` has them."""
    n_rows, n_columns = values.shape
    step = max(1, BLOCK // max(1, n_columns))
    whole = (getattr(values, "chunks", None) or (1,))[0]
    if whole <= 16 * step:  # chunks are read whole, as each is unpacked anew for every block that needs a row of it
        step = -(-step // whole) * whole
    for start in range(0, n_rows, step):
        yield dense_counts(np.asarray(values[start : start + step]), field)


def dense_counts(values: np.ndarray, field: Field) -> sp.csr_matrix:
    """Checked CSR matrix of counts from a dense one."""
    if values.dtype.kind not in "biuf":
        raise UserError(f"{field.where} holds {values.dtype}, not numbers; {field.remedy}")
    n_rows, n_columns = values.shape
    there = values != 0  # NaN differs from 0 too
    at = np.flatnonzero(there)
    lengths = np.count_nonzero(there, axis=1)
    columns = (at - np.repeat(np.arange(n_rows) * n_columns, lengths)).astype(np.int32)
    counts = pack_counts(values.reshape(-1)[at], field)
    matrix = sp.csr_matrix((counts, columns, np.append(0, np.cumsum(lengths))), shape=values.shape)
    matrix.eliminate_zeros()  # of noise where zero was meant
    return matrix
