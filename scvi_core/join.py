"""An atlas' results beside one's own data: the columns of its cells, their embedding and pictures, joined by cell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_core.files import UserError, read_parquet
from scvi_core.log import log
from scvi_core.tables import natural

if TYPE_CHECKING:
    from anndata import AnnData

PICTURES = ("umap", "tsne")


def attach(
    adata: AnnData, results: str | Path, sample: str | None = None, barcode: str | None = None, prefix: str = ""
) -> np.ndarray:
    """Add an atlas' cell columns to ``obs``, and its embedding and pictures to ``obsm``, cell by cell, in place.

    Cells are known by ``cell_id``, which is ``{sample}:{barcode}``; where the names of `adata` are none, by barcode, if
    the atlas has most of them and each once.

    Parameters
    ----------
    adata : cells, in any order; some may not be in the atlas, as QC dropped them.
    results : the atlas' folder, ``results/{atlas}``.
    sample : column of ``adata.obs`` that holds each cell's sample, or the one sample that all are of; None: barcodes
        must tell by themselves.
    barcode : column of ``adata.obs`` that holds the barcodes; None: the cells' names.
    prefix : of the names that are added.

    Returns
    -------
    numpy.ndarray
        (cells,) bool: which are in the atlas. The others' values are missing (NaN).

    Raises
    ------
    UserError
        When no cell is in the atlas, two are the same, a barcode is of several samples, or a column of that name is
        there with other values.

    Examples
    --------
    >>> found = sv.attach(adata, "results/pancreas")
    >>> scanpy.pl.umap(adata[found], color="cluster")
    """
    from scvi_core.api import check_arguments  # loads torch

    check_arguments(adata)
    results = Path(results)
    cells = read_parquet(results / "cells.parquet", "cells")
    latent = read_parquet(results / "latent.parquet", "embed")
    if list(latent["cell_id"]) != list(cells["cell_id"]):
        raise UserError(f"{results}/latent.parquet: its cells are not those of cells.parquet; build the atlas again")
    place_n = _places(adata, cells, results, sample, barcode)
    found_n = place_n >= 0
    drawn = [c for c in cells if c.rpartition("_")[0] in PICTURES]
    obs = {
        f"{prefix}{name}": _column(cells[name], place_n, adata.obs_names)
        for name in cells.columns.drop(["cell_id", *drawn])
    }
    matrices = {f"X_{prefix}scvi": latent.drop(columns="cell_id")}
    for name in PICTURES:
        axes = [c for c in drawn if c.startswith(f"{name}_")]
        if axes and cells[axes].notna().all(axis=None):
            matrices[f"X_{prefix}{name}"] = cells[axes]
    obsm = {name: _rows(frame.to_numpy(np.float32), place_n) for name, frame in matrices.items()}
    differ = [
        f"obs['{name}']" for name, values in obs.items() if name in adata.obs and _differ(adata.obs[name], values)
    ]
    differ += [
        f"obsm['{name}']"
        for name, values in obsm.items()
        if name in adata.obsm and not np.array_equal(np.asarray(adata.obsm[name]), values, equal_nan=True)
    ]
    if differ:
        raise UserError(
            f"adata: {', '.join(differ)} hold other values than the atlas; give a prefix for what is added, or take "
            "these out first"
        )
    for name, values in obs.items():
        if name not in adata.obs:
            adata.obs[name] = values
    adata.obsm.update(obsm)
    absent = int((~found_n).sum())
    say = log.warning if absent > adata.n_obs / 2 else log.info
    say(
        "attach: %d of %d cells are in %s; %d are not: dropped by QC, or not of its samples",
        found_n.sum(), adata.n_obs, results, absent,
    )  # fmt: skip
    return found_n


def _places(adata: AnnData, cells: pd.DataFrame, results: Path, sample: str | None, barcode: str | None) -> np.ndarray:
    """(cells,) int64 rows of `cells`, -1 for those that are not there."""
    if barcode is not None and barcode not in adata.obs:
        raise UserError(f"barcode: no cell column '{barcode}' (columns: {', '.join(map(str, adata.obs.columns))})")
    names = pd.Index((adata.obs_names if barcode is None else adata.obs[barcode]).astype(str))
    keys = pd.Index(cells["cell_id"])
    if sample is not None:
        of_cell = adata.obs[sample].astype(str) if sample in adata.obs else [sample] * adata.n_obs
        names = pd.Index([f"{one}:{code}" for one, code in zip(of_cell, names, strict=True)])
    elif not names.isin(keys).any():
        keys = pd.Index(cells["barcode"])
        twice = names[names.isin(keys[keys.duplicated()])]
        if len(twice):
            held = sorted(cells.loc[cells["barcode"] == twice[0], "sample"], key=natural)
            raise UserError(
                f"adata: barcode {twice[0]!r} is in samples {', '.join(held)} of {results}; say by sample= which "
                "sample the cells are of, or which column of obs says it"
            )
        share = names.isin(keys).mean()
        if 0 < share < 0.5:  # kits give the same barcodes to other cells
            raise UserError(
                f"adata: {share:.1%} of its barcodes are in {results}, perhaps by chance; say by sample= which sample "
                "the cells are of, or which column of obs says it"
            )
    if not names.isin(keys).any():
        raise UserError(
            f"adata: none of its {adata.n_obs} cells (such as {names[0] if len(names) else ''!r}) is in {results}, "
            f"whose cell_id are as {cells['cell_id'][0]!r} ({{sample}}:{{barcode}}); name the sample by sample=, or "
            "the column of barcodes by barcode="
        )
    place = pd.Series(np.arange(len(keys)), keys)
    place_n = place[~place.index.duplicated()].reindex(names).fillna(-1).to_numpy(np.int64)
    twice = pd.Index(place_n[place_n >= 0])
    if twice.has_duplicates:
        same = cells["cell_id"][twice[twice.duplicated()][0]]
        raise UserError(f"adata: several of its cells are {same!r} of {results}; make them one, or name them apart")
    return place_n


def _column(values: pd.Series, place_n: np.ndarray, names: pd.Index) -> pd.Series:
    """A column of the atlas in the order of the cells; text as categories, in the order that people count in."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        texts = values.astype(object).where(values.notna(), None)
        levels = sorted({str(v) for v in texts if v is not None}, key=natural)
        values = pd.Series(pd.Categorical(texts.map(str, na_action="ignore"), categories=levels))
    out = values.reset_index(drop=True).reindex(np.where(place_n < 0, len(values), place_n))
    return out.set_axis(names)


def _rows(values: np.ndarray, place_n: np.ndarray) -> np.ndarray:
    out = np.full((len(place_n), values.shape[1]), np.nan, dtype=np.float32)
    out[place_n >= 0] = values[place_n[place_n >= 0]]
    return out


def _differ(mine: pd.Series, theirs: pd.Series) -> bool:
    """Whether a cell of the atlas has another value there; 1, 1.0 and '1' are one."""
    both = theirs.notna()
    if pd.api.types.is_float_dtype(theirs) and pd.api.types.is_numeric_dtype(mine):
        return not np.allclose(mine[both].to_numpy(float), theirs[both].to_numpy(float), rtol=1e-5, equal_nan=True)
    from scvi_core.config import level_text

    return [*map(level_text, mine[both])] != [*map(level_text, theirs[both])]
