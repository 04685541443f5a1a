"""Genes on the page: which are shown, their values in the cells that are drawn, and the pictures made of these."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from scvi_core.config import Config
from scvi_core.files import UserError
from scvi_core.normalise import TARGET, log_normalised
from scvi_core.preprocess.samples import cell_blocks
from scvi_core.report.style import THEMES, colours, label, styled
from scvi_core.report.viewer import MISSING, PALETTE, levels

SHOWN_GENES = 12  # on the map and in violins
HEAT_GENES, HEAT_CELLS = 3, 40  # of each group, in the heat map
JOINED = re.compile(r"(.+?)[_|-](ENS[A-Z]*G\d{11}(?:\.\d+)?)")  # a name that still has its id behind it
NAMED_POINTS = 8  # genes of each direction that a volcano names
PANELS = 12  # cell groups of a contrast that have a volcano each
UNIT = f"log(1 + counts per {TARGET:,})"


@dataclasses.dataclass(frozen=True)
class Expression:
    """Expression of some genes in the cells that are drawn.

    Attributes
    ----------
    rows : (drawn,) positions in cells.parquet.
    names : gene id: what it is called on the page.
    values_ng : (drawn, genes of `names`) float32: log(1 + counts per 10,000 of the cell).
    shown : ids of the genes on the map and in the violins.
    heat : group: ids of its genes in the heat map.
    """

    rows: np.ndarray
    names: dict[str, str]
    values_ng: np.ndarray
    shown: list[str]
    heat: dict[str, list[str]]

    def of(self, gene: str) -> np.ndarray:
        """Values of one gene, (drawn,)."""
        return self.values_ng[:, list(self.names).index(gene)]


def gene_labels(genes: pd.DataFrame) -> dict[str, str]:
    """Gene id: its name; with the id behind it where several genes share the name, and the id where there is none.

    Of names that have an Ensembl id behind them, as some tables write names met twice, the id goes if it can.

    Parameters
    ----------
    genes : frame with ``gene_id`` and ``gene_name``, a row a gene or several.
    """
    table = genes[["gene_id", "gene_name"]].drop_duplicates("gene_id")
    ids, names = table["gene_id"].astype(str), table["gene_name"].fillna("").astype(str).str.strip()
    names = names.where(names != "", ids)
    short = names.map(lambda name: found[1] if (found := JOINED.fullmatch(name)) else name)
    names = names.where(short.duplicated(keep=False), short)
    twice = names.duplicated(keep=False) & (names != ids)
    names = names.where(~twice, names + " (" + ids + ")")
    return dict(zip(ids, names, strict=True))


def choose(de: pd.DataFrame, genes: pd.DataFrame, config: Config) -> tuple[list[str], dict[str, list[str]]]:
    """Say which genes are shown on the map, and which of each group in the heat map.

    Those that ``report.genes`` names, else the first marker of each group, of the largest groups where there are many.

    Raises
    ------
    UserError
        When ``report.genes`` names a gene that was not measured.
    """
    from scvi_core.report import markers

    first = markers(de, HEAT_GENES)
    heat: dict[str, list[str]] = {}
    taken: set[str] = set()
    for group, top in first.items():
        heat[group] = [gene for gene in top["gene_id"] if gene not in taken]
        taken |= {*heat[group]}
    if not config.report.genes:
        return list(dict.fromkeys(ids[0] for ids in heat.values() if ids))[:SHOWN_GENES], heat
    ids = {str(name): str(gene) for gene, name in genes[["gene_id", "gene_name"]].iloc[::-1].to_numpy()}
    ids |= {str(gene): str(gene) for gene in genes["gene_id"]}
    shown = []
    for asked in config.report.genes:
        if asked not in ids:
            near = [name for name in ids if name.casefold() == asked.casefold()]
            near = near or difflib.get_close_matches(asked, ids, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "name genes as genes.parquet does"
            raise UserError(f"report.genes: no gene {asked!r} in genes.parquet; {hint}")
        shown.append(ids[asked])
    return list(dict.fromkeys(shown)), heat


def read_expression(
    folder: Path, samples: list[str], cells: pd.DataFrame, genes: pd.DataFrame, de: pd.DataFrame, rows: np.ndarray,
    config: Config,
) -> Expression:  # fmt: skip
    """Read the genes that the page shows, of the cells that it draws, from the samples' counts.

    Parameters
    ----------
    rows : (drawn,) positions of the cells that are drawn, in any order.
    """
    import pyarrow.parquet as pq

    shown, heat = choose(de, genes, config)
    wanted = list(dict.fromkeys([*shown, *(gene for ids in heat.values() for gene in ids)]))
    names = gene_labels(genes)
    place_n = np.full(len(cells), -1)
    place_n[rows] = np.arange(len(rows))
    values_ng = np.zeros((len(rows), len(wanted)), np.float32)
    ids = pq.read_table(folder / "cells.parquet", columns=["cell_id"])["cell_id"].to_pandas()
    paths = [folder / "samples" / name / "counts.h5ad" for name in samples]
    totals_n = cells["n_counts"].to_numpy(float)
    for first, counts in cell_blocks(paths, pd.Index(ids), wanted):
        at = place_n[first : first + counts.shape[0]]
        drawn = np.flatnonzero(at >= 0)
        counts = counts[drawn]
        counts.data = log_normalised(counts.data, counts.indptr, totals_n[first + drawn])
        values_ng[at[drawn]] = counts.toarray()
    return Expression(rows, {gene: names[gene] for gene in wanted}, values_ng, shown, heat)


def _ramp(theme: str) -> LinearSegmentedColormap:
    """From hardly there to the page's main colour's end of viridis: zeros step back, whatever the paper."""
    steps = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.95, 8))
    steps = steps[::-1] if theme == "light" else steps
    faint = np.array([*matplotlib.colors.to_rgb("#dfe2e6" if theme == "light" else "#30363e"), 1])
    return LinearSegmentedColormap.from_list("genes", [faint, *steps])


@styled
def gene_maps(cells: pd.DataFrame, found: Expression, basis: str, theme: str = "light") -> Figure:
    """Draw the chosen genes on the UMAP or t-SNE, a panel each; cells with more of it lie on top."""
    return _maps(
        cells, basis, found.rows, {found.names[g]: found.of(g) for g in found.shown}, _ramp(theme), theme, UNIT
    )


def _maps(
    cells: pd.DataFrame, basis: str, rows: np.ndarray, panels: dict[str, np.ndarray], ramp: Any, theme: str, unit: str
) -> Figure:
    """Panels of the same map, coloured by a quantity each."""
    across = min(4, max(len(panels), 1))
    down = -(-len(panels) // across)
    fig = Figure(figsize=(10, 10 / 4 * 1.02 * down + 0.2), layout="constrained")
    axes = np.atleast_1d(fig.subplots(down, 4, squeeze=False)).ravel()
    xy = cells[[f"{basis}_1", f"{basis}_2"]].to_numpy(float)[rows]
    size = float(np.clip(5000 / max(len(rows), 1), 0.3, 7))
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, values) in zip(axes, panels.items(), strict=False):
        seen = values[np.isfinite(values)]
        top = float(np.quantile(seen, 0.995)) if len(seen) else 0.0
        top = top if top > 0 else float(seen.max(initial=0)) or 1.0
        order = np.argsort(np.where(np.isfinite(values), values, -1), kind="stable")
        drawn = ax.scatter(*xy[order].T, c=values[order], s=size, lw=0, cmap=ramp, vmin=0, vmax=top, rasterized=True)
        ax.set_title(label(name, 26))
        ax.set_aspect("equal", "datalim")
        bar = fig.colorbar(drawn, ax=ax, shrink=0.5, aspect=12, pad=0.01)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=7)
        bar.locator = matplotlib.ticker.MaxNLocator(3)
        bar.update_ticks()
    fig.supxlabel(unit, fontsize=8, color=THEMES[theme]["soft"])
    return fig


@styled
def quality_maps(
    cells: pd.DataFrame, flags: pd.Series | None, basis: str, rows: np.ndarray, theme: str = "light"
) -> Figure:
    """Draw counts, genes, mitochondrial share and doublet score on the map, and the cells that bear a flag."""
    quantities = {"n_counts": "counts, log₁₀", "n_genes": "genes, log₁₀", "pct_mito": "mitochondrial %"}
    panels = {}
    for column, title in (quantities | {"doublet_score": "doublet score"}).items():
        values = cells[column].to_numpy(float)[rows]
        if np.isfinite(values).any() and np.nanmax(values) > 0:
            panels[title] = np.log10(np.maximum(values, 1)) if "log" in title else values
    n_flags = flags is not None and bool(len(flags.cat.categories))
    down = -(-(len(panels) + n_flags) // 3)
    fig = Figure(figsize=(10, 3.1 * down), layout="constrained")
    axes = fig.subplots(down, 3, squeeze=False).ravel()
    t, ramp = THEMES[theme], _ramp(theme)
    xy = cells[[f"{basis}_1", f"{basis}_2"]].to_numpy(float)[rows]
    size = float(np.clip(6000 / max(len(rows), 1), 0.3, 8))
    for ax in axes:
        ax.set_axis_off()
        ax.set_aspect("equal", "datalim")
    for ax, (title, values) in zip(axes, panels.items(), strict=False):
        low, high = np.nanquantile(values, [0.005, 0.995])
        drawn = ax.scatter(*xy.T, c=values, s=size, lw=0, cmap=ramp, vmin=low, vmax=max(high, low + 1e-9))
        ax.set_title(title)
        bar = fig.colorbar(drawn, ax=ax, shrink=0.5, aspect=12, pad=0.01)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=7)
    if n_flags:
        ax, codes = axes[len(panels)], flags.cat.codes.to_numpy()[rows]
        ax.scatter(*xy[codes < 0].T, s=size, c=t["faint"], lw=0, alpha=0.5)
        for i, name in enumerate(flags.cat.categories):
            mine = codes == i
            ax.scatter(*xy[mine].T, s=max(size, 3), c=PALETTE[(4, 0, 2, 6, 1, 3)[i % 6]], lw=0, label=label(name, 34))
        ax.set_title("flagged and kept")
        # below its panel: beside it, it would push the colour bar of the panel above far away
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0), handletextpad=0, markerscale=2, fontsize=7.5)
    return fig


@styled
def violins(groups: pd.Series, found: Expression, theme: str = "light") -> Figure:
    """Draw violins of the chosen genes, a row each, by group; the share of cells without a count is their flat foot."""
    names, codes = levels(groups)
    codes = codes[found.rows]
    keep = [i for i, name in enumerate(names) if name != MISSING and (codes == i).sum() > 1]
    shade, genes = colours(names, theme), found.shown
    fig = Figure(figsize=(10, 0.62 * len(genes) + 0.9), layout="constrained")
    axes = fig.subplots(len(genes), 1, sharex=True, squeeze=False).ravel()
    for ax, gene in zip(axes, genes, strict=True):
        values = found.of(gene)
        for x, i in enumerate(keep):
            mine = values[codes == i]
            if np.ptp(mine) > 0:
                mine = np.quantile(mine, np.linspace(0, 1, 401)) if len(mine) > 401 else mine
                body = ax.violinplot([mine], [x], widths=0.85, showextrema=False, bw_method=0.25)["bodies"][0]
                body.set(facecolor=shade[i], alpha=0.85, edgecolor="none")
            ax.plot([x - 0.2, x + 0.2], [np.median(mine)] * 2, color=THEMES[theme]["ink"], lw=1.2)
        ax.set_ylabel(label(found.names[gene], 16), rotation=0, ha="right", va="center", color=THEMES[theme]["ink"])
        top = max(float(values.max(initial=0)), 0.1)
        ax.set(ylim=(-0.06 * top, top * 1.02), xlim=(-0.6, len(keep) - 0.4), yticks=[0, round(top, 1)])
        ax.tick_params(length=0, labelsize=7)
        ax.spines["left"].set_visible(False)
    axes[-1].set_xticks(range(len(keep)), [label(names[i], 18) for i in keep], rotation=90 if len(keep) > 12 else 0)
    fig.supxlabel(UNIT, fontsize=8, color=THEMES[theme]["soft"])
    return fig


@styled
def heat_map(groups: pd.Series, found: Expression, theme: str = "light") -> Figure:
    """Draw the first markers of each group in some of its cells, a column a cell, scaled to the gene's highest."""
    names, codes = levels(groups)
    codes = codes[found.rows]
    names = [name for name in names if name != MISSING]
    picked = [np.flatnonzero(codes == i)[:HEAT_CELLS] for i in range(len(names))]  # rows are in random order
    genes = [gene for name in names for gene in found.heat.get(name, [])]
    table = np.stack([found.of(gene)[np.concatenate(picked)] for gene in genes]) if genes else np.zeros((0, 1))
    top = np.quantile(table, 0.99, axis=1, keepdims=True) if genes else 1
    fig = Figure(figsize=(10, 0.155 * len(genes) + 1.1), layout="constrained")
    ax = fig.subplots()
    shown = ax.imshow(
        table / np.where(top > 0, top, 1), aspect="auto", cmap=_ramp(theme), vmin=0, vmax=1, interpolation="nearest"
    )
    ax.set_yticks(range(len(genes)), [label(found.names[g], 18) for g in genes], fontsize=7)
    edges = np.cumsum([0, *map(len, picked)])
    middles = (edges[:-1] + edges[1:]) / 2 - 0.5
    ax.set_xticks(middles, [label(n, 16) for n in names], rotation=90 if len(names) > 12 else 0)
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color=THEMES[theme]["paper"], lw=1.2)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(shown, ax=ax, shrink=min(1, 1.6 / fig.get_figheight()), aspect=14, pad=0.01, anchor=(0, 1))
    bar.set_label("÷ gene's highest", fontsize=7.5)
    bar.outline.set_visible(False)
    return fig


@styled
def volcano(frame: pd.DataFrame, names: dict[str, str], theme: str = "light") -> Figure:
    """Draw fold changes against p-values of one contrast, a panel a cell group; called genes in colour, first named.

    Parameters
    ----------
    frame : rows of ``contrast.parquet`` of one contrast, of ``PANELS`` cell groups at most.
    names : gene id: what it is called.
    """
    parts = list(frame.groupby("cell_group", sort=False))
    down, across = -(-len(parts) // 3), 3 if len(parts) > 1 else 1
    fig = Figure(figsize=(10 if across == 3 else 6, 3.3 * down), layout="constrained")
    t = THEMES[theme]
    axes = fig.subplots(down, across, squeeze=False).ravel()
    for ax, (group, part) in zip(axes, parts, strict=False):
        p = part["p_value"].to_numpy(float)
        least = p[p > 0].min(initial=1.0)
        x, y = part["lfc"].to_numpy(float), -np.log10(np.maximum(p, least))
        ok, called = np.isfinite(y) & np.isfinite(x), part["is_de"].to_numpy(bool)
        for mask, colour in ((~called, t["faint"]), (called & (x > 0), PALETTE[4]), (called & (x < 0), PALETTE[0])):
            ax.scatter(x[ok & mask], y[ok & mask], s=7, c=colour, lw=0, alpha=0.7)
        wide, high = float(np.abs(x[ok]).max(initial=1.0)) * 1.25, max(float(y[ok].max(initial=1.0)) * 1.08, 1)
        ax.set(xlim=(-wide, wide), ylim=(0, high))
        for side in (x > 0, x < 0):
            named: list[int] = []
            for i in np.argsort(part["rank"].to_numpy(float), kind="stable"):
                near = any(abs(x[i] - x[j]) < 0.4 * wide and abs(y[i] - y[j]) < 0.05 * high for j in named)
                if not (ok & called & side)[i] or near or len(named) == NAMED_POINTS:
                    continue
                text = label(names.get(str(part["gene_id"].iloc[i]), part["gene_id"].iloc[i]), 16)
                ax.annotate(text, (x[i], y[i]), xytext=(3, 1), textcoords="offset points", fontsize=6.5)
                named.append(i)
        ax.axvline(0, color=t["line"], lw=0.8)
        ax.set_title(f"{label(group, 24)}: {int((called & (x > 0)).sum())} up, {int((called & (x < 0)).sum())} down")
    for ax in axes[len(parts) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(parts) - across) : len(parts)]:
        ax.set_xlabel("log₂ fold change")
    for ax in axes[: len(parts) : across]:
        ax.set_ylabel("-log₁₀ p-value")
    return fig


@styled
def conditions(cells: pd.DataFrame, column: str, theme: str = "light") -> Figure:
    """Draw the share of each sample's cells that is in each cluster: a dot a sample, a bar the mean of a condition."""
    clusters, rows = levels(cells["cluster"])
    samples, codes = levels(cells["sample"])
    names, of = levels(cells[column])
    table = np.zeros((len(samples), len(clusters)))
    np.add.at(table, (codes, rows), 1)
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    condition = np.zeros(len(samples), int)
    condition[codes] = of  # each sample has one
    shade, t = colours(names, theme), THEMES[theme]
    width = 0.8 / len(names)
    fig = Figure(figsize=(10, 3.2), layout="constrained")
    ax = fig.subplots()
    for j, name in enumerate(names):
        mine = share[condition == j]
        x = np.arange(len(clusters)) + (j - (len(names) - 1) / 2) * width
        ax.bar(x, mine.mean(axis=0), width=width * 0.92, color=shade[j], alpha=0.55, label=label(name, 24))
        jitter = np.linspace(-0.25, 0.25, len(mine)) * width if len(mine) > 1 else np.zeros(1)
        for row, shift in zip(mine, jitter, strict=True):
            ax.scatter(x + shift, row, s=9, c=t["ink"], lw=0, zorder=3)
    ax.set_xticks(range(len(clusters)), [label(c, 16) for c in clusters], rotation=90 if len(clusters) > 14 else 0)
    ax.set(ylabel="% of a sample's cells", xlim=(-0.6, len(clusters) - 0.4), xlabel="cluster")
    ax.tick_params(axis="x", length=0)
    fig.legend(loc="outside upper left", ncols=min(6, len(names)))
    return fig
