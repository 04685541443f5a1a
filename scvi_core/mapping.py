"""New cells onto a fitted model: read them in any form, bring them to the model's genes, embed them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_core.counts import matrix_of
from scvi_core.files import Decisions, UserError
from scvi_core.log import log

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from scvi_core.api import Model


VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")


def embed(model: Model, cells: AnnData | pd.DataFrame | str | Path) -> pd.DataFrame:
    """Embed new cells in a model's latent space.

    Parameters
    ----------
    model : the model.
    cells : raw counts: an AnnData; a frame cells × genes (index: cell ids; columns: gene ids, or gene names);
        a path to an h5ad, zarr, 10x, loom or text file; or a frame of one text column that holds such paths.

    Returns
    -------
    pandas.DataFrame
        ``cell_id`` (str), ``z_0`` ... (float32): posterior means, a row a cell, in the order of the input.

    Raises
    ------
    UserError
        For another input, or cells that have fewer than half of the model's genes.

    Notes
    -----
    Genes of the model that the input lacks count as 0, and cells without a count in the model's genes are left out,
    each with a warning that says how many. Batch and covariates are not needed.
    """
    import pandas as pd

    if isinstance(cells, pd.DataFrame) and cells.shape[1] == 1 and not pd.api.types.is_numeric_dtype(cells.iloc[:, 0]):
        return pd.concat([embed(model, str(path)) for path in cells.iloc[:, 0]], ignore_index=True)
    adata = align(_read(cells), list(model.gene_ids), list(model.gene_names), model.layer)
    seen = np.asarray(adata.X.sum(axis=1)).ravel() > 0
    if not seen.all():
        log.warning("new cells: %d of %d have no counts in the model's genes: left out", (~seen).sum(), len(seen))
        adata = adata[seen].copy()
    latent = np.asarray(model.latent(adata), dtype=np.float32)
    frame = pd.DataFrame(latent, columns=[f"z_{k}" for k in range(latent.shape[1])])
    frame.insert(0, "cell_id", adata.obs_names.astype(str).to_numpy())
    return frame


def align(adata: AnnData, gene_ids: list[str], gene_names: list[str], layer: str | None = None) -> AnnData:
    """Bring cells to a model's genes, in its order.

    Parameters
    ----------
    adata : cells × any genes; their index or a text column of ``var`` names them by id (version suffixes allowed) or
        by name. Columns of one gene are summed.
    layer : where the counts are, if `adata` has that layer; else they are in X.
    gene_ids, gene_names : (genes,) of the model. A name that several of its genes share means the first.

    Returns
    -------
    anndata.AnnData
        cells × genes of the model (CSR, int64 or the input's float type), the input's ``obs``.

    Raises
    ------
    UserError
        When fewer than half of the model's genes are there.
    """
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    place = {name: i for names in (gene_names, gene_ids) for i, name in reversed(list(enumerate(names)))}
    fields = [adata.var_names, *(adata.var[c] for c in adata.var if not pd.api.types.is_numeric_dtype(adata.var[c]))]
    best = np.full(adata.n_vars, -1)
    for field in fields:
        target = np.array([place.get(VERSION.sub(r"\1", str(name)), -1) for name in field], dtype=np.int64)
        if len(np.unique(target)) > len(np.unique(best)):
            best = target
    missing = np.setdiff1d(np.arange(len(gene_ids)), best)
    if 2 * len(missing) > len(gene_ids):
        raise UserError(
            f"new cells: {len(missing)} of the model's {len(gene_ids)} genes are missing (such as "
            f"'{gene_ids[missing[0]]}'); name genes by the model's ids or names, and give all measured genes"
        )
    if len(missing):
        log.warning("new cells: %d of the model's %d genes are missing and count as 0", len(missing), len(gene_ids))
    x = matrix_of(adata, layer if layer in adata.layers else None)
    # input genes × model genes, ones where they are the same: one product reorders, drops, sums and fills
    source = np.flatnonzero(best >= 0)
    kind = x.dtype if x.dtype.kind == "f" else np.int64
    select = sp.csr_matrix((np.ones(len(source), dtype=kind), (source, best[source])), (adata.n_vars, len(gene_ids)))
    aligned = ad.AnnData(x @ select, obs=adata.obs, var=pd.DataFrame(index=pd.Index(gene_ids)))
    if layer is not None and layer in adata.layers:
        aligned.layers[layer] = aligned.X
    return aligned


def _read(cells: Any) -> AnnData:
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    if isinstance(cells, ad.AnnData):
        return cells
    if isinstance(cells, pd.DataFrame):
        obs, var = (pd.DataFrame(index=axis.astype(str)) for axis in (cells.index, cells.columns))
        try:
            return ad.AnnData(sp.csr_matrix(cells.to_numpy(dtype=np.float64)), obs=obs, var=var)
        except (TypeError, ValueError) as error:
            raise UserError(f"new cells: a frame of cells by genes holds counts only ({error})") from None
    if isinstance(cells, str | Path):
        from scvi_core.config import InputConfig
        from scvi_core.io import read_counts

        return read_counts(cells, InputConfig(), Decisions("embed"))
    raise UserError(
        f"new cells: {type(cells).__name__} cannot be read; give an AnnData, a frame of cells by genes, or a path"
    )
