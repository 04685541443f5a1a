"""Counts that stay on disk: a store larger than the memory allowed is read in blocks, in shuffled order.

The loop that trains sees no difference: :class:`Stream` is a :class:`~scvi_core.counts.Counts` whose arrays hold some
blocks of consecutive cells, those last asked for. An epoch goes through the blocks in random order, a window of them at
a time, and through the cells of a window in random order.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scvi_core.counts import Counts, OnHost, Schema, codes, gather_nonzeros, small_types, tensor_of
from scvi_core.files import UserError
from scvi_core.log import log

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 1 << 20  # non-zeros a block, about: as many as a chunk of the store holds


@dataclasses.dataclass
class Stream(OnHost):
    """Cells x genes counts of which `genes_m` and `values_m` hold some blocks, each in a slot of its own.

    Attributes
    ----------
    X : the store's zarr group, with arrays ``indices`` and ``data``.
    first_b : (blocks + 1,) the cell at which each block begins.
    slot_size : non-zeros a slot has room for.
    slot_b : block -> its slot, for those in memory; the one longest unused first.
    device : where minibatches go.
    """

    X: Any
    first_b: np.ndarray
    slot_size: int
    slot_b: dict[int, int]

    def to(self, device: torch.device, beside: int = 0) -> Stream:
        """The same, with minibatches made on another device; the blocks stay in the computer's memory."""
        return dataclasses.replace(self, device=device)

    def order(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An epoch's order: windows of random blocks, half as many as fit into memory, shuffled within."""
        rows = rng.permutation(rows)
        place_b = rng.permutation(len(self.first_b) - 1)
        n_slots = len(self.genes_m) // self.slot_size
        window_n = place_b[self._block(rows)] // max(1, n_slots // 2)
        return rows[np.argsort(window_n, kind="stable")]

    def nonzeros(self, rows_n: torch.Tensor, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`Counts.nonzeros`; blocks not in memory are read, in turns where they do not fit together."""
        block_n, n_slots = self._block(rows_n.numpy()), len(self.genes_m) // self.slot_size
        if len(np.unique(block_n)) <= n_slots:
            return super().nonzeros(rows_n, packed)
        order = np.argsort(block_n, kind="stable")
        turn_n = np.unique(block_n[order], return_inverse=True)[1] // n_slots
        turns = np.split(order, np.flatnonzero(np.diff(turn_n)) + 1)
        parts = [super(Stream, self).nonzeros(rows_n[torch.from_numpy(turn)], packed=True) for turn in turns]
        back_n = torch.from_numpy(np.argsort(order))
        lengths_n = torch.cat([indptr_n.diff() for indptr_n, _, _ in parts])
        starts_n = lengths_n.cumsum(0) - lengths_n
        genes_m, values_m = (torch.cat(arrays) for arrays in list(zip(*parts, strict=True))[1:])
        return gather_nonzeros(starts_n[back_n], lengths_n[back_n], genes_m, values_m, packed)

    def starts(self, rows_n: torch.Tensor) -> torch.Tensor:
        """Where some cells begin in the slots, once their blocks are there."""
        block_n = self._block(rows_n.numpy())
        needed = np.unique(block_n).tolist()
        for block in needed:  # used now: to the end, the last to be given up
            if block in self.slot_b:
                self.slot_b[block] = self.slot_b.pop(block)
        for block in needed:
            if block not in self.slot_b:
                self._read(block)
        slot_n = np.array([self.slot_b[block] for block in needed], dtype=np.int64)[np.searchsorted(needed, block_n)]
        within_n = self.indptr_n[rows_n] - self.indptr_n[torch.from_numpy(self.first_b[block_n])]
        return torch.from_numpy(slot_n * self.slot_size) + within_n

    def _block(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.first_b, rows, side="right") - 1

    def _read(self, block: int) -> None:
        n_slots = len(self.genes_m) // self.slot_size
        slot = len(self.slot_b) if len(self.slot_b) < n_slots else self.slot_b.pop(next(iter(self.slot_b)))
        start, stop = (int(self.indptr_n[self.first_b[b]]) for b in (block, block + 1))
        at = slice(slot * self.slot_size, slot * self.slot_size + stop - start)
        self.genes_m[at] = torch.from_numpy(self.X["indices"][start:stop].astype(self.genes_m.numpy().dtype))
        self.values_m[at] = torch.from_numpy(self.X["data"][start:stop].astype(self.values_m.numpy().dtype))
        self.slot_b[block] = slot


def open_counts(path: Path, adata: AnnData, schema: Schema, memory_gb: float, new_batches: bool = False) -> Counts:
    """The counts of a store that ``preprocess.store`` wrote: in memory, or streamed where they are larger.

    Read block by block either way, and checked, so that no second copy is made.

    Parameters
    ----------
    path : of counts.zarr. adata : its cells and genes, without counts. schema : of the model, with the store's genes.
    memory_gb : what packed counts may take, in units of 10^9 bytes.
    new_batches : as for :func:`scvi_core.counts.pack`.

    Raises
    ------
    UserError
        When the counts are damaged, or the memory allowed is too little for two blocks.
    """
    try:
        return _open_counts(path, adata, schema, memory_gb, new_batches)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zarr raises every type there is on damaged stores
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a whole store of scvi-core ({line}); run `scvi-core store` again") from None


def _open_counts(path: Path, adata: AnnData, schema: Schema, memory_gb: float, new_batches: bool) -> Counts:
    import zarr

    X = zarr.open_group(path, mode="r")["X"]
    indptr = np.asarray(X["indptr"][:], dtype=np.int64)
    n_genes, n_cells, size = len(schema.gene_ids), adata.n_obs, int(indptr[-1])
    damaged = UserError(f"{path}: not a whole store of scvi-core (X: rows are damaged); run `scvi-core store` again")
    if len(indptr) != n_cells + 1 or indptr[0] or (np.diff(indptr) < 1).any():
        raise damaged
    if X["data"].shape != (size,) or X["indices"].shape != (size,):
        raise damaged
    n_blocks = -(-size // BLOCK)  # of nearly equal size
    first_b = np.unique(np.append(np.searchsorted(indptr, np.arange(n_blocks) * size // n_blocks), n_cells))
    gene_type, value_type = small_types(n_genes, min(np.iinfo(X["data"].dtype).max, 2**31 - 1))
    bytes_each = np.dtype(gene_type).itemsize + np.dtype(value_type).itemsize
    slot_size = int(np.diff(indptr[first_b]).max())
    whole = size * bytes_each <= memory_gb * 1e9
    n_slots = int(memory_gb * 1e9 / bytes_each) // slot_size
    if not whole and n_slots < 2:
        least = 2 * slot_size * bytes_each / 1e9
        least = math.ceil(1000 * least) / 1000
        raise UserError(f"train.memory_gb: {memory_gb:g} is less than two blocks of {path}; allow {least:g} or more")
    length = size if whole else n_slots * slot_size
    genes_m, values_m = (tensor_of(np.empty(0), kind).new_empty(length) for kind in (gene_type, value_type))
    library_n = np.empty(n_cells)
    for b in range(len(first_b) - 1):
        cells = slice(first_b[b], first_b[b + 1])
        at = slice(int(indptr[cells.start]), int(indptr[cells.stop]))
        genes, values = X["indices"][at], X["data"][at]
        starts = indptr[cells] - at.start
        rises = np.diff(genes) > 0  # a lost chunk reads as zeros: no count may be 0, and genes rise within a cell
        rises[starts[1:] - 1] = True
        if not rises.all() or (values == 0).any() or genes.min() < 0 or genes.max() >= n_genes:
            raise damaged
        library_n[cells] = np.add.reduceat(values, starts, dtype=np.float64)
        if whole:
            genes_m[at], values_m[at] = tensor_of(genes, gene_type), tensor_of(values, value_type)
    fields = {
        "indptr_n": torch.from_numpy(indptr),
        "genes_m": genes_m,
        "values_m": values_m,
        "library_n": torch.from_numpy(library_n),
        "n_genes": n_genes,
        **codes(adata, schema, new_batches=new_batches),
    }
    if whole:
        log.info("counts in memory: %.2f GB packed", size * bytes_each / 1e9)
        return Counts(**fields)
    log.info(
        "counts streamed from %s: %.2f GB packed, %.2f GB of them in memory at a time (train.memory_gb)",
        path, size * bytes_each / 1e9, length * bytes_each / 1e9,
    )  # fmt: skip
    return Stream(**fields, X=X, first_b=first_b, slot_size=slot_size, slot_b={}, device=torch.device("cpu"))
