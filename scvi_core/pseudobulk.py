"""Contrasts between conditions: counts summed by replicate and cell group, tested across replicates.

Cells of one sample share its donor, day and library. A test that takes them for replicates mistakes what differs
between any two samples for an effect of the condition. So the raw counts of all genes are summed, one pseudobulk a
(replicate, cell group), and each cell group's pseudobulks are tested by PyDESeq2: negative binomial regression with
shrunken dispersions and Wald tests (Love et al., Genome Biology 2014). :func:`contrast` is the way in.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_core.config import Comparison, ContrastConfig, level_text
from scvi_core.files import Decisions, UserError, read_parquet
from scvi_core.preprocess.samples import kept_chunks, open_samples
from scvi_core.tables import natural

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ABSENT = ("NA", "N/A", "na", "NaN", "nan", "null", "None")  # how people write that a covariate is not known
ALL = "all"  # the cell group where `within` is null
IS_GROUP = "(group)"  # a column that no sample sheet can have
MIN_RATIO_GENES = 50  # fewer genes with counts in every pseudobulk: too few for a median of ratios
COLUMNS = {
    "contrast": object,
    "cell_group": object,
    "group": object,
    "reference": object,
    "gene_id": object,
    "gene_name": object,
    "base_mean": np.float64,
    "lfc": np.float64,
    "lfc_se": np.float64,
    "stat": np.float64,
    "p_value": np.float64,
    "p_adjusted": np.float64,
    "is_de": bool,
    "rank": np.int32,
    "n_replicates_group": np.int32,
    "n_replicates_reference": np.int32,
    "n_cells_group": np.int64,
    "n_cells_reference": np.int64,
}


@dataclasses.dataclass(frozen=True)
class Pseudobulks:
    """Sums of counts.

    Attributes
    ----------
    units : frame (pseudobulks): replicate, cell_group, n_cells; by cell group, then by replicate.
    counts_ug : (pseudobulks, genes) int64 CSR.
    genes : frame (genes): gene_id, gene_name.
    measured_rg : (replicates, genes) bool frame: whether all samples of the replicate have the gene at all.
    """

    units: pd.DataFrame
    counts_ug: csr_matrix
    genes: pd.DataFrame
    measured_rg: pd.DataFrame

    def table(self) -> pd.DataFrame:
        """pseudobulk.parquet: a row a count above zero: replicate, cell_group, n_cells, gene_id, count."""
        counts_ug = self.counts_ug.tocoo()
        unit, gene = counts_ug.row, counts_ug.col

        def text(values: pd.Series, codes: np.ndarray) -> pd.Categorical:
            levels, of = np.unique(values.to_numpy(str), return_inverse=True)
            return pd.Categorical.from_codes(of[codes], levels)

        return pd.DataFrame(
            {
                "replicate": text(self.units["replicate"], unit),
                "cell_group": text(self.units["cell_group"], unit),
                "n_cells": self.units["n_cells"].to_numpy()[unit],
                "gene_id": text(self.genes["gene_id"], gene),
                "count": counts_ug.data,
            }
        )


def contrast(
    h5ads: Sequence[Path], qcs: Sequence[Path], cells: pd.DataFrame, genes: pd.DataFrame, config: ContrastConfig
) -> tuple[pd.DataFrame, Pseudobulks, Decisions]:
    """Test every configured contrast in every cell group.

    Parameters
    ----------
    h5ads, qcs : the samples' counts.h5ad and qc.parquet.
    cells : the frame of cells.parquet.
    genes : the frame of genes.parquet; all of its genes take part, selected or not.
    config : that section of the configuration.

    Returns
    -------
    frame : ``contrast.parquet``: a row a (contrast, cell group, tested gene), columns as ``COLUMNS``. `lfc` is the
        maximum-likelihood log2 fold change, not shrunken, and `lfc_se` its standard error. `p_value` is null where
        Cook's distance marks an outlying replicate; `p_adjusted` (Benjamini-Hochberg) there and where the mean count
        is too low for a call (independent filtering). `rank` is by |stat|, genes without a p-value last.
    bulks : the sums.
    decisions : pseudobulks and cell groups left out, genes tested and called.

    Raises
    ------
    UserError
        For no contrast, a column that is absent or varies within a replicate, a level that is absent or has too few
        replicates, covariates that the levels cannot be told apart from.
    """
    if not config.tests:
        raise UserError("contrast.tests: no contrast is asked for; name column, group and reference of one")
    decisions = Decisions("contrast")
    replicates = designs(cells, config, decisions)
    bulks = sum_counts(h5ads, qcs, cells, genes, config, decisions)
    small = bulks.units["n_cells"] < config.min_cells
    if small.any():
        text = f"of {len(small)}: fewer than {config.min_cells} cells (contrast.min_cells)"
        n_cells = int(bulks.units.loc[small, "n_cells"].sum())
        decisions.add("pseudobulks left out", int(small.sum()), text, n_cells=n_cells)
    frames = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})]
    for one, chosen in zip(config.tests, replicates, strict=True):
        tested = list(_compare(bulks, ~small.to_numpy(), chosen, one, config, decisions))
        called = {str(frame["cell_group"].iloc[0]): int(frame["is_de"].sum()) for frame in tested}
        text = f"genes of each tested cell group at a false discovery rate of {config.fdr:g}"
        decisions.add(f"{one.label}: genes called", called, text)
        frames += tested
    frame = pd.concat(frames[1:] or frames, ignore_index=True)
    return frame.astype(COLUMNS), bulks, decisions


def designs(cells: pd.DataFrame, config: ContrastConfig, decisions: Decisions) -> list[pd.DataFrame]:
    """The replicates of each contrast, with ``IS_GROUP`` (bool) and the columns that it names.

    Parameters
    ----------
    cells : a row a cell, or a sample where only the sheet is known yet.

    Raises
    ------
    UserError
        As :func:`contrast`, but for cells of no sample.
    """
    replicates = replicate_table(cells, config)
    return [_check(replicates, one, config, decisions) for one in config.tests]


def replicate_table(cells: pd.DataFrame, config: ContrastConfig) -> pd.DataFrame:
    """What is known of each replicate: a row each, with the columns that contrasts and covariates name.

    Raises
    ------
    UserError
        For a column that is absent or has several values within a replicate.
    """
    used = [c for one in config.tests for c in (one.column, *one.categorical_covariates, *one.continuous_covariates)]
    within = [config.within] if config.within else []
    for column in dict.fromkeys([config.replicate, *within, *used]):
        if column not in cells:
            raise UserError(f"contrast: no column '{column}' in cells.parquet (columns: {', '.join(cells.columns)})")
    names = cells[config.replicate]
    if names.isna().any():
        raise UserError(
            f"contrast.replicate: {int(names.isna().sum())} cells have no '{config.replicate}'; fill the column, or "
            "take sample"
        )
    table = pd.DataFrame({column: _levels(cells[column]) for column in dict.fromkeys(used)})
    table = table.groupby(_levels(names).to_numpy(), sort=True)
    n_values = table.nunique(dropna=False)
    for column in n_values:
        several = n_values.index[n_values[column] > 1]
        if len(several):
            inside = cells.loc[(_levels(names) == several[0]).to_numpy(), column]
            values = ", ".join(map(str, list(pd.unique(inside))[:4]))
            raise UserError(
                f"contrast: column '{column}' has several values ({values}) in {config.replicate} '{several[0]}'; "
                "contrasts and covariates need one value a replicate (contrast.replicate)"
            )
    return table.first()


def _levels(values: pd.Series) -> pd.Series:
    """Levels as texts; missing stays missing."""
    return values.astype("category").map(level_text, na_action="ignore").astype(object)


def _check(replicates: pd.DataFrame, one: Comparison, config: ContrastConfig, decisions: Decisions) -> pd.DataFrame:
    """The replicates of a contrast, with ``IS_GROUP`` (bool): enough of them, and a design that can be fitted."""
    levels = _levels(replicates[one.column])
    group, reference = level_text(one.group), level_text(one.reference)
    for key, level in (("group", group), ("reference", reference)):
        n = int((levels == level).sum())
        if not n:
            have = ", ".join(sorted(set(levels.dropna())))
            raise UserError(
                f"contrast {one.label}: {key}: no {config.replicate} has {one.column} '{level}'; there are {have}"
            )
        if n < config.min_replicates:
            raise UserError(
                f"contrast {one.label}: {key}: {one.column} '{level}' has {n} {config.replicate}; a test across "
                f"replicates needs {config.min_replicates} of each level"
            )
    chosen = replicates[levels.isin([group, reference]).to_numpy()].copy()
    for column in (*one.categorical_covariates, *one.continuous_covariates):
        missing = chosen.index[chosen[column].isna() | chosen[column].isin(ABSENT)]
        if len(missing):
            raise UserError(
                f"contrast {one.label}: {config.replicate} '{missing[0]}' has no '{column}'; fill it in the sample "
                "sheet, or leave the covariate out"
            )
    for column in one.continuous_covariates:
        numbers = pd.to_numeric(chosen[column], errors="coerce")
        if not np.isfinite(numbers).all():
            raise UserError(
                f"contrast {one.label}: continuous_covariates: '{column}' is not all numbers (such as "
                f"'{chosen.loc[~np.isfinite(numbers), column].iloc[0]}'); mend it, or name it in categorical_covariates"
            )
        chosen[column] = numbers
    chosen.insert(0, IS_GROUP, (levels[chosen.index] == group).to_numpy())
    design = design_matrix(chosen, one)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(f"contrast {one.label}: {_confounded(chosen, one)}")
    if len(chosen) <= design.shape[1]:
        raise UserError(
            f"contrast {one.label}: {len(chosen)} replicates cannot carry {design.shape[1]} coefficients; leave "
            "covariates out, or add samples"
        )
    n_group = int(chosen[IS_GROUP].sum())
    n_reference = len(chosen) - n_group
    text = f"{n_group} {config.replicate}s of {one.column} '{group}' against {n_reference} of '{reference}'"
    if min(n_group, n_reference) < 3:
        text += "; with fewer than 3 of a level dispersions are uncertain and few genes can be found"
    if len(chosen) < len(replicates):
        text += f"; {len(replicates) - len(chosen)} {config.replicate}s of other levels take no part"
    decisions.add(f"{one.label}: replicates", {"group": n_group, "reference": n_reference}, text)
    return chosen


def design_matrix(chosen: pd.DataFrame, one: Comparison) -> pd.DataFrame:
    """The design: intercept, the contrast (1 in the group), covariates.

    Categories are coded against their first level in sorted order, numbers standardised. A covariate with one value
    among these replicates has nothing to adjust for and adds no column.

    Returns
    -------
    (replicates, coefficients) float64 frame.
    """
    columns = {"intercept": np.ones(len(chosen)), "contrast": chosen[IS_GROUP].to_numpy(np.float64)}
    for name in one.categorical_covariates:
        values = _levels(chosen[name])
        for level in sorted(set(values))[1:]:
            columns[f"{name}[{level}]"] = (values == level).to_numpy(np.float64)
    for name in one.continuous_covariates:
        values = chosen[name].to_numpy(np.float64)
        if np.ptp(values) > 0:
            columns[f"{name}[sd]"] = (values - values.mean()) / values.std()
    return pd.DataFrame(columns, index=chosen.index)


def _confounded(chosen: pd.DataFrame, one: Comparison) -> str:
    """Name the covariates that stand in the way of a full rank: one where one does, else all."""
    for key in ("categorical_covariates", "continuous_covariates"):
        for column in getattr(one, key):
            alone = {"categorical_covariates": (), "continuous_covariates": (), key: (column,)}
            design = design_matrix(chosen, one.model_copy(update=alone))
            if np.linalg.matrix_rank(design) < design.shape[1]:
                return (
                    f"'{column}' decides '{one.column}', as each of its values goes with one level only, so their "
                    f"effects cannot be told apart; take '{column}' out of {key}, or add samples"
                )
    names = ", ".join(f"'{c}'" for c in (one.column, *one.categorical_covariates, *one.continuous_covariates))
    return f"the columns {names} determine one another among its replicates; leave a covariate out"


def sum_counts(
    h5ads: Sequence[Path],
    qcs: Sequence[Path],
    cells: pd.DataFrame,
    genes: pd.DataFrame,
    config: ContrastConfig,
    decisions: Decisions,
) -> Pseudobulks:
    """Sum the raw counts of the cells of `cells` by (replicate, cell group), one sample in memory at a time.

    Parameters
    ----------
    h5ads, qcs, cells, genes, config : as :func:`contrast`.
    decisions : cells without a cell group are counted here.

    Raises
    ------
    UserError
        When a cell is in none of the samples.
    """
    from scipy.sparse import csr_matrix, vstack

    samples = open_samples(h5ads, qcs)
    replicate = _levels(cells[config.replicate])
    group = _levels(cells[config.within]) if config.within else pd.Series(ALL, index=cells.index)
    unlabelled = int(group.isna().sum())
    if unlabelled:
        text = f"of {len(cells)}: no value in column '{config.within}' (contrast.within)"
        decisions.add("cells left out", unlabelled, text, n_cells=unlabelled)
    place = pd.MultiIndex.from_arrays([group, replicate])
    units = pd.DataFrame(
        sorted(set(place[group.notna()]), key=lambda unit: (natural(unit[0]), unit[1])),
        columns=["cell_group", "replicate"],
    )
    unit_n = pd.MultiIndex.from_frame(units).get_indexer(place)
    units["n_cells"] = np.bincount(unit_n[unit_n >= 0], minlength=len(units))
    at = pd.Index(cells["cell_id"])

    ids = pd.Index(genes["gene_id"])
    names = sorted(set(replicate))
    measured_rg = pd.DataFrame(True, index=names, columns=ids)
    parts, rows, n_found = [], [], 0
    for sample, table in zip(samples, qcs, strict=True):
        cell = at.get_indexer(read_parquet(table, "qc", ["cell_id"])["cell_id"])
        n_found += int((cell >= 0).sum())
        measured_rg.loc[sorted(set(replicate.to_numpy()[cell[cell >= 0]]))] &= ids.isin(sample.gene_ids)
        unit = np.where(cell >= 0, unit_n[cell], -1)
        inside, local = np.unique(unit[unit >= 0], return_inverse=True)
        if not len(inside):
            continue
        code = np.full(len(unit), -1)
        code[unit >= 0] = local
        counts_ug = np.zeros((len(inside), len(sample.gene_ids)), dtype=np.int64)
        for chunk, counts_ng in kept_chunks(sample, unit >= 0):
            member_un = csr_matrix(
                (np.ones(len(chunk), np.int64), (code[chunk], np.arange(len(chunk)))), (len(inside), len(chunk))
            )
            counts_ug += (member_un @ counts_ng).toarray()
        column = ids.get_indexer(sample.gene_ids)
        shared_ug = np.zeros((len(inside), len(ids)), dtype=np.int64)
        shared_ug[:, column[column >= 0]] = counts_ug[:, column >= 0]
        parts.append(csr_matrix(shared_ug))
        rows.append(inside)
    if n_found != len(cells):
        raise UserError(f"cells.parquet: {len(cells) - n_found} of its cells are in none of the samples; name them all")
    row = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    # a replicate of several samples has a part in each
    sum_up = csr_matrix((np.ones(len(row), np.int64), (row, np.arange(len(row)))), (len(units), len(row)))
    counts_ug = (sum_up @ vstack(parts)).tocsr() if parts else csr_matrix((len(units), len(ids)), dtype=np.int64)
    counts_ug.sort_indices()
    columns = ["replicate", "cell_group", "n_cells"]
    return Pseudobulks(units[columns], counts_ug, genes[["gene_id", "gene_name"]].reset_index(drop=True), measured_rg)


def _compare(
    bulks: Pseudobulks,
    large_u: np.ndarray,
    replicates: pd.DataFrame,
    one: Comparison,
    config: ContrastConfig,
    decisions: Decisions,
) -> Iterator[pd.DataFrame]:
    """Test one contrast in every cell group that can be; the others go to `decisions`.

    Parameters
    ----------
    large_u : (pseudobulks,) bool: of enough cells.
    replicates : those of the contrast, as :func:`_check` gives them.
    """
    n_tested: dict[str, int] = {}
    for cell_group in dict.fromkeys(bulks.units["cell_group"]):
        mine = (bulks.units["cell_group"] == cell_group) & bulks.units["replicate"].isin(replicates.index) & large_u
        found, kept_u, gene, why = None, *_testable(bulks, np.flatnonzero(mine), replicates, one, config)
        units = bulks.units.iloc[kept_u]
        chosen = replicates.loc[units["replicate"]]
        if not why:
            empty = sorted(set(bulks.units.loc[mine, "replicate"]) - set(units["replicate"]))
            if empty:
                text = f"{config.within or 'cells'} {cell_group}: no count of any gene that can be tested"
                decisions.add(f"{one.label}: replicates left out", empty, text)
            counts_rg = bulks.counts_ug[kept_u][:, gene].toarray()
            try:
                found = deseq2(counts_rg, design_matrix(chosen, one), config.fdr)
            except (ArithmeticError, LookupError, ValueError) as error:  # of a fit on counts that nobody foresaw
                why = f"PyDESeq2 cannot fit it ({' '.join(str(error).split())[:200]})"
        if found is None:
            n_cells = int(bulks.units.loc[mine, "n_cells"].sum())
            decisions.add(f"{one.label}: cell group not tested", cell_group, why, n_cells=n_cells)
            continue
        for what, (value, text) in found.attrs["notes"].items():
            decisions.add(f"{one.label}: {what}", value, f"{config.within or 'cells'} {cell_group}: {text}")
        is_group = chosen[IS_GROUP].to_numpy(bool)
        n_group, n_reference = int(is_group.sum()), int((~is_group).sum())
        n_tested[cell_group] = len(gene)
        size = units["n_cells"].to_numpy()
        order = np.lexsort((np.arange(len(found)), -found["stat"].abs().to_numpy(), found["p_value"].isna()))
        rank = np.empty(len(found), np.int32)
        rank[order] = np.arange(1, len(found) + 1)
        yield pd.DataFrame(
            {
                "contrast": one.label,
                "cell_group": cell_group,
                "group": one.group,
                "reference": one.reference,
                "gene_id": bulks.genes["gene_id"].to_numpy()[gene],
                "gene_name": bulks.genes["gene_name"].to_numpy()[gene],
                **{name: found[name] for name in ("base_mean", "lfc", "lfc_se", "stat", "p_value", "p_adjusted")},
                "is_de": (found["p_adjusted"] <= config.fdr).to_numpy(bool),
                "rank": rank,
                "n_replicates_group": n_group,
                "n_replicates_reference": n_reference,
                "n_cells_group": int(size[is_group].sum()),
                "n_cells_reference": int(size[~is_group].sum()),
            }
        )
    partly = ~bulks.measured_rg.loc[replicates.index].to_numpy().all(axis=0)
    text = (
        f"of {len(bulks.genes)}, by cell group: at least {config.min_counts} counts in as many {config.replicate}s as "
        "the smaller level has"
    )
    if partly.any():
        text += f"; {int(partly.sum())} genes are not measured in all samples, and a gap is no zero"
    decisions.add(f"{one.label}: genes tested", n_tested, text)


def _testable(
    bulks: Pseudobulks, kept_u: np.ndarray, replicates: pd.DataFrame, one: Comparison, config: ContrastConfig
) -> tuple[np.ndarray, np.ndarray, str]:
    """What of a cell group can be tested: its pseudobulks, its genes, and why not where nothing can.

    A replicate without a count of any gene that can be tested has no size factor: it is left out, which leaves fewer
    replicates to ask of a gene, so genes are chosen again.

    Parameters
    ----------
    kept_u : positions of the cell group's pseudobulks of enough cells, of the contrast's replicates.
    """
    none = np.zeros(0, np.int64)
    while True:
        units = bulks.units.iloc[kept_u]
        chosen = replicates.loc[units["replicate"]]
        n_group = int(chosen[IS_GROUP].sum())
        n_reference = len(chosen) - n_group
        if min(n_group, n_reference) < config.min_replicates:
            have = f"{config.replicate}s with enough cells and counts: {n_group} of '{one.group}', {n_reference} of"
            text = f"{have} '{one.reference}'; {config.min_replicates} of each are needed (contrast.min_replicates)"
            return kept_u, none, text
        design = design_matrix(chosen, one)
        if np.linalg.matrix_rank(design) < design.shape[1] or len(design) <= design.shape[1]:
            return kept_u, none, f"the {len(design)} {config.replicate}s that have it cannot carry the covariates"
        counts_rg = bulks.counts_ug[kept_u].toarray()
        enough = (counts_rg >= config.min_counts).sum(axis=0) >= min(n_group, n_reference)
        everywhere = bulks.measured_rg.loc[units["replicate"]].to_numpy().all(axis=0)
        gene = np.flatnonzero(enough & everywhere)
        if not len(gene):
            text = f"no gene reaches {config.min_counts} counts in enough {config.replicate}s (contrast.min_counts)"
            return kept_u, none, text
        counted = counts_rg[:, gene].any(axis=1)
        if counted.all():
            return kept_u, gene, ""
        kept_u = kept_u[counted]


def deseq2(counts_rg: np.ndarray, design: pd.DataFrame, fdr: float) -> pd.DataFrame:
    """Test the coefficient `contrast` of a design by PyDESeq2, on one thread: the same bytes each time.

    Size factors are medians of ratios over genes with counts in every pseudobulk; where fewer than 50 genes have,
    over each pseudobulk's non-zero counts (``poscounts``).

    Parameters
    ----------
    counts_rg : (replicates, genes) integers.
    design : (replicates, coefficients) of full rank, fewer coefficients than replicates.
    fdr : at which independent filtering is optimised.

    Returns
    -------
    Frame of base_mean, lfc, lfc_se (log2), stat, p_value, p_adjusted float64, a row a gene; ``attrs["notes"]`` says
    where PyDESeq2 had to take another way than its first.
    """
    from threadpoolctl import threadpool_limits

    names = design.index.astype(str)
    counts = pd.DataFrame(counts_rg, index=names, columns=np.arange(counts_rg.shape[1]).astype(str))
    n_everywhere = int((counts_rg > 0).all(axis=0).sum())
    by_ratio = n_everywhere >= min(MIN_RATIO_GENES, counts_rg.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and its import turns FutureWarning off for good
        from pydeseq2.dds import DeseqDataSet
        from pydeseq2.default_inference import DefaultInference
        from pydeseq2.ds import DeseqStats

        with threadpool_limits(1):  # of the libraries that are loaded by now
            alone = DefaultInference(n_cpus=1)
            fitted = DeseqDataSet(
                counts=counts,
                metadata=pd.DataFrame({"replicate": names}, index=names),
                design=design.set_axis(names),
                size_factors_fit_type="ratio" if by_ratio else "poscounts",
                inference=alone,
                quiet=True,
            )
            fitted.deseq2()
            vector = (design.columns == "contrast").astype(np.float64)
            stats = DeseqStats(fitted, contrast=vector, alpha=fdr, inference=alone, quiet=True)
            stats.summary()
    notes = {}
    if not by_ratio:
        notes["size factors"] = "poscounts", f"only {n_everywhere} genes have counts in every pseudobulk"
    if fitted.uns["disp_function_type"] == "mean":
        notes["dispersion trend"] = "mean", "dispersions show no falling trend with the mean count"
    renamed = {
        "baseMean": "base_mean",
        "log2FoldChange": "lfc",
        "lfcSE": "lfc_se",
        "stat": "stat",
        "pvalue": "p_value",
        "padj": "p_adjusted",
    }
    found = stats.results_df.rename(columns=renamed)[list(renamed.values())].astype(np.float64).reset_index(drop=True)
    found.attrs["notes"] = notes
    return found
