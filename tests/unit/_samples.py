"""Samples as `scvi-core ingest` writes them, made by code."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_core.files import seal, sha256_text, write_parquet
from scvi_core.preprocess.store import write_store


def sample(X, name="a", batch="b", gene_ids=None, gene_names=None, kind="symbol", organism="human", **obs):
    """AnnData by the contract of counts.h5ad; X: (cells, genes) counts."""
    X = sp.csr_matrix(X)
    X.eliminate_zeros()
    X.sort_indices()
    top = X.data.max() if X.nnz else 0
    X = X.astype(next(t for t in (np.uint8, np.uint16, np.uint32) if top <= np.iinfo(t).max))
    n, g = X.shape
    gene_ids = [f"G{i}" for i in range(g)] if gene_ids is None else list(gene_ids)
    barcode = [f"c{i}" for i in range(n)]
    table = {"barcode": barcode, "sample": pd.Categorical([name] * n)}
    table["batch"] = pd.Categorical([batch] * n if isinstance(batch, str) else list(batch))
    frame = pd.DataFrame({**table, **obs}, index=[f"{name}:{b}" for b in barcode])
    var = pd.DataFrame({"gene_name": gene_ids if gene_names is None else list(gene_names)}, index=gene_ids)
    digest = sha256_text(json.dumps([name, X.toarray().tolist()]) if n * g < 1e5 else name)
    return ad.AnnData(
        X, frame, var, uns={"sample": name, "gene_ids": kind, "organism": organism, "content_sha256": digest}
    )


def judged(adata, keep=None):
    """A qc.parquet for it with the given cells kept (default all)."""
    n = adata.n_obs
    keep = np.ones(n, bool) if keep is None else np.asarray(keep, bool)
    obs = {c: adata.obs[c].astype(str).to_numpy() for c in ("barcode", "sample", "batch")}
    X = adata.X
    return pd.DataFrame(
        {
            "cell_id": adata.obs_names.to_numpy(),
            **obs,
            "n_counts": np.asarray(X.astype(np.int64).sum(axis=1)).ravel(),
            "n_genes": np.diff(X.indptr).astype(np.int32),
            "pct_mito": np.zeros(n, np.float32),
            "doublet_score": np.full(n, np.nan, np.float32),
            "keep": keep,
            "s_score": np.full(n, np.nan, np.float32),
            "g2m_score": np.full(n, np.nan, np.float32),
            "cycle_phase": "",
            "predicted_doublet": False,
        }
    )


def write_sample(path, adata):
    """As ingest leaves it: with its checksum after the end of what HDF5 reads."""
    adata.write_h5ad(path)
    seal(path, append=True)


def write(folder, adatas, keeps=None):
    """Write samples and their QC; returns (h5ads, qcs)."""
    h5ads, qcs = [], []
    for i, adata in enumerate(adatas):
        home = folder / adata.obs["sample"].iloc[0]
        home.mkdir(parents=True, exist_ok=True)
        write_sample(home / "counts.h5ad", adata)
        write_parquet(home / "qc.parquet", judged(adata, None if keeps is None else keeps[i]))
        h5ads.append(home / "counts.h5ad")
        qcs.append(home / "qc.parquet")
    return h5ads, qcs


def stored(folder, adata):
    """Path of a counts.zarr in `folder` of all genes, cells by turns in the samples s0 and s1 of batches b0 and b1."""
    parts = [sample(adata.X[i::2], f"s{i}", f"b{i}", adata.var_names) for i in (0, 1)]
    genes = pd.DataFrame({"gene_id": adata.var_names, "gene_name": adata.var_names, "selected": True})
    write_store(folder / "counts.zarr", *write(folder / "samples", parts), genes)
    return folder / "counts.zarr"


def split(adata, by):
    """A real dataset as samples, one a level of `by`."""
    names = [str(level) for level in pd.unique(adata.obs[by])]
    return [
        sample(adata.X[(adata.obs[by].astype(str) == n).to_numpy()], n.replace(" ", "_"), n, adata.var_names)
        for n in names
    ]
