"""Names that users give to clusters or cells, in a table of their own: the column `annotation` of ``cells.parquet``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from scvi_core.config import sheet_text
from scvi_core.files import Decisions, UserError
from scvi_core.tables import natural

CLUSTERS = r"cluster(_r[\d.]+)?"
LONGEST = 200  # characters of a name


def annotate(path: str | Path, cells: pd.DataFrame, decisions: Decisions) -> pd.Series:
    """Give each cell the name that a table has for its cluster, or for itself.

    Parameters
    ----------
    path : tab-separated; the header is ``cluster`` (or ``cluster_r1`` and the like, or ``cell_id``), ``name``, and for
        clusters perhaps ``n_cells``: how many cells the cluster had when it was named, which is compared.
    cells : a row a cell: ``cell_id``, ``cluster`` and further resolutions.

    Returns
    -------
    pd.Series
        Of texts, in the order of `cells`. A cluster without a name keeps its number; a cell without one has None.

    Raises
    ------
    UserError
        For what is no such table, a cluster that is not there, or one that is named twice or has another size; when no
        cell has a name.
    """
    key, names, sizes, lines = read_names(path, [*cells.columns])
    if key == "cell_id":
        return _of_cells(path, cells, names, decisions)
    found = cells[key].astype(str)
    counts = found.value_counts()
    known = sorted(counts.index, key=natural)
    for cluster in names:
        where = f"{path} line {lines[cluster]}"
        if cluster not in counts:
            raise UserError(
                f"{where}: no cluster '{cluster}' in column {key}, which has {_some(known)}; was it named before cells "
                "were clustered anew? Name the clusters that there are"
            )
        if cluster in sizes and sizes[cluster] != counts[cluster]:
            raise UserError(
                f"{where}: cluster {cluster} has {counts[cluster]:,} cells, and {sizes[cluster]:,} when it was named; "
                "look whether it is still the same, then give its size"
            )
    unnamed = [cluster for cluster in known if not names.get(cluster)]
    for cluster, name in names.items():
        if name in unnamed and name != cluster:
            raise UserError(
                f"{path} line {lines[cluster]}: cluster {cluster} is named '{name}', which is the number of a cluster "
                "without a name; give it another"
            )
    told = {cluster: names.get(cluster) or cluster for cluster in known}
    n_names = len(set(names.values()) - {""})
    checked = "sizes as when they were named" if sizes else "whether it is the clustering that was named is not checked"
    decisions.add(
        "annotation", n_names, f"names for {len(known) - len(unnamed)} of {len(known)} groups of {key}; {checked}"
    )
    if unnamed:
        reason = f"without a name, {counts[unnamed].sum():,} cells in all; they keep their numbers"
        decisions.add("clusters_unnamed", unnamed, reason, warn=True)
    _alike(told.values(), decisions)
    return found.map(told)


def _of_cells(path: str | Path, cells: pd.DataFrame, names: dict[str, str], decisions: Decisions) -> pd.Series:
    found = cells["cell_id"].map(names).replace("", None)
    found = found.astype(object).where(found.notna(), None)
    n_named, other = int(found.notna().sum()), len(names.keys() - {*cells["cell_id"]})
    if not n_named:
        raise UserError(
            f"{path}: none of its cells is in the atlas, whose first is '{cells['cell_id'].iloc[0]}'; write cell_id as "
            "cells.parquet has it"
        )
    reason = f"of {len(cells):,} cells have a name; {other:,} of the table's are not in the atlas"
    decisions.add("annotation", n_named, reason, warn=n_named < len(cells) or other > 0)
    _alike(found.dropna().unique(), decisions)
    return found


def read_names(path: str | Path, columns: list[str]) -> tuple[str, dict[str, str], dict[str, int], dict[str, int]]:
    """Read and check a table of names by itself.

    Parameters
    ----------
    columns : of the cells, which the table may name groups of.

    Returns
    -------
    The column that it is by; then by group or cell its name, its size where that is given, and its line.
    """
    text = sheet_text(path, "table of names; it has the columns cluster, name")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    try:
        table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: cannot be read ({error}); separate columns by tabs") from None
    table = [(number, row) for number, row in table if any(row) and not row[0].startswith("#")]
    if not table:
        raise UserError(f"{path}: empty; expected a header with the columns cluster, name")
    header = table[0][1]
    key, *more = header
    if not re.fullmatch(f"{CLUSTERS}|cell_id", key) or more not in (["name"], ["name", "n_cells"]):
        raise UserError(
            f"{path}: columns {', '.join(header)}, separated by tabs; write cluster, name (and n_cells, if you like), "
            "or cell_id, name"
        )
    if key not in columns:
        there = ", ".join(column for column in columns if re.fullmatch(CLUSTERS, column))
        raise UserError(f"{path}: names groups of {key}, which cluster.resolutions does not make; there is {there}")
    names: dict[str, str] = {}
    sizes: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, row in table[1:]:
        where, row = f"{path} line {number}", [*row, *[""] * (len(header) - len(row))]
        if len(row) > len(header):
            raise UserError(f"{where}: {len(row)} columns where the header has {len(header)}; separate them by tabs")
        which, name = row[:2]
        if not which:
            raise UserError(f"{where}: '{name}' is the name of no {key}; fill it in")
        if len(name) > LONGEST or not name.isprintable():
            raise UserError(f"{where}: a name of {LONGEST} printable characters at most is needed")
        if which in names and names[which] != name:
            raise UserError(
                f"{where}: {key} {which} is named '{name}', and '{names[which]}' on line {lines[which]}; keep one"
            )
        if len(row) > 2 and row[2]:
            if not row[2].replace(",", "").isdecimal():
                raise UserError(f"{where}: n_cells is '{row[2]}'; give a whole number, or leave it empty")
            sizes[which] = int(row[2].replace(",", ""))
        names[which], lines[which] = name, number
    if not any(names.values()):
        raise UserError(f"{path}: has no name; fill in the column name")
    return key, names, sizes, lines


def _alike(names: Iterable[str], decisions: Decisions) -> None:
    """Warn of names that differ in case or blanks only."""
    of: dict[str, list[str]] = {}
    for name in names:
        of.setdefault("".join(name.split()).casefold(), []).append(name)
    for same in of.values():
        if len(different := sorted(set(same))) > 1:
            reason = "differ in case or blanks only, and stay apart; write them alike if they are one"
            decisions.add("names_alike", different, reason, warn=True)


def _some(names: list[str]) -> str:
    return f"{names[0]} to {names[-1]}" if len(names) > 6 else ", ".join(names)
