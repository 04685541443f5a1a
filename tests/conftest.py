import os
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; benchmarks/gpu.py is what needs a GPU
ROOT = Path(__file__).resolve().parent.parent


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
