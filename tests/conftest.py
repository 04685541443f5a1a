import os
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; benchmarks/gpu.py is what needs a GPU
ROOT = Path(__file__).resolve().parent.parent


def of_workflow(nodeid):
    return nodeid.startswith("tests/workflow/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not of_workflow(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Two processes share the tests by files; those of the workflow, which share a build, are one file, and first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "workflow" if of_workflow(nodeid) else nodeid.partition("::")[0]

    return ByFile(config, log)


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
