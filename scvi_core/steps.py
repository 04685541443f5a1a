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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvi_core import api
from scvi_core.config import Config, ModelConfig
from scvi_core.counts import Counts, Schema, pack
from scvi_core.files import UserError, canonical_json, parquet_writer, sha256_text, write_json
from scvi_core.fingerprint import fingerprint
from scvi_core.log import log
from scvi_core.preprocess.store import read_store
from scvi_core.stream import open_counts

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
    digest = fingerprint(schema, data, model, settings.train, settings.seed)
    return Plan(adata, schema, names, model, data, about, digest)


def is_model_of(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds a whole model of this fingerprint."""
    try:
        return api.load(folder, "cpu").fingerprint == fingerprint
    except (UserError, OSError):
        return False


def write_expression(
    path: Path, cell_ids: Sequence[str], gene_ids: Sequence[str], blocks: Iterable[tuple[slice, np.ndarray]]
) -> None:
    """expression.parquet: ``cell_id``, then a float32 column a gene; row groups of about 10^6 values, one in memory.

    Parameters
    ----------
    blocks : (place of the cells, (cells, genes) float32), from first to last cell.
    """
    import pyarrow as pa

    schema = pa.schema([("cell_id", pa.string()), *((gene, pa.float32()) for gene in gene_ids)])
    least = max(1, 10**6 // len(gene_ids))
    with parquet_writer(path, schema) as writer:
        start, held = 0, []
        for at, values_ng in blocks:
            held.append(values_ng)
            if at.stop - start >= least or at.stop == len(cell_ids):
                values_gn = np.ascontiguousarray(np.concatenate(held).T)
                ids = [str(c) for c in cell_ids[start : at.stop]]
                writer.write_table(pa.table([pa.array(ids, pa.string()), *map(pa.array, values_gn)], schema=schema))
                start, held = at.stop, []


def open_store(path: Path, model: api.Model, memory_gb: float, design: bool = True) -> tuple[pd.Index, Counts]:
    """Ids of a store's cells, and their counts for a fitted model, streamed where they are larger than `memory_gb`.

    Parameters
    ----------
    design : False leaves batch and covariates out, where the encoder does not see them, as
        :func:`scvi_core.counts.pack` does.
    """
    adata, schema, device = read_store(path, counts=False), model.schema, next(model.network.parameters()).device
    if tuple(map(str, adata.var_names)) != schema.gene_ids:
        log.warning("%s: its genes are not the model's, in its order; so its counts are read whole", path)
        return adata.obs_names, pack(read_store(path), schema, None, design or model.model.encode_covariates).to(device)
    if not (design or model.model.encode_covariates):
        schema = dataclasses.replace(schema, batch_key=None, batches=("all",), categorical={}, continuous={})
    return adata.obs_names, open_counts(path, adata, schema, memory_gb).to(device)


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
        checksum=True,
    )


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
