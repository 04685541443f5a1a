"""What inputs are, before anything is built: opened by their readers, looked at by a sample of their counts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scvi_core.config import Config, InputConfig, Sample
from scvi_core.files import Decisions, UserError
from scvi_core.io import identity, open_input
from scvi_core.io.blocks import Scratch
from scvi_core.log import duration, log, progress

ENTRIES = 2**22  # of an input that are read; of a format that lies in another order than by cells, and of text, too
EMPTY, MANY = 20, 10_000  # fewer counts than a cell has; barcodes that are more than most samples have cells
# of `benchmarks/million.py`, defaults, two cores: 260,000 and 1,300,000 cells took 8 and 44 minutes, 1.7 and 3.9 GB
MINUTES, GIGABYTES = 32.5, 2.1  # a million cells
START = 1.0, 0.05, 1.15  # minutes, minutes a sample, gigabytes


@dataclasses.dataclass(frozen=True)
class Look:
    """An input as a sample of its counts shows it.

    Attributes
    ----------
    name : of the sample.
    format : told by its content.
    n_cells, n_genes : of the matrix.
    kind, organism : of gene ids, as ingest has them.
    gene_ids, gene_names : (genes,) texts.
    columns : of its own cell table.
    counts, genes : medians of the cells that were looked at; None where whole cells would have to be gathered.
    whole : whether all names are known: of a large table of text the first rows only are.
    remarks : what to look at.
    """

    name: str
    format: str
    n_cells: int
    n_genes: int
    kind: str
    organism: str
    gene_ids: np.ndarray
    gene_names: np.ndarray
    columns: tuple[str, ...]
    counts: float | None
    genes: float | None
    whole: bool
    remarks: tuple[str, ...]


def look(path: str | Path, name: str, config: InputConfig) -> Look:
    """Open an input as ingest will, and read a sample of its counts.

    Raises
    ------
    UserError
        As ingest would, for all that shows in the sample.
    """
    path, made = Path(path), Decisions("ingest", name)
    with quiet(), Scratch(most=ENTRIES) as scratch:
        kind, read = open_input(path, config, made, scratch)
        ids, names, of = identity.gene_identity(read.var, config, str(path), made)
        _, ids, names = identity.merge_genes(ids, names, made)
        block = next(iter(read.blocks), None)
        stopped = scratch.enough(0)
    if block is None or not block.nnz:
        raise UserError(f"{path}: the counts that were looked at are all zero; check the export")
    totals, lengths = np.asarray(block.sum(axis=1)).ravel(), np.diff(block.indptr)
    if stopped:  # of a matrix market file these are the first cells; in other orders, of some genes only
        filled = np.flatnonzero(lengths)
        n_first = int(filled[-1])
        first = n_first < 0.9 * read.shape[0] and len(filled) > 0.1 * n_first
        totals, lengths = (totals[:n_first], lengths[:n_first]) if first else (totals[:0], lengths[:0])
    remarks = [f"{d.what} = {d.value}: {d.reason}" for d in made if d.warning]
    few = float(np.mean(totals < EMPTY)) if len(totals) else 0.0
    if few > 0.5 and read.shape[0] > MANY:
        remarks.append(
            f"{few:.0%} of its barcodes have fewer than {EMPTY} counts: these look like all droplets, most of them "
            "empty; take the filtered matrix"
        )
    return Look(
        name, kind, *read.shape, of, identity.guess_organism(ids, names), ids, names, read.columns,
        float(np.median(totals)) if len(totals) else None, float(np.median(lengths)) if len(totals) else None,
        not (stopped and kind == "text table"), tuple(remarks),
    )  # fmt: skip


def check_inputs(samples: Sequence[Sample], settings: Config) -> str:
    """Look at all local inputs; warn of what is odd.

    Returns
    -------
    str
        A table, a row a sample, and what the build will need.

    Raises
    ------
    UserError
        For the first input that cannot be read, once all have been looked at; the others' faults are warnings.
    """
    looks, faults = [], []
    local = [sample for sample in samples if not sample.plugin]
    for sample in progress(local, "validate: inputs", len(local)):
        try:
            looks.append(look(sample.path, sample.sample, sample.reads(settings.input)))
        except UserError as error:
            faults.append(f"{settings.samples}: sample '{sample.sample}': {error}")
    for one in looks:
        for remark in one.remarks:
            log.warning("%s: %s", one.name, remark)
    if looks and not faults:
        for remark in together(looks, settings.input.genes):
            log.warning("%s", remark)
        fewest, asked = min(len(one.gene_ids) for one in looks), settings.genes.n_top
        known = all(one.whole for one in looks) and settings.input.genes == "intersection"
        if known and isinstance(asked, int) and asked > fewest:
            faults.append(
                f"genes.n_top: {asked:,} genes asked for, and a sample has {fewest:,}; lower it, or take auto"
            )
    for fault in faults[1:]:
        log.error("%s", fault)
    if faults:
        raise UserError(faults[0] + (f" ({len(faults)} inputs have faults)" if len(faults) > 1 else ""))
    away = len(samples) - len(local)
    told = [lines(looks)] if looks else []
    if away:
        told.append(f"{away} of {len(samples)} inputs are remote, and were not fetched")
    else:
        told.append(f"A build takes {needs(sum(one.n_cells for one in looks), len(looks))}, by the defaults.")
    return "\n".join(told)


def together(looks: Sequence[Look], how: str) -> Iterator[str]:
    """What only several inputs say: organisms, and the genes that all of them have.

    Parameters
    ----------
    how : `input.genes`.

    Raises
    ------
    UserError
        As the step `genes` would: where no gene is shared, or genes are ids here and symbols there.
    """
    from scvi_core.preprocess.genes import harmonise

    organisms = {one.organism: one.name for one in reversed(looks) if one.organism != "unknown"}
    if len(organisms) > 1:
        told = ", ".join(f"{organism} ({name})" for organism, name in sorted(organisms.items()))
        yield f"samples look like different organisms: {told}; give each an atlas of its own"
    whole = [one for one in looks if one.whole]
    if len(whole) < 2:
        return
    with quiet():
        harmonise(whole, how, Decisions("genes"))
    shared = set.intersection(*(set(one.gene_ids) for one in whole))
    fewest = min(whole, key=lambda one: len(one.gene_ids))
    most = max(len(one.gene_ids) for one in whole)
    if how == "intersection" and len(shared) < 0.7 * most:
        yield (
            f"{len(shared):,} genes are in all samples, of up to {most:,} in one ({fewest.name} has fewest: "
            f"{len(fewest.gene_ids):,}); the others are left out, unless input.genes is union"
        )


def needs(n_cells: int, n_samples: int) -> str:
    """How long a build of so many cells takes, and its memory, by what was measured."""
    start, each, base = START
    minutes = start + each * n_samples + MINUTES * n_cells / 1e6
    return f"about {duration(60 * minutes)} on two cores and {base + GIGABYTES * n_cells / 1e6:.1f} GB of memory"


def lines(looks: Sequence[Look]) -> str:
    """A table for the terminal: a row a sample."""
    rows = [("sample", "format", "cells", "genes", "counts a cell", "genes a cell", "organism")]
    for one in looks:
        n_genes = f"{one.n_genes:,}{'' if one.whole else ' or more'}"
        medians = ["-" if value is None else f"{value:,.0f}" for value in (one.counts, one.genes)]
        rows.append((one.name, one.format, f"{one.n_cells:,}", n_genes, *medians, one.organism))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (False, False, True, True, True, True, False)
    return "\n".join(
        "  ".join(
            text.rjust(n) if side else text.ljust(n) for text, n, side in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines of decisions, which are for the step's own log."""
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
