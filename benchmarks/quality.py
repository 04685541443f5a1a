"""How good is the embedding? An atlas beside PCA and scvi-tools, on the same genes and cells, by one yardstick.

    python benchmarks/quality.py results/pancreas --label cell_type --seeds 0 1 2 --json quality.json

Needs the peers: pip install scvi-core[peer]. What is measured, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numba
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scvi_core import api
from scvi_core.cluster import cluster
from scvi_core.config import ClusterConfig, Config
from scvi_core.files import Decisions, UserError, canonical_json, replacing, sha256_text, write_json
from scvi_core.log import log
from scvi_core.preprocess.store import read_store

RESOLUTIONS = (0.5, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)  # the cluster step's, then a grid
COLUMNS = {
    "ARI": "leiden_ari", "NMI": "leiden_nmi", "clusters": "n_clusters", "best ARI": "best_ari", "best NMI": "best_nmi",
    "scIB bio": "Bio conservation", "scIB batch": "Batch correction", "scIB total": "Total",
    "seconds": "seconds", "epochs": "epochs",
}  # fmt: skip
METHODS = ("ours", "pca", "scvi-tools")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(min(options.threads, numba.config.NUMBA_NUM_THREADS))
    warnings.filterwarnings("ignore")
    log.setLevel(logging.WARNING)
    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Fetch or fit every latent space, score them all, print the table."""
    for module, package in (("scib_metrics", "scib-metrics"), ("scvi", "scvi-tools")):
        if (module == "scib_metrics" or package in options.methods) and importlib.util.find_spec(module) is None:
            raise UserError(f"{package} is not installed in this environment; pip install scvi-core[peer]")
    adata = read_store(options.atlas / "counts.zarr")
    labels = _labels(options.atlas, options.label, adata)
    built = api.load(options.atlas / "model")
    seeds = options.seeds or [built.seed]
    out = options.out or options.atlas.parent / "quality" / options.atlas.name
    data = sha256_text("\n".join([*adata.obs_names, *adata.var_names]) + str(adata.uns["samples"]))

    spaces: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in seeds:
        if "ours" in options.methods and seed == built.seed and not options.refit:
            spaces["scvi-core", seed] = _own(options.atlas, built, adata)
        elif "ours" in options.methods:
            of = [data, built.model.model_dump(), built.train.model_dump(), api.code_version()]
            spaces["scvi-core", seed] = _cached(out, "scvi-core", seed, of, lambda s=seed: _refit(built, adata, s))
        if "pca" in options.methods:
            for k in sorted({30, built.model.n_latent}, reverse=True):  # nothing random: one space for all seeds
                name = f"PCA, {k} components"
                spaces[name, seed] = _cached(out, name, 0, [data], lambda k=k: _pca(adata, k))
        if "scvi-tools" in options.methods:
            name = f"scvi-tools {importlib.metadata.version('scvi-tools')}"
            spaces[name, seed] = _cached(out, name, seed, [data], lambda s=seed: _scvi_tools(adata, s))

    scores = _score(spaces, labels, adata.obs["batch"])
    print(f"{options.atlas.name}: {adata.n_obs} cells, {adata.n_vars} genes, {adata.obs['batch'].nunique()} batches;")
    print(f"{labels.nunique()} labels in {options.label} on {labels.notna().sum()} cells; seeds {seeds}\n")
    print(_table(scores))
    if options.json:
        packages = ("scvi-core", "scib-metrics", "scanpy", "igraph", "torch")
        about = {
            "atlas": options.atlas.name, "n_cells": adata.n_obs, "n_genes": adata.n_vars, "data_sha256": data,
            "label": options.label, "resolutions": RESOLUTIONS, "pcr_comparison": False, "threads": options.threads,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }  # fmt: skip
        rows = scores.astype(object).where(scores.notna(), None).to_dict("records")
        write_json(options.json, about | {"results": rows})


# Latent spaces: each function gives latent (cells, latent), the seconds it took, the epochs it ran (NaN: not known).


def _own(atlas: Path, built: api.Model, adata: ad.AnnData) -> dict[str, Any]:
    """The atlas' own; its time is that of its build, if it was trained and not taken from the registry."""
    frame = pd.read_parquet(atlas / "latent.parquet")
    if list(frame["cell_id"]) != list(adata.obs_names):
        raise UserError(f"{atlas}/latent.parquet: its cells are not those of counts.zarr; run `scvi-core embed` again")
    record = atlas / "logs" / "train_run.json"
    told = json.loads(record.read_text()) if record.exists() else {"reused": True}
    seconds, latent = np.nan if told["reused"] else told["seconds"], frame.drop(columns="cell_id").to_numpy(np.float32)
    return {"latent": latent, "seconds": seconds, "epochs": built.card["metrics"]["epochs"]}


def _refit(built: api.Model, adata: ad.AnnData, seed: int) -> dict[str, Any]:
    """The same model and training as the atlas', from a seed."""
    began = time.perf_counter()
    model = api.fit(adata, built.schema.batch_key, model=built.model, train=built.train, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    return {"latent": model.latent(adata), "seconds": seconds, "epochs": model.card["metrics"]["epochs"]}


def _scvi_tools(adata: ad.AnnData, seed: int) -> dict[str, Any]:
    """scvi-tools' SCVI, every setting its default."""
    import scvi

    scvi.settings.seed = seed
    counts = ad.AnnData(adata.X.astype(np.float32), adata.obs[["batch"]].copy(), adata.var[[]].copy())
    scvi.model.SCVI.setup_anndata(counts, batch_key="batch")
    model = scvi.model.SCVI(counts)
    began = time.perf_counter()
    model.train(enable_progress_bar=False)
    seconds = time.perf_counter() - began
    epochs = len(model.history["elbo_train"])
    return {"latent": model.get_latent_representation(), "seconds": seconds, "epochs": epochs}


def _pca(adata: ad.AnnData, n_components: int) -> dict[str, Any]:
    """Counts per 10,000 of the cell (all its genes), log(1 + x), each gene scaled (clipped at 10), components."""
    began = time.perf_counter()
    scale = sparse.diags_array(1e4 / np.maximum(adata.obs["n_counts"].to_numpy(), 1))
    work = ad.AnnData(sparse.csr_matrix(scale @ adata.X).astype(np.float32))
    sc.pp.log1p(work)
    sc.pp.scale(work, max_value=10)
    sc.pp.pca(work, n_comps=n_components)
    return {"latent": work.obsm["X_pca"], "seconds": time.perf_counter() - began, "epochs": np.nan}


def _cached(folder: Path, name: str, seed: int, of: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, kept in a file named by all that decides it."""
    stem = name.replace(",", "").replace(" ", "-")
    path = folder / f"{stem}.seed{seed}.{sha256_text(canonical_json([name, seed, of]))[:12]}.npz"
    if not path.exists():
        print(f"fitting {name}, seed {seed} ...", file=sys.stderr, flush=True)
        made = make()
        with replacing(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **made)
    with np.load(path) as saved:
        return {"latent": saved["latent"], "seconds": float(saved["seconds"]), "epochs": float(saved["epochs"])}


def _score(spaces: dict[tuple[str, int], dict[str, Any]], labels: pd.Series, batch: pd.Series) -> pd.DataFrame:
    """A row a method and seed: Leiden on all cells, compared on the labelled ones; scIB on the labelled ones."""
    known = labels.notna().to_numpy()
    keys = {at: at[0] if at[0].startswith("PCA") else f"{at[0]} {at[1]}" for at in spaces}  # PCA is one for all seeds
    scib = _scib({keys[at]: space["latent"][known] for at, space in spaces.items()}, labels[known], batch[known])
    rows = []
    for (method, seed), space in spaces.items():
        row = {"method": method, "seed": seed, "seconds": space["seconds"], "epochs": space["epochs"]}
        rows.append(row | _leiden(space["latent"], labels, seed) | scib.loc[keys[method, seed]].to_dict())
    return pd.DataFrame(rows)


def _leiden(latent: np.ndarray, labels: pd.Series, seed: int) -> dict[str, float]:
    """Agreement of Leiden clusters with the labels, by the cluster step's own function and settings."""
    config = ClusterConfig(resolutions=RESOLUTIONS, umap=False, tsne=False)
    found = cluster(latent, config, seed, Decisions("quality"))
    known = labels.notna().to_numpy()
    columns = ["cluster", *(f"cluster_r{r:g}" for r in RESOLUTIONS[1:])]
    out: dict[str, float] = {"n_clusters": int(found["cluster"].nunique())}
    for name, measure in (("ari", adjusted_rand_score), ("nmi", normalized_mutual_info_score)):
        values = [float(measure(labels[known], found.loc[known, column])) for column in columns]
        best = int(np.argmax(values))
        out |= {f"leiden_{name}": values[0], f"best_{name}": values[best], f"best_{name}_resolution": RESOLUTIONS[best]}
    return out


def _scib(spaces: dict[str, np.ndarray], labels: pd.Series, batch: pd.Series) -> pd.DataFrame:
    """scib-metrics, unscaled. PCR comparison is off: it scores against PCA, which is one of those compared."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker

    logging.getLogger("scib_metrics").setLevel(logging.WARNING)  # else it names every label that kBET leaves out
    obs = pd.DataFrame({"label": labels.astype(str).astype("category"), "batch": batch.astype(str).astype("category")})
    adata = ad.AnnData(np.zeros((len(obs), 1), np.float32), obs, obsm=spaces)
    several = BatchCorrection(pcr_comparison=False) if obs["batch"].nunique() > 1 else None
    bench = Benchmarker(
        adata, "batch", "label", list(spaces), batch_correction_metrics=several, n_jobs=1, progress_bar=False,
        pre_integrated_embedding_obsm_key=next(iter(spaces)),  # only PCR comparison would read it
    )  # fmt: skip
    bench.benchmark()
    return bench.get_results(min_max_scale=False).loc[list(spaces)].astype(float)


def _table(scores: pd.DataFrame) -> str:
    """Markdown: medians over seeds, and the range where there are several."""
    shown = {head: key for head, key in COLUMNS.items() if key in scores}
    lines = ["| method | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for method, rows in scores.groupby("method", sort=False):
        cells = [
            _cell(rows[key].dropna(), 0 if head in ("clusters", "seconds", "epochs") else 3)
            for head, key in shown.items()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series, digits: int) -> str:
    low, middle, high = (f"{v:.{digits}f}" for v in (values.min(), values.median(), values.max()))
    return middle.replace("nan", "-") if low == high else f"{middle} ({low} to {high})"


def _labels(atlas: Path, column: str, adata: ad.AnnData) -> pd.Series:
    cells = pd.read_parquet(atlas / "cells.parquet").set_index("cell_id")
    if column not in cells:
        raise UserError(f"{atlas}/cells.parquet: no column '{column}' for --label; it has {', '.join(cells.columns)}")
    labels = cells[column].reindex(adata.obs_names)
    labels = labels.where(~labels.astype(str).isin(["", "nan", "None"]))
    if labels.nunique() < 2:
        raise UserError(f"{atlas}/cells.parquet: column '{column}' for --label holds fewer than 2 labels; name another")
    return labels


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("atlas", type=Path, help="folder of an atlas, such as results/pancreas")
    parser.add_argument("--label", required=True, help="cell column with the known cell types")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the atlas' own")
    parser.add_argument(
        "--refit", action="store_true", help="fit the atlas' own seed anew too, to time it here and now"
    )
    parser.add_argument("--threads", type=int, default=Config().threads, help="CPU threads, the same for all methods")
    parser.add_argument("--out", type=Path, help="folder that keeps latents; default: quality/{atlas} beside the atlas")
    parser.add_argument("--json", type=Path, help="also write every number, seed by seed, here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
