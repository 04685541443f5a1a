"""Which genes the model sees: harmonised over samples, ranked by variability (seurat_v3.py), chosen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_core.config import GenesConfig, InputConfig
from scvi_core.files import Decisions, UserError
from scvi_core.preprocess.qc import GENE_GROUPS, in_group
from scvi_core.preprocess.samples import SampleFile, open_samples
from scvi_core.preprocess.seurat_v3 import Stream, mean_variance, moments, rank_genes

if TYPE_CHECKING:
    import pandas as pd

AUTO_N_TOP = 2000


def harmonise(samples: list[SampleFile], how: str, decisions: Decisions) -> pd.DataFrame:
    """The genes that the samples are compared over.

    Parameters
    ----------
    samples : the samples.
    how : ``"intersection"`` or ``"union"``.
    decisions : genes lost or filled with zeros are counted here, sample by sample.

    Returns
    -------
    Frame of gene_id, gene_name, n_samples, in the order of the first sample; union: then of appearance.

    Raises
    ------
    UserError
        When some samples name genes by Ensembl id and others by symbol, or no gene is shared.
    """
    import pandas as pd

    kinds: dict[str, str] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, sample.name)
    if len(kinds) > 1:
        raise UserError(
            "genes are Ensembl ids in sample {ensembl} and symbols in sample {symbol}; set input.gene_ids: symbol, "
            "so that all are read by symbol".format(**kinds)
        )
    organisms = {s.organism: s.name for s in reversed(samples) if s.organism != "unknown"}
    told = ", ".join(f"{organism} ({name})" for organism, name in sorted(organisms.items()))
    if len(organisms) > 1:
        decisions.add("organism", "several", f"samples look like different organisms: {told}; are they meant together?")

    names: dict[str, str] = {}
    n_samples: dict[str, int] = {}
    renamed = set()
    for sample in samples:
        for gene, name in zip(sample.gene_ids, sample.gene_names, strict=True):
            known = names.setdefault(gene, name)
            if known == gene:  # an id stands for a name that a sample lacks
                names[gene] = name
            elif name not in (gene, known):
                renamed.add(gene)
            n_samples[gene] = n_samples.get(gene, 0) + 1
    shared = [gene for gene in names if n_samples[gene] == len(samples)]
    if not shared and (how == "intersection" or len(organisms) > 1):
        raise UserError(
            f"no gene is in all {len(samples)} samples (first genes: "
            + "; ".join(f"{s.name} has {', '.join(s.gene_ids[:2])}" for s in samples[:3])
            + (f"; organisms: {told}" if len(organisms) > 1 else "")
            + "); check that they are one organism with one kind of gene id, or set input.genes: union"
        )
    genes = shared if how == "intersection" else list(names)
    for sample in samples:
        lost = len(sample.gene_ids) - len(shared)
        absent = len(genes) - len(sample.gene_ids)
        if how == "intersection" and lost:
            text = f"of {len(sample.gene_ids)} genes of the sample: not in every sample (input.genes: intersection)"
            decisions.add("genes_lost", lost, text, n_genes=lost, sample=sample.name)
        if how == "union" and absent:
            text = f"of {len(genes)} genes: not in the sample, taken as 0 in all its cells (input.genes: union)"
            decisions.add("genes_filled", absent, text, n_genes=absent, sample=sample.name)
    decisions.add(
        "genes_harmonised",
        len(genes),
        f"{how} of {len(samples)} sample{'s' if len(samples) > 1 else ''}; {len(names)} genes in any, "
        f"{len(shared)} in all",
        n_genes=len(genes),
    )
    renamed &= set(genes)
    if renamed:
        text = f"the samples name these genes differently, such as {min(renamed)}; the first sample's name is kept"
        decisions.add("gene_names", "first", text, n_genes=len(renamed))
    return pd.DataFrame(
        {
            "gene_id": genes,
            "gene_name": [names[gene] for gene in genes],
            "n_samples": np.array([n_samples[gene] for gene in genes], dtype=np.int32),
        }
    )


def select_genes(
    h5ads: Sequence[Path], qcs: Sequence[Path], input: InputConfig, genes: GenesConfig
) -> tuple[pd.DataFrame, Decisions]:
    """Choose the genes that the model sees.

    The included genes come first, then the highest-ranked others, up to ``n_top`` in total. Genes in fewer than
    ``min_cells`` kept cells and excluded ones take no part in the ranking, as if the matrix were without them.

    Parameters
    ----------
    h5ads, qcs : the samples' counts.h5ad and qc.parquet, in sheet order.
    input, genes : those sections of the configuration.

    Returns
    -------
    frame : a row a harmonised gene, columns as ``genes.parquet``; means and variances over all kept cells.
    decisions : genes lost, left out, included, excluded; how many are selected and why.

    Raises
    ------
    UserError
        For samples that share no genes, a batch of a single cell, an include or exclude entry that names no gene,
        more genes asked for than there are.
    """
    decisions = Decisions("genes")
    samples = open_samples(h5ads, qcs)
    frame = harmonise(samples, input.genes, decisions)
    batches = _batches(samples)
    if not genes.per_batch:
        decisions.add("per_batch", False, f"genes are ranked over all {len(batches)} batches as one (genes.per_batch)")
        batches = {"all": sum(batches.values())}
    position = {gene: i for i, gene in enumerate(frame["gene_id"])}
    stream = Stream(
        samples,
        batches,
        codes=[_codes(sample, batches) for sample in samples],
        columns=[np.array([position.get(gene, -1) for gene in s.gene_ids], dtype=np.intp) for s in samples],
    )
    sums, squares, n_cells = moments(stream, len(frame))
    total = sum(batches.values())
    frame["n_cells"] = n_cells
    frame["mean"] = sums.sum(axis=0) / total
    frame["variance"] = mean_variance(sums.sum(axis=0), squares.sum(axis=0), total)[1]

    known = {gene for sample in samples for gene in (*sample.gene_ids, *sample.gene_names)}
    included = _matches("include", genes.include, frame, known, decisions)
    excluded = _matches("exclude", genes.exclude, frame, known, decisions)
    both = sorted(included.keys() & excluded.keys())
    if both:
        gene = both[0]
        raise UserError(
            f"genes.include {included[gene]!r} and genes.exclude {excluded[gene]!r} both match gene "
            f"{frame['gene_name'][gene]}; take it out of one"
        )
    passing = n_cells >= genes.min_cells
    rare = int((~passing).sum())
    if rare:
        text = f"of {len(frame)} genes: detected in fewer than {genes.min_cells} kept cells (genes.min_cells)"
        decisions.add("below_min_cells", rare, text, n_genes=rare)
    note = np.where(passing, "", "below min_cells").astype(object)
    for gene, entry in excluded.items():
        note[gene] = f"excluded: {entry}"
    for gene in included:
        note[gene] = "included"
    candidate = passing.copy()
    candidate[list(excluded)] = False
    always = np.zeros(len(frame), dtype=bool)
    always[list(included)] = True
    n_top = _n_top(genes, candidate, always, decisions)

    ranked = rank_genes(stream, sums, squares, np.flatnonzero(candidate), n_top, genes.span, decisions)
    for column, absent in (
        ("variances_norm", np.nan),
        ("highly_variable_rank", np.nan),
        ("highly_variable_nbatches", 0),
    ):
        values = np.full(len(frame), absent, dtype=np.float64)
        values[candidate] = ranked[column]
        frame[column] = values
    frame["highly_variable_nbatches"] = frame["highly_variable_nbatches"].astype(np.int32)
    frame["note"] = note
    selected = always.copy()
    others = [gene for gene in np.flatnonzero(candidate)[ranked["order"]] if not always[gene]]
    selected[others[: n_top - int(always.sum())]] = True
    frame["selected"] = selected
    decisions.add("selected", int(selected.sum()), f"genes that the model sees, {int(always.sum())} of them included")
    return frame, decisions


def _batches(samples: list[SampleFile]) -> dict[str, int]:
    """Kept cells of each batch, batches sorted as ``numpy.unique`` sorts (the order scanpy sums in)."""
    sizes: dict[str, int] = {}
    for sample in samples:
        if not sample.keep.any():
            raise UserError(f"sample {sample.name}: no cell is kept after QC; loosen qc, or drop it from the sheet")
        for batch, n in zip(*np.unique(sample.batch[sample.keep].astype(str), return_counts=True), strict=True):
            sizes[str(batch)] = sizes.get(str(batch), 0) + int(n)
    for batch, n in sizes.items():
        if n == 1:
            raise UserError(
                f"batch {batch!r}: a single cell is kept, which has no variance; give its samples the batch of others "
                "in the sample sheet, loosen qc, or drop it"
            )
    return dict(sorted(sizes.items()))


def _codes(sample: SampleFile, batches: dict[str, int]) -> np.ndarray:
    order = {batch: i for i, batch in enumerate(batches)}
    return np.array([order.get(batch, 0) for batch in sample.batch], dtype=np.intp)  # 0: unkept, or all as one


def _n_top(genes: GenesConfig, candidate: np.ndarray, always: np.ndarray, decisions: Decisions) -> int:
    """How many genes to select in all, included ones among them."""
    available = int((candidate | always).sum())
    if not available:
        raise UserError(f"genes.min_cells: no gene is detected in {genes.min_cells} kept cells; lower it or loosen qc")
    if genes.n_top == "all":
        decisions.add("n_top", available, "genes.n_top is all: every gene that passes min_cells and is not excluded")
        return available
    if genes.n_top == "auto":
        n_top = max(min(AUTO_N_TOP, available), int(always.sum()))
        decisions.add("n_top", n_top, f"genes.n_top is auto: {AUTO_N_TOP}, or all {available} available if fewer")
        return n_top
    if genes.n_top > available:
        raise UserError(
            f"genes.n_top: {genes.n_top} genes asked for, but only {available} pass genes.min_cells "
            f"({genes.min_cells}) and are not excluded; set it to {available} or less, or to auto"
        )
    if always.sum() > genes.n_top:
        raise UserError(
            f"genes.n_top: {genes.n_top} asked for, but genes.include names {int(always.sum())} genes; raise it"
        )
    decisions.add("n_top", genes.n_top, f"as genes.n_top asks; {available} genes are available")
    return genes.n_top


def _matches(
    key: str, entries: tuple[str, ...], frame: pd.DataFrame, known: set[str], decisions: Decisions
) -> dict[int, str]:
    """Positions of the genes that a list names, each with the first entry that did."""
    ids, names = frame["gene_id"].to_numpy(), frame["gene_name"].to_numpy()
    matched: dict[int, str] = {}
    for entry in entries:
        if entry.startswith("@"):
            if entry[1:] not in GENE_GROUPS:
                valid = ", ".join(f"@{group}" for group in GENE_GROUPS)
                raise UserError(f"genes.{key}: no gene group {entry!r}; there are {valid}")
            found = in_group(entry[1:], ids, names)
        elif len(entry) > 2 and entry.startswith("/") and entry.endswith("/"):
            try:
                pattern = re.compile(entry[1:-1])
            except re.error as error:
                raise UserError(f"genes.{key}: {entry!r} is not a regular expression ({error})") from None
            found = np.array([pattern.search(name) is not None for name in names], dtype=bool)
        else:
            found = (ids == entry) | (names == entry)
            if not found.any():
                raise UserError(f"genes.{key}: no gene {entry!r}; {_nearest(entry, ids, names, known)}")
        rows = np.flatnonzero(found)
        text = f"genes.{key} {entry!r} matches {', '.join(names[rows[:5]])}{' ...' if len(rows) > 5 else ''}"
        decisions.add(
            f"{key}d", len(rows), text if len(rows) else f"genes.{key} {entry!r} matches no gene", None, len(rows)
        )
        for row in rows:
            matched.setdefault(int(row), entry)
    return matched


def _nearest(entry: str, ids: np.ndarray, names: np.ndarray, known: set[str]) -> str:
    if entry in known:
        return "not every sample has it; input.genes: union keeps such genes"
    folded = {name.casefold(): name for name in (*ids, *names)}
    if entry.casefold() in folded:
        return f"did you mean {folded[entry.casefold()]!r}? (capitals count)"
    near = difflib.get_close_matches(entry.casefold(), list(folded), n=1)
    return f"did you mean {folded[near[0]]!r}?" if near else "use its id or name as in the input, or a /regex/"
