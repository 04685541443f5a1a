"""The image on a real Apptainer: what it holds, that it stays unwritten and off the network, the same bytes as outside.

Skipped where there is no Apptainer or no image: `make image` builds one, SCVI_CORE_IMAGE names another.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from _place import IMAGE, inside, run, slow
from _project import CONFIG, ROOT, changed, make, snakemake, tree, write_config

PROFILE = ROOT / "workflow" / "profiles" / "apptainer"
VARIES = ("logs", "benchmarks", "model_ref.json")  # by the contract of the files


def test_its_own_test(image):
    done = run("apptainer", "test", image)
    assert done.returncode == 0 and "scvi-core" in done.stdout, done.stdout + done.stderr


def test_labels(image):
    done = run("apptainer", "inspect", "--json", image)
    labels = json.loads(done.stdout)["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.version"] == inside("scvi-core", "--version").stdout.split()[-1]
    assert labels["org.opencontainers.image.revision"] and labels["scvi-core.variant"] in ("cpu", "cuda")


def test_it_cannot_be_written(image):
    done = inside("touch", "/opt/venv/new")
    assert done.returncode != 0 and "Read-only" in done.stderr


def test_the_callers_packages_stay_out(image, tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the caller numpy')")
    done = inside("python", "-c", "import numpy", env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd="/")
    assert done.returncode == 0, done.stderr


def test_a_cache_that_is_not_ours_is_not_used(image, tmp_path):
    (tmp_path / f"scvi-core-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"scvi-core-{os.getuid()}").chmod(0o777)
    done = inside(
        "sh", "-c", "echo $NUMBA_CACHE_DIR", options=("--bind", tmp_path), env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert done.stdout.strip() and not done.stdout.startswith(str(tmp_path / "scvi-core-")), done.stdout + done.stderr


def test_the_bill_of_materials(image):
    done = inside("python", "/opt/venv/share/scvi-core/sbom.py")
    found = [c["purl"] for c in json.loads(done.stdout)["components"]]
    assert found == sorted(found)
    assert any(p.startswith("pkg:pypi/torch@") for p in found) and any(
        p.startswith("pkg:deb/debian/libc6@") for p in found
    )
    assert not any(p.startswith("pkg:pypi/snakemake") for p in found)
    locked = (ROOT / "envs" / "cpu.lock").read_text()
    for purl in found:
        if purl.startswith("pkg:pypi/") and "/scvi-core@" not in purl:
            name, version = purl.removeprefix("pkg:pypi/").split("@")
            assert f"{name}=={version.split('+')[0]}" in locked.lower(), purl
    beside = IMAGE.with_suffix(".sbom.json")
    if beside.exists():
        assert beside.read_text() == done.stdout


def settled(folder, foreign):
    """Digests of what a build leaves, but for the lines that name the `foreign` software."""
    found = tree(folder, VARIES)
    manifest = json.loads((folder / "manifest.json").read_text())
    card = json.loads((folder / "model" / "model.json").read_text())
    page = (folder / "report.html").read_text()
    for other in ("report.html", "model/model.json"):  # compared by their own texts
        del manifest["files"][other]
    for name in foreign:
        manifest["software"].pop(name, None)
        card["software"].pop(name, None)
        page = re.sub(rf'<tr>\s*<th scope="row">\s*{name}</th>.*?</tr>\s*', "", page, flags=re.DOTALL)
    for name, text in (
        ("manifest.json", json.dumps(manifest)),
        ("model/model.json", json.dumps(card)),
        ("report.html", page),
    ):
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


@slow
def test_the_same_bytes_as_outside(current, tmp_path, monkeypatch):
    monkeypatch.setenv("SCVI_CORE_IMAGE", str(current))
    folders = [make(tmp_path / name) for name in ("outside", "inside")]
    for folder, options in zip(folders, ((), ("--profile", PROFILE)), strict=True):
        done = snakemake(folder, *options)
        assert done.returncode == 0, done.stdout + done.stderr
    results = [folder / "results" / "small" for folder in folders]
    ours, theirs = (set(json.loads((at / "manifest.json").read_text())["software"]) for at in results)
    assert theirs <= ours  # an environment made by hand may hold more than the lock
    outside, found = (settled(at, ours - theirs) for at in results)
    assert found == outside
    assert "model/model.safetensors" in found and "cells.parquet" in found


def test_no_network_in_a_rule(image):
    probe = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done = inside("python", "-c", probe, options=("--net", "--network", "none"))
    assert done.returncode != 0 and "Network is unreachable" in done.stderr


@slow
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_a_gpu_asked_for_and_not_there(current, tmp_path, monkeypatch):
    monkeypatch.setenv("SCVI_CORE_IMAGE", str(current))
    folder = make(tmp_path / "gpu")
    write_config(folder, changed(CONFIG, device="cuda"))
    done = snakemake(folder, "--profile", PROFILE, "--until", "train", "--cores", "1")
    assert done.returncode != 0 and "'cuda' was asked for but PyTorch sees no CUDA device" in done.stdout + done.stderr


# ---- without Apptainer


def sbom(*arguments):
    return run(sys.executable, ROOT / "containers" / "sbom.py", *arguments)


def test_bills_are_compared(tmp_path):
    first = json.loads(sbom().stdout)
    assert sbom().stdout == sbom().stdout
    assert first["bomFormat"] == "CycloneDX" and any(c["name"] == "torch" for c in first["components"])
    second = json.loads(json.dumps(first))
    gone = second["components"].pop(0)
    next(c for c in second["components"] if c["name"] == "torch")["version"] = "0"
    for name, bill in (("first", first), ("second", second)):
        (tmp_path / name).write_text(json.dumps(bill))
    assert sbom(tmp_path / "first", tmp_path / "first").returncode == 0
    done = sbom(tmp_path / "first", tmp_path / "second")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2
    assert f"{gone['version']} -> absent" in done.stdout and "-> 0" in done.stdout
