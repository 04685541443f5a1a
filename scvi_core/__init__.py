"""scvi-core: from raw single-cell counts to a gene expression atlas.

``import scvi_core as sv``; names are loaded when first used, so that the import itself is light.
"""

import os

from scvi_core._version import __version__

# Threads that wait, asleep, not spinning: a step has dozens of short parallel parts, and where anything else runs on
# the machine, spinning for a thread that is not scheduled costs ten times the work. Read by OpenMP when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOME = {
    "fit": "scvi_core.api",
    "load": "scvi_core.api",
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
