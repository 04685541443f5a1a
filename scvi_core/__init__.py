"""scvi-core: from raw single-cell counts to a gene expression atlas.

``import scvi_core as sv``; names are loaded when first used, so that the import itself is light.
"""

import os

from scvi_core._version import __version__

# A thread of PyTorch's that waits for others spins for some microseconds, then sleeps: on cores that others use too, to
# spin for long takes many times longer than what there is to do. Read by OpenMP when torch loads it. Training has
# threads of its own (scvi_core/kernels/kernels.c), which wait for nobody that has not come.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "fit": "scvi_core.api",
    "load": "scvi_core.api",
    "attach": "scvi_core.join",
    "Model": "scvi_core.api",
    "Config": "scvi_core.config",
    "ModelConfig": "scvi_core.config",
    "DeConfig": "scvi_core.config",
    "TrainConfig": "scvi_core.config",
    "UserError": "scvi_core.files",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'scvi_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
