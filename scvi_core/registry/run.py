"""One MLflow run per training: its configuration, curves, dataset, figures, software and the model itself."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvi_core._version import __version__
from scvi_core.files import UserError, read_parquet
from scvi_core.log import log
from scvi_core.registry.tracking import artifact_root, retried, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, LoggedModel

WEIGHTS, CARD, HISTORY = "model.safetensors", "model.json", "history.parquet"
STORED = "data/model"  # where MLflow's pyfunc layout puts the bundle inside the logged model
LOADER = "scvi_core.registry.pyfunc"


def log_training(
    client: MlflowClient,
    tracking_uri: str,
    name: str,
    bundle: Path,
    card: dict[str, Any],
    *,
    train_run: Mapping[str, Any],
    dataset: Mapping[str, Any],
    config: Mapping[str, Any],
    experiment: str,
    labels: Mapping[str, str],
    figures: Iterable[str | Path],
) -> tuple[str, LoggedModel]:
    """Write a run and its logged model; the run is left RUNNING for the registration that follows.

    Parameters
    ----------
    client, tracking_uri : of an open store.
    name : of the logged model.
    bundle, card : folder, and what its ``model.json`` says.
    train_run, dataset, config, experiment, figures : as for :func:`scvi_core.registry.register`.
    labels : tags of the run.

    Returns
    -------
    (run_id, logged model)
        The model is READY: its files are in place.
    """
    from mlflow.entities import LoggedModelOutput

    experiment_id = _experiment(client, tracking_uri, experiment)
    fingerprint = card["fingerprint"]
    for run in client.search_runs([experiment_id], f"tags.fingerprint = '{fingerprint}' and status = 'RUNNING'"):
        client.set_terminated(run.info.run_id, "KILLED")
        log.warning(
            "MLflow run %s: its registration was interrupted, or another process is at it; marked KILLED",
            run.info.run_id,
        )
    start = _milliseconds(train_run.get("started"))
    software = {f"software.{package}": version for package, version in card.get("software", {}).items()}
    run_tags = {**labels, **software, "mlflow.source.name": "scvi-core", "mlflow.source.type": "LOCAL"}
    if train_run.get("git_revision"):
        run_tags["mlflow.source.git.commit"] = train_run["git_revision"]
    run_tags = {_key(key): short(value, 5000) for key, value in run_tags.items()}
    run_name = f"{labels['atlas']}-{fingerprint[:12]}"
    run_id = client.create_run(experiment_id, start, run_tags, run_name).info.run_id
    try:
        data = _log_dataset(client, run_id, dataset, card)
        _log_params(client, run_id, flatten(config))
        _log_history(client, run_id, bundle / HISTORY, start, train_run.get("seconds_per_epoch") or ())
        client.log_dict(run_id, dict(config), "config.json")
        client.log_dict(run_id, dict(train_run), "train_run.json")
        for figure in figures:
            client.log_artifact(run_id, str(figure), "figures")
        called = re.sub(r"[/:.%\"']", "_", name)  # MLflow takes fewer characters here than in a registered model's name
        model = client.create_logged_model(
            experiment_id, called, run_id, tags={"fingerprint": fingerprint}, model_type="scvi-core"
        )
        _upload(client, model.model_id, run_id, bundle, card)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        _log_outcome(client, run_id, card, train_run, start, model.model_id, data)
        return run_id, client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise


def _experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    database = sqlite_path(tracking_uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # a server knows where its artifacts go; a database file has to be told, or they land in ./mlruns
        folder = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "experiment"
        location = None if database is None else f"{artifact_root(database)}/{folder}"
        try:
            return client.create_experiment(name, location)
        except MlflowException:  # a server has been told by someone else in the meantime
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"registry.experiment: '{name}' was deleted in MLflow; restore it there, or choose another experiment"
        )
    return experiment.experiment_id


def _upload(client: MlflowClient, model_id: str, run_id: str, bundle: Path, card: dict[str, Any]) -> None:
    """Put the bundle in place in MLflow's pyfunc layout, whose loader is a module of ours and no pickle."""
    import mlflow.pyfunc
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as folder:
        light = Path(folder) / "model"
        light.mkdir()
        for file in (CARD, HISTORY):
            shutil.copyfile(bundle / file, light / file)
        about = Model(run_id=run_id, model_id=model_id, metadata={"fingerprint": card["fingerprint"]})
        staged = Path(folder) / "staged"
        mlflow.pyfunc.save_model(
            staged,
            loader_module=LOADER,
            data_path=str(light),
            mlflow_model=about,
            pip_requirements=[f"scvi-core=={card.get('package_version', __version__)}"],
        )
        client.log_model_artifacts(model_id, str(staged))
    client.log_model_artifact(model_id, str(bundle / WEIGHTS), STORED)  # the big one, without a copy of it in between


def _log_dataset(client: MlflowClient, run_id: str, dataset: Mapping[str, Any], card: dict[str, Any]) -> Dataset:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = {"name", "digest", "source"}
    profile = {"num_rows": card.get("n_cells"), "num_genes": card.get("n_genes")}
    profile.update({key: value for key, value in dataset.items() if key not in known})
    data = Dataset(
        name=short(dataset.get("name") or "counts", 500),
        digest=str(dataset.get("digest") or card["fingerprint"])[:36],
        source_type="local",
        source=json.dumps({"uri": str(dataset.get("source") or "counts.zarr")}),
        profile=json.dumps(profile, default=str),
    )
    inputs = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
    retried(lambda: client.log_inputs(run_id, inputs))
    return data


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(_key(key), short(value, 500)) for key, value in params.items()]
    for i in range(0, len(entries), 100):
        client.log_batch(run_id, params=entries[i : i + 100])


def _log_history(client: MlflowClient, run_id: str, path: Path, start: int, seconds: Sequence[float]) -> None:
    """Log every column of the history, a step an epoch, at the time that epoch ended."""
    from mlflow.entities import Metric

    history = read_parquet(path, "train")
    entries, at = [], float(start)
    for i, row in enumerate(history.to_dict("records")):
        epoch = int(row.pop("epoch", i))
        if i < len(seconds):
            at += 1000 * float(seconds[i])
            row["seconds"] = float(seconds[i])
        entries += [Metric(key, float(v), int(at), epoch) for key, v in row.items() if _is_number(v)]
    for i in range(0, len(entries), 1000):
        client.log_batch(run_id, metrics=entries[i : i + 1000])


def _log_outcome(
    client: MlflowClient,
    run_id: str,
    card: dict[str, Any],
    train_run: Mapping[str, Any],
    at: int,
    model_id: str,
    data: Any,
) -> None:
    """Log the numbers of the finished model, tied to the model and its dataset (``final_`` tells them from epochs')."""
    from mlflow.entities import Metric

    metrics = card.get("metrics", {})
    numbers = {f"final_{key}": value for key, value in flatten(metrics).items()}
    numbers |= {key: train_run.get(key) for key in ("seconds", "cells_per_second", "peak_memory_mb")}
    numbers["total_seconds"] = numbers.pop("seconds")
    step = metrics.get("kept_epoch") or metrics.get("best_epoch") or metrics.get("epochs") or 0
    entries = [
        Metric(_key(key), float(v), at, int(step), model_id, data.name, data.digest, run_id)
        for key, v in numbers.items()
        if _is_number(v)
    ]
    client.log_batch(run_id, metrics=entries)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> ``{"model.n_latent": 10, ...}``; sequences stay values."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(entry, f"{name}.") if isinstance(entry, Mapping) and entry else {name: entry}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _key(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", text)[:250]


def short(value: Any, limit: int) -> str:
    """Text of a value, cut to what MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _milliseconds(started: Any) -> int:
    if isinstance(started, str):
        with contextlib.suppress(ValueError):
            return int(1000 * datetime.fromisoformat(started).timestamp())
    return int(1000 * (started if isinstance(started, int | float) else time.time()))
