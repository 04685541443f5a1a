"""Quality control of one sample: per-cell metrics, thresholds, doublet scores, and which cells are kept.

Every threshold is a decision on record with its numbers; a dropped cell carries its reason in ``qc.parquet``.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import numpy as np

from scvi_core.config import QcConfig
from scvi_core.files import Decisions, UserError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FLAGS = ("low_counts", "high_counts", "low_genes", "high_genes", "high_mito", "high_hb", "high_top50", "doublet")

# A sample of healthy cells can have a median mitochondrial share of 1 % and a MAD of 0.3 %: 5 MADs would then
# drop living cells at 3 %. Below 5 % nearly every tissue of man and mouse counts as healthy (Osorio & Cai,
# Bioinformatics 2021), so the MAD threshold never goes under it; qc.max_pct_mito may.
PCT_MITO_FLOOR = 5.0

TOP = 50  # genes whose joint share is a sign of debris
BLOCK = 2000  # cells whose counts are widened at a time

# Scrublet embeds with 30 principal components and needs neighbours to compare with
MIN_DOUBLET_CELLS = 50
MIN_DOUBLET_GENES = 50
EXACT_NEIGHBOR_CELLS = 20_000  # up to here exact neighbours take less time than compiling approximate ones

# Gene groups by name, any species' capitals (MT-ND1, mt-Nd1). The patterns leave out genes that merely look alike:
# RPS6KA1 (kinase) and RPS19BP1, HBEGF and HBP1, IGHMBP2 (helicase), TRADD and TRAF1.
# A '.' may stand for '-' in names that went through R.
GENE_GROUPS = {
    "mitochondrial": r"^MT[-.:]",
    "ribosomal": r"^RP(?:[SL]\d+(?![\dK]|BP)|LP[0-2]|SA(?:$|P))(?!.*[-.](?:AS|DT)\d*$)",
    "haemoglobin": r"^HB(?:[ABDEGMQZ]\d?|Q1[AB]|[AB][AE]\d(?:\.\d)?)(?:$|[-.])",
    "immunoglobulin": r"^IG(?:H[VJ]|HD\d|H[ADEGM](?:\d[ABC]?)?(?:P\d?)?$|K[CVJ]|L[CVJ])",
    "tcr": r"^(?:TR(?:A[VJ]|B[VDJ]|G[VJ]|D[VDJ])(?:\d|P|[AB]$|OR)|TR(?:A|B|G|D)C\d?(?:$|[-.])|TCR[ABGD][-.])",
}
# for matrices without gene names: the 13 protein-coding and 2 ribosomal RNA genes of each mitochondrial genome
MITOCHONDRIAL_IDS = frozenset(
    [f"ENSG00000{n}" for n in (198888, 198763, 198804, 198712, 228253, 198899, 198938, 198840, 212907, 198886)]
    + [f"ENSG00000{n}" for n in (198786, 198695, 198727, 211459, 210082)]
    + [f"ENSMUSG000000{n}" for n in (64341, 64345, 64351, 64354, 64356, 64357, 64358, 64360, 65947, 64363)]
    + [f"ENSMUSG000000{n}" for n in (64367, 64368, 64370, 64337, 64339)]
)


def in_group(group: str, gene_ids: np.ndarray, gene_names: np.ndarray) -> np.ndarray:
    """Which genes belong to a group of ``GENE_GROUPS``.

    Parameters
    ----------
    group : a key of ``GENE_GROUPS``.
    gene_ids, gene_names : (genes,) texts.

    Returns
    -------
    (genes,) bool.
    """
    matches = re.compile(GENE_GROUPS[group], re.IGNORECASE).match
    found = np.array([matches(name) is not None for name in gene_names], dtype=bool)
    if group == "mitochondrial":
        found |= np.array([gene in MITOCHONDRIAL_IDS for gene in gene_ids], dtype=bool)
    return found


def qc(adata: AnnData, config: QcConfig, seed: int) -> tuple[pd.DataFrame, Decisions]:
    """Judge the cells of one sample.

    Thresholds lie at median ± ``n_mads`` scaled median absolute deviations (of log1p for counts and genes; upper
    side only for the mitochondrial and top-50 shares), with the fixed limits of `config` on top. Medians and MADs
    are taken over the barcodes that pass the fixed lower limits, so that empty droplets do not set them.

    Parameters
    ----------
    adata : one sample, as ``samples/{sample}/counts.h5ad`` holds it (cells, genes), unsigned integer CSR.
    config : the qc section.
    seed : of Scrublet.

    Returns
    -------
    frame : one row a barcode in file order, columns as ``qc.parquet``; shares are per cent.
    decisions : thresholds with the number of cells each flagged, doublet detection, cells dropped.

    Raises
    ------
    UserError
        When no cell is left.
    """
    sample = str(adata.obs["sample"].iloc[0])
    decisions = Decisions("qc", sample)
    frame = _metrics(adata, decisions)
    flags = _thresholds(frame, config, decisions)
    frame["doublet_score"], frame["predicted_doublet"] = _doublets(adata, flags, config, seed, decisions)
    flags["doublet"] = frame["predicted_doublet"].to_numpy()

    frame["flags"] = _joined(flags, FLAGS)
    dropping = [flag for flag in FLAGS if flag in config.drop]
    frame["reason"] = _joined(flags, dropping)
    frame["keep"] = frame["reason"] == ""
    n, left = len(frame), int(frame["keep"].sum())
    if not left:
        worst = max(dropping, key=lambda flag: int(flags[flag].sum()))
        raise UserError(
            f"sample {sample}: no cell is left after QC; {worst} dropped most ({int(flags[worst].sum())} of {n} "
            f"cells): {_remedy(worst, config)}"
        )
    counts = {flag: int(flags[flag].sum()) for flag in dropping if flags[flag].any()}
    why = ", ".join(f"{flag} {count}" for flag, count in counts.items()) or "no cell has a flag that drops"
    decisions.add("cells_kept", left, f"of {n}; dropped by flag (a cell may have several): {why}", n_cells=n - left)
    order = ["cell_id", "barcode", "sample", "batch", "n_counts", "n_genes", "pct_mito", "pct_ribo", "pct_hb"]
    order += ["pct_top50", "doublet_score", "predicted_doublet", "flags", "keep", "reason"]
    return frame[order], decisions


def _metrics(adata: AnnData, decisions: Decisions) -> pd.DataFrame:
    """Sums a cell, block by block of rows.

    They are what ``scanpy.pp.calculate_qc_metrics`` gives (a test says so). That function sums in the type of the
    data, where 8 bits wrap round, and takes a minute to compile on a new machine.
    """
    import pandas as pd

    gene_ids, gene_names = adata.var_names.to_numpy(), adata.var["gene_name"].astype(str).to_numpy()
    groups = {group: in_group(group, gene_ids, gene_names) for group in ("mitochondrial", "ribosomal", "haemoglobin")}
    for group, member in groups.items():
        found = int(member.sum())
        text = "recognised by name or Ensembl id" if found else "none recognised: their share is 0 in every cell"
        if group == "mitochondrial" and not found:
            text = "none recognised by name or Ensembl id: the share is 0 and no threshold on it applies"
        decisions.add(f"{group}_genes", found, text, n_genes=found)

    X = adata.X
    indptr = X.indptr.astype(np.int64)
    n_counts = np.zeros(adata.n_obs, dtype=np.int64)
    parts = {name: np.zeros(adata.n_obs, dtype=np.int64) for name in (*groups, "top")}
    for start in range(0, adata.n_obs, BLOCK):
        rows = slice(start, min(start + BLOCK, adata.n_obs))
        ends = indptr[start : rows.stop + 1]
        counts = X.data[ends[0] : ends[-1]].astype(np.int64)
        gene = X.indices[ends[0] : ends[-1]]
        ends = ends - ends[0]
        n_counts[rows] = _row_sums(counts, ends)
        for group, member in groups.items():
            parts[group][rows] = _row_sums(np.where(member[gene], counts, 0), ends)
        for row, (first, last) in enumerate(itertools.pairwise(ends), start):
            values = counts[first:last]
            parts["top"][row] = (np.partition(values, -TOP)[-TOP:] if values.size > TOP else values).sum()
    # a cell without counts has no shares: 0, and low_counts flags it
    share = {name: (100 * part / np.maximum(n_counts, 1)).astype(np.float32) for name, part in parts.items()}
    return pd.DataFrame(
        {
            "cell_id": adata.obs_names.astype(str).to_numpy(),
            **{column: adata.obs[column].astype(str).to_numpy() for column in ("barcode", "sample", "batch")},
            "n_counts": n_counts,
            "n_genes": np.diff(indptr).astype(np.int32),
            "pct_mito": share["mitochondrial"],
            "pct_ribo": share["ribosomal"],
            "pct_hb": share["haemoglobin"],
            "pct_top50": share["top"],
        }
    )


def _row_sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of consecutive stretches of integers; exact, and right for empty stretches."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[ends[1:]] - total[ends[:-1]]


def _thresholds(frame: pd.DataFrame, config: QcConfig, decisions: Decisions) -> dict[str, np.ndarray]:
    from scipy.stats import median_abs_deviation

    flags = {flag: np.zeros(len(frame), dtype=bool) for flag in FLAGS}
    cells = ((frame["n_counts"] >= config.min_counts) & (frame["n_genes"] >= config.min_genes)).to_numpy()

    def apply(flag: str, column: str, limit: float, side: int, name: str, why: str) -> None:
        values = frame[column].to_numpy()
        beyond = values < limit if side < 0 else values > limit
        flags[flag] |= beyond
        word = "below" if side < 0 else "above"
        text = f"{column} {word} it is flagged; {why}"
        decisions.add(f"{flag}.{name}", round(limit, 4), text, n_cells=int(beyond.sum()))

    def by_mad(column: str, sides: dict[int, str], log: bool = False, floor: float | None = None) -> None:
        values = frame[column].to_numpy()[cells].astype(np.float64)
        values = np.log1p(values) if log else values
        if not values.size:
            return
        median, mad = float(np.median(values)), float(median_abs_deviation(values, scale="normal"))
        scale = f"log1p({column})" if log else column
        if mad == 0:
            decisions.add(
                f"{'/'.join(sides.values())}.mad", None, f"{scale} has MAD 0 around {median:.4g}: not applied"
            )
            return
        for side, flag in sides.items():
            limit = median + side * config.n_mads * mad
            limit = float(np.expm1(limit)) if log else min(limit, 100.0)  # shares are per cent
            sign = "-" if side < 0 else "+"
            why = f"median {median:.4g} {sign} {config.n_mads:g} x scaled MAD {mad:.4g} of {scale}"
            if floor is not None and limit < floor:
                why, limit = f"{why} = {limit:.4g}, raised to the floor of {floor:g} %", floor
            apply(flag, column, limit, side, "mad", why)

    if not cells.all():
        decisions.add(
            "mad_cells",
            int(cells.sum()),
            f"medians and MADs are over cells with at least {config.min_counts} counts and {config.min_genes} genes",
        )
    apply("low_counts", "n_counts", config.min_counts, -1, "min_counts", "fixed limit")
    apply("low_genes", "n_genes", config.min_genes, -1, "min_genes", "fixed limit")
    by_mad("n_counts", {-1: "low_counts", 1: "high_counts"}, log=True)
    by_mad("n_genes", {-1: "low_genes", 1: "high_genes"}, log=True)
    by_mad("pct_top50", {1: "high_top50"})
    if config.max_counts is not None:
        apply("high_counts", "n_counts", config.max_counts, 1, "max_counts", "fixed limit")
    if any(d.what == "mitochondrial_genes" and d.value for d in decisions):
        by_mad("pct_mito", {1: "high_mito"}, floor=PCT_MITO_FLOOR)
        apply("high_mito", "pct_mito", config.max_pct_mito, 1, "max_pct_mito", "fixed limit")
    if config.max_pct_hb is not None:
        apply("high_hb", "pct_hb", config.max_pct_hb, 1, "max_pct_hb", "fixed limit")
    return flags


def _doublets(
    adata: AnnData, flags: dict[str, np.ndarray], config: QcConfig, seed: int, decisions: Decisions
) -> tuple[np.ndarray, np.ndarray]:
    """Scrublet scores (float32, NaN where not scored) and calls (bool) of every cell.

    Empty droplets and dying cells are left out, as Scrublet's authors advise: added to another cell they make no
    recognisable doublet. Cells with too many counts or genes stay in: that is what doublets look like.
    """
    import scanpy as sc
    from anndata import AnnData
    from threadpoolctl import threadpool_limits

    score = np.full(adata.n_obs, np.nan, dtype=np.float32)
    called = np.zeros(adata.n_obs, dtype=bool)
    if not config.doublets:
        decisions.add("doublets", "off", "qc.doublets is false: not scored")
        return score, called
    poor = [flag for flag in ("low_counts", "low_genes", "high_mito", "high_hb", "high_top50") if flag in config.drop]
    rows = np.flatnonzero(~np.any([flags[flag] for flag in poor], axis=0)) if poor else np.arange(adata.n_obs)
    X = adata.X[rows]
    n_genes = int((np.bincount(X.indices, minlength=X.shape[1]) >= 3).sum())
    if len(rows) < MIN_DOUBLET_CELLS or n_genes < MIN_DOUBLET_GENES:
        decisions.add(
            "doublets",
            "skipped",
            f"{len(rows)} cells and {n_genes} genes in 3 cells or more: Scrublet needs at least {MIN_DOUBLET_CELLS} "
            f"and {MIN_DOUBLET_GENES}; not scored",
        )
        return score, called

    # float32 holds counts exactly to 16 million; Scrublet adds cells up, where 8 bits would wrap round
    cells = AnnData(X.astype(np.float32))
    try:
        with threadpool_limits(1):  # sums in one order: the same scores for any number of threads
            sc.pp.scrublet(
                cells,
                expected_doublet_rate=config.expected_doublet_rate,
                use_approx_neighbors=False if len(rows) <= EXACT_NEIGHBOR_CELLS else None,
                random_state=seed,
                verbose=False,
            )
    except Exception as error:  # whatever it trips over, a sample without doublet scores is still a sample
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        decisions.add("doublets", "failed", f"Scrublet stopped with {text!r}: not scored, none flagged")
        return score, called
    score[rows] = cells.obs["doublet_score"].to_numpy(dtype=np.float32)
    threshold = cells.uns["scrublet"].get("threshold")
    if threshold is None:
        decisions.add("doublets", "no threshold", "Scrublet's simulated scores have no two modes: none flagged")
        return score, called
    called[rows] = cells.obs["predicted_doublet"].fillna(False).to_numpy(dtype=bool)
    share = 100 * called.sum() / len(rows)
    decisions.add(
        "doublet.scrublet",
        round(float(threshold), 4),
        f"scores above it are flagged: {share:.1f} % of {len(rows)} cells scored, where "
        f"{100 * config.expected_doublet_rate:g} % were expected; "
        + ("flagged cells are dropped" if "doublet" in config.drop else "flagged cells are kept (qc.drop)"),
        n_cells=int(called.sum()),
    )
    return score, called


def _joined(flags: dict[str, np.ndarray], names: list[str] | tuple[str, ...]) -> np.ndarray:
    """(cells,) texts: the names of the flags that are set, comma-joined."""
    joined = np.full(len(next(iter(flags.values()))), "", dtype=object)
    for name in names:
        rows = np.flatnonzero(flags[name])
        joined[rows] = [f"{text},{name}" if text else name for text in joined[rows]]
    return joined


def _remedy(flag: str, config: QcConfig) -> str:
    """What to change where `flag` drops too many."""
    keys = {
        "low_counts": f"lower qc.min_counts ({config.min_counts})",
        "low_genes": f"lower qc.min_genes ({config.min_genes})",
        "high_counts": f"raise qc.max_counts ({config.max_counts})",
        "high_mito": f"raise qc.max_pct_mito ({config.max_pct_mito:g})",
        "high_hb": f"raise qc.max_pct_hb ({config.max_pct_hb})",
    }
    return f"{keys.get(flag, f'raise qc.n_mads ({config.n_mads:g})')}, or take {flag} out of qc.drop"
