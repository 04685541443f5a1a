"""What takes time, and where it is done fastest: see :mod:`scvi_core.kernels.ops`."""

from scvi_core.kernels.nonzeros import Nonzeros
from scvi_core.kernels.ops import (
    adam,
    corrected,
    hidden,
    kind,
    linear,
    linear_of_counts,
    log_likelihood,
    reconstruction,
)

__all__ = [
    "Nonzeros",
    "adam",
    "corrected",
    "hidden",
    "kind",
    "linear",
    "linear_of_counts",
    "log_likelihood",
    "reconstruction",
]
