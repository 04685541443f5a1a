"""What the steps of a build share: the plan of a fit, the tables they write, the record of a training run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvi_core import api
from scvi_core.config import Config, ModelConfig
from scvi_core.counts import Schema
from scvi_core.files import canonical_json, sha256_text, write_json
from scvi_core.preprocess.store import read_store

if TYPE_CHECKING:
    from anndata import AnnData


@dataclasses.dataclass(frozen=True)
class Plan:
    """A fit before it is made.

    Attributes
    ----------
    cells : the store's cells and genes, without counts.
    schema, gene_names, model : what is fitted, and how its columns are coded.
    data : digests of samples and used columns.
    about : entries of the model card: samples, organism, data_sha256.
    fingerprint : of the weights that will come of it.
    """

    cells: AnnData
    schema: Schema
    gene_names: list[str]
    model: ModelConfig
    data: dict[str, Any]
    about: dict[str, Any]
    fingerprint: str


def plan(store: Path, settings: Config) -> Plan:
    """What a fit of this store by this configuration is made of."""
    adata = read_store(store, counts=False)
    model = ModelConfig(**{key: getattr(settings.model, key) for key in ModelConfig.model_fields})
    schema = Schema.of(adata, "batch", model.categorical_covariates, model.continuous_covariates)
    api.check_design(model, schema)
    samples = json.loads(adata.uns["samples"])
    used = ["batch", *model.categorical_covariates, *model.continuous_covariates]
    columns = {name: sha256_text("\n".join(adata.obs[name].astype(str))) for name in used}
    data = {"samples": samples, "columns": columns}
    about = {
        "samples": {name: entry["n_cells"] for name, entry in samples.items()},
        "organism": str(adata.uns["organism"]),
        "data_sha256": sha256_text(canonical_json(data)),
    }
    names = [str(name) for name in adata.var["gene_name"]]
    fingerprint = api.fingerprint_of(schema, data, model, settings.train, settings.seed)
    return Plan(adata, schema, names, model, data, about, fingerprint)


def latent_table(cell_ids: Iterable[str], z_nk: np.ndarray) -> pd.DataFrame:
    """latent.parquet: ``cell_id``, then ``z_0`` ... float32."""
    frame = pd.DataFrame(z_nk, columns=[f"z_{k}" for k in range(z_nk.shape[1])])
    frame.insert(0, "cell_id", [str(c) for c in cell_ids])
    return frame


def cells_table(obs: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """cells.parquet: the fixed columns, the user's own, then t-SNE and further resolutions."""
    fixed = ["sample", "batch", "n_counts", "n_genes", "pct_mito", "doublet_score"]
    front = ["cluster", "umap_1", "umap_2"]
    own = [column for column in obs.columns if column not in fixed]
    found = found.set_index(obs.index)
    table = pd.concat([obs[fixed], found[front], obs[own], found.drop(columns=front)], axis=1)
    for column in table.columns:
        if isinstance(table[column].dtype, pd.CategoricalDtype):  # text reads the same in every Parquet reader
            table[column] = table[column].astype(object).where(table[column].notna(), None)
    table.insert(0, "cell_id", [str(c) for c in obs.index])
    return table.reset_index(drop=True)


def write_run(path: Path, began: float, model: api.Model, reused: bool) -> None:
    """Record what differs between two runs of one training, for MLflow; the results hold none of it.

    Parameters
    ----------
    path : the JSON file. began : when, in seconds since 1970. reused : whether training was skipped.
    """
    epochs = [] if reused else [round(float(s), 4) for s in model.history["seconds"]]
    n_train = model.card["metrics"]["n_train"]
    write_json(
        path,
        {
            "started": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - began, 2),
            "seconds_per_epoch": epochs,
            "cells_per_second": round(n_train * len(epochs) / max(sum(epochs), 1e-9)) if epochs else None,
            "host": platform.node(),
            "device": model.card["device"],
            "threads": torch.get_num_threads(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "git_revision": _git_revision(),
            "reused": reused,
        },
    )


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
