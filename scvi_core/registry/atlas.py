"""Register the model of an atlas, from the files in its folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from scvi_core import registry
from scvi_core.config import Config
from scvi_core.files import read_json, read_parquet
from scvi_core.log import redacted
from scvi_core.report import figures

AFTER = ("annotations", "cluster", "contrast", "criticism", "de", "export", "report")  # keys that make no model


def register(folder: Path, settings: Config) -> dict[str, Any]:
    """Register an atlas' model with its metrics and figures; what :func:`scvi_core.registry.register` says of it.

    Parameters
    ----------
    folder : results/{atlas}.
    """
    card = read_json(folder / "model" / "model.json", "train")
    run = read_json(folder / "logs" / "train_run.json", "train")
    # what made the model
    config = redacted(settings.model_dump_json(exclude={*AFTER}))
    with tempfile.TemporaryDirectory() as scratch:
        return registry.register(
            settings.tracking_uri,
            settings.registered_name,
            folder / "model",
            train_run=run,
            dataset={"name": settings.atlas, "digest": card["data_sha256"], "source": str(folder / "counts.zarr")},
            config=json.loads(config),
            experiment=settings.registry.experiment or f"scvi-core/{settings.atlas}",
            atlas=settings.atlas,
            organism=settings.registry.organism or card["organism"],
            figures=_pictures(folder, card, Path(scratch)) if settings.registry.figures else [],
        )


def _pictures(folder: Path, card: dict[str, Any], scratch: Path) -> list[Path]:
    """Draw what a registered version shows: the training, and clusters and batches where there is a UMAP."""
    cells = read_parquet(folder / "cells.parquet", "cells")
    history = read_parquet(folder / "model" / "history.parquet", "train")
    drawn = {"training": figures.training_figure(history, card["metrics"]["kept_epoch"])}
    if cells["umap_1"].notna().any():
        drawn |= {f"umap_{c}": figures.umap_figure(cells, c) for c in ("cluster", "batch")}
    for name, figure in drawn.items():
        (scratch / f"{name}.png").write_bytes(figures.png(figure))
    return [scratch / f"{name}.png" for name in drawn]
