"""The atlas as one file for scanpy, cellxgene and R: ``atlas.h5ad``, written block by block.

Memory is that of the cell table and the neighbour graph, whatever the number of counts. Equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_core._version import __version__
from scvi_core.cluster import connectivities, neighbors
from scvi_core.config import Config
from scvi_core.files import Decisions, UserError, read_json, read_parquet, replacing, seal
from scvi_core.io.write import CHUNK, PACKED, Survivor, of_names
from scvi_core.normalise import TARGET, log_normalised
from scvi_core.preprocess.samples import cell_blocks
from scvi_core.report import sample_names
from scvi_core.report.viewer import MISSING, PALETTE, levels

if TYPE_CHECKING:
    import h5py

COLOURED = 500  # categories of a column that has colours, at most


def write_h5ad(out: Path, folder: Path, config: Config) -> None:
    """Write all that is known of an atlas as AnnData.

    X is log(1 + 10,000 x / total), float32 CSR, where total is the cell's ``n_counts``, over all genes; or the counts
    again (``export.x``). ``layers["counts"]`` are the counts, int32. obs is ``cells.parquet``, var ``genes.parquet``,
    obsm ``X_scVI``, ``X_umap``, ``X_tsne`` float32. obsp is the graph on which `cluster` ran, made again from the same
    latent space: it takes less than to keep it for everyone.

    Parameters
    ----------
    out : atlas.h5ad.
    folder : ``results/{atlas}`` with the files of the steps up to `cluster`.
    config : `samples`, `cluster`, `export`, `seed`, `threads` and the names of atlas and model.

    Raises
    ------
    UserError
        When a file is missing or damaged, or files are not of one build.
    """
    import h5py
    from anndata.io import write_elem

    z = read_parquet(folder / "latent.parquet", "embed")
    ids = pd.Index(z.pop("cell_id").to_numpy(object), name="cell_id")
    latent_nk = np.ascontiguousarray(z.to_numpy(np.float32))
    del z
    uns = {
        "scvi_core": provenance(read_json(folder / "model" / "model.json", "train"), config),
        "neighbors": {
            "connectivities_key": "connectivities",
            "distances_key": "distances",
            "params": {
                "method": "umap",
                "metric": "euclidean",
                "n_neighbors": config.cluster.n_neighbors,
                "random_state": config.seed,
                "use_rep": "X_scVI",
            },
        },
    }
    if config.export.x == "log1p":
        uns["log1p"] = {"base": math.e}  # given, as some readers do not take its absence for e
    with replacing(out, "H5AD") as temporary:
        with Survivor(temporary, "w+") as target, h5py.File(target, "w") as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            write_elem(file, "obsp", {})
            _write_graph(file["obsp"], latent_nk, config)  # first, while nothing else is in memory
            target.check()
            cells = read_parquet(folder / "cells.parquet", "cells")
            if not np.array_equal(ids, cells["cell_id"]):
                raise UserError(f"{folder / 'latent.parquet'}: its cells are not those of cells.parquet; embed again")
            paths = [folder / "samples" / name / "counts.h5ad" for name in sample_names(folder, config, cells)]
            genes = read_parquet(folder / "genes.parquet", "genes")
            if config.export.genes == "selected":
                genes = genes[genes["selected"]]
            obsm = {"X_scVI": latent_nk}
            for basis in ("umap", "tsne"):
                places = cells[[f"{basis}_1", f"{basis}_2"]].to_numpy(np.float32)
                if not np.isnan(places).all():
                    obsm[f"X_{basis}"] = places
            totals_n = cells["n_counts"].to_numpy(np.float64)
            obs, colours = cell_table(cells.drop(columns="cell_id"), ids)
            del cells
            uns |= {f"{column}_colors": np.array(found, dtype=object) for column, found in colours.items()}
            for key, value in {"obs": obs, "var": gene_table(genes), "obsm": obsm}.items():
                write_elem(file, key, value, dataset_kwargs=PACKED)
            del obs, obsm, latent_nk
            for key in ("layers", "varm", "varp"):
                write_elem(file, key, {})
            digest = of_names(ids, pd.Index(genes["gene_id"]))
            for content in _write_counts(file, paths, ids, genes, totals_n, config, target.check):
                digest.update(content.encode())
            write_elem(file, "uns", {**uns, "content_sha256": digest.hexdigest()}, dataset_kwargs=PACKED)
        seal(temporary, append=True)  # HDF5 reads nothing beyond its own end


def provenance(card: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What made the atlas: nothing that differs between two builds of the same, as a registry's version does."""
    return {
        "atlas": config.atlas,
        "fingerprint": card["fingerprint"],
        "model_uri": f"models:/{config.registered_name}",
        "model_query": f"tag.fingerprint = '{card['fingerprint']}'",
        "weights_sha256": card["weights_sha256"],
        "organism": str(card.get("organism") or "unknown"),
        "seed": config.seed,
        "version": __version__,
        "X": f"log(1 + {TARGET:,} x counts / n_counts)" if config.export.x == "log1p" else "counts",
    }


def cell_table(cells: pd.DataFrame, ids: pd.Index) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """cells.parquet as obs, and the colours of its categories, as on the page.

    Parameters
    ----------
    cells : without ``cell_id``, which are `ids`.

    Returns
    -------
    obs : indexed by cell id; texts are categories in natural order, unless every cell has its own.
    colours : column: a colour a category.
    """
    columns, colours = {}, {}
    for name in cells.columns:
        columns[name] = _categories(cells[name])
        if isinstance(columns[name], pd.Categorical) and 0 < len(columns[name].categories) <= COLOURED:
            colours[name] = [PALETTE[i % len(PALETTE)] for i in range(len(columns[name].categories))]
    return pd.DataFrame(columns, index=ids), colours


def gene_table(genes: pd.DataFrame) -> pd.DataFrame:
    """genes.parquet as var, indexed by gene id."""
    columns = {name: _categories(genes[name]) for name in genes.columns.drop(["gene_id", "gene_name"])}
    columns = {"gene_name": genes["gene_name"].to_numpy(object), **columns}
    return pd.DataFrame(columns, index=pd.Index(genes["gene_id"].to_numpy(object), name="gene_id"))


def _categories(values: pd.Series) -> np.ndarray | pd.Categorical:
    """Numbers as they are; texts as categories: the one text type for which AnnData can say that a value is absent."""
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy()
    names, codes = levels(values)
    if MISSING in names:  # the last
        codes = np.where(codes == len(names) - 1, -1, codes)
        names = names[:-1]
    if len(names) == len(values):
        return values.to_numpy(object)
    return pd.Categorical.from_codes(codes, np.array(names, dtype=object))


def _write_graph(group: h5py.Group, latent_nk: np.ndarray, config: Config) -> None:
    """Neighbours' distances, and the weights by which `cluster` joins them; none where there are too few cells."""
    from anndata.io import write_elem
    from scipy.sparse import csr_matrix

    n, k = len(latent_nk), config.cluster.n_neighbors - 1
    near_nk, distance_nk = neighbors(latent_nk, k, config.seed, config.threads, Decisions("export"))
    write_elem(group, "connectivities", connectivities(near_nk, distance_nk), dataset_kwargs=PACKED)
    distances = csr_matrix((distance_nk.ravel(), near_nk.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    distances.sort_indices()
    write_elem(group, "distances", distances, dataset_kwargs=PACKED)


def _write_counts(
    file: h5py.File,
    h5ads: Sequence[Path],
    ids: pd.Index,
    genes: pd.DataFrame,
    totals_n: np.ndarray,
    config: Config,
    check: Callable[[], None],
) -> list[str]:
    """Write ``layers/counts`` and ``X`` from the samples' counts; give the digest of each sample's content."""
    digests: list[str] = []
    counts = _create(file, "layers/counts", "int32", (len(ids), len(genes)))
    scaled = config.export.x == "log1p"
    X = _create(file, "X", "float32", (len(ids), len(genes))) if scaled else None
    lengths, at = [], 0
    for row, part in cell_blocks(h5ads, ids, genes["gene_id"], digests):
        each = np.diff(part.indptr)
        for name, values in (("indices", part.indices), ("data", part.data)):
            counts[name].resize((at + part.nnz,))
            counts[name][at:] = values
        if scaled:
            X["data"].resize((at + part.nnz,))
            X["data"][at:] = log_normalised(part.data, part.indptr, totals_n[row : row + len(each)])
        lengths.append(each)
        at += part.nnz
        check()
    indptr = np.append(0, np.cumsum(np.concatenate(lengths), dtype=np.int64))
    if at < 2**31:  # as anndata itself writes it; R has no whole numbers beyond
        indptr = indptr.astype(np.int32)
    counts.create_dataset("indptr", data=indptr, chunks=(min(len(indptr), CHUNK),), shuffle=True, **PACKED)
    if scaled:
        for name in ("indices", "indptr"):  # both matrices have their values at the same places: one copy, two names
            X[name] = counts[name]
    else:
        file["X"] = counts
    return digests


def _create(file: h5py.File, name: str, dtype: str, shape: tuple[int, int]) -> h5py.Group:
    """A CSR matrix as AnnData has it on disk, without entries yet."""
    group = file.create_group(name)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    group.attrs["shape"] = np.array(shape, dtype=np.int64)
    for entry, kind in (("data", dtype), ("indices", "int32")):
        if name != "X" or entry == "data":
            group.create_dataset(entry, (0,), kind, maxshape=(None,), chunks=(CHUNK,), shuffle=True, **PACKED)
    return group
