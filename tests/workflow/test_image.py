"""An image that cannot be had is told in one line, before anything is planned."""

import os
import shutil

import pytest
from _project import make, snakemake


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make(tmp_path_factory.mktemp("image"))


def last_line(project):
    done = snakemake(project, "-n", "--sdm", "apptainer")
    assert done.returncode == 1 and "Building DAG" not in done.stdout + done.stderr
    return done.stderr.strip().split("\n")[-1]


@pytest.mark.skipif(any(map(shutil.which, ("apptainer", "singularity"))), reason="there is one here")
def test_without_apptainer(project):
    assert last_line(project) == "error: apptainer: not found on PATH; install or load it, or leave out --sdm apptainer"


def test_without_the_image(project, tmp_path, monkeypatch):
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SCVI_CORE_IMAGE", "/nowhere/scvi-core.sif")
    told = "no such image, or it cannot be read; make image, or name another by SCVI_CORE_IMAGE"
    assert last_line(project) == f"error: /nowhere/scvi-core.sif: {told}"
