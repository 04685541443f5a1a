"""Every step, killed or failed at its nth write, rename, fsync: what was there stays whole, a rerun gives the same.

The calls of a step are counted first; then some of them, drawn at random (SCVI_CORE_FAULT_SEED), are struck one at a
time, twice: by SIGKILL, as when a machine is lost, and by an error (no space left, or input/output error).
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _place import ALL, slow
from _project import environment, tree

HERE = Path(__file__).parent
SEED = int(os.environ.get("SCVI_CORE_FAULT_SEED", "0"))
CALLS = ("write", "rename", "fsync", "mkdir", "unlink", "open")
A = "results/small"
COUNTS = [f"{A}/samples/{name}/counts.h5ad" for name in "abc"]
COMMON = ["--config", "config/config.yaml"]
STORE, MODEL = ["--store", f"{A}/counts.zarr"], ["--model", f"{A}/model"]
# of each step the command and its outputs
STEPS = {
    "ingest": (["ingest", "data/a.h5ad", "--sample", "a", "--batch", "one", "--metadata",
                '{"donor": "d1", "age": "31"}', *COMMON, "--out", COUNTS[0]], [COUNTS[0]]),
    "qc": (["qc", COUNTS[0], *COMMON, "--out", f"{A}/samples/a/qc.parquet", "--figure", f"{A}/samples/a/qc.png",
            "--decisions", f"{A}/decisions/qc.a.jsonl"], [f"{A}/samples/a/qc.parquet", f"{A}/samples/a/qc.png"]),
    "genes": (["genes", *COUNTS, *COMMON, "--out", f"{A}/genes.parquet"], [f"{A}/genes.parquet"]),
    "store": (["store", *COUNTS, "--genes", f"{A}/genes.parquet", *COMMON, "--out", f"{A}/counts.zarr"],
              [f"{A}/counts.zarr"]),
    "train": (["train", *STORE, *COMMON, "--out", f"{A}/model", "--checkpoints", f"{A}/.checkpoints"], [f"{A}/model"]),
    "embed": (["embed", *STORE, *MODEL, *COMMON, "--out", f"{A}/latent.parquet"], [f"{A}/latent.parquet"]),
    "cluster": (["cluster", *STORE, "--latent", f"{A}/latent.parquet", *COMMON, "--out", f"{A}/clusters.parquet"],
                [f"{A}/clusters.parquet"]),
    "cells": (["cells", *STORE, "--clusters", f"{A}/clusters.parquet", *COMMON, "--out", f"{A}/cells.parquet"],
              [f"{A}/cells.parquet"]),
    "de": (["de", *STORE, *MODEL, "--cells", f"{A}/cells.parquet", *COMMON, "--out", f"{A}/de.parquet"],
           [f"{A}/de.parquet"]),
    "criticism": (["criticism", *STORE, *MODEL, "--cells", f"{A}/cells.parquet", *COMMON, "--out", f"{A}/criticism"],
                  [f"{A}/criticism"]),
    "report": (["report", A, *COMMON], [f"{A}/report.html", f"{A}/metrics.json", f"{A}/manifest.json"]),
}  # fmt: skip


class Runner:
    """Commands with a fault in them, one after another."""

    def __init__(self, library: Path):
        more = {"LD_PRELOAD": str(library), "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "_faulty.py"], env=environment() | more, stdin=-1, stdout=-1, text=True
        )

    def run(self, folder: Path, argv: list[str], call: str = "", nth: int = 0, error: int = 0) -> dict:
        asked = {"argv": argv, "cwd": str(folder), "call": call, "under": A, "nth": nth, "errno": error}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    made = shutil.which("cc") and subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "fault.c", "-ldl"], capture_output=True, check=False
    )
    if not sys.platform.startswith("linux") or not made or made.returncode:
        pytest.skip("needs Linux and a C compiler")
    runner = Runner(library)
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


def outputs(folder: Path, paths: list[str]) -> dict[str, str | dict[str, str]]:
    """Digests of a step's outputs, as far as they are there."""
    digests = {path: tree((folder / path).parent, [".checkpoints"]) for path in paths}
    return {
        name: digest
        for path, found in digests.items()
        for name, digest in ((f"{Path(path).parent / n}", d) for n, d in found.items())
        if name == path or name.startswith(f"{path}/")
        if not name.endswith(".snakemake_timestamp")
    }


@pytest.mark.parametrize("step", [step if step == "genes" else pytest.param(step, marks=slow) for step in STEPS])
def test_a_step_struck_at_its_system_calls(reference, tmp_path, runner, step):
    """With an earlier output in place, and without one."""
    argv, paths = STEPS[step]
    expected = outputs(reference, paths)
    rng, struck = random.Random(f"{SEED} {step}"), 0
    folder = tmp_path / "project"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts", ".snakemake"))
    for call in CALLS:
        counted = runner.run(folder, argv, call)
        assert counted["rc"] == 0, counted["said"]
        assert outputs(folder, paths) == expected
        for nth in sorted(rng.sample(range(1, counted["seen"] + 1), min(counted["seen"], 8 if ALL else 1))):
            for error in (0, errno.ENOSPC if nth % 2 else errno.EIO):
                there = rng.random() < 0.5
                if not there:
                    for path in paths:
                        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
                before, struck = outputs(folder, paths), struck + 1
                done = runner.run(folder, argv, call, nth, error)
                what = f"{step}: {call} {nth} of {counted['seen']}, {errno.errorcode.get(error, 'SIGKILL')}: {done}"
                after = outputs(folder, paths)
                for path in paths:  # each is as it was, or whole
                    of = {n: d for n, d in after.items() if n == path or n.startswith(f"{path}/")}
                    assert of in (
                        {n: d for n, d in before.items() if n in of},
                        {n: d for n, d in expected.items() if n in of},
                    ), what
                    assert not of or set(of) == {n for n in expected if n == path or n.startswith(f"{path}/")}, what
                assert "Traceback" not in done["said"] and "scvi-core's own" not in done["said"], what
                if error and done["rc"]:
                    assert (
                        done["rc"] == 1 and done["said"].count("\nerror: ") + done["said"].startswith("error: ") == 1
                    ), what
                elif error:  # what it was about could fail: a file that is removed, a folder of no importance
                    assert after == expected, what
                for left in folder.rglob(".*.tmp"):  # what is a minute old is nobody's
                    os.utime(left, (0, 0))
                again = runner.run(folder, argv)
                assert again["rc"] == 0 and outputs(folder, paths) == expected, (what, again)
    print(f"{step}: struck {struck} times")
    assert not list(folder.rglob(".*.tmp"))
