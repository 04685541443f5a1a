"""Counts as a stream: blocks of whole cells in the file's order, whatever order the file itself is in.

What lies cell by cell is read straight through. What lies gene by gene, or in no order, goes through
:func:`by_cell`. Memory is that of a block, not of the sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.config import InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.io import checks

SMALL = 2**26  # bytes that need no file
GRAINS = 2**13  # ranges of cells that by_cell tells apart


@dataclasses.dataclass(frozen=True)
class Read:
    """What a reader gives.

    Attributes
    ----------
    blocks : the counts, once: CSR (some cells, genes), canonical, the smallest unsigned integers. Most of what is
        wrong with a file is found when they are read.
    shape : cells, genes.
    obs, var : the input's cell table, of its columns those that the configuration names, and its gene table.
    field : the matrix, as messages name it; counts what was rounded.
    columns : all columns of the input's cell table.
    """

    blocks: Iterable[sp.csr_matrix]
    shape: tuple[int, int]
    obs: pd.DataFrame
    var: pd.DataFrame
    field: checks.Field
    columns: tuple[str, ...] = ()


class Scratch(contextlib.ExitStack):
    """Where a reader puts temporary files, and what is closed when its blocks have been read.

    Parameters
    ----------
    folder : for the files; the system's place for them if None.
    most : entries after which a reader that has to read ahead may stop, as only a sample is wanted; None: all.
    """

    def __init__(self, folder: Path | None = None, most: int | None = None):
        super().__init__()
        self.folder, self.most, self.read = folder, most, 0

    def enough(self, entries: int) -> bool:
        """Count entries that were read; whether these are enough."""
        self.read += entries
        return self.most is not None and self.read >= self.most


Reader = Callable[[Path, InputConfig, Decisions, Scratch], Read]


class Spool:
    """CSR matrices laid down in a temporary file that no folder lists, in memory while they are few.

    Read again in any order, as a whole, by rows or array by array.

    Parameters
    ----------
    scratch : says where, and closes it.
    """

    def __init__(self, scratch: Scratch):
        self.folder, self.end = scratch.folder, 0
        self.file = scratch.enter_context(tempfile.SpooledTemporaryFile(SMALL, dir=self.folder))  # noqa: SIM115
        self.parts: list[dict[str, tuple[int, np.dtype, int]]] = []  # of each array: offset, type, length
        self.n_columns = 0

    def add(self, part: sp.csr_matrix) -> None:
        """Lay down one matrix; the widest is how wide all are."""
        self.n_columns = max(self.n_columns, part.shape[1])
        laid = {}
        try:
            self.file.seek(self.end)
            for name in ("indptr", "indices", "data"):
                # lengths of rows in place of where they end: half the bytes
                array = np.diff(part.indptr).astype(np.int32) if name == "indptr" else getattr(part, name)
                laid[name] = (self.end, array.dtype, len(array))
                self.file.write(array.view(np.uint8))
                self.end += array.nbytes
            self.file.flush()
        except OSError as error:
            if error.errno not in (28, 122):  # ENOSPC, EDQUOT
                raise
            with contextlib.suppress(OSError):  # it would try once more to write what there is no room for
                self.file.close()
            where = self.folder or tempfile.gettempdir()
            line = f"{where}: no space left on the device for temporary files (some 6 bytes a count); free some"
            raise UserError(f"{line}, then run again") from error
        self.parts.append(laid)

    def array(self, part: int, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """`data`, `indices` or the rows' lengths (by the name `indptr`) of one matrix, or a stretch of them."""
        at, dtype, length = self.parts[part][name]
        out = np.empty((length if stop is None else stop) - start, dtype)
        self.file.seek(at + start * dtype.itemsize)
        if self.file.readinto(out.view(np.uint8)) != out.nbytes:
            raise OSError("a temporary file is shorter than what was written to it")
        return out

    def arrays(self, name: str) -> Iterator[np.ndarray]:
        """That array of each matrix, in turn."""
        return (self.array(part, name) for part in range(len(self.parts)))

    def rows(self, part: int, rows: slice = slice(None), entries: slice = slice(None)) -> sp.csr_matrix:
        """Some rows of one matrix, given which entries those are; by default all."""
        lengths = self.array(part, "indptr", rows.start or 0, rows.stop)
        data, indices = (self.array(part, name, entries.start or 0, entries.stop) for name in ("data", "indices"))
        indptr = np.append(0, np.cumsum(lengths, dtype=np.int64))
        return sp.csr_matrix((data, indices, indptr), shape=(len(lengths), self.n_columns))

    def __iter__(self) -> Iterator[sp.csr_matrix]:
        return (self.rows(part) for part in range(len(self.parts)))


def by_cell(stripes: Iterable[sp.csr_matrix], n_cells: int, where: str, scratch: Scratch) -> Iterator[sp.csr_matrix]:
    """Blocks of cells from matrices that each hold some of the entries of any cell.

    All of them are read and spooled before this returns; a block is then gathered from its stretch of each.

    Parameters
    ----------
    stripes : CSR (all cells, genes), no entry in two of them; a later one may have more genes.
    where : file and field, for messages.
    scratch : for the temporary file; see :class:`Spool`.

    Returns
    -------
    iterator of scipy.sparse.csr_matrix
        As :class:`Read` has them, each of at most ``checks.BLOCK`` entries (or a few cells, where these have more).

    Raises
    ------
    UserError
        For an entry that is there twice.
    """
    spool = Spool(scratch)
    edges = np.unique(np.linspace(0, n_cells, min(n_cells, GRAINS) + 1).astype(np.int64))
    before = []  # of each stripe: the entries before each edge
    for stripe in stripes:
        spool.add(stripe)
        before.append(stripe.indptr[edges].astype(np.int64))
        if scratch.enough(stripe.nnz):
            break

    def gathered() -> Iterator[sp.csr_matrix]:
        for first, last in checks.stretches(np.sum(before, axis=0)) if before else ():
            rows = slice(edges[first], edges[last])
            parts = [
                spool.rows(part, rows, slice(bounds[first], bounds[last]))
                for part, bounds in enumerate(before)
                if bounds[first] < bounds[last]
            ]
            block = _overlaid(parts, (rows.stop - rows.start, spool.n_columns), where)
            yield checks.canonical(block, where, rows.start)

    return gathered()


def _overlaid(parts: list[sp.csr_matrix], shape: tuple[int, int], where: str) -> sp.csr_matrix:
    """The sum of CSR matrices of which no two have the same entry."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return sp.csr_matrix(shape, dtype=np.uint8)
    rows = [np.repeat(np.arange(shape[0], dtype=np.int32), np.diff(part.indptr)) for part in parts]
    entries = [np.concatenate(c) for c in (rows, [p.indices for p in parts], [p.data for p in parts])]
    return by_row(*entries, shape, where)


def by_row(
    rows: np.ndarray, columns: np.ndarray, counts: np.ndarray, shape: tuple[int, int], where: str
) -> sp.csr_matrix:
    """CSR matrix of entries in any order; refuses one that is there twice."""
    matrix = sp.coo_matrix((counts, (rows, columns)), shape).tocsr()
    if matrix.nnz != len(counts):
        raise UserError(f"{where}: {len(counts) - matrix.nnz:,} entries are stored twice; {checks.DAMAGED}")
    return matrix


def turned(blocks: Iterable[sp.csr_matrix]) -> Iterator[sp.csr_matrix]:
    """Blocks of genes (some genes, cells) as :func:`by_cell` takes them: transposed, each after the genes before."""
    first = 0
    for block in blocks:
        stripe = block.T.tocsr()
        arrays = stripe.data, stripe.indices + np.int32(first), stripe.indptr
        first += block.shape[0]
        yield sp.csr_matrix(arrays, shape=(block.shape[1], first))


def take_columns(block: sp.csr_matrix, to: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Columns dropped, or summed where several go to one.

    Parameters
    ----------
    block : canonical CSR of unsigned integers.
    to : (columns,) the new place of each; -1 drops it. Those that stay alone stay in order.
    n_columns : how many there are afterwards.
    """
    if n_columns == len(to):  # none is dropped, none summed, so all stay where they are
        return block
    columns, data, indptr = to.astype(np.int32)[block.indices], block.data, block.indptr
    kept = columns >= 0
    if not kept.all():
        indptr = np.append(0, np.cumsum(kept))[indptr]
        columns, data = columns[kept], data[kept]
    summed = n_columns < (to >= 0).sum()
    taken = sp.csr_matrix(
        (data.astype(np.uint64) if summed else data, columns, indptr), shape=(block.shape[0], n_columns)
    )
    if summed:
        taken.sum_duplicates()
    return checks.smallest(taken)


def stacked(blocks: Iterable[sp.csr_matrix], n_columns: int) -> sp.csr_matrix:
    """All blocks as one matrix in memory; none at all gives a matrix without rows."""
    parts = list(blocks)
    return sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, n_columns), dtype=np.uint8)
