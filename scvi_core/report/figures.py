"""Pictures: each a plain function from data frames to a matplotlib Figure; :func:`png` makes bytes of it.

No pyplot and no global state: a Figure is made and drawn inside one style, so that the same data give the same
bytes wherever matplotlib and its own font (DejaVu Sans) are the same. Names come from strangers' files: they are
never read as mathematics, and are cut where they are long (:func:`label`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from scvi_core.files import decided
from scvi_core.report.style import THEMES, colours, label, png, scale_axis, short, styled
from scvi_core.report.viewer import PALETTE, levels

__all__ = [
    "composition_figure", "criticism_figure", "genes_figure", "markers_figure", "png", "qc_figure", "qc_overview",
    "thresholds", "training_figure", "umap_figure",
]  # fmt: skip
METRICS = {  # column of qc.parquet: (title, logarithmic)
    "n_counts": ("counts", True),
    "n_genes": ("genes", True),
    "pct_mito": ("mitochondrial %", False),
    "pct_top50": ("top-50 genes %", False),
    "doublet_score": ("doublet score", False),
}
SHOWN = 20_000  # barcodes drawn as points; more are thinned at random, with a fixed seed
SHOWN_ON_MAP = 200_000  # cells on a UMAP or t-SNE


def thresholds(decisions: Iterable[Any], sample: str | None = None) -> dict[str, list[float]]:
    """Read QC's limits from its decisions, such as ``high_mito.mad``: for each metric, the limits in force.

    Takes Decision objects or the mappings that ``read_decisions`` gives. Those of other samples are left out.
    """
    metric = {"counts": "n_counts", "genes": "n_genes", "doublet": "doublet_score"}
    found: dict[str, list[float]] = {}
    for d in decisions:
        what, value, of = (decided(d, key) for key in ("what", "value", "sample"))
        match = re.fullmatch(r"(?:low_|high_)?(counts|genes|mito|hb|top50|doublet)\.\w+", str(what))
        if not match or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if sample is None or of in (None, sample):
            found.setdefault(metric.get(match[1], f"pct_{match[1]}"), []).append(float(value))
    return found


def _violins(ax: Axes, groups: list[np.ndarray], logarithmic: bool, theme: str) -> None:
    """Draw horizontal violins with the median, the first group on top; on a log scale the density is that of log10."""
    for i, values in enumerate(groups):
        values = values[np.isfinite(values)]
        values = np.log10(np.maximum(values, 1)) if logarithmic else values
        if not len(values):
            ax.text(0.02, i, "not scored", va="center", color=THEMES[theme]["soft"], transform=ax.get_yaxis_transform())
            continue
        if np.ptp(values) > 0:
            # 2,001 quantiles have the density of all values, if smoothed as much as all values would be (Scott's rule)
            thin = np.quantile(values, np.linspace(0, 1, 2001)) if len(values) > 2001 else values
            drawn = ax.violinplot(
                [thin], [i], orientation="horizontal", widths=0.86, showextrema=False, bw_method=len(values) ** -0.2
            )
            body = drawn["bodies"][0]
            body.set(facecolor=THEMES[theme]["main"], alpha=0.55, edgecolor="none")
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        ax.plot([low, high], [i, i], color=THEMES[theme]["ink"], lw=2.2, solid_capstyle="round")
        ax.plot([middle], [i], "o", ms=4.2, mfc=THEMES[theme]["paper"], mec=THEMES[theme]["ink"], mew=1)
    if ax.dataLim.xmax <= 0 and not logarithmic:  # all zero: no share to speak of
        ax.set_xlim(-0.05, 1)
    scale_axis(ax.xaxis)
    if logarithmic:  # the axis is linear in log10: ticks at 1, 2, 5 or at powers of ten
        low, high = ax.get_xlim()
        steps = (0.0,) if high - low > 2.2 else (0.0, np.log10(5)) if high - low > 1.2 else tuple(np.log10([1, 2, 5]))
        ticks = [e + s for e in range(int(low) - 1, int(high) + 1) for s in steps if low <= e + s <= high]
        ax.set_xticks(ticks, [short(float(f"{10**t:.1g}")) for t in ticks])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


@styled
def qc_overview(qc: Mapping[str, pd.DataFrame], decisions: Iterable[Any], theme: str = "light") -> Figure:
    """Draw violins of all barcodes before QC, a row a sample, with each sample's limits as dashes."""
    decisions, names = list(decisions), list(qc)
    fig = Figure(figsize=(10, 1.1 + 0.42 * len(names)), layout="constrained")
    for ax, (metric, (title, log)) in zip(fig.subplots(1, 5, sharey=True), METRICS.items(), strict=True):
        _violins(ax, [_droplets(qc[s])[1][metric].to_numpy(float) for s in names], log, theme)
        ax.set_title(title)
        for i, sample in enumerate(names):
            for limit in thresholds(decisions, sample).get(metric, []):
                at = np.log10(max(limit, 1)) if log else limit
                low, high = ax.get_xlim()
                if low <= at <= high:
                    ax.plot([at, at], [i - 0.4, i + 0.4], color=PALETTE[4], lw=1.6)
                    ax.set_xlim(low, high)
    fig.axes[0].set_yticks(range(len(names)), [label(s, 24) for s in names])
    return fig


@styled
def qc_figure(qc: pd.DataFrame, decisions: Iterable[Any] = (), theme: str = "light") -> Figure:
    """Draw one sample's QC: violins, scatters of kept and dropped cells, the barcode-rank curve, flags; limits dashed.

    Time and size are those of ``SHOWN`` barcodes at most; all are counted.

    Parameters
    ----------
    qc : rows of ``samples/{sample}/qc.parquet``.
    decisions : the ``qc`` step's decisions, which hold the limits.
    """
    t, sample = THEMES[theme], str(qc["sample"].iloc[0]) if len(qc) else None
    barcodes, qc = _droplets(qc)
    limits, keep = thresholds(decisions, sample), qc["keep"].to_numpy(bool)
    fig = Figure(figsize=(10, 5.2), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 2.3])
    for part in (fig, top, bottom):
        part.patch.set_visible(part is fig)
    for ax, (metric, (title, log)) in zip(top.subplots(1, 5), METRICS.items(), strict=True):
        _violins(ax, [qc[metric].to_numpy(float)], log, theme)
        ax.set(title=title, yticks=[])
        ax.spines["left"].set_visible(False)
        low, high = ax.get_xlim()
        for limit in limits.get(metric, []):
            at = np.log10(max(limit, 1)) if log else limit
            if low <= at <= high:
                ax.axvline(at, color=PALETTE[4], lw=1.2, ls=(0, (4, 2)))
        ax.set_xlim(low, high)
    axes = bottom.subplots(1, 4, width_ratios=[1, 1, 1, 0.8])
    _knee(axes[2], barcodes, len(qc), theme)
    some = qc.iloc[np.sort(np.random.default_rng(0).permutation(len(qc))[:SHOWN])]
    shown, left = some["keep"].to_numpy(bool), f" ({SHOWN:,} barcodes at random)" if len(qc) > SHOWN else ""
    for ax, metric, log in ((axes[0], "n_genes", True), (axes[1], "pct_mito", False)):
        for mask, colour, layer in ((shown, t["main"], 2), (~shown, PALETTE[4], 3)):
            x = np.maximum(some["n_counts"].to_numpy(float)[mask], 1)
            y = some[metric].to_numpy(float)[mask]
            ax.scatter(x, np.maximum(y, 1) if log else y, s=5, c=colour, alpha=0.45, lw=0, zorder=layer)
        scale_axis(ax.xaxis, True)
        scale_axis(ax.yaxis, log)
        ax.set(xlabel=f"counts{left}", ylabel=METRICS[metric][0])
        if not log and not (qc[metric] > 0).any():
            ax.set_ylim(-0.05, 1)
        box = ax.get_xlim(), ax.get_ylim()
        for draw, name in ((ax.axvline, "n_counts"), (ax.axhline, metric)):
            for limit in limits.get(name, []):
                if limit > 0 or not log:
                    draw(limit, color=t["soft"], lw=0.9, ls=(0, (4, 2)))
        ax.set(xlim=box[0], ylim=box[1])
    dots = [Line2D([], [], marker="o", ls="", ms=5, mew=0, color=c) for c in (t["main"], PALETTE[4])]
    bottom.legend(
        dots, [f"kept {keep.sum():,}", f"dropped {(~keep).sum():,}"], loc="outside upper left", ncols=2, handletextpad=0
    )
    texts = qc["flags"].value_counts()
    pairs = [(flag, n) for text, n in texts.items() for flag in text.split(",") if flag]
    counts = pd.DataFrame(pairs, columns=["flag", "n"]).groupby("flag")["n"].sum().sort_index(ascending=False)
    axes[3].barh(range(len(counts)), counts.to_numpy(), color=PALETTE[4], height=0.6, alpha=0.85)
    axes[3].set_ylim(len(counts) - max(len(counts), 6) - 0.6, len(counts) - 0.4)
    for i, n in enumerate(counts):
        axes[3].text(n, i, f" {n:,}", va="center", color=t["soft"])
    axes[3].set_yticks(range(len(counts)), [label(flag) for flag in counts.index])
    axes[3].set_title("flags" if len(counts) else "no barcode was flagged")
    axes[3].set(xticks=[], xlim=(0, max([*counts, 1]) * 1.25))
    axes[3].spines[["left", "bottom"]].set_visible(False)
    axes[3].tick_params(length=0)
    return fig


def _droplets(qc: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All barcodes, and those that are no empty droplets."""
    return qc, qc[~qc["flags"].str.startswith("empty").to_numpy(bool)]


def _knee(ax: Axes, barcodes: pd.DataFrame, n_cells: int, theme: str) -> None:
    """Draw counts over rank: the barcodes taken for cells, and the empty droplets where these are told apart."""
    t, empty = THEMES[theme], barcodes["flags"].str.startswith("empty").to_numpy(bool)
    total = barcodes["n_counts"].to_numpy(float)
    order = np.argsort(-total, kind="stable")
    order = order[total[order] > 0]
    # as many points on each stretch of the logarithmic axis
    at = (
        np.unique(np.round(np.geomspace(1, max(len(order), 1), 2000)).astype(int)) - 1
        if len(order)
        else np.zeros(0, int)
    )
    for mask, colour, layer in ((empty, t["faint"], 2), (~empty, t["main"], 3)):
        y = np.where(mask[order], total[order], np.nan)
        ax.scatter(np.asarray(at) + 1, y[at], s=5, c=colour, lw=0, zorder=layer)
    scale_axis(ax.xaxis, len(order) > 0)
    scale_axis(ax.yaxis, len(order) > 0)
    ax.set(xlabel="barcodes by rank", ylabel="counts")
    text = f"{n_cells:,} cells, {empty.sum():,} empty" if empty.any() else f"{n_cells:,} barcodes, all taken for cells"
    ax.set_title(text, fontsize="small")


@styled
def genes_figure(genes: pd.DataFrame, theme: str = "light") -> Figure:
    """Draw mean against variance, and against the standardised variance that ranks genes; the selected in colour."""
    fig = Figure(figsize=(10, 3.7), layout="constrained")
    chosen, seen = genes["selected"].to_numpy(bool), genes["mean"].to_numpy(float) > 0
    names = (("variance", "variance"), ("variances_norm", "standardised variance"))
    for ax, (column, title) in zip(fig.subplots(1, 2), names, strict=True):
        y = genes[column].to_numpy(float)
        for mask, colour, alpha in ((~chosen, THEMES[theme]["faint"], 0.5), (chosen, THEMES[theme]["main"], 0.7)):
            mask = mask & seen & (y > 0)
            ax.scatter(genes["mean"].to_numpy(float)[mask], y[mask], s=5, c=colour, alpha=alpha, lw=0)
        scale_axis(ax.xaxis, True)
        scale_axis(ax.yaxis, True)
        ax.set(xlabel="mean counts a cell", ylabel=title)
    dots = [
        Line2D([], [], marker="o", ls="", ms=5, mew=0, color=c) for c in (THEMES[theme]["main"], THEMES[theme]["faint"])
    ]
    texts = [f"selected {chosen.sum():,}", f"not selected {(~chosen).sum():,}"]
    fig.axes[0].legend(dots, texts, loc="upper left", handletextpad=0)
    return fig


@styled
def training_figure(history: pd.DataFrame, best_epoch: int | None = None, theme: str = "light") -> Figure:
    """Draw the evidence lower bound on training and validation cells, an epoch a point, and the KL weight below."""
    fig = Figure(figsize=(10, 4), layout="constrained")
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    epoch, curves = history["epoch"].to_numpy(float), []
    for column, text, colour in (
        ("train_elbo", "training", THEMES[theme]["main"]),
        ("validation_elbo", "validation", PALETTE[4]),
    ):
        y = history[column].to_numpy(float) if column in history else np.full(len(history), np.nan)
        if np.isfinite(y).any():
            top.plot(epoch, y, color=colour, lw=1.6, label=text, marker="o" if len(y) < 3 else None)
            curves.append(y[np.isfinite(y)])
    tails = [y[min(len(y) // 20, 10) :] for y in curves]  # the first steps are so far off that they hide the rest
    if tails and len(epoch) > 20:
        low, high = min(y.min() for y in tails), max(y.max() for y in tails)
        top.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low) + 1e-9)
    for ax in (top, bottom):
        if best_epoch is not None:
            ax.axvline(best_epoch, color=THEMES[theme]["soft"], lw=0.9, ls=(0, (4, 2)))
        scale_axis(ax.yaxis)
    if best_epoch is not None:
        top.plot(
            [], [], color=THEMES[theme]["soft"], lw=0.9, ls=(0, (4, 2)), label=f"weights kept (epoch {best_epoch})"
        )
    if curves or best_epoch is not None:
        fig.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    top.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.5g}"))
    top.set_ylabel("ELBO, nats a cell")
    bottom.plot(epoch, history["kl_weight"].to_numpy(float), color=PALETTE[2], lw=1.6)
    bottom.set(xlabel="epoch", ylabel="KL weight", ylim=(-0.05, max(1.0, history["kl_weight"].max()) * 1.1))
    bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return fig


@styled
def criticism_figure(criticism: Mapping[str, Any], theme: str = "light") -> Figure:
    """Draw what the model predicts against what was measured, a point a gene or a cell; the missed in colour.

    Parameters
    ----------
    criticism : data frames ``genes``, ``cells`` and ``de`` of the folder ``criticism/``.
    """
    genes, cells, de = (criticism[name] for name in ("genes", "cells", "de"))
    genes = genes[genes["judged"]]
    fig = Figure(figsize=(10, 6.9), layout="constrained")
    axes = fig.subplots(2, 3)
    _against(axes[0, 0], genes, "zero_fraction", "zeros, share of cells, by gene", False, theme)
    ax, t = axes[0, 1], THEMES[theme]
    for kind, colour, size in (("observed", t["faint"], 10), ("predicted", t["main"], 3)):
        xy = genes[[f"mean_{kind}", f"variance_{kind}"]].to_numpy(float)
        xy = xy[(xy > 0).all(1)]
        ax.scatter(*xy.T, s=size, c=colour, alpha=0.7, lw=0)
    for axis in (ax.xaxis, ax.yaxis):
        scale_axis(axis, True)
    box = ax.get_xlim(), ax.get_ylim()
    ax.plot(box[0], box[0], color=t["soft"], lw=0.9, ls=(0, (4, 2)))
    ax.set(xlim=box[0], ylim=box[1], xlabel="mean", ylabel="variance", title="mean and variance by gene")
    dots = [Line2D([], [], marker="o", ls="", ms=5, mew=0, color=c) for c in (t["faint"], t["main"])]
    dots.append(Line2D([], [], color=t["soft"], lw=0.9, ls=(0, (4, 2))))
    ax.legend(dots, ["measured", "predicted", "variance = mean"], loc="upper left", handletextpad=0.4)
    _against(axes[0, 2], genes, "cv", "coefficient of variation by gene", True, theme)
    _against(axes[1, 0], cells, "total", "total counts by cell", True, theme)
    _against(axes[1, 1], cells, "cv", "coefficient of variation by cell", True, theme)
    pairs = pd.DataFrame({"x_observed": de["lfc_observed"], "x_predicted": de["lfc_predicted"], "x_missed": False})
    _against(axes[1, 2], pairs, "x", "log\u2082 fold change, group and gene", False, theme)
    dots = [Line2D([], [], marker="o", ls="", ms=5, mew=0, color=c) for c in (t["main"], PALETTE[4])]
    fig.legend(dots, ["as the model predicts", "missed"], loc="outside upper left", ncols=2, handletextpad=0)
    return fig


def _against(ax: Axes, table: pd.DataFrame, name: str, title: str, logarithmic: bool, theme: str) -> None:
    """Scatter predicted over observed, with the diagonal on which they are equal."""
    t, missed = THEMES[theme], table[f"{name}_missed"].to_numpy(bool)
    xy = table[[f"{name}_observed", f"{name}_predicted"]].to_numpy(float)
    shown = np.isfinite(xy).all(1) & ((xy > 0).all(1) | (not logarithmic))
    for mask, colour in ((shown & ~missed, t["main"]), (shown & missed, PALETTE[4])):
        ax.scatter(*xy[mask].T, s=5, c=colour, alpha=float(np.clip(2000 / max(shown.sum(), 1), 0.1, 0.6)), lw=0)
    for axis in (ax.xaxis, ax.yaxis):
        scale_axis(axis, logarithmic)
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color=t["soft"], lw=0.9)
    ax.set(xlim=(low, high), ylim=(low, high), xlabel="measured", ylabel="predicted", title=title)
    ax.set_aspect("equal", "box")


@styled
def umap_figure(cells: pd.DataFrame, column: str, basis: str = "umap", theme: str = "light") -> Figure:
    """Draw cells on ``{basis}_1``, ``{basis}_2`` coloured by a column; cluster names are written on the clusters.

    Up to 36 categories have a line in the legend; colours repeat beyond, and the title says how many there are.
    """
    names, codes = levels(cells[column])
    xy = cells[[f"{basis}_1", f"{basis}_2"]].to_numpy(float)
    colour, shown = np.array(colours(names, theme)), min(len(names), len(PALETTE))
    # in random order, so that no category lies on top of all others
    order = np.random.default_rng(0).permutation(len(cells))[:SHOWN_ON_MAP]
    columns = -(-shown // 18)
    fig = Figure(figsize=(3.7 + 1.5 * columns, 3.8), layout="constrained")
    ax = fig.subplots()
    size = float(np.clip(9000 / max(len(order), 1), 0.4, 10))
    ax.scatter(*xy[order].T, s=size, c=colour[codes[order]], lw=0, alpha=0.85)
    if column.startswith("cluster"):
        for i, name in enumerate(names):
            x, y = np.median(xy[codes == i], axis=0)
            box = {"boxstyle": "round,pad=.18", "fc": THEMES[theme]["paper"], "ec": "none", "alpha": 0.75}
            ax.text(x, y, label(name, 12), ha="center", va="center", weight="bold", fontsize=8, bbox=box)
    more = f", the first {shown} of {len(names)}" if shown < len(names) else ""
    ax.set_title(label(column, 40) + more)
    ax.set(xticks=[], yticks=[])
    title = {"umap": "UMAP", "tsne": "t-SNE"}.get(basis, basis)
    some = f" ({SHOWN_ON_MAP:,} cells at random)" if len(cells) > SHOWN_ON_MAP else ""
    ax.set_xlabel(f"{title} 1{some}", loc="left")
    ax.set_ylabel(f"{title} 2", loc="bottom")
    ax.set_aspect("equal", "box")
    ax.spines[:].set_visible(False)
    dots = [Line2D([], [], marker="o", ls="", ms=6, mew=0, color=c) for c in colour[:shown]]
    texts = [label(n, 22) for n in names[:shown]]
    fig.legend(dots, texts, loc="outside right center", ncols=columns, handletextpad=0, columnspacing=0.8, fontsize=7.5)
    return fig


@styled
def celltypes_figure(
    reliability: list[list[float]], cells: pd.DataFrame, novelty_n: np.ndarray, theme: str = "light"
) -> Figure:
    """Draw the share of right labels over the probability, a point a bin of held-out cells; and novelty on the UMAP."""
    t, (p_b, share_b, _) = THEMES[theme], np.array(reliability).T
    fig = Figure(figsize=(8.6, 3.8), layout="constrained")
    ax, umap = fig.subplots(1, 2, width_ratios=(1, 1.15))
    ax.plot([0, 1], [0, 1], color=t["soft"], lw=0.9, ls=(0, (4, 2)))
    ax.plot(p_b, share_b, color=t["main"], lw=1, marker="o", ms=4, mew=0)
    least = max(0.0, min(p_b.min(), share_b.min()) - 0.05)
    ax.set(xlim=(least, 1.01), ylim=(least, 1.01), xlabel="probability", ylabel="share right", title="held-out cells")
    ax.set_aspect("equal", "box")
    xy = cells[["umap_1", "umap_2"]].to_numpy(float)
    order = np.random.default_rng(0).permutation(len(cells))[:SHOWN_ON_MAP]
    order = order[np.argsort(novelty_n[order], kind="stable")]  # the novel on top
    size = float(np.clip(9000 / max(len(order), 1), 0.4, 10))
    points = umap.scatter(*xy[order].T, s=size, c=novelty_n[order], vmin=0, vmax=1, cmap="viridis", lw=0)
    umap.set(xticks=[], yticks=[], title="novelty")
    umap.set_xlabel("UMAP 1", loc="left")
    umap.set_ylabel("UMAP 2", loc="bottom")
    umap.set_aspect("equal", "box")
    umap.spines[:].set_visible(False)
    fig.colorbar(points, ax=umap, shrink=0.7)
    return fig


@styled
def composition_figure(cells: pd.DataFrame, column: str, theme: str = "light") -> Figure:
    """Draw each cluster's cells by sample or batch, as shares of the cluster; cell counts at the right."""
    clusters, rows = levels(cells["cluster"])
    names, codes = levels(cells[column])
    table = np.zeros((len(clusters), len(names)))
    np.add.at(table, (rows, codes), 1)
    total, shade, shown = table.sum(axis=1), colours(names, theme), min(len(names), len(PALETTE))
    fig = Figure(figsize=(10, 1 + 0.24 * len(clusters) + 0.2 * -(-shown // 5)), layout="constrained")
    ax, left = fig.subplots(), np.zeros(len(clusters))
    for j in range(len(names)):
        share = table[:, j] / total
        ax.barh(range(len(clusters)), share, left=left, color=shade[j], height=0.78, ec=THEMES[theme]["paper"], lw=0.5)
        left += share
    for i, n in enumerate(total):
        ax.text(1.01, i, f"{int(n):,}", va="center", color=THEMES[theme]["soft"], fontsize=8)
    ax.set_yticks(range(len(clusters)), [label(c, 16) for c in clusters])
    ax.set(ylim=(len(clusters) - 0.4, -0.6), xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], ylabel="cluster")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    dots = [Line2D([], [], marker="s", ls="", ms=7, mew=0, color=c) for c in shade[:shown]]
    texts = [label(n, 24) for n in names[:shown]]
    fig.legend(dots, texts, loc="outside upper left", ncols=min(5, shown), handletextpad=0.2)
    return fig


@styled
def markers_figure(de: pd.DataFrame, markers: Mapping[str, list[str]], theme: str = "light") -> Figure:
    """Draw a dot plot: area = share of the group's cells with a count, colour = expression over the gene's highest.

    Parameters
    ----------
    de : ``de.parquet``.
    markers : for each group, the gene ids to show. Long lists are broken into several rows of panels.
    """
    groups, _ = levels(de["group"])
    shade = matplotlib.colormaps["viridis_r" if theme == "light" else "viridis"]
    scale = de.pivot(index="gene_id", columns="group", values="scale_group")[groups]
    share = de.pivot(index="gene_id", columns="group", values="nonzero_group")[groups]
    title = de.drop_duplicates("gene_id").set_index("gene_id")["gene_name"]
    relative = scale.div(scale.max(axis=1).replace(0, np.nan), axis=0)
    seen: dict[str, str] = {}
    for group in groups:
        for gene in markers.get(group, []):
            seen.setdefault(gene, group)
    genes, width = list(seen), 42
    blocks = [genes[i : i + width] for i in range(0, len(genes), width)] or [[]]
    tall = 0.2 * len(groups) + 0.85
    fig = Figure(figsize=(10, tall * len(blocks) + 0.5), layout="constrained")
    last = None
    for ax, block in zip(np.atleast_1d(fig.subplots(len(blocks), 1)), blocks, strict=True):
        y, x = np.divmod(np.arange(len(groups) * len(block)), max(len(block), 1))
        area = share.loc[block].to_numpy(float).T.ravel()
        tint = relative.loc[block].to_numpy(float).T.ravel()
        ok = np.isfinite(area) & np.isfinite(tint)
        last = ax.scatter(x[ok], y[ok], s=70 * area[ok], c=tint[ok], cmap=shade, vmin=0, vmax=1, lw=0)
        ax.set_xticks(range(len(block)), [label(title.get(g) or g, 16) for g in block], rotation=90)
        ax.set_yticks(range(len(groups)), [label(g, 18) for g in groups])
        edges = [i for i in range(1, len(block)) if seen[block[i]] != seen[block[i - 1]]]
        for edge in edges:
            ax.axvline(edge - 0.5, color=THEMES[theme]["line"], lw=0.6)
        ax.set(xlim=(-0.7, min(width, max(len(genes), 12)) - 0.3), ylim=(len(groups) - 0.4, -0.6))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    dots = [
        Line2D([], [], marker="o", ls="", ms=np.sqrt(70 * p), mew=0, color=THEMES[theme]["soft"])
        for p in (0.25, 0.5, 1)
    ]
    fig.legend(dots, ["25% of cells", "50%", "100%"], loc="outside upper left", ncols=3, handletextpad=0.4)
    bar = fig.colorbar(last, ax=fig.axes, shrink=min(1, 1.8 / (tall * len(blocks))), aspect=14, pad=0.01, anchor=(0, 1))
    bar.set_label("÷ gene's highest", fontsize=7.5)
    bar.outline.set_visible(False)
    return fig
