import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))  # the small project

from _place import IMAGE, inside, run
from _project import environment, make, snakemake

CODE = "from scvi_core.files import code_sha256; print(code_sha256())"


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


@pytest.fixture(scope="session")
def image():
    if not shutil.which("apptainer"):
        pytest.skip("Apptainer is not installed here")
    if not IMAGE.exists():
        pytest.skip(f"no image {IMAGE}; make image builds it")
    return IMAGE


@pytest.fixture(scope="session")
def current(image):
    """The image, if it holds the code of this checkout."""
    if inside("python", "-c", CODE).stdout != run(sys.executable, "-c", CODE, env=environment()).stdout:
        pytest.skip(f"{image} holds other code than this checkout; make image builds it anew")
    return image
