"""``counts.h5ad``: what a sample is, written from a spool, with the digest of its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.files import seal
from scvi_core.io import checks
from scvi_core.io.blocks import Spool

CHUNK = 2**16  # stored counts packed at a time
PACKED = {"compression": "gzip", "compression_opts": 1}


def write_counts(path: Path, obs: pd.DataFrame, var: pd.DataFrame, uns: Mapping[str, str], spool: Spool) -> str:
    """Write AnnData with a CSR matrix, read by plain anndata; equal content gives equal bytes.

    Parameters
    ----------
    obs, var : the cell table and the gene table; their indices are the ids.
    uns : texts; `content_sha256` is added.
    spool : the counts, canonical, block of cells after block.

    Returns
    -------
    str
        The digest; see :func:`content_sha256`.
    """
    indptr = np.append(0, np.cumsum(np.concatenate(list(spool.arrays("indptr"))), dtype=np.int64))
    widest = max((part["data"][1] for part in spool.parts), key=lambda dtype: dtype.itemsize)
    arrays = {
        "indptr": (np.dtype(np.int64), [indptr]),
        "indices": (np.dtype(np.int32), spool.arrays("indices")),
        "data": (
            widest,
            spool.arrays("data"),
        ),  # each block has the smallest type, so the sample has the widest of these
    }
    empty = anndata.AnnData(sp.csr_matrix((len(obs), len(var)), dtype=widest), obs=obs, var=var)
    digest = of_names(obs.index, var.index)
    with Survivor(path, "w+") as target, h5py.File(target, "w") as file:
        anndata.io.write_elem(file, "/", empty, dataset_kwargs=PACKED)
        for name, (dtype, blocks) in arrays.items():
            n = len(indptr) if name == "indptr" else int(indptr[-1])
            del file["X"][name]
            # shuffled, byte by byte, they take 2/3 of the room, and of the time to pack and to unpack
            dataset = file["X"].create_dataset(name, (n,), dtype, chunks=(min(n, CHUNK),), shuffle=True, **PACKED)
            at = 0
            for block in blocks:
                dataset[at : at + len(block)] = block
                digest.update(block.astype("<i8"))
                target.check()
                at += len(block)
        anndata.io.write_elem(file, "uns", {**uns, "content_sha256": digest.hexdigest()}, dataset_kwargs=PACKED)
    seal(path, append=True)  # HDF5 reads nothing beyond its own end
    return digest.hexdigest()


class Survivor(FileIO):
    """A file for h5py, of which HDF5 never learns that the disk is full: it would not survive that.

    The first error is kept, and nothing more is written; :meth:`check` raises it, and so does the end of the ``with``
    block, whatever else has followed from it.
    """

    error: OSError | None = None

    def __exit__(self, *_: Any) -> None:
        """Close, and raise what went wrong."""
        self.close()
        self.check()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self.error is not None:
            raise self.error

    def write(self, content: Any) -> int:
        """Write all of `content`, or keep why not."""
        left = memoryview(content).cast("B")
        length = len(left)
        try:
            while self.error is None and len(left):
                left = left[os.write(self.fileno(), left) :]
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int | None = None) -> int:
        """Cut or lengthen, unless something went wrong."""
        return super().truncate(size) if self.error is None else 0


def content_sha256(adata: anndata.AnnData) -> str:
    """Digest of what a sample is: cell ids, gene ids, counts. The same whatever integer type holds them.

    Over the lengths and newline-joined ids as UTF-8, then indptr, indices and data of the canonical CSR matrix as
    little-endian int64.
    """
    counts = adata.X if sp.issparse(adata.X) and adata.X.format == "csr" else sp.csr_matrix(adata.X)
    if not counts.has_canonical_format or not np.all(counts.data):
        counts = counts.copy()
        counts.sum_duplicates()
        counts.eliminate_zeros()
    digest = of_names(adata.obs_names, adata.var_names)
    for array in (counts.indptr, counts.indices, counts.data):
        for start in range(0, len(array), checks.BLOCK):
            digest.update(array[start : start + checks.BLOCK].astype("<i8"))
    return digest.hexdigest()


def of_names(cells: pd.Index, genes: pd.Index) -> Any:
    """Begin a digest, a ``hashlib`` object, with cell and gene ids."""
    digest = hashlib.sha256()
    for names in (cells, genes):
        digest.update(f"{len(names)}\n{chr(10).join(names)}\n".encode())
    return digest
