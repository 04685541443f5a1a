"""Quality control of one sample: per-cell metrics, thresholds, doublet scores, and which cells are kept.

Every threshold is a decision on record with its numbers; a dropped cell carries its reason in ``qc.parquet``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from scvi_core.config import Flag, QcConfig, name_matcher
from scvi_core.files import Decisions, UserError
from scvi_core.io.identity import GENOME
from scvi_core.preprocess.cellcycle import CYCLE_OBS, G2M_PHASE, S_PHASE, cell_cycle, unscored
from scvi_core.preprocess.limits import KIND_GENES, limits, rich_in_mitochondria
from scvi_core.preprocess.samples import read_chunks, read_tables

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

FLAGS = get_args(Flag)

TOP = 50  # genes whose joint share is a sign of debris

# Doublets. Fewer cells than these hold less than one at the usual rate, and too few neighbours to judge by.
MIN_DOUBLET_CELLS = 100
MIN_DOUBLET_GENES = 50
DOUBLET_GENES = 1350  # the most counted
GROUP_CELLS = 10_000  # cells scored together
GATHERED = 200_000_000  # stored counts whose cells are gathered in one reading of the file
# A droplet holds two cells more often the more cells are loaded: 0.8 % per 1,000 cells captured (10x Genomics). One of
# more than 10,000 comes of a chemistry with half that rate, or of several captures, each with a rate of its own.
RATE_PER_CELL = 0.008 / 1000
HIGHEST_RATE = 0.08
ODD_RATE = 5  # times off what is expected, and worth a look

MUCH = 0.2  # ambient RNA: usual shares are 2 to 20 %
TOLD_GENES = 10  # of ambient RNA

# Gene groups by name, any species' capitals (MT-ND1, mt-Nd1). The patterns leave out genes that merely look alike:
# RPS6KA1 (kinase) and RPS19BP1, HBEGF and HBP1, IGHMBP2 (helicase), TRADD and TRAF1.
# A '.' may stand for '-' in names that went through R.
GENE_GROUPS = {
    # the last two: thale cress, yeast
    "mitochondrial": r"^(?:MT[-.:]|MT_?(?:ND\dL?|COX?\d|ATP\d|CYT?B|RNR\d)$|ATMG\d{5}$|Q0\d{3}$)",
    "ribosomal": r"^RP(?:[SL]\d+(?![\dK]|BP)|LP[0-2]|SA(?:$|P))(?!.*[-.](?:AS|DT)\d*$)",
    "haemoglobin": r"^HB(?:[ABDEGMQZ]\d?|Q1[AB]|[AB][AE]\d(?:\.\d)?)(?:$|[-.])",
    "immunoglobulin": r"^IG(?:H[VJ]|HD\d|H[ADEGM](?:\d[ABC]?)?(?:P\d?)?$|K[CVJ]|L[CVJ])",
    "tcr": r"^(?:TR(?:A[VJ]|B[VDJ]|G[VJ]|D[VDJ])(?:\d|P|[AB]$|OR)|TR(?:A|B|G|D)C\d?(?:$|[-.])|TCR[ABGD][-.])",
}
# the genes of mitochondrial genomes where nothing stands in front of their names: of most vertebrates, and the worm's
MITOCHONDRIAL_NAMES = {
    "ND1", "ND2", "ND3", "ND4", "ND4L", "ND5", "ND6", "COX1", "COX2", "COX3", "CO1", "CO2", "CO3", "CYTB", "CYB",
    "ATP6", "ATP8", "NDUO-1", "NDUO-2", "NDUO-3", "NDUO-4", "NDUO-5", "NDUO-6", "NDFL-4", "CTC-1", "CTC-2", "CTC-3",
    "CTB-1", "ATP-6",
}  # fmt: skip
# long RNA that stays in the nucleus, in most tissues of man and mouse
GENE_GROUPS["nuclear"] = r"^(?:MALAT1|NEAT1|XIST|MEG3|SNHG11|KCNQ1OT1)$"
GENE_GROUPS["cell_cycle"] = rf"^(?:{'|'.join(S_PHASE + G2M_PHASE)})$"
ENOUGH_NAMES = 5  # of these, as one alone may be called so by chance
ALL_NAMES = 12  # proteins that a mitochondrial genome codes for; the worm's has no ATP8
CLONE = re.compile(r"[A-Z]{1,2}[_-]?\d{5,8}\.\d+|MTCE\.\d+|")  # names of sequences, of genes without a symbol


@functools.cache
def _mitochondrial_ids() -> frozenset[str]:
    """Ensembl ids of the mitochondrial genomes of the species in mitochondrial.txt."""
    lines = Path(__file__).with_name("mitochondrial.txt").read_text("utf-8").splitlines()
    return frozenset(gene for line in lines if not line.startswith("#") for gene in line.partition(":")[2].split())


def in_group(
    group: str, gene_ids: np.ndarray, gene_names: np.ndarray, given: tuple[str, ...] | None = None
) -> np.ndarray:
    """Which genes belong to a group of ``GENE_GROUPS``.

    Parameters
    ----------
    group : a key of ``GENE_GROUPS``.
    gene_ids, gene_names : (genes,) texts.
    given : ids, names and /patterns/ that are the group, instead of what is known of it.

    Returns
    -------
    (genes,) bool.
    """
    if given is not None:
        among = name_matcher(given)
        return np.array(
            [among(gene) or among(name) for gene, name in zip(gene_ids, gene_names, strict=True)], dtype=bool
        )
    matches = re.compile(GENE_GROUPS[group], re.IGNORECASE).match
    names = [GENOME.sub("", name, count=1) for name in gene_names]
    found = np.array([matches(name) is not None for name in names], dtype=bool)
    if group == "mitochondrial":
        bare = np.array([name.upper() in MITOCHONDRIAL_NAMES for name in names], dtype=bool)
        by_id = np.array([gene in _mitochondrial_ids() for gene in gene_ids], dtype=bool)
        if (found | bare).sum() >= ALL_NAMES:  # a symbol says more than an id, where a file's symbols tell these genes
            pairs = zip(gene_ids, gene_names, strict=True)
            by_id &= np.array([name == gene or CLONE.fullmatch(name) is not None for gene, name in pairs], dtype=bool)
        found |= by_id
        if (found | bare).sum() >= ENOUGH_NAMES:  # some of one annotation may have names, and others ids alone
            found |= bare
    return found


def qc(h5ad: Path, config: QcConfig, seed: int) -> tuple[pd.DataFrame, Decisions]:
    """Judge the cells of one sample, whose counts are read chunk by chunk and never held whole.

    By the limits of :mod:`scvi_core.preprocess.limits` and the scores of :mod:`scvi_core.preprocess.doublets`.

    Parameters
    ----------
    h5ad : ``samples/{sample}/counts.h5ad`` of one sample, as ``scvi-core ingest`` writes it.
    config : the qc section.
    seed : of the groups and the artificial doublets that cells are scored with.

    Returns
    -------
    frame : one row a barcode in file order, columns as ``qc.parquet``; shares are per cent.
    decisions : thresholds with the number of cells each flagged, doublet detection, cells dropped.

    Raises
    ------
    UserError
        When no cell is left, or the file is not a sample that ingest wrote.
    """
    obs, var, uns = read_tables(h5ad, ("barcode", "sample", "batch"))
    sample = uns["sample"]
    decisions = Decisions("qc", sample)
    frame, totals, mitochondrial = _metrics(h5ad, obs, var, config, decisions)
    flags = {flag: np.zeros(len(frame), dtype=bool) for flag in FLAGS}
    members = {name: np.flatnonzero(frame["sample"] == name) for name in frame["sample"].unique()}
    for name, rows in members.items():
        flags["empty"][rows] = _empty(h5ad, rows, frame, var, config, seed, decisions, name)[rows]
        rows = rows[~flags["empty"][rows]]
        part = frame.iloc[rows]
        found, limit = limits(part, int(np.count_nonzero(totals)), bool(mitochondrial.any()), config, decisions, name)
        for flag, flagged in found.items():
            flags[flag][rows] = flagged
        if limit is not None:
            good = np.zeros(len(frame), dtype=bool)
            good[rows] = ~(found["low_counts"] | found["low_genes"])
            others = _most_counted(np.where(mitochondrial, 0, totals), KIND_GENES)
            spared = rich_in_mitochondria(h5ad, frame, good, limit, others, seed)
            if config.max_pct_mito is not None:
                spared &= (frame["pct_mito"] <= config.max_pct_mito).to_numpy()
            flags["high_mito"] &= ~spared
            if spared.any():
                text = (
                    f"cells have a mitochondrial share above {limit:.3g} %, but no higher than the cells that they are "
                    "like by other genes, and as many other counts: of a kind rich in mitochondria, not flagged"
                )
                decisions.add("rich_in_mitochondria", int(spared.sum()), text, sample=name)
    frame["doublet_score"], frame["predicted_doublet"] = _doublets(
        h5ad, frame["n_genes"].to_numpy(), totals, members, flags, config, seed, decisions
    )
    flags["doublet"] = frame["predicted_doublet"].to_numpy()

    frame["flags"] = _joined(flags, FLAGS)
    dropping = [flag for flag in FLAGS if flag in config.drop]
    frame["reason"] = _joined(flags, dropping)
    frame["keep"] = frame["reason"] == ""
    n, left = len(frame), int(frame["keep"].sum())
    if not left:
        worst = max(dropping, key=lambda flag: int(flags[flag].sum()))
        median = frame["n_counts"].median()
        few = f"they have {median:.0f} counts at the median; leave the sample out if all are empty, or "
        raise UserError(
            f"sample {sample}: no cell is left after QC; {worst} dropped most ({int(flags[worst].sum())} of {n} "
            f"cells): {few if worst in ('low_counts', 'low_genes') else ''}{_remedy(worst, config)}"
        )
    counts = {flag: int(flags[flag].sum()) for flag in dropping if flags[flag].any()}
    why = ", ".join(f"{flag} {count}" for flag, count in counts.items()) or "no cell has a flag that drops"
    decisions.add("cells_kept", left, f"of {n}; dropped by flag (a cell may have several): {why}", n_cells=n - left)
    names = np.array([GENOME.sub("", name, count=1).upper() for name in var["gene_name"]], dtype=object)
    phases = np.isin(names, S_PHASE), np.isin(names, G2M_PHASE)
    found = cell_cycle(h5ad, frame, *phases, decisions) if config.cell_cycle else unscored(n)
    for column, values in zip(CYCLE_OBS, found, strict=True):
        frame[column] = values
    order = ["cell_id", "barcode", "sample", "batch", "n_counts", "n_genes", "pct_mito", "pct_ribo", "pct_hb"]
    order += ["pct_top50", "doublet_score", "predicted_doublet", "flags", "keep", "reason", *CYCLE_OBS]
    return frame[order], decisions


def labels_table(frame: pd.DataFrame, labels: Sequence[Any]) -> pd.DataFrame:
    """A row a label: ``cells``, ``dropped``, ``per_cent``, then the cells that each flag is on; most dropped first."""
    import pandas as pd

    label = pd.Series(labels, index=frame.index).astype(object)
    label = label.where(label.notna(), "(none)").astype(str)
    flags = frame["flags"].str.get_dummies(",") if len(frame) else pd.DataFrame(index=frame.index)
    flags = flags[[flag for flag in FLAGS if flag in flags]]
    table = (
        pd.DataFrame({"cells": 1, "dropped": (~frame["keep"].astype(bool)).astype(int), **flags}).groupby(label).sum()
    )
    table.insert(2, "per_cent", (100 * table["dropped"] / table["cells"]).round(1))
    return table.rename_axis("label").sort_values(["per_cent", "cells"], ascending=[False, False], kind="stable")


def _empty(
    h5ad: Path,
    rows: np.ndarray,
    frame: pd.DataFrame,
    var: pd.DataFrame,
    config: QcConfig,
    seed: int,
    decisions: Decisions,
    sample: str,
) -> np.ndarray:
    """(barcodes of the file,) bool: of one sample, which hold no cell, where its barcodes are raw droplets."""
    from scvi_core.preprocess.droplets import barcode_ranks, find_cells

    empty, n_counts = np.zeros(len(frame), dtype=bool), frame["n_counts"].to_numpy()
    curve = barcode_ranks(n_counts[rows]) if config.cells != "all" else None
    if curve is None:
        if config.cells == "raw":
            raise UserError(
                f"sample {sample}: qc.cells is raw, but its {len(rows):,} barcodes are no raw droplets: most have as "
                "many counts as cells have; set qc.cells to auto, or read the unfiltered matrix"
            )
        why = "as qc.cells says" if config.cells == "all" else "few have hardly any counts, as most raw droplets do"
        text = f"each of {len(rows):,} barcodes is taken for a cell: {why}; ambient RNA cannot be told from cells alone"
        decisions.add("barcodes", "cells", text, sample=sample)
        return empty
    found = find_cells(h5ad, rows, n_counts, curve, seed)
    n_cells = int(found.cell[rows].sum())
    if not n_cells:
        raise UserError(
            f"sample {sample}: none of {len(rows):,} raw droplets holds a cell: all look like ambient RNA; leave the "
            "sample out, or set qc.cells to all"
        )
    empty[rows] = ~found.cell[rows]
    text = (
        f"of {len(rows):,} barcodes, which are raw droplets by their barcode-rank curve: {n_cells - found.called:,} by "
        f"more than {curve.sure:,.0f} counts, {found.called:,} of {found.tested:,} with {curve.lower + 1:,} or more by "
        "genes that ambient RNA would not give; the others are flagged empty"
    )
    decisions.add("droplets_with_cells", n_cells, text, n_cells=len(rows) - n_cells, sample=sample)
    if not found.ambient_g.any():
        text = (
            f"no droplet has {curve.lower} counts or fewer: the matrix was cut, so cells are told by their counts "
            "alone and ambient RNA cannot be told; read the whole unfiltered matrix"
        )
        decisions.add("ambient_share", None, text, sample=sample, warn=True)
        return empty
    share, least = found.share, np.isfinite(found.share)
    text = "share of a cell's counts that is ambient RNA, by genes that its kind does not express; it is not taken out"
    if not least:
        text = "too few counts, or cells too much alike, tell the share of ambient RNA"
    decisions.add("ambient_share", round(share, 4) if least else None, text, sample=sample, warn=least and share > MUCH)
    top = np.argsort(-found.ambient_g, kind="stable")[:TOLD_GENES]
    percent = 100 * found.ambient_g / found.ambient_g.sum()
    genes = {str(var["gene_name"].iloc[g]): round(float(percent[g]), 2) for g in top}
    decisions.add("ambient_genes", genes, "the most of the ambient RNA, in per cent of it", sample=sample)
    return empty


def _metrics(
    h5ad: Path, obs: pd.DataFrame, var: pd.DataFrame, config: QcConfig, decisions: Decisions
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Sums a cell, (genes,) counts of all cells, and which genes are mitochondrial, in one reading of the file.

    They are what ``scanpy.pp.calculate_qc_metrics`` gives (a test says so). That function sums in the type of the
    data, where 8 bits wrap round, and takes a minute to compile on a new machine.
    """
    import pandas as pd

    gene_ids, gene_names = var.index.to_numpy(), var["gene_name"].to_numpy()
    given = {"mitochondrial": config.mitochondrial, "ribosomal": config.ribosomal, "haemoglobin": config.haemoglobin}
    groups = {group: in_group(group, gene_ids, gene_names, known) for group, known in given.items()}
    for group, member in groups.items():
        found, how = (
            int(member.sum()),
            f"as qc.{group} says" if given[group] is not None else "recognised by name or Ensembl id",
        )
        text = how if found else f"none {how}: their share is 0 in every cell"
        lost = group == "mitochondrial" and not found
        if lost:
            text = f"none {how}: the share is 0 and no threshold on it applies; name them as qc.mitochondrial"
        decisions.add(f"{group}_genes", found, text, n_genes=found, warn=lost)
    groups["nuclear"] = in_group("nuclear", gene_ids, gene_names)

    n_counts, n_top = np.zeros(len(obs), dtype=np.int64), np.zeros(len(obs), dtype=np.int64)
    n_genes, totals = np.zeros(len(obs), dtype=np.int32), np.zeros(len(var), dtype=np.int64)
    members = np.column_stack([np.ones(len(var), dtype=bool), *groups.values()]).astype(np.int64)
    parts = np.zeros((len(obs), len(groups)), dtype=np.int64)
    for rows, counts in read_chunks(h5ad, np.ones(len(obs), dtype=bool)):
        counts = counts.astype(np.int64)
        sums = counts @ members
        n_counts[rows], parts[rows] = sums[:, 0], sums[:, 1:]
        n_genes[rows], n_top[rows] = np.diff(counts.indptr), _top_sums(counts)
        np.add.at(totals, counts.indices, counts.data)
    shares = np.column_stack([parts, n_top])
    # a cell without counts has no shares: 0, and low_counts flags it
    shares = (100 * shares / np.maximum(n_counts, 1)[:, None]).astype(np.float32)
    frame = pd.DataFrame(
        {
            "cell_id": obs.index.astype(str).to_numpy(),
            **{column: obs[column].astype(str).to_numpy() for column in ("barcode", "sample", "batch")},
            "n_counts": n_counts,
            "n_genes": n_genes,
            **dict(zip(("pct_mito", "pct_ribo", "pct_hb", "pct_nuclear", "pct_top50"), shares.T, strict=True)),
        }
    )
    return frame, totals, groups["mitochondrial"]


def _top_sums(counts: csr_matrix) -> np.ndarray:
    """(cells,) sums of each cell's ``TOP`` largest counts, of fewer than 2^31 cells and counts below 2^32."""
    ends = counts.indptr.astype(np.int64)
    row = np.repeat(np.arange(counts.shape[0], dtype=np.int64), np.diff(ends))
    values = np.sort(row << 32 | counts.data) & 0xFFFFFFFF  # sorted within each row, by one sort of them all
    total = np.concatenate([[0], np.cumsum(values)])
    return total[ends[1:]] - total[np.maximum(ends[:-1], ends[1:] - TOP)]


def _doublets(
    h5ad: Path,
    n_genes: np.ndarray,
    totals: np.ndarray,
    members: dict[str, np.ndarray],
    flags: dict[str, np.ndarray],
    config: QcConfig,
    seed: int,
    decisions: Decisions,
) -> tuple[np.ndarray, np.ndarray]:
    """Doublet scores (float32, NaN where not scored) and calls (bool) of every cell; `members`: each sample's rows.

    Empty droplets and dying cells are left out: added to another cell they make no recognisable doublet. Cells with
    too many counts or genes stay in: that is what doublets look like. A large sample is scored in random groups, so
    that memory does not grow with it; one threshold, over all groups of a sample, calls.
    """
    from scvi_core.preprocess.doublets import doublet_rate, doublet_threshold, score_doublets

    score = np.full(len(n_genes), np.nan, dtype=np.float32)
    called = np.zeros(len(n_genes), dtype=bool)
    if not config.doublets:
        decisions.add("doublets", "off", "qc.doublets is false: not scored")
        return score, called
    poor = [
        flag
        for flag in ("empty", "low_counts", "low_genes", "high_mito", "high_hb", "high_top50")
        if flag in config.drop
    ]
    good = ~np.any([flags[flag] for flag in poor], axis=0) if poor else np.ones(len(n_genes), dtype=bool)
    genes = _most_counted(totals, DOUBLET_GENES)
    rng = np.random.default_rng(seed)
    given, groups, of, expected = config.expected_doublet_rate, [], [], {}
    for name, of_sample in members.items():
        rows = of_sample[good[of_sample]]
        if len(rows) < MIN_DOUBLET_CELLS or len(genes) < MIN_DOUBLET_GENES:
            decisions.add(
                "doublets",
                "undecidable",
                f"{len(rows)} cells and {len(genes)} genes to judge by, where {MIN_DOUBLET_CELLS} and "
                f"{MIN_DOUBLET_GENES} are needed; none is scored or called",
                sample=name,
                warn=True,
            )
            continue
        expected[name] = min(RATE_PER_CELL * len(rows), HIGHEST_RATE)
        text = f"share of {len(rows)} cells: {100_000 * RATE_PER_CELL:g} % per 1,000 cells captured"
        odd = given is not None and not 1 / ODD_RATE < given / expected[name] < ODD_RATE and len(rows) > 1000
        if given is not None:
            text = f"share of {len(rows)} cells, as qc.expected_doublet_rate says; by their number {expected[name]:.3g}"
            expected[name] = given
        elif expected[name] == HIGHEST_RATE:
            text += f", {100 * HIGHEST_RATE:g} % at most, as more cells come of several captures or a newer chemistry"
        decisions.add("doublets_expected", round(expected[name], 4), text, sample=name, warn=odd)
        parts = [np.sort(part) for part in np.array_split(rng.permutation(rows), -(-len(rows) // GROUP_CELLS))]
        if len(parts) > 1:
            text = f"of {len(rows)} cells: random groups of {len(parts[0])} are scored alone, so that memory is bounded"
            decisions.add("doublet_groups", len(parts), text, sample=name)
        groups += parts
        of += [name] * len(parts)
    artificial: dict[str, list[np.ndarray]] = {name: [] for name in expected}
    for i, (group, counts) in enumerate(_gathered(h5ad, groups, n_genes, genes)):
        score[group], of_artificial = score_doublets(counts, expected[of[i]], given is not None, seed + i)
        artificial[of[i]].append(of_artificial.astype(np.float32))
    for name, share in expected.items():
        rows = members[name][good[members[name]]]
        scores = score[rows], np.concatenate(artificial[name])
        rate = doublet_rate(*scores)
        threshold = doublet_threshold(*scores, rate if given is None else given)
        text = f"share of {len(rows)} cells, told by how many score as artificial doublets do"
        off = rate > ODD_RATE * max(share, 0.01)
        if off:
            text += f": {rate:.1%}, {rate / share:.3g} times the {share:.1%} that were expected; "
            text += "look whether cells between two types are called"
        decisions.add("doublets_estimated", round(rate, 4), text, sample=name, warn=off)
        called[rows] = score[rows] > threshold
        decisions.add(
            "doublet.threshold",
            round(threshold, 4),
            f"scores above it are flagged: {100 * called[rows].sum() / len(rows):.1f} % of {len(rows)} cells; "
            + ("flagged cells are dropped" if "doublet" in config.drop else "flagged cells are kept (qc.drop)"),
            n_cells=int(called[rows].sum()),
            sample=name,
        )
    return score, called


def _gathered(
    h5ad: Path, groups: list[np.ndarray], n_genes: np.ndarray, genes: np.ndarray
) -> Iterator[tuple[np.ndarray, csr_matrix]]:
    """Yield each group's rows with their counts of `genes`; a reading of the file gathers as many groups as fit."""
    from scipy.sparse import vstack

    sizes = np.cumsum([n_genes[group].sum(dtype=np.int64) for group in groups])
    first = 0
    while first < len(groups):
        before = sizes[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(sizes, before + GATHERED, side="right")))
        of_row = np.full(len(n_genes), -1, dtype=np.int32)
        for i in range(first, last):
            of_row[groups[i]] = i
        pieces: dict[int, list[csr_matrix]] = {i: [] for i in range(first, last)}
        for rows, counts in read_chunks(h5ad, of_row >= 0):
            counts = counts[:, genes]
            for i, kept in pieces.items():
                kept.append(counts[of_row[rows] == i])
        for i in range(first, last):
            yield groups[i], vstack(pieces.pop(i), format="csr")
        first = last


def _most_counted(totals: np.ndarray, n: int) -> np.ndarray:
    """Positions of the `n` genes with most counts, ascending; of fewer where fewer have any."""
    return np.sort(np.argsort(-totals, kind="stable")[: min(n, np.count_nonzero(totals))])


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
        "high_mito": f"raise qc.n_mads ({config.n_mads:g}) and qc.max_pct_mito ({config.max_pct_mito})",
        "high_hb": f"raise qc.max_pct_hb ({config.max_pct_hb})",
    }
    return f"{keys.get(flag, f'raise qc.n_mads ({config.n_mads:g})')}, or take {flag} out of qc.drop"
