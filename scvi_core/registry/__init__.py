"""Models by name, version and fingerprint: register a bundle, find it again, fetch it, promote it.

A bundle is the folder ``model/``: ``model.safetensors``, ``model.json``, ``history.parquet``. A registered version is
created last and in one transaction with its tags, when all it names is in place: a registration killed half-way
leaves an MLflow run marked KILLED at the next attempt, and never a version that :func:`find` would return.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from scvi_core.config import model_name
from scvi_core.files import UserError, canonical_json, replacing, sha256_file, sha256_text
from scvi_core.log import log, redacted
from scvi_core.registry.run import CARD, HISTORY, STORED, WEIGHTS, log_training, short
from scvi_core.registry.tracking import connect, errors, exclusive, place, retried, sqlite_path

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

BUNDLE = (WEIGHTS, CARD, HISTORY)


class Gone(UserError):  # noqa: N818 (what became of it)
    """A registered model whose files are not there, or are no longer those that were registered."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A registered version: enough to fetch it and to check what was fetched."""

    name: str
    version: str
    run_id: str
    fingerprint: str
    weights_sha256: str


def find(tracking_uri: str, fingerprint: str, name: str | None = None) -> Found | None:
    """Look a model up by the fingerprint of everything that decides its weights.

    Parameters
    ----------
    tracking_uri : MLflow tracking URI. An SQLite file that is not there holds nothing and is not made.
    fingerprint : SHA-256 in hexadecimal.
    name : registered model to look under; None for all.

    Returns
    -------
    Found or None
        The newest such version.

    Raises
    ------
    UserError
        For a store that cannot be reached or read.
    """
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        return None
    client = connect(tracking_uri)
    with errors(tracking_uri):
        version = _newest(client, fingerprint, name)
    return None if version is None else _found(version)


def fetch(tracking_uri: str, found: Found, out: str | Path) -> None:
    """Download a registered version's bundle into the folder `out`, whole or not at all, and check its hash.

    Only the three files of a bundle are asked for, by name; nothing is unpickled or executed.

    Raises
    ------
    Gone
        When a file is missing, or the weights are not those that were registered.
    """
    client = connect(tracking_uri)
    with errors(tracking_uri):
        location = client.get_model_version_download_uri(found.name, found.version)
    label = f"models:/{found.name}/{found.version}"
    _download(tracking_uri, client, location, label, out, found.fingerprint, found.weights_sha256)


def _download(
    tracking_uri: str,
    client: MlflowClient,
    location: str,
    label: str,
    out: str | Path,
    fingerprint: str,
    weights_sha256: str | None,
) -> None:
    """Put the bundle that lies at an artifact location into the folder `out`, checked, as :func:`fetch` does."""
    from mlflow.artifacts import download_artifacts

    label, location, out = f"{redacted(tracking_uri)}: {label}", place(tracking_uri, location), Path(out)
    remedy = "train again with model.reuse: never, which registers it anew"
    with (
        replacing(out, "MODEL") as temporary,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as download,
    ):
        temporary.mkdir()
        for file in BUNDLE:
            with errors(tracking_uri):
                try:
                    got = download_artifacts(
                        f"{location}/{STORED}/{file}", dst_path=download, tracking_uri=client.tracking_uri
                    )
                except Exception as error:
                    if isinstance(error, ImportError):
                        raise UserError(f"{label}: {location} needs the package {error.name!r}; install it") from error
                    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):  # of an odd address
                        raise Gone(f"{label}: {location}: cannot be fetched ({error}); {remedy}") from error
                    if not _is_absent(error):
                        raise
                    raise Gone(f"{label}: {file} is missing from {location}; {remedy}") from error
                shutil.move(got, temporary / file)
        try:
            _check(temporary, label, remedy, fingerprint, weights_sha256)
        except UserError as error:
            raise Gone(str(error)) from error


def register(
    tracking_uri: str,
    name: str,
    bundle: str | Path,
    *,
    train_run: Mapping[str, Any],
    dataset: Mapping[str, Any],
    config: Mapping[str, Any],
    experiment: str,
    atlas: str,
    organism: str | None = None,
    figures: Iterable[str | Path] = (),
    tags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Record a training as an MLflow run and its model as a version of a registered model.

    Doing it again changes nothing: a version of the same fingerprint and weights is returned as it is (its files
    mended from `bundle` if they are damaged), or linked to, where only another registered model has it. One whose run
    was deleted, or whose files a server no longer has, is left as it is, and another is made.

    Parameters
    ----------
    tracking_uri : MLflow tracking URI.
    name : of the registered model.
    bundle : folder with ``model.safetensors``, ``model.json`` and ``history.parquet``.
    train_run : what varies between runs: started (ISO text or seconds since 1970), seconds, seconds_per_epoch,
        git_revision, reused, and whatever else is to be logged with the run.
    dataset : name, digest (hexadecimal; its first 36 characters are logged), source (text), and any numbers.
    config : the full configuration, nested; logged as flat parameters and as ``config.json``.
    experiment : MLflow experiment, made if missing.
    atlas, organism : tags of the version; organism defaults to the bundle's.
    figures : image files, logged under ``figures/``.
    tags : further tags of the run and the version.

    Returns
    -------
    dict
        registered_name, version, run_id, fingerprint, reused (training was skipped), tracking_uri: the content of
        ``model_ref.json``.

    Raises
    ------
    UserError
        For an incomplete bundle, or a store that cannot be reached or written.
    """
    bundle, _ = Path(bundle), _is_called(name)
    card = _check(bundle, str(bundle), "remove it and run again: `scvi-core train` makes it anew")
    client = connect(tracking_uri)
    with errors(tracking_uri), exclusive(tracking_uri):
        version = _whole(tracking_uri, client, card, name)
        if version is None:
            for lost in _of_fingerprint(client, card["fingerprint"], name):
                if lost.tags["weights_sha256"] == card["weights_sha256"]:
                    log.warning("models:/%s/%s: its run or its files were deleted; another is made", name, lost.version)
            labels = _version_tags(card, atlas, organism, tags or {})
            same = _whole(tracking_uri, client, card)
            if same is None:
                run_id, model = log_training(
                    client,
                    tracking_uri,
                    name,
                    bundle,
                    card,
                    train_run=train_run,
                    dataset=dataset,
                    config=config,
                    experiment=experiment,
                    labels=labels,
                    figures=figures,
                )
                labels["model_id"], source = model.model_id, model.artifact_location
            else:
                run_id, source = same.run_id, same.source
                labels["model_id"] = same.tags.get("model_id", "")
                log.info("models:/%s/%s has the same weights: its run and files are shared", same.name, same.version)
            made = retried(lambda: _create_version(client, name, source, run_id, labels))
            version = _first(tracking_uri, client, made, card)
        _mend(tracking_uri, client, version, bundle)
        run = client.get_run(version.run_id)
        # ours, or that of a registration killed at its last step, or taken for one by another at the same time
        if run.info.status != "FINISHED":
            seconds = float(train_run.get("seconds") or 0)
            client.set_terminated(version.run_id, "FINISHED", run.info.start_time + int(1000 * seconds))
    return {
        "registered_name": name,
        "version": str(version.version),
        "run_id": version.run_id,
        "fingerprint": card["fingerprint"],
        "reused": bool(train_run.get("reused", False)),
        "tracking_uri": redacted(tracking_uri),
    }


def list_models(tracking_uri: str) -> pd.DataFrame:
    """Every registered version that scvi-core made, newest first within its name.

    Returns
    -------
    pandas.DataFrame
        name, version, aliases, created, organism, n_cells, n_genes, batches, validation_elbo, fingerprint, run_id.
    """
    import pandas as pd

    columns = ["name", "version", "aliases", "created", "organism", "n_cells", "n_genes", "batches"]
    columns += ["validation_elbo", "fingerprint", "run_id"]
    database = sqlite_path(tracking_uri)
    rows = []
    if database is None or database.exists():
        client = connect(tracking_uri)
        with errors(tracking_uri):
            versions = _all(client, "tag.fingerprint LIKE '%'")
            aliases = {name: _aliases(client, name) for name in {v.name for v in versions}}
        for version in sorted(versions, key=lambda v: (v.name, -int(v.version))):
            row = _describe(version, aliases[version.name])
            rows.append([", ".join(row[c]) if c == "aliases" else row.get(c) for c in columns])
    return pd.DataFrame(rows, columns=columns)


def show_model(tracking_uri: str, name: str, version: str | int | None = None) -> dict[str, Any]:
    """Everything on record about one version.

    Parameters
    ----------
    tracking_uri, name : where and what.
    version : number, alias (``champion`` or ``@champion``), or None for the newest.

    Returns
    -------
    dict
        name, version, aliases, created, uri, run_id, the version's tags, and ``metrics`` of its run.

    Raises
    ------
    UserError
        For an unknown name, version or alias.
    """
    client, found = _lookup(tracking_uri, name, version)
    with errors(tracking_uri):
        described = _describe(found, _aliases(client, found.name))
        run = _run(client, found.run_id)
        described["metrics"] = dict(run.data.metrics) if run else {}
        if run is None:
            log.warning("models:/%s/%s: MLflow run %s was deleted", found.name, found.version, found.run_id)
    return described


def promote(tracking_uri: str, name: str, version: str | int, alias: str = "champion") -> None:
    """Let ``models:/{name}@{alias}`` mean this version from now on.

    Raises
    ------
    UserError
        For an unknown name or version, or an alias that MLflow does not take.
    """
    alias = alias.removeprefix("@")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", alias) or re.fullmatch(r"v\d+|latest", alias, re.IGNORECASE):
        raise UserError(f"alias '{alias}': use letters, digits, '_' and '-' (first a letter; not 'latest', not 'v3')")
    client, found = _lookup(tracking_uri, name, version)
    with errors(tracking_uri), exclusive(tracking_uri):
        client.set_registered_model_alias(found.name, alias, str(found.version))


def resolve(tracking_uri: str, reference: str | Path, out: str | Path) -> Path:
    """Get the bundle that a reference means.

    Parameters
    ----------
    tracking_uri : where to look names up.
    reference : ``models:/name/3``, ``models:/name@champion``, ``models:/name/latest``, ``models:/m-0123...`` (the id of
        a logged model), ``runs:/0123.../model``, or the folder of a bundle or of an atlas' results.
    out : folder that a registered bundle is downloaded into.

    Returns
    -------
    pathlib.Path
        The bundle's folder, its weights checked: `out`, or `reference` itself if it is a folder.

    Raises
    ------
    UserError
        For an unknown reference, or weights that are not those of the record.
    """
    text, out = str(reference), Path(out)
    scheme, colon, rest = text.partition(":/")
    if colon and scheme == "models":
        if re.fullmatch(r"m-[0-9a-f]{32}", rest):
            _fetch_logged(tracking_uri, rest, text, out)
            return out
        name, version = _parsed(tracking_uri, text, rest)
        _, found = _lookup(tracking_uri, name, version)
        if not {"fingerprint", "weights_sha256"} <= set(found.tags):
            raise _of_others(text)
        fetch(tracking_uri, _found(found), out)
        return out
    if colon and scheme == "runs":
        _fetch_logged(tracking_uri, _model_of_run(tracking_uri, text, rest), text, out)
        return out
    folder = Path(reference)
    if not folder.is_dir():
        raise UserError(
            f"model '{text}': no such folder; give a bundle's folder, models:/name/3 or models:/name@champion"
        )
    if not (folder / CARD).exists() and (folder / "model" / CARD).is_file():  # an atlas' results
        folder /= "model"
    _check(folder, text, "fetch or train it again")
    return folder


def _parsed(tracking_uri: str, text: str, rest: str) -> tuple[str, str | None]:
    """Name, and version, @alias or None for the newest, of what follows ``models:/``."""
    name, slash, version = rest.partition("/")
    if slash and name and version and "/" not in version:
        return name, None if version.lower() == "latest" else version
    name, at, alias = rest.rpartition("@")
    if at and name and alias and "/" not in rest:
        return name, f"@{alias}"
    which = "models:/name/3, models:/name@champion or models:/name/latest"
    if rest and "/" not in rest:
        client, newest = _lookup(tracking_uri, rest, None)
        aliases = "".join(f", models:/{rest}@{alias}" for alias in sorted(_aliases(client, rest)))
        which = f"which of its versions: models:/{rest}/{newest.version} is the newest{aliases}"
    raise UserError(f"model '{text}': write {which}")


def _of_others(text: str) -> UserError:
    return UserError(f"model '{text}': was not made by scvi-core; name one that `scvi-core models list` shows")


def _model_of_run(tracking_uri: str, text: str, rest: str) -> str:
    """The id of the model that a run logged."""
    run_id, _, name = rest.partition("/")
    client = _opened(tracking_uri)
    with errors(tracking_uri):
        run = _run(client, run_id)
        if run is None:
            raise UserError(f"model '{text}': {redacted(tracking_uri)} has no such run, or it was deleted")
        ids = [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]
        for model_id in ids:
            if name in ("", "model", client.get_logged_model(model_id).name):
                return model_id
    raise _of_others(text)


def _fetch_logged(tracking_uri: str, model_id: str, text: str, out: Path) -> None:
    """Fetch what MLflow calls a logged model, registered or not."""
    from mlflow.exceptions import MlflowException

    client = _opened(tracking_uri)
    with errors(tracking_uri):
        try:
            model = client.get_logged_model(model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"model '{text}': {redacted(tracking_uri)} has no logged model {model_id}") from error
        if "fingerprint" not in model.tags:
            raise _of_others(text)
        weights = {v.tags.get("weights_sha256") for v in _all(client, f"tag.model_id = '{model_id}'")}
    told = weights.pop() if len(weights) == 1 else None  # of one that is not registered its own card alone tells
    _download(tracking_uri, client, model.artifact_location, text, out, model.tags["fingerprint"], told)


# ---- steps of a registration


def _create_version(
    client: MlflowClient, name: str, source: str, run_id: str | None, labels: dict[str, str]
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, source, run_id, tags=labels, await_creation_for=60, model_id=labels.get("model_id") or None
    )


def _first(tracking_uri: str, client: MlflowClient, made: ModelVersion, card: dict[str, Any]) -> ModelVersion:
    """The version to keep: of those that several processes make of one model at once, a server taking no locks."""
    first = _whole(tracking_uri, client, card, made.name) or made
    if int(first.version) < int(made.version):
        client.delete_model_version(made.name, str(made.version))
        if made.run_id != first.run_id:
            client.set_terminated(made.run_id, "KILLED")
        log.info("models:/%s/%s: another process registered it at the same time", first.name, first.version)
    return first


def _whole(
    tracking_uri: str, client: MlflowClient, card: dict[str, Any], name: str | None = None
) -> ModelVersion | None:
    """The first version of a model whose run and files are there: of several made at once, the one that stays."""
    found = _of_fingerprint(client, card["fingerprint"], name)
    for version in sorted(found, key=lambda v: (int(v.version), v.creation_timestamp)):
        same = version.tags["weights_sha256"] == card["weights_sha256"]
        if same and _run(client, version.run_id) is not None and _has_files(tracking_uri, client, version):
            return version
    return None


def _run(client: MlflowClient, run_id: str | None) -> Run | None:
    """An MLflow run; None where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


def _has_files(tracking_uri: str, client: MlflowClient, version: ModelVersion) -> bool:
    """Whether a version's files are there by name, or on this disk, where :func:`_mend` puts them back."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = place(tracking_uri, client.get_model_version_download_uri(version.name, str(version.version)))
    if sqlite_path(tracking_uri) is not None and location.startswith("file:"):
        return True
    try:
        listed = get_artifact_repository(location, tracking_uri=client.tracking_uri).list_artifacts(STORED)
    except Exception as error:
        if not _is_absent(error):
            raise
        return False
    return {*BUNDLE} <= {file.path.rpartition("/")[2] for file in listed}


def _mend(tracking_uri: str, client: MlflowClient, version: ModelVersion, bundle: Path) -> None:
    """Bring back files of a version on this disk that were lost or damaged: we hold the same weights."""
    location = place(tracking_uri, client.get_model_version_download_uri(version.name, str(version.version)))
    if sqlite_path(tracking_uri) is None or not location.startswith("file:"):
        return
    stored = Path(url2pathname(urlsplit(location).path)) / STORED
    tags = version.tags
    try:
        _check(stored, "stored", "put back", tags["fingerprint"], tags["weights_sha256"])
    except UserError as error:
        stored.mkdir(parents=True, exist_ok=True)
        for file in BUNDLE:
            (stored / file).unlink(missing_ok=True)  # the registry's own, whatever has become of it
            with replacing(stored / file) as temporary:
                shutil.copyfile(bundle / file, temporary)
        log.warning("models:/%s/%s: files put back (%s)", version.name, version.version, error)


def _version_tags(card: dict[str, Any], atlas: str, organism: str | None, further: Mapping[str, Any]) -> dict[str, str]:
    batches = card.get("batches", [])
    listed = ", ".join(batches)
    if len(listed) > 200:
        listed = f"{short(listed, 180)} ({len(batches)} in all)"
    ours = {
        "fingerprint": card["fingerprint"],
        "weights_sha256": card["weights_sha256"],
        "atlas": atlas,
        "organism": organism or card.get("organism", "unknown"),
        "n_cells": card.get("n_cells"),
        "n_genes": card.get("n_genes", len(card.get("gene_ids", []))),
        "batches": listed,
        "validation_elbo": card.get("metrics", {}).get("validation_elbo"),
        "format_version": card.get("format_version"),
        "package_version": card.get("package_version"),
    }
    if labels := card.get("annotation"):
        ours |= {
            "labels": short(", ".join(labels["taxonomy"]["names"][: labels["taxonomy"]["n_leaves"]]), 200),
            "taxonomy_sha256": sha256_text(canonical_json(labels["taxonomy"])),
            "held_out_macro_f1": round(labels["quality"]["macro_f1"], 4),
            "held_out_ece": round(labels["quality"]["ece"], 4),
        }
    return {key: short(value, 5000) for key, value in {**further, **ours}.items() if value is not None}


# ---- small things


def _is_absent(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or bool(
        re.search(r"no such (file|artifact)|not found|does not exist|404", str(error), re.IGNORECASE)
    )


def _is_called(name: str) -> str:
    """MLflow's condition by a registered model's name."""
    try:
        name = model_name(name)
    except ValueError as error:
        raise UserError(f"model name {name!r}: {error}") from None
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def _check(bundle: Path, label: str, remedy: str, fingerprint: str | None = None, weights: str | None = None) -> dict:
    """Read a bundle's model.json and compare the weights' hash with it, and with the registry's record if given."""
    from scvi_core.api import read_card  # loads torch

    for file in BUNDLE:
        if not (bundle / file).is_file():
            raise UserError(f"{label}: {file} is missing; {remedy}")
    try:
        card, _ = read_card(bundle)
        recorded = {"fingerprint": card["fingerprint"], "weights_sha256": card["weights_sha256"]}
    except UserError as error:
        name = HISTORY if str(bundle / HISTORY) in str(error) else CARD
        raise UserError(f"{label}: {name} is damaged; {remedy}") from error
    except KeyError as error:
        raise UserError(f"{label}: {CARD} lacks {error}; {remedy}") from error
    actual = sha256_file(bundle / WEIGHTS)
    for source, expected in (("the version's tag", weights), (CARD, recorded["weights_sha256"])):
        if expected is not None and expected != actual:
            raise UserError(f"{label}: {WEIGHTS} has SHA-256 {actual[:12]}…, {source} says {expected[:12]}…; {remedy}")
    if fingerprint is not None and recorded["fingerprint"] != fingerprint:
        raise UserError(f"{label}: {CARD} has another fingerprint than the version's tag; {remedy}")
    return card


def _all(client: MlflowClient, condition: str) -> list[ModelVersion]:
    versions, token = [], None
    while True:
        # by tags of the version: the status filter of logged models finds nothing (MLflow 3.17)
        page = client.search_model_versions(condition, max_results=1000, page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def _newest(client: MlflowClient, fingerprint: str, name: str | None) -> ModelVersion | None:
    versions = _of_fingerprint(client, fingerprint, name)
    return max(versions, key=lambda v: (v.creation_timestamp, int(v.version)), default=None)


def _of_fingerprint(client: MlflowClient, fingerprint: str, name: str | None) -> list[ModelVersion]:
    if not re.fullmatch(r"[0-9a-f]{16,64}", fingerprint):
        raise UserError(f"fingerprint '{fingerprint}': not a SHA-256 in hexadecimal")
    condition = f"tag.fingerprint = '{fingerprint}'"
    if name is not None:
        condition += f" and {_is_called(name)}"
    return [v for v in _all(client, condition) if v.status == "READY" and "weights_sha256" in v.tags]


def _found(version: ModelVersion) -> Found:
    tags = version.tags
    return Found(version.name, str(version.version), version.run_id, tags["fingerprint"], tags["weights_sha256"])


def _opened(tracking_uri: str) -> MlflowClient:
    """The way to a store that is there."""
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        raise UserError(
            f"{redacted(tracking_uri)}: no such registry; build an atlas first, or mend registry.tracking_uri"
        )
    return connect(tracking_uri)


def _lookup(tracking_uri: str, name: str, version: str | int | None) -> tuple[MlflowClient, ModelVersion]:
    """Find one version by number, alias (with or without @) or None for the newest."""
    label = f"{redacted(tracking_uri)}: "
    client = _opened(tracking_uri)
    with errors(tracking_uri):
        versions = _all(client, _is_called(name))
        if not versions:
            names = sorted({v.name for v in _all(client, "tag.fingerprint LIKE '%'")})
            raise UserError(
                f"{label}no model '{name}' (there are: {', '.join(names) or 'none'}); see `scvi-core models list`"
            )
        by_number = {str(v.version): v for v in versions}
        if version is None:
            return client, by_number[max(by_number, key=int)]
        aliases = _aliases(client, name)
        wanted = str(version)
        number = wanted if wanted in by_number else aliases.get(wanted.removeprefix("@"))
        if number not in by_number:
            raise UserError(
                f"{label}model '{name}' has no version or alias '{wanted}' (versions: "
                f"{', '.join(sorted(by_number, key=int))}; aliases: {', '.join(sorted(aliases)) or 'none'})"
            )
        return client, by_number[number]


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _describe(version: ModelVersion, aliases: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = dict(version.tags)
    for key, kind in (("n_cells", int), ("n_genes", int), ("validation_elbo", float)):
        with contextlib.suppress(KeyError, ValueError):
            described[key] = kind(described[key])
    created = datetime.fromtimestamp(version.creation_timestamp / 1000).astimezone()
    return described | {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(alias for alias, number in aliases.items() if number == str(version.version)),
        "created": created.isoformat(timespec="seconds"),
        "uri": f"models:/{version.name}/{version.version}",
        "run_id": version.run_id,
    }
