"""Processes killed at random moments, full and read-only disks, torn inputs, two at once, lost servers.

After each of them: no corrupt file that passes for good, a clear message, and a run that completes with the same bytes.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import _place as place
import pytest
from _place import ALL, slow
from _project import BIN, CONFIG, SHEET, changed, cli, environment, snakemake, tree

from scvi_core.files import sha256_file

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
SEED = int(os.environ.get("SCVI_CORE_FAULT_SEED", "0"))


# ---- killed


@linux
def test_training_killed_at_random_moments(reference, tmp_path):
    """By SIGKILL and SIGTERM in turn; whenever a run reaches its end, its weights are those of one never disturbed."""
    rng = random.Random(SEED)
    config = changed(CONFIG, train__max_epochs=1000 if ALL else 400)
    common = ["train", "--store", reference / "results/small/counts.zarr", "--config", json.dumps(config)]
    began = time.monotonic()
    assert cli(tmp_path, *common, "--out", "whole").returncode == 0
    longest = time.monotonic() - began
    expected = sha256_file(tmp_path / "whole/model.safetensors")
    command = [str(part) for part in (BIN / "scvi-core", *common, "--out", "model", "--checkpoints", "states")]
    killed = resumed = finished = 0
    while killed < (20 if ALL else 5):
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=said)
        try:
            process.wait(rng.uniform(0.1, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if killed % 2 else signal.SIGKILL)
            process.wait()
            killed += 1
        said = (tmp_path / "said").read_text()
        assert process.returncode in (0, 75, -signal.SIGKILL, -signal.SIGTERM) and "Traceback" not in said, said
        resumed += "resuming at" in said
        whole = (tmp_path / "model").exists()  # also where it was killed after it had written the model
        assert whole or process.returncode != 0
        if whole:
            finished += 1
            assert sha256_file(tmp_path / "model/model.safetensors") == expected
            assert process.returncode != 0 or not list((tmp_path / "states").glob("*.safetensors"))
            shutil.rmtree(tmp_path / "model")
    process = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert sha256_file(tmp_path / "model/model.safetensors") == expected
    print(f"killed {killed}, resumed {resumed}, finished {finished + 1}")
    assert resumed


@linux
@slow
def test_workflow_and_jobs_killed_at_random_moments(reference, project):
    """The whole session, Snakemake alone (its jobs go on), one job, Snakemake asked to stop: in turn."""
    rng = random.Random(SEED + 1)
    killed = 0
    for how in ("all", "job", "snakemake", "term") * 3:
        process = place.start(project)
        try:
            process.wait(rng.uniform(3, 12))
        except subprocess.TimeoutExpired:
            killed += 1
        if how == "job":
            jobs = [pid for pid, words in place.below(process) if any(word.endswith("/scvi-core") for word in words)]
            if jobs:
                os.kill(rng.choice(jobs), signal.SIGKILL)
                assert process.wait(120) == 1
                assert "Error in rule" in (project / "said").read_text()
        elif how == "snakemake":
            jobs = [pid for pid, _ in place.below(process)]
            process.kill()
            process.wait()
            place.until(lambda jobs=jobs: not any(os.path.exists(f"/proc/{pid}") for pid in jobs), what="the jobs' end")
        elif how == "term":
            process.terminate()
            process.wait(120)
        place.kill_all(process)
        assert snakemake(project, "--unlock").returncode == 0
    place.finish(project)
    print(f"killed {killed}")
    assert place.artefacts(project) == place.artefacts(reference)


# ---- disks


@pytest.fixture
def disk(project):
    """A small file system of memory, at results/: resize(kilobytes), and options such as `ro`."""
    results = project / "results"
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "scvi-core-test", str(results)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only one who may mount file systems can fill one")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(results)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(results)], check=True)


@slow
def test_a_full_disk_at_every_stage(reference, project, disk):
    """Filled again and again: each run gets further and says why it stopped, and the last gives the same bytes."""
    stages, size, done = [], 160, None
    while size < 64_000:
        disk(f"size={size}k")
        done = snakemake(project, "--cores", "1")
        if done.returncode == 0:
            break
        said = done.stdout + done.stderr
        stages += re.findall(r"Error in rule (\w+)", said) or ["snakemake"]
        assert re.search("no space left", said, re.IGNORECASE), said
        size = int(size * 1.6) + 32
    print("full at:", ", ".join(stages))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(stages)) >= 3
    assert place.artefacts(project) == place.artefacts(reference)


@slow
def test_read_only_results(reference, project, disk):
    target = "results/small/genes.parquet"
    disk("ro")
    done = snakemake(project, target)
    assert done.returncode == 1 and "Read-only file system" in done.stdout + done.stderr, done.stdout + done.stderr
    disk("rw")
    place.finish(project, target)
    disk("ro")
    before = tree(project / "results")
    done = snakemake(project, "results/small/counts.zarr/.zattrs")
    assert done.returncode == 1 and "Read-only file system" in done.stdout + done.stderr, done.stdout + done.stderr
    assert tree(project / "results") == before
    disk("rw")
    place.finish(project, "results/small/counts.zarr/.zattrs")
    made, expected = place.artefacts(project), place.artefacts(reference)
    assert made == {name: expected[name] for name in made} and "counts.zarr/.zattrs" in made


# ---- inputs


def test_truncated_inputs(reference, project):
    names = ("a.h5ad", "b/matrix.mtx.gz", "c.csv.gz")
    whole = {name: (project / "data" / name).read_bytes() for name in names}
    for name, content in whole.items():
        (project / "data" / name).write_bytes(content[: len(content) // 2])
    targets = [f"results/small/samples/{sample}/counts.h5ad" for sample in "abc"]
    done = snakemake(project, "--keep-going", *targets)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and not any((project / target).exists() for target in targets), said
    for sample in SHEET["path"]:
        assert re.search(rf"^error: {re.escape(sample)}: .*truncated", said, re.MULTILINE), said
    assert "Traceback" not in said, said
    for name, content in whole.items():
        (project / "data" / name).write_bytes(content)
    place.finish(project, *targets)
    expected = place.artefacts(reference)
    made = place.artefacts(project)
    assert made and made == {name: expected[name] for name in made}


# ---- two at once


def test_a_second_workflow_on_the_same_results_is_told(reference, project):
    targets = [f"results/small/samples/{sample}/counts.h5ad" for sample in "abc"]
    first = place.start(project, *targets)
    locks = project / ".snakemake" / "locks"
    place.until(lambda: locks.is_dir() and any(locks.iterdir()), what="the first workflow's lock")
    os.killpg(first.pid, signal.SIGSTOP)  # else it may be done before the second looks
    second = snakemake(project, *targets)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 1 and "cannot be locked" in second.stdout + second.stderr, second.stdout + second.stderr
    assert first.wait(120) == 0
    made, expected = place.artefacts(project), place.artefacts(reference)
    assert made and made == {name: expected[name] for name in made}


@linux
def test_the_same_training_twice_at_once_is_done_once(reference, tmp_path):
    """As when Snakemake is killed and started again while its job still runs."""
    config = changed(CONFIG, train__max_epochs=400)
    common = ["train", "--store", reference / "results/small/counts.zarr", "--config", json.dumps(config)]
    command = [str(part) for part in (BIN / "scvi-core", *common, "--out", "model", "--checkpoints", "states")]
    said = {name: tmp_path / name for name in ("one", "two")}

    def begin(name):
        with open(said[name], "w") as file:
            return subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=file)

    one = begin("one")
    place.until(lambda: "/400" in said["one"].read_text(), what="training")
    one.send_signal(signal.SIGSTOP)  # else it may be done before the second comes
    two = begin("two")
    place.until(lambda: "waiting for it" in said["two"].read_text(), what="the second's waiting")
    one.send_signal(signal.SIGCONT)
    assert (one.wait(120), two.wait(120)) == (0, 0)
    assert "epoch 400/400" in said["one"].read_text()
    assert "is kept" in said["two"].read_text() and "epoch" not in said["two"].read_text()
    assert cli(tmp_path, *common, "--out", "whole").returncode == 0
    assert sha256_file(tmp_path / "model/model.safetensors") == sha256_file(tmp_path / "whole/model.safetensors")
    assert not list((tmp_path / "states").iterdir())


def copy_unregistered(reference, folder):
    shutil.copytree(reference / "results" / "small", folder / "results" / "small")
    (folder / "results/small/model_ref.json").unlink()
    return folder


def registering(folder, uri):
    settings = json.dumps(changed(CONFIG, registry__tracking_uri=uri))
    command = [BIN / "scvi-core", "register", "results/small", "--config", settings]
    return subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


def test_two_on_the_same_registry(reference, tmp_path):
    folders = [copy_unregistered(reference, tmp_path / name) for name in ("one", "two")]
    uri = f"sqlite:///{tmp_path}/shared/mlflow.db"
    both = [registering(folder, uri) for folder in folders]
    for process in both:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
    one, two = (json.loads((folder / "results/small/model_ref.json").read_text()) for folder in folders)
    assert one == two and one["version"] == "1"


# ---- a tracking server


@pytest.fixture
def server(tmp_path):
    """(port, start): a server that is not up yet, which knows itself as localhost and by no other name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start():
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--allowed-hosts", f"localhost:{port}"]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "art")]
        with open(tmp_path / "server.log", "wb") as log:
            quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
            started.append(subprocess.Popen(command, env=quiet, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                return
            except OSError:
                if started[-1].poll() is not None or time.monotonic() > deadline:
                    pytest.skip("mlflow server was not up within 60 s")
                time.sleep(0.2)

    yield port, start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)  # the session that we started, with its workers
        process.wait()


@slow
def test_a_server_that_is_away_or_refuses_loses_nothing(reference, tmp_path, server):
    """The bundle waits; registering again, when the server is there, works, from two places at once."""
    port, start = server
    folders = [copy_unregistered(reference, tmp_path / name) for name in ("one", "two")]
    before = tree(folders[0] / "results")
    for uri, why in ((f"http://localhost:{port}", "cannot be reached"), (f"http://127.0.0.1:{port}", "refuses us")):
        if why == "refuses us":
            start()  # with its host check on, which does not know this address
        process = registering(folders[0], uri)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in said, said
        assert re.search(rf"^error: {re.escape(uri)}: .*{why}", said, re.MULTILINE), said
        assert tree(folders[0] / "results") == before
    both = [registering(folder, f"http://localhost:{port}") for folder in folders]
    for process in both:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
    one, two = (json.loads((folder / "results/small/model_ref.json").read_text()) for folder in folders)
    assert one == two and one["version"] == "1"
