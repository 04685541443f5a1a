"""A sample on disk: everything but its counts in memory, the counts of kept cells read chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_core.files import UserError, read_parquet, verify
from scvi_core.log import progress

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

CHUNK = 2_000_000  # stored counts read at a time


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """What ``samples/{sample}/counts.h5ad`` and its ``qc.parquet`` say about a sample, the counts left on disk.

    Attributes
    ----------
    path : of counts.h5ad.
    name : the sample.
    kind : ``"ensembl"`` or ``"symbol"``.
    organism, content_sha256 : as in the file's uns.
    gene_ids, gene_names : (genes,) texts.
    keep : (cells,) bool, from qc.parquet.
    batch : (cells,) texts.
    """

    path: Path
    name: str
    kind: str
    organism: str
    content_sha256: str
    gene_ids: np.ndarray
    gene_names: np.ndarray
    keep: np.ndarray
    batch: np.ndarray


def open_samples(h5ads: Sequence[Path], qcs: Sequence[Path]) -> list[SampleFile]:
    """Read everything but the counts of each sample.

    Raises
    ------
    UserError
        For a file that is missing or not as scvi-core writes it, or a pair that does not belong together.
    """
    return [_open(Path(h5ad), Path(table)) for h5ad, table in zip(h5ads, qcs, strict=True)]


def read_tables(h5ad: Path, columns: Sequence[str] = ()) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Read what counts.h5ad says about its cells and genes; the counts stay on disk.

    Parameters
    ----------
    h5ad : as ``scvi-core ingest`` wrote it.
    columns : of the cells, to be read too.

    Returns
    -------
    obs : (cells, columns) indexed by cell id.
    var : (genes, ...) indexed by gene id, with ``gene_name``.
    uns : sample (its row of the sheet), gene_ids, organism and content_sha256.

    Raises
    ------
    UserError
        For a file that is not as scvi-core writes it.
    """
    import h5py
    import pandas as pd
    from anndata.io import read_elem

    verify(h5ad, "ingest")
    try:
        with h5py.File(h5ad, locking=False) as file:  # which may lie where no lock can be taken
            group = file["obs"]
            ids = read_elem(group[group.attrs["_index"]])
            obs = pd.DataFrame({column: read_elem(group[column]) for column in columns}, index=pd.Index(ids))
            var = read_elem(file["var"])
            uns = {
                key: str(read_elem(file["uns"][key])) for key in ("sample", "gene_ids", "organism", "content_sha256")
            }
            shape = tuple(file["X"].attrs["shape"])
        var["gene_name"] = var["gene_name"].astype(str)
        if shape != (len(obs), len(var)):
            raise ValueError(f"X is {shape}, the tables {(len(obs), len(var))}")
    except Exception as error:  # written by another version, or sealed by somebody else; h5py raises every type
        raise UserError(f"{h5ad}: not a sample that `scvi-core ingest` wrote ({error}); run ingest again") from None
    return obs, var, uns


def own_labels(h5ad: Path) -> dict[str, np.ndarray]:
    """(cells,) texts of each column of labels that counts.h5ad carries from its input or the sample sheet."""
    import h5py
    import pandas as pd
    from anndata.io import read_elem

    with h5py.File(h5ad, locking=False) as file:
        obs = read_elem(file["obs"])
    fixed = ("barcode", "sample", "batch")
    labels = [c for c in obs if c not in fixed and isinstance(obs[c].dtype, pd.CategoricalDtype)]
    return {column: obs[column].astype(object).where(obs[column].notna(), "(none)").to_numpy() for column in labels}


def _open(h5ad: Path, table: Path) -> SampleFile:
    obs, var, uns = read_tables(h5ad)
    judged = read_parquet(table, "qc", ["cell_id", "batch", "keep"])
    if not np.array_equal(judged["cell_id"], obs.index.to_numpy(dtype=object)) or not len(obs):
        raise UserError(f"{table}: its cells are not those of {h5ad}; run qc again")
    return SampleFile(
        path=h5ad,
        name=uns["sample"],
        kind=uns["gene_ids"],
        organism=uns["organism"],
        content_sha256=uns["content_sha256"],
        gene_ids=var.index.astype(str).to_numpy(),
        gene_names=var["gene_name"].to_numpy(),
        keep=judged["keep"].to_numpy().astype(bool),
        batch=judged["batch"].to_numpy(),
    )


def kept_chunks(sample: SampleFile, keep: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    """:func:`read_chunks` of a sample's kept cells, or of those that `keep`, (cells,) bool, names instead."""
    return read_chunks(sample.path, sample.keep if keep is None else keep)


def cell_blocks(
    h5ads: Sequence[Path], cell_ids: pd.Index, gene_ids: Sequence[str], digests: list[str] | None = None
) -> Iterator[tuple[int, csr_matrix]]:
    """Yield the counts of an atlas' cells, in its order of cells and genes, from the samples that it is made of.

    Parameters
    ----------
    h5ads : the samples' counts.h5ad, qc.parquet beside each, in the order of the sheet.
    cell_ids : of cells.parquet, in its order.
    gene_ids : of any genes of genes.parquet; one that a sample does not have is zero there.
    digests : takes the digest of each sample's content.

    Yields
    ------
    first : place of the block's first cell in `cell_ids`.
    counts : (n, genes) CSR in the file's integer type, indices sorted.

    Raises
    ------
    UserError
        When samples and cells are not of one build.
    """
    import pandas as pd

    position, row = {gene: i for i, gene in enumerate(gene_ids)}, 0
    for path in h5ads:
        qc = path.parent / "qc.parquet"
        (sample,) = open_samples([path], [qc])  # one at a time, as each holds the names of its genes
        if digests is not None:
            digests.append(sample.content_sha256)
        own = pd.Index(read_parquet(qc, "qc", ["cell_id"])["cell_id"])
        keep = own.isin(cell_ids[row : row + len(own)])
        column = np.array([position.get(gene, -1) for gene in sample.gene_ids], dtype=np.int64)
        for rows, counts in kept_chunks(sample, keep):
            if not np.array_equal(own[rows], cell_ids[row : row + len(rows)]):
                raise UserError(f"{path}: its cells are not those of cells.parquet; run the steps after qc again")
            yield row, take_genes(counts, column, len(gene_ids))
            row += len(rows)
    if row != len(cell_ids):
        raise UserError(f"cells.parquet: {len(cell_ids) - row} of its cells are in none of the samples; name them all")


def take_genes(counts: csr_matrix, column: np.ndarray, n_genes: int) -> csr_matrix:
    """Some genes of a chunk, in another order: `column` has the new place of each of its genes, -1 of one left out."""
    from scipy.sparse import csr_matrix

    gene = column[counts.indices]
    inside = gene >= 0
    indptr = np.concatenate([[0], np.cumsum(inside)])[counts.indptr]
    part = csr_matrix((counts.data[inside], gene[inside].astype(np.int32), indptr), (counts.shape[0], n_genes))
    part.sort_indices()
    return part


def read_chunks(h5ad: Path, keep: np.ndarray) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    """Yield (rows, counts): cells' positions in the file and their counts, a chunk of ``CHUNK`` at a time; say how far.

    Parameters
    ----------
    h5ad : counts.h5ad.
    keep : (cells,) bool, which to read.

    Yields
    ------
    rows : (n,) int, ascending.
    counts : (n, genes of the file) CSR in the file's integer type.
    """
    return progress(_chunks(h5ad, keep), f"{h5ad}: cells read", int(keep.sum()), lambda chunk: len(chunk[0]))


def _chunks(h5ad: Path, keep: np.ndarray) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    import h5py
    from scipy.sparse import csr_matrix

    with h5py.File(h5ad, locking=False) as file:  # which may lie where no lock can be taken
        X = file["X"]
        indptr, n_genes = X["indptr"][:].astype(np.int64), int(X.attrs["shape"][1])
        start = 0
        while start < len(keep):
            stop = max(start + 1, int(np.searchsorted(indptr, indptr[start] + CHUNK, side="right")) - 1)
            rows = start + np.flatnonzero(keep[start:stop])
            if rows.size:  # whole stretches are read, as HDF5 reads them best, and the kept rows taken
                first, last = rows[0], rows[-1] + 1
                span = slice(indptr[first], indptr[last])
                parts = X["data"][span], X["indices"][span], indptr[first : last + 1] - indptr[first]
                yield rows, csr_matrix(parts, shape=(last - first, n_genes))[rows - first]
            start = stop
