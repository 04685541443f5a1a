import os
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; benchmarks/gpu.py is what needs a GPU
ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Two processes share the tests by files; those of the workflow, which share a build, are one file, and first."""
    items.sort(key=lambda item: item.path.parent.name != "workflow")
    for item in items:
        workflow = item.path.parent.name == "workflow"
        item.add_marker(pytest.mark.xdist_group("workflow" if workflow else item.path.name))


@pytest.fixture(scope="session")
def real_data():
    """Path of a real dataset by name; skips the test where the datasets are not at hand."""
    folder = Path(os.environ.get("SCVI_CORE_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"real dataset {name} is not at hand (set SCVI_CORE_DATA to its folder)")
        return path

    return find
