import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))  # the small project

from _project import make, snakemake


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The small project, built without disturbance. Nobody writes in it."""
    folder = make(tmp_path_factory.mktemp("reference") / "project")
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def project(tmp_path):
    """The project, unbuilt."""
    return make(tmp_path / "project")


@pytest.fixture
def stored(reference, tmp_path):
    """The project, built as far as the store."""
    folder = tmp_path / "stored"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    atlas = folder / "results" / "small"
    shutil.rmtree(atlas / "model")
    for path in [*atlas.glob("*.parquet"), *atlas.glob("*.json")]:
        if path.name != "genes.parquet":
            path.unlink()
    return folder
