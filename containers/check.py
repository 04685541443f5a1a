"""What an image must hold: the packages import, the kernels are compiled, nothing of the image need be written."""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path

PACKAGES = "torch numpy scipy pandas pyarrow anndata zarr scanpy faiss scranpy openTSNE igraph mlflow duckdb pydeseq2"
for name in PACKAGES.split():
    importlib.import_module(name)
for name in ("snakemake", "pip"):
    assert importlib.util.find_spec(name) is None, f"{name} is in the image, where nothing needs it"

import scvi_core  # noqa: E402
from scvi_core.kernels import native  # noqa: E402

assert native.library is not None, f"the compiled kernels: {native.reason}"
for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCH_HOME"):
    folder = Path(os.environ[name])
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
print("scvi-core", scvi_core.__version__, "from", Path(scvi_core.__file__).parent)
