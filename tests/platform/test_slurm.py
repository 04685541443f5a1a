"""A real Slurm: the same bytes by it, and training that is preempted, killed and cut short."""

import json
import os
import shutil
import signal
import subprocess

import _place as place
import pytest
from _place import ALL
from _project import CONFIG, ROOT, changed, cli, environment, snakemake, write_config

from scvi_core.files import sha256_file

PROFILE = ["--profile", ROOT / "workflow" / "profiles" / "slurm", "--slurm-init-seconds-before-status-checks", "2"]
MODEL = "results/small/model/model.safetensors"
LONG = changed(CONFIG, train__max_epochs=6000)  # a minute or so: long enough to be disturbed


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


pytestmark = [
    pytest.mark.skipif(not ALL, reason="submits jobs: `make faults` runs it (SCVI_CORE_PLATFORM=1)"),
    pytest.mark.skipif("UP" not in (ask("scontrol", "ping") if shutil.which("sbatch") else ""), reason="no Slurm here"),
]


def jobs(folder, **wanted):
    """Jobs of a folder's build that Slurm remembers, as its own fields; the newest last."""
    lines = ask("scontrol", "-o", "show", "job").splitlines()
    found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    found = [job for job in found if job.get("WorkDir") == str(folder)]
    return [job for job in found if all(job.get(key) in value.split() for key, value in wanted.items())]


def training(folder):
    """(its job, pid of `scvi-core train`), once training has begun; Slurm's own id finds it, whatever started it."""
    for job in jobs(folder, Comment="rule_train", JobState="RUNNING"):
        for pid, (_, words) in place.processes().items():
            if len(words) > 1 and words[1].endswith("/scvi-core") and "train" in words:
                inside = environment_of(pid)
                if inside.get("SLURM_JOB_ID") == job["JobId"]:
                    return job, pid
    return None


def environment_of(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.split("=", 1) for entry in file.read().decode(errors="replace").split("\0") if "=" in entry)
            return dict(pairs)
    except OSError:
        return {}


def fitting(folder):
    """The same, when it is past its first steps: the log says so."""
    found, log = training(folder), folder / "results/small/logs/train.log"
    return found if found and log.exists() and "epoch" in log.read_text().replace("epochs", "") else None


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    """SHA-256 of the long training's weights, undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli(
        folder,
        *("train", "--store", reference / "results/small/counts.zarr", "--config", json.dumps(LONG), "--out", "model"),
    )
    assert done.returncode == 0, done.stderr
    return sha256_file(folder / "model" / "model.safetensors")


@pytest.fixture
def long(stored):
    write_config(stored, LONG)
    return stored


def test_the_same_bytes_by_slurm(reference, project):
    """Every rule is a job but those that speak to the registry; samples go as arrays; training alone has the GPU."""
    how = ["--slurm-array-jobs", "ingest,qc", "--slurm-keep-successful-logs", "--retries", "0"]
    if gpu := "gpu" in ask("sinfo", "-h", "-o", "%G"):
        how += ["--set-resources", "train:gpu=1"]
    assert place.start(project, *PROFILE, *how).wait(1500) == 0, (project / "said").read_text()
    logs = project / ".snakemake" / "slurm_logs"
    submitted = ["ingest", "qc", "genes", "store", "train", "embed", "cluster", "cells", "de", "criticism"]
    submitted += ["export", "report"]
    assert {path.name for path in logs.iterdir()} == {f"rule_{name}" for name in submitted}
    assert len(list(logs.glob("rule_ingest/**/*_[123].log"))) == 3  # an array; of qc, those that became ready together
    told = [line.split("|") for line in ask("sacct", "-XnPo", "WorkDir,Comment,AllocTRES").splitlines()]
    told = [(comment, given) for folder, comment, given in told if folder == str(project)]
    if gpu and told:  # where Slurm keeps accounts
        assert [comment for comment, given in told if "gpu" in given] == ["rule_train"]
    assert place.artefacts(project) == place.artefacts(reference)


def test_training_signalled_killed_requeued_and_cancelled(weights, long):
    """One training that meets all of it in turn goes on each time, to the bytes of an undisturbed one."""
    process = place.start(long, *PROFILE, "--retries", "6", MODEL)
    states = long / "results/small/.checkpoints"
    resumed = 0
    for how in ("signal", "requeue", "cancel", "kill"):
        job, pid = place.until(lambda: fitting(long), 240, f"training before '{how}'")
        resumed += "resuming at" in (long / "results/small/logs/train.log").read_text()
        before = {path: path.stat().st_mtime_ns for path in states.glob("*.safetensors")}
        if how == "signal":
            ask("scancel", "--signal=TERM", job["JobId"])
        elif how == "requeue":
            assert subprocess.run(["scontrol", "requeue", job["JobId"]], check=False).returncode == 0
        elif how == "cancel":
            ask("scancel", job["JobId"])
        else:
            os.kill(pid, signal.SIGKILL)
        place.until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), 60, f"the end of training by '{how}'")
        after = {path: path.stat().st_mtime_ns for path in states.glob("*.safetensors")}
        assert after and (how == "kill" or after != before), how
        if how == "requeue":  # Slurm lets a requeued job wait for two minutes
            place.until(lambda job=job: jobs(long, JobId=job["JobId"], JobState="PENDING"), 60, "the job, requeued")
            ask("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now")
    code, said = process.wait(600), (long / "said").read_text()
    assert code == 0, said
    assert "resuming at" in (long / "results/small/logs/train.log").read_text()
    assert resumed == 3
    assert sha256_file(long / MODEL) == weights
    assert not list(states.glob("*.safetensors"))


def test_too_short_a_time_limit(weights, long):
    """Before its minute is up training writes a checkpoint and ends; the next attempt goes on."""
    limits = ["--set-resources", "train:runtime=1", "train:slurm_extra=--signal=TERM@30"]
    code = place.start(long, *PROFILE, *limits, "--retries", "15", MODEL).wait(1500)
    assert code == 0, (long / "said").read_text()
    ended = [job["JobState"] for job in jobs(long, Comment="rule_train")]
    assert len(ended) >= 2 and ended[-1] == "COMPLETED" and "COMPLETED" not in ended[:-1], ended
    assert "resuming at" in (long / "results/small/logs/train.log").read_text()
    assert sha256_file(long / MODEL) == weights


def test_snakemake_killed_while_training(weights, long):
    """Its job goes on; the same command afterwards takes what that has made, and trains nothing twice."""
    process = place.start(long, *PROFILE, MODEL)
    place.until(lambda: fitting(long), 240, "training")
    place.kill_all(process)
    place.until(lambda: not jobs(long, JobState="RUNNING COMPLETING PENDING"), 300, "the job's end")
    made = (long / "results/small/logs/train_run.json").read_bytes()  # the times of that training
    assert sha256_file(long / MODEL) == weights
    assert snakemake(long, "--unlock").returncode == 0
    assert place.start(long, *PROFILE, MODEL).wait(300) == 0, (long / "said").read_text()
    assert (long / "results/small/logs/train_run.json").read_bytes() == made
    assert sha256_file(long / MODEL) == weights


def test_snakemake_interrupted(weights, long):
    """Ctrl-C: it cancels its jobs, training leaves a checkpoint, and the same command goes on."""
    process = place.start(long, *PROFILE, MODEL)
    _, pid = place.until(lambda: fitting(long), 240, "training")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    place.until(lambda: not os.path.exists(f"/proc/{pid}"), 60, "the end of training")
    assert list((long / "results/small/.checkpoints").glob("*.safetensors"))
    place.until(lambda: not jobs(long, JobState="RUNNING COMPLETING PENDING"), 60, "the job's end")
    assert place.start(long, *PROFILE, MODEL).wait(600) == 0, (long / "said").read_text()
    assert "resuming at" in (long / "results/small/logs/train.log").read_text()
    assert sha256_file(long / MODEL) == weights


def test_training_in_the_image_is_signalled(weights, long, current, monkeypatch):
    """SIGTERM reaches training inside a container, which goes on in another."""
    monkeypatch.setenv("SCVI_CORE_IMAGE", str(current))
    inside = ["--workflow-profile", ROOT / "workflow" / "profiles" / "apptainer"]
    process = place.start(long, *PROFILE, *inside, "--retries", "3", MODEL)
    job, pid = place.until(lambda: fitting(long), 240, "training")
    assert environment_of(pid).get("APPTAINER_CONTAINER") == str(current)
    ask("scancel", "--signal=TERM", job["JobId"])
    assert process.wait(600) == 0, (long / "said").read_text()
    assert "resuming at" in (long / "results/small/logs/train.log").read_text()
    assert sha256_file(long / MODEL) == weights


def test_two_processes_and_torchrun(long):
    """`devices: 2` in the workflow; and two launchers in a job of one's own, as several machines need."""
    write_config(long, changed(CONFIG, devices=2))
    assert place.start(long, *PROFILE, "--retries", "0", MODEL).wait(300) == 0, (long / "said").read_text()
    assert "process 1 of 2 on cpu" in (long / "results/small/logs/train.log").read_text()
    step = ["srun", "-n2", "-c1", "--mem=4000", "torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    step += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29511", "-m", "scvi_core.cli", "train"]
    step += ["--store", "results/small/counts.zarr", "--config", json.dumps(CONFIG), "--out", "own", "--devices", "2"]
    alone = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(step, cwd=long, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "process 1 of 2" in done.stderr, done.stderr
    assert sha256_file(long / "own/model.safetensors") == sha256_file(long / MODEL)
