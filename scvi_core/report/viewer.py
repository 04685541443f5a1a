"""Columns of the cell table as categories and quantities, and packed for the page's own viewer."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pandas as pd

from scvi_core.files import Decisions
from scvi_core.tables import natural

# 36 colours: six of Okabe and Ito, then each the farthest (CIELAB) from all before it under normal, deuteranopic,
# protanopic and tritanopic sight, with lightness 38-76 so that they show on white and on near-black.
PALETTE = (  # noqa: SIM905
    "#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #56B4E9 #8600FF #9EC26D #866DFF #C20031 #61556D #DBAAAA "
    "#8624C2 #496D3D #7992F3 #F3496D #B6009E #AA9E3D #92C2DB #B63100 #7949F3 #CE0086 #9E86C2 #79CE31 "
    "#AA8649 #864955 #CEB692 #CE3DCE #AA619E #FF92FF #FF92CE #FF9261 #AA6155 #49AAB6 #6D920C #B69286"
).split()
MISSING = "(none)"  # cells without a value
SHOWN_CELLS = 50_000  # points in the page's viewer; more are thinned at random, with a fixed seed
NAMED_CELLS = 20_000  # up to here the viewer knows the cells' names
CELL_COLUMNS = ("n_counts", "n_genes", "pct_mito", "doublet_score", "s_score", "g2m_score")


def levels(values: pd.Series) -> tuple[list[str], np.ndarray]:
    """Give a column's categories in natural order ("2" before "10"; cells without a value last) and their codes.

    Returns
    -------
    names : the categories as text; codes : (cells,) int64, positions in `names`.
    """
    codes, found = pd.factorize(values)  # -1 where there is no value
    texts = [str(v) if str(v).strip() else MISSING for v in found] + [MISSING] * bool((codes < 0).any())
    names = sorted(set(texts), key=lambda v: (v == MISSING, natural(v)))
    position = {name: i for i, name in enumerate(names)}
    return names, np.array([position[text] for text in texts], dtype=np.int64)[codes]


def continuous(values: pd.Series) -> bool:
    """Tell whether a column is a quantity to colour by on a scale, rather than categories."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values) and values.nunique() > 30


def drawn(n_cells: int) -> np.ndarray:
    """Give the cells that the viewer draws, ``SHOWN_CELLS`` at most, in the order of drawing: random, but fixed."""
    return np.random.default_rng(0).permutation(n_cells)[:SHOWN_CELLS]


def viewer_data(
    cells: pd.DataFrame,
    labels: tuple[str, ...],
    decisions: Decisions,
    flags: pd.Series,
    genes: dict[str, np.ndarray],
) -> dict[str, Any] | None:
    """Pack coordinates and columns for the page's viewer: base64 of little-endian uint16 (uint8 for quantities).

    Parameters
    ----------
    flags : (cells,) categories, QC's.
    genes : name: values in the cells that :func:`drawn` gives, in its order.
    """
    bases = [b for b in ("umap", "tsne") if f"{b}_1" in cells and cells[f"{b}_1"].notna().any()]
    if not bases:
        decisions.add("viewer", "none", "neither UMAP nor t-SNE was asked for, so there is no embedding to show")
        return None
    order = drawn(len(cells))
    if len(cells) > SHOWN_CELLS:
        reason = f"a page with all {len(cells)} cells would be slow; drawn at random with a fixed seed"
        decisions.add("cells_in_viewer", SHOWN_CELLS, reason)

    def pack(values: np.ndarray, kind: str = "<u2") -> str:
        return base64.b64encode(values.astype(kind).tobytes()).decode()

    spaces = []
    for basis in bases:
        xy = cells[[f"{basis}_1", f"{basis}_2"]].to_numpy(float)
        low = xy.min(axis=0)
        unit = (xy - low) / max(np.ptp(xy, axis=0).max(), 1e-9)
        x, y = np.round(unit[order] * 65535).T
        spaces.append({"name": {"umap": "UMAP", "tsne": "t-SNE"}[basis], "x": pack(x), "y": pack(y)})
    columns: list[dict[str, Any]] = []
    skip = {"cell_id", "barcode", "umap_1", "umap_2", "tsne_1", "tsne_2"}
    first = ["cluster", *labels, "sample", "batch"]
    cells = cells.assign(**{"QC flag": flags.to_numpy()}) if len(flags.cat.categories) else cells
    for name in dict.fromkeys([*first, *(c for c in cells if c not in skip)]):
        values = cells[name]
        if name in CELL_COLUMNS or continuous(values):
            v = values.to_numpy(float)
            log = name in ("n_counts", "n_genes")
            v = np.log10(np.maximum(v, 1)) if log else v
            if not np.isfinite(v).any():
                continue
            low, high = np.nanquantile(v[np.isfinite(v)], [0.005, 0.995])
            scaled = np.clip((v - low) / max(high - low, 1e-9), 0, 1) * 254
            codes = np.where(np.isfinite(v), np.round(np.nan_to_num(scaled)), 255)[order]
            columns.append({"name": name, "values": pack(codes, "u1"), "low": low, "high": high, "log": log})
            continue
        names, codes = levels(values)
        if len(names) > 500:
            decisions.add("viewer_column", name, f"not offered in the page's viewer: {len(names)} different values")
            continue
        counts = np.bincount(codes, minlength=len(names)).tolist()
        columns.append({"name": name, "names": names, "counts": counts, "codes": pack(codes[order])})
    for name, values in genes.items():
        high = max(float(np.quantile(values, 0.995)), float(values.max()) / 4, 1e-9)
        codes = np.round(np.clip(values / high, 0, 1) * 254)
        columns.append({"name": name, "values": pack(codes, "u1"), "low": 0, "high": high, "log": False, "gene": True})
    ids = cells["cell_id"].to_numpy()[order].tolist() if len(cells) <= NAMED_CELLS else None
    out = {"n": len(cells), "shown": len(order), "spaces": spaces, "columns": columns, "ids": ids}
    return {**out, "palette": PALETTE, "missing": MISSING}


def label_table(cells: pd.DataFrame, column: str) -> dict[str, Any]:
    """Count cells by cluster and label; past 30 labels the rarer ones are summed in a last column."""
    clusters, rows = levels(cells["cluster"])
    names, codes = levels(cells[column])
    table = np.zeros((len(clusters), len(names)), dtype=np.int64)
    np.add.at(table, (rows, codes), 1)
    if len(names) > 30:
        keep = np.sort(np.argsort(-table.sum(axis=0), kind="stable")[:29])
        rest = table.sum(axis=1) - table[:, keep].sum(axis=1)
        names, table = [*(names[i] for i in keep), f"{len(names) - 29} others"], np.c_[table[:, keep], rest]
    return {"clusters": clusters, "names": names, "rows": table.tolist(), "totals": table.sum(axis=1).tolist()}
