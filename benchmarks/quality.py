"""Methods on datasets: held-out likelihood, imputation, embedding and differential expression, by one yardstick.

    python benchmarks/quality.py COUNTS.h5ad [...] --seeds 0 --json quality.json
    python benchmarks/quality.py results/pancreas --seeds 0 1 2

A file holds raw counts in X, the batch in `--batch-key` and known cell types in `--label`; without the one or the other
there are dashes. A folder is an atlas: its store is the data, its own embedding one more row. Data, split, and the fits
of scvi-core and scvi-tools are those of benchmarks/train.py, and found where that made them (`--out`). Needs the
comparators: pip install scvi-core[peer], or --peer-python. What is finished is kept, by content: the same command goes
on where it was. What is measured, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, special, stats
from train import N_WEIGHED, N_WEIGHTS, _cached, _identity, _told, _versions, prepare, split

# method -> its name, the packages that decide it, what it can be asked
LINEAR = ("scanpy", "scikit-learn")
METHODS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "ours": ("scvi-core", (), ("embedding", "likelihood", "imputation", "de")),
    "peer": ("scvi-tools", (), ("embedding", "likelihood", "imputation", "de")),
    "pca": ("PCA", LINEAR, ("embedding", "imputation")),
    "fa": ("factor analysis", LINEAR, ("embedding", "likelihood", "imputation")),
    "combat": ("ComBat", LINEAR, ("embedding",)),
    "harmony": ("Harmony", ("harmonypy", *LINEAR), ("embedding",)),
    "scanorama": ("Scanorama", ("scanorama", *LINEAR), ("embedding",)),
    "mnn": ("MNN", ("scranpy", *LINEAR), ("embedding",)),
    "mean": ("gene means", LINEAR, ("imputation",)),
    "wilcoxon": ("Wilcoxon", LINEAR, ("de",)),
}
FITTED = ("ours", "peer")  # embedding and likelihood are those of train.py's fits
INTEGRATES = ("combat", "harmony", "scanorama", "mnn")  # nothing to do with one batch
TASKS = ("embedding", "likelihood", "imputation", "de")

PROTOCOL = 1  # of all that is made here: raise it when what a result means changes
N_COMPONENTS, N_FACTORS = 30, 10
MASKED = 0.1  # share of the non-zero counts set to zero
N_NEIGHBORS = 50  # of the entropy of mixing
MIN_CELLS = 10  # of a label, for differential expression
BLOCK = 512  # cells decoded at a time
RESOLUTIONS = (0.5, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)  # the cluster step's, then a grid

# table -> header -> key, digits
TABLES = {
    "Counts": {"held-out log p(x)": ("log_p", 1), "held-out -ELBO": ("nelbo", 1), "imputation": ("imputation", 3)},
    "Embedding": {
        "ASW": ("asw", 3), "ARI": ("kmeans_ari", 3), "NMI": ("kmeans_nmi", 3),
        "Leiden ARI": ("leiden_ari", 3), "Leiden NMI": ("leiden_nmi", 3), "entropy": ("entropy", 3),
        "iLISI": ("iLISI", 3), "kBET": ("KBET", 3), "connectivity": ("Graph connectivity", 3),
        "scIB bio": ("Bio conservation", 3), "scIB batch": ("Batch correction", 3), "scIB total": ("Total", 3),
    },
}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:  # this file, as the process of one result
        return work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    options = _options()
    warnings.filterwarnings("ignore")
    from scvi_core.files import UserError

    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Make every result, or find it made; print the tables."""
    from scvi_core.files import sha256_file, write_json

    versions = _installed(options)
    rows, agreements, datasets = [], [], []
    for path in options.counts:
        data = _atlas(path, options) if path.is_dir() else prepare(path, options)
        about = {"name": path.resolve().name.removesuffix(".h5ad"), "prepared_sha256": sha256_file(data)}
        about |= _described(data, options)
        datasets.append(about)
        for seed in options.seeds:
            made = {method: _row(data, about, method, seed, options, versions) for method in options.methods}
            changes = {method: row.pop("de") for method, row in made.items() if "de" in row}
            agreements += _agreements(about["name"], seed, changes)
            rows += made.values()
        if path.is_dir() and "embedding" in options.tasks:
            row = {"dataset": about["name"], "method": "atlas", "seed": options.seeds[0]}
            rows.append(row | {"space": _atlas_space(path, data)})
        _score(data, [row for row in rows if "space" in row], options, versions)
    print(_texts(rows, agreements, datasets, versions))
    if options.json:
        given = {key: getattr(options, key) for key in ("threads", "genes", "label", "batch_key", "max_epochs")}
        about = given | {"protocol": PROTOCOL, "versions": versions, "datasets": datasets}
        write_json(options.json, about | {"results": rows, "agreements": agreements})


# In this process: data, and the order of things.


def _installed(options: argparse.Namespace) -> dict[str, str]:
    """Versions here and at --peer-python. Methods whose packages are missing are left out, and said so."""
    have = _told(options.peer_python, sorted({"igraph"}.union(*(METHODS[method][1] for method in options.methods))))
    for method in list(options.methods):
        missing = [package for package in METHODS[method][1] if package not in have]
        if missing:
            print(f"{METHODS[method][0]} is left out: pip install {' '.join(missing)}", file=sys.stderr)
            options.methods.remove(method)
    versions = _versions(options) | have
    if "scib-metrics" not in versions and "embedding" in options.tasks:
        print("no embedding is scored: pip install scib-metrics", file=sys.stderr)
        options.tasks.remove("embedding")
    return versions


def _atlas(folder: Path, options: argparse.Namespace) -> Path:
    """The store of an atlas, with batches and labels, as a file like those of `prepare`."""
    from scvi_core.files import UserError, canonical_json, replacing, sha256_file, sha256_text
    from scvi_core.preprocess.store import read_store

    adata = read_store(folder / "counts.zarr")
    cells = pd.read_parquet(folder / "cells.parquet").set_index("cell_id").reindex(adata.obs_names)
    if options.label not in cells:
        columns = ", ".join(cells.columns)
        raise UserError(f"{folder}/cells.parquet: no column '{options.label}' for --label; it has {columns}")
    of = [sha256_file(folder / "cells.parquet"), str(adata.uns["samples"]), [str(gene) for gene in adata.var_names]]
    digest = sha256_text(canonical_json([of, options.batch_key, options.label]))[:12]
    out = options.out / folder.resolve().name / f"counts.{digest}.h5ad"
    if not out.exists():
        import anndata as ad

        columns = {options.batch_key: adata.obs["batch"].astype(str), options.label: cells[options.label].astype(str)}
        adata = ad.AnnData(adata.X.astype(np.float32), pd.DataFrame(columns), adata.var[[]])
        with replacing(out) as temporary:
            adata.write_h5ad(temporary)
    return out


def _atlas_space(folder: Path, data: Path) -> Path:
    """The embedding of an atlas, as a file like those that workers write."""
    from scvi_core.files import UserError, replacing, sha256_file

    out = data.parent / f"atlas.{sha256_file(folder / 'latent.parquet')[:12]}.npz"
    if not out.exists():
        frame = pd.read_parquet(folder / "latent.parquet")
        if list(frame["cell_id"]) != list(_obs(data).index):
            raise UserError(f"{folder}/latent.parquet: its cells are not those of counts.zarr; run `scvi-core embed`")
        with replacing(out) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, about="{}", latent=frame.drop(columns="cell_id").to_numpy(np.float32))
    return out


def _described(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Cells, batches, labels; and the entropy of the batches' sizes, that of perfect mixing."""
    obs = _obs(data)
    share_b = _batch(obs, options.batch_key).value_counts(normalize=True).to_numpy()
    n_labels = int(_labels(obs, options.label).nunique())
    entropy = float(special.entr(share_b).sum())
    return {"n_cells": len(obs), "n_batches": len(share_b), "n_labels": n_labels, "entropy_of_batches": entropy}


def _row(
    data: Path, about: dict[str, Any], method: str, seed: int, options: argparse.Namespace, versions: dict[str, str]
) -> dict[str, Any]:
    """All that a method is asked about a dataset, and can be."""
    row: dict[str, Any] = {"dataset": about["name"], "method": method, "seed": seed}
    for task in (task for task in options.tasks if task in METHODS[method][2]):
        if (task == "de" and about["n_labels"] < 2) or (method in INTEGRATES and about["n_batches"] < 2):
            continue
        of_fit = method in FITTED and task in ("embedding", "likelihood")
        found = _fit(data, method, seed, options, versions) if of_fit else None
        if not of_fit:
            found = _result(data, method, task, seed, options, [*_decides(method, versions), _code(method, task)])
        if task == "embedding":
            row["space"] = found["path"]
        elif task == "de":
            with np.load(found["path"]) as saved:
                row["de"] = found["about"]["groups"], saved["latent"]
        elif of_fit:
            row |= {"log_p": found["about"]["marginal_ll"], "nelbo": found["about"]["heldout_nelbo"]}
        else:
            row |= found["about"]
    return row


def _fit(data: Path, method: str, seed: int, options: argparse.Namespace, versions: dict[str, str]) -> dict[str, Any]:
    """The fit that train.py makes, under the name that it has there."""
    spec = {"kind": method, "seed": seed, "short": False, "threads": options.threads, "batch_key": options.batch_key}
    spec |= {"max_epochs": options.max_epochs}
    return _cached(data, spec, options, _identity(method, versions), f"{METHODS[method][0]}, seed {seed}")


def _result(
    data: Path, kind: str, task: str, seed: int, options: argparse.Namespace, of: list[Any], **more: Any
) -> dict[str, Any]:
    """What a worker of this file gives."""
    spec = {"kind": kind, "task": task, "seed": seed} | more
    spec |= {key: getattr(options, key) for key in ("threads", "batch_key", "label", "max_epochs")}
    return _cached(
        data, spec, options, [PROTOCOL, *of], f"{METHODS.get(kind, (kind,))[0]}, seed {seed}: {task}", __file__
    )


def _score(data: Path, rows: list[dict[str, Any]], options: argparse.Namespace, versions: dict[str, str]) -> None:
    """Put scores into the rows, in place of their spaces; one process for all new ones, as its start takes longest."""
    from scvi_core.files import canonical_json, sha256_text, write_json

    of = {package: versions.get(package) for package in ("scib-metrics", "scikit-learn", "scanpy", "igraph")}
    key = canonical_json([PROTOCOL, data.name, options.batch_key, options.label, of])
    kept = {row["space"]: data.parent / f"scores.{sha256_text(key + row['space'].name)[:12]}.json" for row in rows}
    spaces = {space.name: str(path) for space, path in kept.items() if not path.exists()}
    if spaces:
        found = _result(data, "scores", "embedding", 0, options, [of], spaces=sorted(spaces))["about"]
        for space, path in spaces.items():
            write_json(path, found[space])
    for row in rows:
        row |= json.loads(kept[row.pop("space")].read_text())


def _decides(method: str, versions: dict[str, str]) -> list[Any]:
    """What else than data, seed and threads decides a result: the method's packages."""
    if method in FITTED:
        return _identity(method, versions)
    return [{package: versions[package] for package in METHODS[method][1]}]


def _code(method: str, task: str) -> list[str]:
    """Digests of the files of ours that answer, beside those that fit."""
    if method != "ours":
        return []
    import scvi_core
    from scvi_core.files import sha256_file

    names = {"imputation": ["posterior.py"], "de": ["de.py", "posterior.py"]}[task]
    return [sha256_file(Path(scvi_core.__file__).parent / name) for name in names]


# In a process of its own: one result.


def work(spec: dict[str, Any], out: Path) -> None:
    """Do what `spec` says and write it: a JSON text `about`, and what is an array."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    array = np.empty(0)
    if spec["kind"] == "scores":
        about = {space: _scores(spec, space) for space in spec["spaces"]}
    else:
        import anndata as ad
        import torch

        torch.set_num_threads(spec["threads"])
        adata = ad.read_h5ad(spec["counts"])
        adata.X = sparse.csr_matrix(adata.X)
        adata.X.eliminate_zeros()
        adata.obs["batch_"] = _batch(adata.obs, spec["batch_key"])
        about, array = {
            "embedding": _embedding, "likelihood": _likelihood, "imputation": _imputation, "de": _de,
        }[spec["task"]](adata, spec)  # fmt: skip
    with open(out, "wb") as handle:
        np.savez(handle, about=json.dumps(about), latent=array)


def _obs(data: Path) -> pd.DataFrame:
    import anndata as ad

    return ad.read_h5ad(data, backed="r").obs


def _batch(obs: pd.DataFrame, column: str) -> pd.Series:
    return obs[column].astype(str) if column in obs else pd.Series("all", obs.index)


def _labels(obs: pd.DataFrame, column: str) -> pd.Series:
    """Text, or NaN where a cell has no label."""
    labels = obs[column].astype(object) if column in obs else pd.Series(np.nan, obs.index, dtype=object)
    return labels.where(~labels.astype(str).isin(["", "nan", "None", "NA"])).map(str, na_action="ignore")


# Embeddings of the methods that are not fitted by train.py.


def _embedding(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """(cells, latent) of a linear method; all cells decide it, held out or not, but for factor analysis."""
    import scanpy as sc

    work = _log_normalised(adata)
    method, batch = spec["kind"], adata.obs["batch_"]
    if method == "fa":
        rows, _ = split(adata.n_obs)
        y_ng = work.X.toarray()
        return {}, _factor_analysis(y_ng[rows], spec["seed"]).transform(y_ng)
    if method == "scanorama":  # has a normalisation and a decomposition of its own
        import scanorama

        names, parts = batch.unique(), []
        parts = [work.X[(batch == name).to_numpy()] for name in names]
        given = {"dimred": N_COMPONENTS, "seed": spec["seed"], "verbose": False}
        found, _ = scanorama.integrate(parts, [list(work.var_names)] * len(parts), **given)
        latent = np.empty((adata.n_obs, found[0].shape[1]), np.float32)
        for name, part in zip(names, found, strict=True):
            latent[(batch == name).to_numpy()] = part
        return {}, latent
    if method == "combat":
        work.X = work.X.toarray()
        sc.pp.combat(work, key="batch_")
    sc.pp.scale(work, max_value=10)
    sc.pp.pca(work, n_comps=N_COMPONENTS, random_state=spec["seed"])
    z_nk = work.obsm["X_pca"]
    if method == "harmony":
        import harmonypy

        given = {"random_state": spec["seed"], "ncores": spec["threads"], "verbose": False}
        z_nk = np.asarray(harmonypy.run_harmony(z_nk, adata.obs, "batch_", **given).Z_corr)
    if method == "mnn":
        import scranpy

        found = scranpy.correct_mnn(z_nk.T.astype(np.float64), list(batch), num_threads=spec["threads"])
        z_nk = found["corrected"].T
    return {}, np.ascontiguousarray(z_nk, dtype=np.float32)


def _log_normalised(adata: Any) -> Any:
    """Counts per 10,000 of the cell, log(1 + x)."""
    import anndata as ad

    y_ng = (sparse.diags_array(1e4 / _library(adata.X)) @ adata.X).tocsr().astype(np.float32)
    return ad.AnnData(sparse.csr_matrix(y_ng.log1p()), adata.obs[["batch_"]].copy(), adata.var[[]].copy())


def _library(X: sparse.csr_matrix) -> np.ndarray:
    return np.maximum(np.asarray(X.sum(1), dtype=np.float64).ravel(), 1.0)


def _factor_analysis(y_ng: np.ndarray, seed: int) -> Any:
    from sklearn.decomposition import FactorAnalysis

    return FactorAnalysis(N_FACTORS, random_state=seed).fit(y_ng)


# Scores of an embedding.


def _scores(spec: dict[str, Any], space: str) -> dict[str, float]:
    """What can be said of it: mixing where there are batches, agreement where there are labels, scIB's with labels."""
    obs = _obs(Path(spec["counts"]))
    batch, labels = _batch(obs, spec["batch_key"]), _labels(obs, spec["label"])
    with np.load(Path(spec["counts"]).parent / space) as saved:
        latent = saved["latent"]
    known = labels.notna().to_numpy()
    out: dict[str, float] = {}
    if batch.nunique() > 1:
        out["entropy"] = entropy_of_mixing(latent, batch.to_numpy())
    if labels.nunique() > 1:
        out |= _clusters(latent[known], labels[known].to_numpy(), spec["seed"]) | _leiden(latent, labels, spec["seed"])
        out |= {str(k): float(v) for k, v in _scib({"z": latent[known]}, labels[known], batch[known]).loc["z"].items()}
    return {key: value for key, value in out.items() if np.isfinite(value)}


def entropy_of_mixing(latent: np.ndarray, batch: np.ndarray, n_neighbors: int = N_NEIGHBORS) -> float:
    """Entropy, nats, of the batches among a cell's nearest neighbours, itself left out; the mean over all cells.

    As Haghverdi et al. (2018) and Lopez et al. (2018), who average over random cells and have two batches. It reaches
    the entropy of the batches' shares where cells lie at random; no batch near those of another gives 0.
    """
    from sklearn.neighbors import NearestNeighbors

    codes = np.unique(batch, return_inverse=True)[1]
    k = min(n_neighbors, len(latent) - 1)
    near_nm = codes[NearestNeighbors(n_neighbors=k).fit(latent).kneighbors(return_distance=False)]
    return float(sum(special.entr((near_nm == b).mean(1)).mean() for b in range(codes.max() + 1)))


def _clusters(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """The paper's: silhouette of the labels; k-means with as many clusters as labels against them."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    found = KMeans(len(np.unique(labels)), n_init=20, random_state=seed).fit_predict(latent)
    return {
        "asw": float(silhouette_score(latent, labels)),
        "kmeans_ari": float(adjusted_rand_score(labels, found)),
        "kmeans_nmi": float(normalized_mutual_info_score(labels, found)),
    }


def _leiden(latent: np.ndarray, labels: pd.Series, seed: int) -> dict[str, float]:
    """Leiden of all cells, by the cluster step's own function and settings, against the labels there are."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    from scvi_core.cluster import cluster
    from scvi_core.config import ClusterConfig
    from scvi_core.files import Decisions

    config = ClusterConfig(resolutions=RESOLUTIONS, umap=False, tsne=False)
    found = cluster(latent, config, seed, 1, Decisions("quality"))
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
    import anndata as ad
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


# Held-out likelihood of factor analysis, on the scale of the others.


def _likelihood(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    rows, held = split(adata.n_obs)
    fitted = _factor_analysis(np.log1p(adata.X[rows].toarray()), spec["seed"])
    noise_g = np.maximum(fitted.noise_variance_, np.log(2) ** 2 / len(rows))  # of a gene with one count in all
    given = fitted.mean_, fitted.components_, noise_g
    rng = np.random.default_rng(spec["seed"])
    x_ng = adata.X[held[:N_WEIGHED]].toarray()
    log_p_n = [factor_log_likelihood(x_g, *given, N_WEIGHTS, rng) for x_g in x_ng]
    return {"log_p": float(np.mean(log_p_n))}, np.array(log_p_n)


def factor_log_likelihood(
    x_g: np.ndarray, mean_g: np.ndarray, loadings_kg: np.ndarray, noise_g: np.ndarray, n: int, rng: np.random.Generator
) -> float:
    """log p(x), nats, of a cell's counts under factor analysis of log(1 + x), as a model of counts.

    y = mean + z W + e, z ~ N(0, I), e_g ~ N(0, noise_g), and the count is exp(y) - 1 rounded: the probability of x is
    that of y between log(x + 1/2) and log(x + 3/2), of 0 all below log(3/2). So it is a probability, as that of a count
    model is; the density of log(1 + x), even with its Jacobian, is none and exceeds 1 where counts are nearly always 0.
    By importance sampling of z, `n` draws, with the posterior given log(1 + x) as the proposal.
    """
    scaled_kg = loadings_kg / noise_g
    precision_kk = np.eye(len(loadings_kg)) + scaled_kg @ loadings_kg.T
    center_k = np.linalg.solve(precision_kk, scaled_kg @ (np.log1p(x_g) - mean_g))
    root_kk = np.linalg.cholesky(precision_kk)
    normal_sk = rng.standard_normal((n, len(center_k)))
    z_sk = center_k + np.linalg.solve(root_kk.T, normal_sk.T).T
    deviation_g = np.sqrt(noise_g)
    y_sg = mean_g + z_sk @ loadings_kg
    below = np.where(x_g > 0, np.log(x_g + 0.5), -np.inf)
    log_p_s = _log_between((below - y_sg) / deviation_g, (np.log(x_g + 1.5) - y_sg) / deviation_g).sum(1)
    log_ratio_s = (normal_sk**2 - z_sk**2).sum(1) / 2 - np.log(np.diag(root_kk)).sum()  # prior over proposal
    return float(special.logsumexp(log_p_s + log_ratio_s) - np.log(n))


def _log_between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """log(Phi(high) - Phi(low)), in the tail where it can be told."""
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    log_high = special.log_ndtr(high)
    return log_high + np.log1p(-np.exp(np.minimum(special.log_ndtr(low) - log_high, -1e-15)))


# Imputation.


def _imputation(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Median absolute error at counts that were set to zero before the method saw them; in counts."""
    adata.X, rows, columns, true = corrupted(adata.X, MASKED, spec["seed"])
    block = _imputer(adata, spec)
    found = np.empty(len(true))
    for start in range(0, adata.n_obs, BLOCK):
        mine = (rows >= start) & (rows < start + BLOCK)
        found[mine] = block(np.arange(start, min(start + BLOCK, adata.n_obs)))[rows[mine] - start, columns[mine]]
    return {"imputation": float(np.median(np.abs(found - true))), "n_masked": len(true)}, found


def corrupted(
    X: sparse.csr_matrix, share: float, seed: int
) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray, np.ndarray]:
    """`X` with a share of its non-zeros set to zero, chosen alike among all; their cells, genes and values.

    A cell that would be left without counts keeps its own.
    """
    entries = X.tocoo()
    chosen = np.zeros(X.nnz, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(X.nnz)[: int(share * X.nnz)]] = True
    left_n = np.bincount(entries.row[~chosen], minlength=X.shape[0])
    chosen &= left_n[entries.row] > 0
    kept = sparse.csr_matrix((entries.data[~chosen], (entries.row[~chosen], entries.col[~chosen])), X.shape)
    return kept, entries.row[chosen], entries.col[chosen], entries.data[chosen]


def _imputer(adata: Any, spec: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the expected counts (rows, genes) of cells, fitted to all of the corrupted counts."""
    method, library_n = spec["kind"], _library(adata.X)
    if method == "ours":
        model = _fit_ours(adata, spec)
        given = {"library_size": None, "n_samples": 25, "seed": spec["seed"]}
        return lambda rows: model.normalized_expression(adata[rows].copy(), **given).to_numpy()
    if method == "peer":
        model = _fit_peer(adata, spec)
        given = {"library_size": "latent", "n_samples": 25, "return_mean": True, "return_numpy": True}
        return lambda rows: model.get_normalized_expression(indices=rows, **given)
    if method == "mean":
        share_g = np.asarray(adata.X.sum(0)).ravel() / adata.X.sum()
        return lambda rows: library_n[rows, None] * share_g
    y_ng = _log_normalised(adata).X.toarray()
    if method == "pca":
        from sklearn.decomposition import PCA

        model = PCA(N_COMPONENTS, svd_solver="arpack", random_state=spec["seed"]).fit(y_ng)
    else:
        model = _factor_analysis(y_ng, spec["seed"])

    def counts(rows: np.ndarray) -> np.ndarray:
        found = model.transform(y_ng[rows]) @ model.components_ + model.mean_
        return np.expm1(np.maximum(found, 0)) * library_n[rows, None] / 1e4

    return counts


def _fit_ours(adata: Any, spec: dict[str, Any]) -> Any:
    """Ours on all cells, every setting its default."""
    import scvi_core as sv

    train = sv.TrainConfig(max_epochs=spec["max_epochs"]) if spec["max_epochs"] else None
    none = np.empty(0, np.int64)
    return sv.fit(adata, "batch_", train=train, holdout=none, seed=spec["seed"], device="cpu", progress=False)


def _fit_peer(adata: Any, spec: dict[str, Any]) -> Any:
    """scvi-tools' SCVI on all cells, every setting its default."""
    import scvi

    scvi.settings.seed = spec["seed"]
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch_")
    model = scvi.model.SCVI(adata)
    given = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    model.train(max_epochs=spec["max_epochs"], train_size=1.0, **given)
    return model


# Differential expression.


def _de(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """log2 fold change of each label against all other labelled cells, (labels, genes), by the method's defaults."""
    labels = _labels(adata.obs, spec["label"])
    adata.obs["group"] = labels
    sizes = labels.value_counts()
    groups = sorted(sizes.index[sizes >= MIN_CELLS])
    small = sorted(sizes.index[sizes < MIN_CELLS])
    if small:
        print(f"labels of fewer than {MIN_CELLS} cells are not compared: {', '.join(small)}", file=sys.stderr)
    if len(groups) < 2:
        return {"groups": []}, np.empty((0, adata.n_vars))
    adata = adata[labels.notna().to_numpy()].copy()
    adata.obs["group"] = adata.obs["group"].astype("category")
    if spec["kind"] == "ours":
        frame = _fit_ours(adata, spec).differential_expression(adata, groupby="group", seed=spec["seed"])
        frame = frame.pivot(index="group", columns="gene_id", values="lfc_mean")
    elif spec["kind"] == "peer":
        found = _fit_peer(adata, spec).differential_expression(groupby="group", mode="change", silent=True)
        found = found.rename_axis("gene").reset_index()
        frame = found.pivot(index="group1", columns="gene", values="lfc_mean")
    else:
        import scanpy as sc

        work = _log_normalised(adata)
        work.obs["group"] = adata.obs["group"]
        sc.tl.rank_genes_groups(work, "group", groups=groups, method="wilcoxon")
        found = sc.get.rank_genes_groups_df(work, None if len(groups) > 1 else groups)
        frame = found.pivot(index="group", columns="names", values="logfoldchanges")
    frame.index = frame.index.astype(str)
    return {"groups": groups}, frame.reindex(index=groups, columns=list(adata.var_names)).to_numpy(np.float64)


def _agreements(dataset: str, seed: int, changes: dict[str, tuple[list[str], np.ndarray]]) -> list[dict[str, Any]]:
    """Of each pair of methods, Spearman's correlation over genes of the fold changes, label by label."""
    out = []
    for a, b in itertools.combinations(changes, 2):
        (groups, lfc_a), (_, lfc_b) = changes[a], changes[b]
        of_group = {}
        for group, x, y in zip(groups, lfc_a, lfc_b, strict=True):
            both = np.isfinite(x) & np.isfinite(y)
            value = float(stats.spearmanr(x[both], y[both]).statistic) if both.any() else np.nan
            of_group |= {group: value} if np.isfinite(value) else {}
        out.append({"dataset": dataset, "seed": seed, "methods": [a, b], "spearman": of_group})
    return out


# What is shown.


def _texts(
    rows: list[dict[str, Any]],
    agreements: list[dict[str, Any]],
    datasets: list[dict[str, Any]],
    versions: dict[str, str],
) -> str:
    """Markdown: a table for the counts, one for the embeddings, one for differential expression."""
    names = {method: _title(method, versions) for method in METHODS} | {"atlas": "the atlas' own"}
    sizes = {}
    for d in datasets:
        batches = (
            f"{d['n_batches']} batches (entropy {d['entropy_of_batches']:.3f})" if d["n_batches"] > 1 else "1 batch"
        )
        sizes[d["name"]] = f"{d['name']}: {d['n_cells']:,} cells, {batches}, {d['n_labels']} labels"
    texts = []
    for title, columns in TABLES.items():
        keys = {key for key, _ in columns.values()}
        mine = [row for row in rows if keys & set(row)]
        if not mine:
            continue
        lines = [title, "", "| dataset | method | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
        for dataset, size in sizes.items():
            for method in dict.fromkeys(row["method"] for row in mine if row["dataset"] == dataset):
                these = [row for row in mine if (row["dataset"], row["method"]) == (dataset, method)]
                cells = [_cell([row[key] for row in these if key in row], digits) for key, digits in columns.values()]
                lines.append(f"| {size} | {names[method]} | " + " | ".join(cells) + " |")
                size = ""
        texts.append("\n".join(lines))
    if agreements:
        head = "| dataset | methods | median over labels | lowest | labels |"
        lines = ["Differential expression: Spearman of log fold changes", "", head, "|---|---|---:|---:|---:|"]
        for dataset, a, b in dict.fromkeys((one["dataset"], *one["methods"]) for one in agreements):
            these = [one["spearman"] for one in agreements if (one["dataset"], *one["methods"]) == (dataset, a, b)]
            these = [list(of_group.values()) for of_group in these if of_group]
            cells = [_cell([statistics.median(v) for v in these], 3), _cell([min(v) for v in these], 3)]
            n_labels = len(these[0]) if these else 0
            lines.append(f"| {dataset} | {names[a]}, {names[b]} | " + " | ".join(cells) + f" | {n_labels} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _title(method: str, versions: dict[str, str]) -> str:
    """The method's name, with the version where it is a package's."""
    name, packages, _ = METHODS[method]
    if method in FITTED:
        return f"{name} {versions.get(name, '')}".strip()
    package = packages[0]
    return name if package in LINEAR or package not in versions else f"{name} ({package} {versions[package]})"


def _cell(values: list[float], digits: int) -> str:
    """Median, and the range where there is one."""
    if not values:
        return "-"
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "counts", type=Path, nargs="+", help="AnnData files with raw counts in X, or folders of atlases"
    )
    parser.add_argument("--label", default="cell_type", help="cell column with the known cell types")
    parser.add_argument("--batch-key", default="batch", help="cell column with the batch; ignored where there is none")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--genes", type=int, default=2000, help="where a file has more, that many variable ones")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, the same for all methods")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has the others; default: this one")
    parser.add_argument("--max-epochs", type=int, help="of the fits, to try this script; default: each one's own rule")
    parser.add_argument("--out", type=Path, default=Path("results/train-benchmark"), help="folder that keeps results")
    parser.add_argument("--json", type=Path, help="also write every number, seed by seed, here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
