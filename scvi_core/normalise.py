"""Counts as the field compares cells by them: log(1 + counts per 10,000 of the cell)."""

from __future__ import annotations

import numpy as np

TARGET = 10_000  # counts that a cell is scaled to before the logarithm


def log_normalised(x_m: np.ndarray, indptr_n: np.ndarray, total_n: np.ndarray) -> np.ndarray:
    """Log(1 + 10,000 x / total) of the stored counts of a CSR matrix, (stored,) float64.

    Parameters
    ----------
    x_m, indptr_n : ``data`` and ``indptr`` of (cells, genes) counts.
    total_n : (cells,) counts of each cell, over all its genes; above zero.
    """
    return np.log1p(x_m * np.repeat(TARGET / total_n, np.diff(indptr_n)))
