"""Which build of PyTorch is taken, asked before anything is downloaded; and the locks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r"^torch==([0-9.]+)", (ROOT / "envs/cpu.lock").read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all builds are CPU builds")
@pytest.mark.parametrize(
    ("there", "asked", "code", "said"),
    [
        ("{v}+cpu, {v}", "auto", "cpu", "the CPU build"),
        ("9.9.9, {v}+cpu, {v}", "cpu", "cpu", "the CPU build"),
        ("{v}, 2.0.0+cpu", "auto", "cuda", "the CUDA build, as pip finds no CPU build; .*PIP_EXTRA_INDEX_URL="),
        ("{v}", "cpu", 1, "error: TORCH=cpu, but pip finds no CPU build .*PIP_EXTRA_INDEX_URL=.*, or TORCH=cuda"),
        ("{v}+cpu", "cuda", "cuda", "the CUDA build"),
        ("{v}", "gpu", 2, "error: TORCH=gpu; give cpu, cuda or auto"),
    ],
)
def test_the_choice_is_made_by_what_pip_can_find(tmp_path, there, asked, code, said):
    python = tmp_path / "python"
    versions = there.format(v=VERSION)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *index*) echo "torch (1)"; echo "Available versions: {versions}";; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(["bash", ROOT / "envs/torch.sh", python, asked], capture_output=True, text=True, check=False)
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1
    assert (done.stdout.strip() or done.returncode) == code


def test_the_cpu_lock_is_the_other_with_the_cpu_builds(tmp_path):
    made = tmp_path / "cpu.lock"
    paths = (ROOT / "envs/cuda.lock", made, ROOT / "envs/torch-cpu.sha256")
    subprocess.run([sys.executable, ROOT / "envs/cpu_lock.py", *paths], check=True)
    assert made.read_text() == (ROOT / "envs/cpu.lock").read_text()
    builds = (ROOT / "envs/torch-cpu.sha256").read_text()
    for python in ("cp311", "cp312", "cp313", "cp314"):
        for machine in ("x86_64", "aarch64"):
            assert (
                len(re.findall(rf"^[0-9a-f]{{64}}  torch-{VERSION}\+cpu-{python}-{python}-.*{machine}", builds, re.M))
                == 1
            )
