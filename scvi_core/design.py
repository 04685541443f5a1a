"""What a design can tell and what it cannot: batches, levels of a contrast, replicates. Known from the sheet alone."""

from __future__ import annotations

import pandas as pd

from scvi_core.config import Comparison, Config, Sample, level_text
from scvi_core.files import Decisions
from scvi_core.preprocess.store import typed
from scvi_core.pseudobulk import designs

ENOUGH = 3  # replicates of a level from which dispersions are known well enough to find more than a few genes


def sheet_table(samples: list[Sample], config: Config) -> pd.DataFrame:
    """A row a sample: sample, batch and further columns, of the types that ``cells.parquet`` gives them.

    Without ``batch`` or ``sample`` where the inputs have their own (``input.batch_column``, ``input.sample_column``),
    which the sheet does not know.
    """
    rows = [{"sample": s.sample, "batch": s.batch, **s.metadata} for s in samples]
    table = pd.DataFrame(rows)
    for column in ("batch", "sample"):
        if any(getattr(s.reads(config.input), f"{column}_column") for s in samples):
            table = table.drop(columns=column)
    for column in table.columns.drop(["sample", "batch"], errors="ignore"):
        table[column] = typed(column, table[column], False, Decisions("store"))
    return table


def check(table: pd.DataFrame, config: Config) -> None:
    """Build the designs of all contrasts whose columns are in `table`, as the step will from the cells.

    Raises
    ------
    UserError
        As :func:`scvi_core.pseudobulk.contrast` would, once everything is trained.
    """
    known = [one for one in config.contrast.tests if {*_columns(one), config.contrast.replicate} <= {*table}]
    if not known:
        return
    asked = config.contrast.model_copy(update={"tests": tuple(known), "within": None})
    designs(table, asked, Decisions("contrast"))


def remarks(table: pd.DataFrame, config: Config) -> list[str]:
    """Say in sentences what the design makes hard to tell, and what to choose instead.

    Parameters
    ----------
    table : a row a sample, or a cell: sample, batch and the columns that contrasts and ``de.groupby`` name; tests whose
        columns are absent are passed over.
    """
    out = []
    for one in config.contrast.tests:
        if {one.column, "batch", config.contrast.replicate} <= {*table}:
            out += _of_contrast(table, one, config)
    groupby = config.de.groupby
    if (
        config.de.batches == "auto"
        and {groupby, "batch"} <= {*table}
        and share_no_batch(table[groupby], table["batch"])
    ):
        out.append(
            f"No batch holds two groups of '{groupby}' (de.groupby): each cell is decoded under its own batch, and "
            "differences between batches are part of every fold change. Cells are no replicates of a condition: "
            "contrast.tests compares conditions across samples."
        )
    return out


def share_no_batch(groups: pd.Series, batches: pd.Series) -> bool:
    """Whether there are two groups or more, and no batch holds two of them."""
    pairs = pd.DataFrame({"group": groups.astype(object), "batch": batches.astype(object)}).dropna().drop_duplicates()
    return pairs["group"].nunique() > 1 and not pairs["batch"].duplicated().any()


def _columns(one: Comparison) -> list[str]:
    return [one.column, *one.categorical_covariates, *one.continuous_covariates]


def _of_contrast(table: pd.DataFrame, one: Comparison, config: Config) -> list[str]:
    replicate = config.contrast.replicate
    levels = table[one.column].map(level_text, na_action="ignore").astype(object)
    wanted = [level_text(one.group), level_text(one.reference)]
    mine = levels.isin(wanted).to_numpy()
    rows = pd.DataFrame({"level": levels, "batch": table["batch"], "replicate": table[replicate]})[mine].astype(str)
    rows = rows.drop_duplicates()
    if set(rows["level"]) != set(wanted):
        return []
    n_levels = rows.groupby("batch")["level"].nunique()
    n_replicates = rows.groupby("level")["replicate"].nunique()
    both, out = list(n_levels.index[n_levels > 1]), []
    names = f"'{wanted[0]}' and '{wanted[1]}' of {one.column}"
    if both and replicate != "batch":
        verb = "hold" if len(both) > 1 else "holds"
        out.append(
            f"Contrast {one.label}: batch {_some(both)} {verb} {names}. The model corrects for batches, so not "
            "for this condition: clusters may split by it, and a cluster that one level has alone cannot be tested. To "
            "find the same cell types in both, give each sample its own batch in the sample sheet."
        )
    elif len(n_levels) < rows["replicate"].nunique() and len(n_levels) == len(n_replicates):
        out.append(
            f"Contrast {one.label}: a level's samples are all one batch. If batches were processed apart, what differs "
            f"between them cannot be told from {names}; if each sample was processed by itself, give each a batch."
        )
    fewest = int(n_replicates.min())
    if fewest < ENOUGH:
        out.append(
            f"Contrast {one.label}: only {fewest} {replicate}{'s' * (fewest > 1)} of one condition; with fewer than "
            f"{ENOUGH} of each, few genes can be found."
        )
    others = [column for column in table.columns if column not in (replicate, "batch", one.column)]
    pairs = [column for column in others if _pairs(table[mine], column, levels[mine], replicate)]
    if pairs and not {*pairs} & {*one.categorical_covariates}:
        out.append(
            f"Contrast {one.label}: each '{pairs[0]}' has one {replicate} of either level; name it in "
            "categorical_covariates to compare within pairs."
        )
    return out


def _pairs(table: pd.DataFrame, column: str, levels: pd.Series, replicate: str) -> bool:
    """Whether each value of a column, two at least, has exactly one replicate of each of two levels."""
    rows = pd.DataFrame({"value": table[column], "level": levels, "replicate": table[replicate]}).astype(object)
    rows = rows.drop_duplicates()
    sizes = rows.groupby(["value", "level"], observed=True).size().unstack(fill_value=0)
    return len(sizes) > 1 and sizes.shape[1] == 2 and rows["value"].notna().all() and (sizes == 1).all(axis=None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
