"""The latent space made visible: neighbour graph, Leiden clusters, UMAP, t-SNE. scanpy, igraph and openTSNE do it."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from scvi_core.config import ClusterConfig
from scvi_core.files import Decisions, UserError


def cluster(latent_nk: np.ndarray, config: ClusterConfig, seed: int, decisions: Decisions) -> pd.DataFrame:
    """Clusters and two-dimensional coordinates of cells.

    Parameters
    ----------
    latent_nk : (cells, latent) float32.
    config : neighbours, resolutions, which pictures.
    seed : of all of them. Everything runs on one thread where threads would change the result.

    Returns
    -------
    pandas.DataFrame
        A row a cell: cluster (text; 0 is the largest), umap_1, umap_2, tsne_1, tsne_2 (float32, NaN where not asked
        for), and cluster_r{resolution} for every resolution after the first.

    Raises
    ------
    UserError
        When there are not more cells than neighbours.
    """
    import anndata as ad
    import scanpy as sc

    n_cells = len(latent_nk)
    if n_cells <= config.n_neighbors:
        raise UserError(
            f"cluster.n_neighbors: {config.n_neighbors} neighbours of {n_cells} cells; lower it below the cell count"
        )
    adata = ad.AnnData(np.zeros((n_cells, 1), dtype=np.float32), obsm={"latent": latent_nk})
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.neighbors(adata, n_neighbors=config.n_neighbors, use_rep="latent", random_state=seed)
        for i, resolution in enumerate(config.resolutions):
            sc.tl.leiden(
                adata, resolution, random_state=seed, flavor="igraph", n_iterations=-1, directed=False, key_added="c"
            )
            name = "cluster" if i == 0 else f"cluster_r{resolution:g}"
            out[name] = adata.obs["c"].astype(str).to_numpy()
            found = adata.obs["c"].nunique()
            decisions.add(name, found, f"Leiden clusters at resolution {resolution:g}, {config.n_neighbors} neighbours")
        empty = np.full((n_cells, 2), np.nan, dtype=np.float32)
        umap, tsne = empty, empty
        if config.umap:
            sc.tl.umap(adata, min_dist=config.umap_min_dist, random_state=seed)
            umap = adata.obsm["X_umap"].astype(np.float32)
        if config.tsne:
            tsne = _tsne(latent_nk, config.tsne_perplexity, seed, decisions)
    coordinates = {"umap_1": umap[:, 0], "umap_2": umap[:, 1], "tsne_1": tsne[:, 0], "tsne_2": tsne[:, 1]}
    return pd.DataFrame(out | coordinates)


def _tsne(latent_nk: np.ndarray, perplexity: float, seed: int, decisions: Decisions) -> np.ndarray:
    from openTSNE import TSNE

    most = (len(latent_nk) - 1) / 3
    if perplexity > most:
        decisions.add("tsne_perplexity", round(most, 1), f"{perplexity:g} is too many for {len(latent_nk)} cells")
        perplexity = most
    # one thread: the sums of forces depend on how they are split
    return np.asarray(TSNE(perplexity=perplexity, random_state=seed, n_jobs=1).fit(latent_nk), dtype=np.float32)
