import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scvi_core as sv
from scvi_core import files, mapping, registry
from scvi_core.registry import tracking

FINGERPRINT = "ab" * 32


def make_bundle(folder: Path, fingerprint: str = FINGERPRINT, weights: bytes = b"weights") -> Path:
    """A bundle as the registry sees it: bytes with a hash, a card and a history."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    card = {
        "format_version": 1,
        "package_version": "0.1.0",
        "fingerprint": fingerprint,
        "weights_sha256": files.sha256_file(folder / "model.safetensors"),
        "gene_ids": ["g1", "g2"],
        "batches": [f"donor{i}" for i in range(100)],
        "organism": "human",
        "n_cells": 120,
        "n_genes": 2,
        "metrics": {"validation_elbo": -12.5, "kept_epoch": 2, "n_parameters": 7},
        "software": {"torch": "2.0"},
    }
    files.write_json(folder / "model.json", card, checksum=True)
    history = pd.DataFrame({"epoch": [1, 2], "train_elbo": [-20.0, -15.0], "validation_elbo": [-18.0, np.nan]})
    files.write_parquet(folder / "history.parquet", history)
    return folder


def register(uri: str, bundle: Path, name: str = "pancreas", **changed) -> dict:
    arguments = {
        "train_run": {
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 3.0,
            "seconds_per_epoch": [1.0, 2.0],
            "git_revision": "f" * 40,
            "reused": False,
        },
        "dataset": {"name": "pancreas", "digest": "c" * 64, "source": "results/pancreas/counts.zarr", "n_samples": 4},
        "config": {
            "model": {"n_latent": 10, "likelihood": "zinb"},
            "long": "x" * 10_000,
            "many": {f"key{i}": i for i in range(150)},
        },
        "experiment": "scvi-core/pancreas",
        "atlas": "pancreas",
    }
    return registry.register(uri, name, bundle, **(arguments | changed))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """One store with one registered version; tests work on copies of it, which have to stand alone."""
    folder = tmp_path_factory.mktemp("registry")
    make_bundle(folder / "model")
    (folder / "figure.png").write_bytes(b"png")
    ref = register(f"sqlite:///{folder}/store/mlflow.db", folder / "model", figures=[folder / "figure.png"])
    return folder, ref


@pytest.fixture
def store(template, tmp_path):
    """(URI of a copy of the store, bundle)."""
    shutil.copytree(template[0], tmp_path / "copy")
    return f"sqlite:///{tmp_path}/copy/store/mlflow.db", tmp_path / "copy" / "model"


def test_a_store_that_is_not_there_holds_nothing_and_is_not_made(tmp_path):
    uri = f"sqlite:///{tmp_path}/none/mlflow.db"
    assert registry.find(uri, FINGERPRINT) is None
    assert registry.list_models(uri).empty
    assert not (tmp_path / "none").exists()


def test_import_is_light():
    code = "import sys, scvi_core.registry; sys.exit(any(m in sys.modules for m in ('mlflow', 'pandas', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_holds_the_training(template):
    folder, ref = template
    uri = f"sqlite:///{folder}/store/mlflow.db"
    client = tracking.connect(uri)
    run = client.get_run(ref["run_id"])
    assert run.info.status == "FINISHED" and run.info.end_time - run.info.start_time == 3000
    params = run.data.params
    assert params["model.n_latent"] == "10" and params["many.key149"] == "149" and len(params["long"]) == 500
    curve = client.get_metric_history(ref["run_id"], "train_elbo")
    assert [(m.step, m.value) for m in curve] == [(1, -20.0), (2, -15.0)]
    assert [m.timestamp - run.info.start_time for m in curve] == [1000, 3000]
    assert len(client.get_metric_history(ref["run_id"], "validation_elbo")) == 1  # NaN is no measurement
    assert run.data.metrics["final_validation_elbo"] == -12.5
    assert run.data.tags["mlflow.source.git.commit"] == "f" * 40 and run.data.tags["software.torch"] == "2.0"
    [entry] = run.inputs.dataset_inputs
    assert entry.dataset.digest == "c" * 36 and json.loads(entry.dataset.profile)["num_rows"] == 120
    assert {a.path for a in client.list_artifacts(ref["run_id"])} == {"config.json", "train_run.json", "figures"}
    assert run.info.artifact_uri.startswith((folder / "store/mlartifacts").as_uri())
    [model] = client.search_logged_models([run.info.experiment_id], f"tags.fingerprint = '{FINGERPRINT}'")
    assert {m.key: m.value for m in model.metrics}["final_validation_elbo"] == -12.5
    stored = folder / "store/mlartifacts"
    assert not [p for p in stored.rglob("*") if p.suffix in (".pkl", ".pickle", ".py", ".pt")]


def test_find_and_fetch(store, tmp_path):
    uri, bundle = store
    found = registry.find(uri, FINGERPRINT)
    assert (found.name, found.version, found.fingerprint) == ("pancreas", "1", FINGERPRINT)
    assert registry.find(uri, FINGERPRINT, "pancreas") == found
    assert registry.find(uri, FINGERPRINT, "other") is None
    assert registry.find(uri, "cd" * 32) is None
    registry.fetch(uri, found, tmp_path / "out" / "model")
    assert sorted(p.name for p in (tmp_path / "out" / "model").iterdir()) == sorted(registry.BUNDLE)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    for file in registry.BUNDLE:
        assert (tmp_path / "out/model" / file).read_bytes() == (bundle / file).read_bytes()


def test_registering_again_changes_nothing(store, template):
    uri, bundle = store
    again = register(uri, bundle, train_run={"reused": True})
    assert again == template[1] | {"reused": True, "tracking_uri": uri}
    assert len(registry.list_models(uri)) == 1


def test_another_name_shares_run_and_files(store, tmp_path):
    uri, bundle = store
    before = sum(p.name == "model.safetensors" for p in (tmp_path / "copy/store").rglob("*"))
    ref = register(uri, bundle, name="other")
    assert ref["version"] == "1" and ref["run_id"] == registry.find(uri, FINGERPRINT, "pancreas").run_id
    assert sum(p.name == "model.safetensors" for p in (tmp_path / "copy/store").rglob("*")) == before
    registry.fetch(uri, registry.find(uri, FINGERPRINT, "other"), tmp_path / "out")


def test_same_fingerprint_other_weights_is_a_new_version(store, tmp_path):
    uri, _ = store
    ref = register(uri, make_bundle(tmp_path / "gpu", weights=b"last bits differ"))
    assert ref["version"] == "2"
    assert registry.find(uri, FINGERPRINT).version == "2"  # the newest


@pytest.mark.parametrize(
    "step",
    [
        "log_inputs",
        "log_dict",
        "create_logged_model",
        "log_model_artifact",
        "finalize_logged_model",
        "create_registered_model",
        "create_model_version",
        "set_terminated",
    ],
)
def test_a_registration_killed_at_any_step_is_repaired_by_the_next(store, tmp_path, monkeypatch, step):
    from mlflow import MlflowClient

    uri, _ = store
    bundle = make_bundle(tmp_path / "new", "12" * 32)

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", die)  # a dead process does not tidy up either
        patch.setattr(MlflowClient, step, die)
        with pytest.raises(Killed):
            register(uri, bundle, name="new")
    found = registry.find(uri, "12" * 32)
    assert (found is not None) == (step == "set_terminated")  # all but the run's status was in place
    ref = register(uri, bundle, name="new")
    assert ref["version"] == "1"
    registry.fetch(uri, registry.find(uri, "12" * 32), tmp_path / "out")
    client = tracking.connect(uri)
    experiment = client.get_experiment_by_name("scvi-core/pancreas").experiment_id
    runs = client.search_runs([experiment], f"tags.fingerprint = '{'12' * 32}'")
    assert sorted(r.info.status for r in runs) == (["FINISHED"] if step == "set_terminated" else ["FINISHED", "KILLED"])


def test_a_failed_registration_says_so_in_mlflow(store, tmp_path):
    uri, _ = store
    bundle = make_bundle(tmp_path / "new", "12" * 32)
    with pytest.raises(sv.UserError, match=r"nothing\.png"):
        register(uri, bundle, figures=[tmp_path / "nothing.png"])
    assert registry.find(uri, "12" * 32) is None
    client = tracking.connect(uri)
    experiment = client.get_experiment_by_name("scvi-core/pancreas").experiment_id
    [run] = client.search_runs([experiment], f"tags.fingerprint = '{'12' * 32}'")
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("damage", ["changed", "lost", "card", "card and weights"])
def test_damaged_files_are_refused_and_mended(store, tmp_path, damage):
    uri, bundle = store
    [stored] = (tmp_path / "copy/store").rglob("data/model")
    if damage == "changed":
        (stored / "model.safetensors").write_bytes(b"evil")
    elif damage == "lost":
        (stored / "model.safetensors").unlink()
    elif damage == "card":
        (stored / "model.json").write_text("{")
    else:  # consistent with each other, but not with the version's tag
        make_bundle(stored, weights=b"evil")
    out = tmp_path / "out"
    out.mkdir()
    (out / "history.parquet").touch()
    found = registry.find(uri, FINGERPRINT)
    with pytest.raises(sv.UserError, match=r"models:/pancreas/1: .*(SHA-256|missing|damaged).*reuse: never"):
        registry.fetch(uri, found, out)
    assert [p.name for p in out.iterdir()] == ["history.parquet"]
    assert register(uri, bundle)["version"] == "1"
    registry.fetch(uri, found, out)
    assert (out / "model.safetensors").read_bytes() == b"weights"


def test_an_incomplete_bundle_is_refused(store, tmp_path):
    uri, _ = store
    bundle = make_bundle(tmp_path / "new", "12" * 32)
    (bundle / "model.safetensors").write_bytes(b"others")
    with pytest.raises(sv.UserError, match="SHA-256"):
        register(uri, bundle)
    (bundle / "history.parquet").unlink()
    with pytest.raises(sv.UserError, match=r"history\.parquet is missing"):
        register(uri, bundle)


def test_a_moved_store_works_and_a_copy_never_writes_into_the_original(store, template, tmp_path):
    uri, _ = store
    original = {p: p.stat().st_mtime_ns for p in (template[0] / "store").rglob("*")}
    shutil.move(tmp_path / "copy", tmp_path / "moved here")
    uri = f"sqlite:///{tmp_path}/moved here/store/mlflow.db"
    shutil.move(template[0] / "store/mlartifacts", template[0] / "store/hidden")
    try:
        registry.fetch(uri, registry.find(uri, FINGERPRINT), tmp_path / "out")
        ref = register(uri, make_bundle(tmp_path / "new", "12" * 32))
    finally:
        shutil.move(template[0] / "store/hidden", template[0] / "store/mlartifacts")
    client = tracking.connect(uri)
    here = (tmp_path / "moved here/store/mlartifacts").as_uri()
    assert client.get_run(ref["run_id"]).info.artifact_uri.startswith(here)
    assert client.get_model_version_download_uri("pancreas", "1").startswith(here)
    assert {p for p in (template[0] / "store").rglob("*")} == set(original)


def test_list_show_promote_resolve(store, tmp_path):
    uri, bundle = store
    register(uri, make_bundle(tmp_path / "second", "12" * 32, b"second"))
    registry.promote(uri, "pancreas", 1)
    table = registry.list_models(uri)
    assert table["version"].tolist() == ["2", "1"] and table["aliases"].tolist() == ["", "champion"]
    assert table["n_cells"].tolist() == [120, 120] and table["validation_elbo"].tolist() == [-12.5, -12.5]
    assert table["batches"][0].endswith("(100 in all)") and len(table["batches"][0]) < 250
    assert registry.show_model(uri, "pancreas")["version"] == "2"
    shown = registry.show_model(uri, "pancreas", "champion")
    assert shown["version"] == "1" and shown["aliases"] == ["champion"] and shown["organism"] == "human"
    assert shown["metrics"]["final_validation_elbo"] == -12.5
    for reference, weights in {"1": b"weights", "@champion": b"weights", "latest": b"second"}.items():
        reference = f"models:/pancreas{reference if reference[0] == '@' else '/' + reference}"
        folder = registry.resolve(uri, reference, tmp_path / "out")
        assert (folder / "model.safetensors").read_bytes() == weights
    assert registry.resolve(uri, bundle, tmp_path / "unused") == bundle
    registry.promote(uri, "pancreas", "2", "@champion")
    assert registry.show_model(uri, "pancreas", "@champion")["version"] == "2"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/nothing/1", "no model 'nothing' .*pancreas"),
        ("models:/pancreas/7", "no version or alias '7' .*versions: 1"),
        ("models:/pancreas@best", "no version or alias '@best'"),
        ("models:/pancreas", "write which of its versions: models:/pancreas/1 is the newest$"),
        ("models:/other", "no model 'other' .*pancreas"),
        ("models:/a' or name like '%/1", "no model "),
        ("models:/a' or name = \"b/1", "both kinds of quotes"),
        ("models:/../../1", "write models:/name/3"),
        ("models:/pancreas/", "write models:/name/3"),
        (f"models:/m-{'0' * 32}", "has no logged model m-0"),
        (f"runs:/{'0' * 32}/model", "has no such run"),
        ("runs:/../model", "has no such run"),
        ("no/such/folder", "no such folder"),
    ],
)
def test_unknown_references_get_one_line(store, tmp_path, reference, message):
    with pytest.raises(sv.UserError, match=message) as caught:
        registry.resolve(store[0], reference, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_aliases_that_mlflow_refuses(store):
    for alias in ("latest", "v3", "a b", ""):
        with pytest.raises(sv.UserError, match="alias"):
            registry.promote(store[0], "pancreas", 1, alias)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///x\0y",
        "http://h\x01/x",
        "mlruns",
        "file:///tmp/mlruns",
        "ftp://host",
        "sqlite://",
        "sqlite:///:memory:",
        "http://",
    ],
)
def test_uris_that_cannot_be_used(uri):
    with pytest.raises(sv.UserError, match=r"registry.tracking_uri: .*sqlite:///"):
        registry.find(uri, FINGERPRINT)


def test_a_server_out_of_reach_fails_soon_and_tells_no_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(sv.UserError, match=f"127.0.0.1:{port}: the tracking server cannot be reached") as caught:
        registry.find(f"http://me:secret@127.0.0.1:{port}", FINGERPRINT)
    assert "secret" not in str(caught.value) and time.monotonic() - start < 30


def test_stores_that_cannot_be_opened_get_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(sv.UserError, match="in the way"):
        tracking.connect(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "bad.db").write_text("this is not a database, and long enough to tell")
    with pytest.raises(sv.UserError, match="not an SQLite database"):
        tracking.connect(f"sqlite:///{tmp_path}/bad.db")
    with pytest.raises(sv.UserError, match="no space left"), tracking.errors("sqlite:///x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), tracking.errors("sqlite:///x"):
        raise ZeroDivisionError


def eight_at_once(uri, folder):
    """First use of one store by eight processes: three register one model, five others each their own; nobody crashes.

    The five are of one dataset, as of a sweep. MLflow is silent.
    """
    bundles = [make_bundle(folder / f"model{i}", f"{i}a" * 32, bytes([i])) for i in (0, 0, 0, 1, 2, 3, 4, 5)]
    # one import of mlflow, then eight real processes that start together
    code = """
import multiprocessing, os, sys
from scvi_core import registry
from scvi_core.registry import tracking
os.environ.update(tracking.ENVIRONMENT)
import mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store
def work(bundle, barrier):
    data = dict(name="cells", digest="c" * 64, source="here")
    more = dict(train_run={}, dataset=data, config={"seed": 0}, experiment="eight", atlas="a")
    barrier.wait()
    registry.register(sys.argv[1], "eight", bundle, **more)
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(8)
workers = [fork.Process(target=work, args=(bundle, barrier)) for bundle in sys.argv[2:]]
for worker in workers: worker.start()
for worker in workers: worker.join()
print([worker.exitcode for worker in workers])
"""
    command = [sys.executable, "-c", code, uri, *map(str, bundles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"{[0] * 8}\n", done.stderr
    assert all(line.startswith(("WARNING MLflow run", "INFO models:/eight")) for line in done.stderr.splitlines())
    versions = registry.list_models(uri).query("name == 'eight'")
    assert sorted(versions["fingerprint"]) == sorted({f"{i}a" * 32 for i in range(6)})
    client = tracking.connect(uri)
    assert {client.get_run(run_id).info.status for run_id in versions["run_id"]} == {"FINISHED"}
    for i, bundle in enumerate({*bundles}):
        registry.fetch(uri, registry.find(uri, f"{bundle.name[-1]}a" * 32), folder / f"got{i}")


def test_eight_processes_at_once(tmp_path):
    eight_at_once(f"sqlite:///{tmp_path}/store/mlflow.db", tmp_path)


def test_what_another_does_at_the_same_moment_is_tried_again(tmp_path, monkeypatch):
    """A server tells one of two that log one dataset that the row is there, with what its database says."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    log_inputs, told = MlflowClient.log_inputs, []

    def late(*arguments):
        told.append(1)
        if len(told) < 3:
            raise MlflowException("BAD_REQUEST: (sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
        return log_inputs(*arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", late)
    monkeypatch.setattr(tracking.time, "sleep", lambda _: None)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ref = register(uri, make_bundle(tmp_path / "model"))
    run = tracking.connect(uri).get_run(ref["run_id"])
    assert run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 1 and len(told) == 3

    def fail(*_):
        told.append(1)
        raise MlflowException("something else")

    monkeypatch.setattr(MlflowClient, "log_inputs", fail)
    with pytest.raises(sv.UserError, match="something else"):
        register(uri, make_bundle(tmp_path / "another", "56" * 32))
    assert len(told) == 4


def hard_delete(uri, run_id):
    """What `mlflow gc` does of a run's record."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    tracking.connect(uri).delete_run(run_id)
    SqlAlchemyStore(uri, str(tracking.artifact_root(tracking.sqlite_path(uri))))._hard_delete_run(run_id)


def test_look_up_trains_where_the_model_cannot_be_had(store, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from scvi_core import steps
    from scvi_core.config import load_config

    uri, _ = store
    monkeypatch.setattr(steps, "plan", lambda *_: SimpleNamespace(fingerprint=FINGERPRINT))
    asked = lambda reuse: load_config({"registry": {"tracking_uri": uri}, "model": {"reuse": reuse}})  # noqa: E731
    [made] = steps.lookup(tmp_path, asked("exact"), tmp_path / "had")
    assert made.value == "registered model" and (tmp_path / "had/model/model.json").exists()
    [stored] = (tmp_path / "copy/store").rglob("data/model")
    (stored / "model.safetensors").unlink()
    [made] = steps.lookup(tmp_path, asked("exact"), tmp_path / "found")
    assert made.value == "to be trained" and made.warning and "model.safetensors is missing" in made.reason
    assert files.read_json(tmp_path / "found/lookup.json", "lookup")["found"] is None
    assert not (tmp_path / "found/model").exists()
    with pytest.raises(sv.UserError, match=r"reuse: 'require', but the model cannot be had: .*safetensors is missing"):
        steps.lookup(tmp_path, asked("require"), tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("for_good", [False, True])
def test_a_deleted_run_gives_way_to_a_new_one(store, tmp_path, for_good):
    uri, bundle = store
    run_id = registry.find(uri, FINGERPRINT).run_id
    if for_good:
        hard_delete(uri, run_id)
    else:
        tracking.connect(uri).delete_run(run_id)
    assert registry.show_model(uri, "pancreas")["metrics"] == {}
    assert registry.list_models(uri)["version"].tolist() == ["1"]
    ref = register(uri, bundle)
    assert ref["version"] == "2" and ref["run_id"] != run_id
    assert register(uri, bundle) == ref and register(uri, bundle, name="other")["run_id"] == ref["run_id"]
    assert registry.find(uri, FINGERPRINT, "pancreas").version == "2"
    registry.fetch(uri, registry.find(uri, FINGERPRINT, "pancreas"), tmp_path / "out")
    assert registry.show_model(uri, "pancreas")["metrics"]["final_validation_elbo"] == -12.5


def test_files_that_are_gone_are_told_from_a_store_that_is(store, tmp_path):
    uri, bundle = store
    registry.list_models(uri)  # a copy that was moved is told so while its files are there
    for path in (tmp_path / "copy/store/mlartifacts").iterdir():
        shutil.rmtree(path)
    with pytest.raises(registry.Gone, match=r"model\.safetensors is missing"):
        registry.fetch(uri, registry.find(uri, FINGERPRINT), tmp_path / "out")
    assert register(uri, bundle)["version"] == "1"  # and puts them back
    registry.fetch(uri, registry.find(uri, FINGERPRINT), tmp_path / "out")


def test_names_that_mlflow_allows(store, tmp_path):
    from scvi_core.config import load_config

    uri, _ = store
    for i, name in enumerate(["Human pancreas (v2) [beta]", "it's", 'the "best"', "a.b%c", "Zürich=1", "@home", "-x"]):
        bundle = make_bundle(tmp_path / f"model{i}", f"{i}c" * 32)
        for _ in range(2):
            ref = register(uri, bundle, name=name)
            assert (ref["registered_name"], ref["version"]) == (name, "1")
        assert registry.find(uri, f"{i}c" * 32, name).name == name
        registry.promote(uri, name, 1)
        for way in (
            f"models:/{name}/1",
            f"models:/{name}@champion",
            f"models:/{name}/latest",
            f"models:/{name}/Latest",
        ):
            assert registry.resolve(uri, way, tmp_path / "out") == tmp_path / "out"
        if "@" not in name:
            with pytest.raises(sv.UserError, match=r"/1 is the newest, models:/.*@champion$"):
                registry.resolve(uri, f"models:/{name}", tmp_path / "out")
        assert load_config({"registry": {"name": name}}).registered_name == name


def test_names_that_mlflow_does_not_allow(store):
    uri, bundle = store
    for name in ("a/b", "a:b", "", " ", "..", "a\nb", "x" * 201, "'\""):
        with pytest.raises(sv.UserError, match="write a name of 200 characters"):
            register(uri, bundle, name=name)


def test_every_way_to_name_a_model(store, tmp_path):
    uri, bundle = store
    found = registry.find(uri, FINGERPRINT)
    client = tracking.connect(uri)
    model_id = client.get_model_version("pancreas", "1").tags["model_id"]
    for way in (
        f"models:/{model_id}",
        f"runs:/{found.run_id}/model",
        f"runs:/{found.run_id}/pancreas",
        f"runs:/{found.run_id}",
    ):
        out = registry.resolve(uri, way, tmp_path / "out")
        assert (out / "model.safetensors").read_bytes() == b"weights"
        shutil.rmtree(out)
    assert registry.resolve(uri, bundle.parent, tmp_path / "out") == bundle  # an atlas' folder
    with pytest.raises(sv.UserError, match="was not made by scvi-core"):
        registry.resolve(uri, f"runs:/{found.run_id}/other", tmp_path / "out")
    theirs = client.create_logged_model("0", "theirs")
    run = client.create_run("0")
    for way in (f"models:/{theirs.model_id}", f"runs:/{run.info.run_id}/model"):
        with pytest.raises(sv.UserError, match="was not made by scvi-core"):
            registry.resolve(uri, way, tmp_path / "out")
    [stored] = (tmp_path / "copy/store").rglob("data/model")
    make_bundle(stored, weights=b"evil")
    with pytest.raises(registry.Gone, match="the version's tag says"):
        registry.resolve(uri, f"models:/{model_id}", tmp_path / "out")


def test_where_the_registry_is(monkeypatch):
    from scvi_core.config import TRACKING_URI, tracking_place

    for name in (TRACKING_URI, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    assert tracking_place(None, None, "here") == ("sqlite:///here/mlflow.db", "the default")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs")
    assert tracking_place(None, None, "here") == ("http://theirs", "MLFLOW_TRACKING_URI")
    monkeypatch.setenv(TRACKING_URI, "http://me:secret@ours")
    assert tracking_place(None, None, "here") == ("http://me:secret@ours", TRACKING_URI)
    assert tracking_place(None, "http://***@ours", "here") == ("http://me:secret@ours", "registry.tracking_uri")
    assert tracking_place(None, "http://conf", "here") == ("http://conf", "registry.tracking_uri")
    assert tracking_place("http://opt", "http://conf", "here") == ("http://opt", "--tracking-uri")
    monkeypatch.delenv(TRACKING_URI)
    with pytest.raises(sv.UserError, match=r"registry.tracking_uri: .* is without its password"):
        tracking_place(None, "http://***@ours", "here")


def test_models_say_where_they_look(template, tmp_path, monkeypatch, capsys):
    from scvi_core import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCVI_CORE_TRACKING_URI", raising=False)
    here = f"sqlite:///{template[0]}/store/mlflow.db"
    empty = f"sqlite:///{tmp_path}/empty.db"
    tracking.connect(empty)
    (tmp_path / "mine.yaml").write_text(f"registry: {{tracking_uri: '{here}'}}")

    def listed(*options):
        monkeypatch.setattr(sys, "argv", ["scvi-core", "models", "list", *options])
        with contextlib.suppress(SystemExit):
            cli.main()
        return capsys.readouterr()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty)
    said = listed()
    assert f"no models are registered in {empty}" in said.out and "(MLFLOW_TRACKING_URI)" in said.err
    for options, by in ((["--config", "mine.yaml"], "mine.yaml"), (["--tracking-uri", here], "--tracking-uri")):
        said = listed(*options)
        assert "pancreas" in said.out and f"registry: {here} ({by})" in said.err
    (tmp_path / "config").mkdir()
    (tmp_path / "mine.yaml").rename(tmp_path / "config/config.yaml")
    assert "pancreas" in listed().out


# ---- embedding new cells with a registered model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A small real model, registered: (store URI, model, cells)."""
    from scvi_core.config import ModelConfig, TrainConfig

    rng = np.random.default_rng(0)
    adata = ad.AnnData(
        sp.csr_matrix(rng.poisson(1.0, (60, 30)).astype(np.uint8)),
        obs=pd.DataFrame({"batch": ["a", "b"] * 30}, index=[f"s:{i}" for i in range(60)]),
        var=pd.DataFrame({"gene_name": [f"GENE{i}" for i in range(30)]}, index=[f"ENSG{i:011d}" for i in range(30)]),
    )
    size = ModelConfig(n_latent=3, n_hidden=8)
    model = sv.fit(adata, batch_key="batch", model=size, train=TrainConfig(max_epochs=1), device="cpu", progress=False)
    folder = tmp_path_factory.mktemp("fitted")
    model.save(folder / "model")
    uri = f"sqlite:///{folder}/mlflow.db"
    register(uri, folder / "model", name="tiny")
    return uri, model, adata


def load_pyfunc(uri: str):
    import mlflow

    mlflow.set_tracking_uri(uri)
    try:
        return mlflow.pyfunc.load_model("models:/tiny/1")
    finally:
        mlflow.set_tracking_uri(None)


def test_pyfunc_embeds_cells_of_every_form(fitted, tmp_path):
    uri, model, adata = fitted
    loaded = load_pyfunc(uri)
    expected = model.latent(adata)
    table = loaded.predict(adata)
    assert table.columns.tolist() == ["cell_id", "z_0", "z_1", "z_2"] and table["z_0"].dtype == np.float32
    assert table["cell_id"].tolist() == adata.obs_names.tolist()
    dense = adata.X.toarray()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    shuffled = adata[:, ::-1].copy()
    shuffled.var_names = shuffled.var_names + ".7"
    forms = {
        "anndata": adata,
        "frame by id": pd.DataFrame(dense, adata.obs_names, adata.var_names),
        "frame by name": pd.DataFrame(dense, adata.obs_names, adata.var["gene_name"]).iloc[:, ::-1],
        "other order, versioned ids": shuffled,
        "names in var": ad.AnnData(adata.X, adata.obs, adata.var.reset_index(drop=True)),
        "path": str(tmp_path / "cells.h5ad"),
        "frame of paths": pd.DataFrame({"path": [str(tmp_path / "cells.h5ad")]}),
    }
    for form, cells in forms.items():
        np.testing.assert_allclose(loaded.predict(cells).iloc[:, 1:], expected, atol=1e-5, err_msg=form)


def test_pyfunc_says_what_it_lacks(fitted, capsys):
    uri, _, adata = fitted
    loaded = load_pyfunc(uri)
    loaded.predict(adata[:, 3:])
    assert "3 of the model's 30 genes are missing" in capsys.readouterr().err
    with pytest.raises(sv.UserError, match="28 of the model's 30 genes are missing"):
        loaded.predict(adata[:, :2])
    with pytest.raises(sv.UserError, match="no such file"):
        loaded.predict("nowhere.h5ad")
    with pytest.raises(sv.UserError, match="cannot be read"):
        loaded.predict(7)


def test_repeated_genes_are_summed():
    adata = ad.AnnData(np.array([[200, 100, 5]], dtype=np.uint8), var=pd.DataFrame(index=["A", "A", "B"]))
    aligned = mapping.align(adata, ["B", "A"], ["B", "A"])
    assert aligned.X.toarray().tolist() == [[5, 300]] and aligned.var_names.tolist() == ["B", "A"]


def test_no_pickle_is_ever_read(fitted, tmp_path, monkeypatch):
    import cloudpickle

    uri, model, adata = fitted

    def refuse(*args, **kwargs):
        raise AssertionError("something is being unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (cloudpickle, ("load", "loads"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    np.testing.assert_array_equal(load_pyfunc(uri).predict(adata).iloc[:, 1:], model.latent(adata))
    registry.fetch(uri, registry.find(uri, model.fingerprint), tmp_path / "model")
    np.testing.assert_array_equal(sv.load(tmp_path / "model").latent(adata), model.latent(adata))


# ---- a real server


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(server_folder):
    """URI of an `mlflow server` on the loopback; skips the test where it is not up within 60 seconds."""
    folder = server_folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("mlflow server was not up within 60 s")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the session that we started, with its workers
        process.wait()


def test_everything_works_with_a_server(server, tmp_path):
    bundle = make_bundle(tmp_path / "model")
    assert registry.find(server, FINGERPRINT) is None
    ref = register(server, bundle)
    assert register(server, bundle) == ref and ref["version"] == "1" and ref["tracking_uri"] == server
    assert register(server, bundle, name="other")["run_id"] == ref["run_id"]
    registry.promote(server, "pancreas", 1)
    out = registry.resolve(server, "models:/pancreas@champion", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert registry.list_models(server)["name"].tolist() == ["other", "pancreas"]
    with pytest.raises(sv.UserError, match="refuses us"), tracking.errors(server):
        # the server's host check, as seen by one who names it by an address it does not know
        from mlflow.exceptions import MlflowException

        raise MlflowException("403 Invalid Host header - possible DNS rebinding attack detected")


def test_eight_processes_at_once_at_a_server(server, tmp_path):
    eight_at_once(server, tmp_path)


def test_files_that_a_server_lost_are_registered_anew(server, server_folder, tmp_path):
    bundle = make_bundle(tmp_path / "model", "78" * 32)
    first = register(server, bundle, name="lost")
    client = tracking.connect(server)
    [stored] = server_folder.rglob(f"{client.get_model_version('lost', '1').tags['model_id']}")
    shutil.rmtree(stored)
    with pytest.raises(registry.Gone, match=r"is missing"):
        registry.fetch(server, registry.find(server, "78" * 32), tmp_path / "out")
    again = register(server, bundle, name="lost")
    assert (
        again["version"] == "2"
        and again["run_id"] != first["run_id"]
        and register(server, bundle, name="lost") == again
    )
    registry.fetch(server, registry.find(server, "78" * 32), tmp_path / "out")


def test_two_first_registrations_at_a_server_are_one_version(server, tmp_path, monkeypatch):
    """A second process registers the same model between our look-up and our version, which a server cannot prevent."""
    bundle = make_bundle(tmp_path / "model", "34" * 32)
    create, theirs = registry._create_version, []

    def late(*arguments):
        monkeypatch.setattr(registry, "_create_version", create)
        theirs.append(register(server, bundle, name="raced"))
        return create(*arguments)

    monkeypatch.setattr(registry, "_create_version", late)
    ours = register(server, bundle, name="raced")
    assert ours == theirs[0] and ours["version"] == "1"
    assert (registry.list_models(server)["name"] == "raced").sum() == 1
    client = tracking.connect(server)
    experiment = client.get_experiment_by_name("scvi-core/pancreas").experiment_id
    runs = client.search_runs([experiment], f"tags.fingerprint = '{'34' * 32}'")
    assert {r.info.run_id: r.info.status for r in runs}.pop(ours["run_id"]) == "FINISHED"
    assert sorted(r.info.status for r in runs) == ["FINISHED", "KILLED"]
