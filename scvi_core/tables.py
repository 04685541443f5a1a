"""Tables that several steps write or read, and the order of names in them. Imports neither torch nor anndata."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd


def natural(text: str) -> list[tuple[int, int, str]]:
    """Key that sorts names as people count: "2" before "10", "s2" before "s10", numbers before words, case ignored."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+|[0-9]+", text)
    return [*((0, int(p), "") if p.isdecimal() and len(p) <= 18 else (1, 0, p.casefold()) for p in parts), (2, 0, text)]


def latent_table(cell_ids: Iterable[str], z_nk: np.ndarray) -> pd.DataFrame:
    """latent.parquet: ``cell_id``, then ``z_0`` ... float32."""
    frame = pd.DataFrame(z_nk, columns=[f"z_{k}" for k in range(z_nk.shape[1])])
    frame.insert(0, "cell_id", [str(c) for c in cell_ids])
    return frame


def uncertainty_table(cell_ids: Iterable[str], uncertainty_n: np.ndarray, std_nk: np.ndarray) -> pd.DataFrame:
    """uncertainty.parquet: ``cell_id``, ``uncertainty``, then ``std_0`` ... float32, as :mod:`scvi_core.posterior`."""
    frame = pd.DataFrame(std_nk, columns=[f"std_{k}" for k in range(std_nk.shape[1])])
    frame.insert(0, "uncertainty", uncertainty_n)
    frame.insert(0, "cell_id", [str(c) for c in cell_ids])
    return frame


def clusters_table(cell_ids: Iterable[str], found: pd.DataFrame) -> pd.DataFrame:
    """clusters.parquet: ``cell_id``, then clusters by resolution and the coordinates of UMAP and t-SNE."""
    frame = found.reset_index(drop=True)
    frame.insert(0, "cell_id", [str(c) for c in cell_ids])
    return frame


def cells_table(obs: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """cells.parquet: ``cell_id`` (``{sample}:{barcode}``), its parts, fixed columns, the user's own, then the rest.

    Parameters
    ----------
    obs : of the store. found : clusters.parquet, and columns that were made from it, in the same order.
    """
    fixed = ["sample", "batch", "n_counts", "n_genes", "pct_mito", "doublet_score"]
    front = ["cluster", "umap_1", "umap_2"]
    own = [column for column in obs.columns if column not in fixed]
    found = found.drop(columns="cell_id").set_index(obs.index)
    table = pd.concat([obs[fixed], found[front], obs[own], found.drop(columns=front)], axis=1)
    for column in table.columns:
        if isinstance(table[column].dtype, pd.CategoricalDtype):  # text reads the same in every Parquet reader
            table[column] = table[column].astype(object).where(table[column].notna(), None)
    ids = [str(c) for c in obs.index]
    table.insert(0, "barcode", [i.removeprefix(f"{s}:") for i, s in zip(ids, table["sample"], strict=True)])
    table.insert(0, "cell_id", ids)
    return table.reset_index(drop=True)
