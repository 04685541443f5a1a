"""The page and its companions: report.html, metrics.json, decisions.jsonl, manifest.json and figures/.

Everything is read from the files of ``results/{atlas}/`` and nothing that varies between two runs of the same build
goes in (times, host, device of the run, registry version): that is in ``model_ref.json`` and ``logs/``. So the same
build gives the same bytes. :func:`build_report` is the way in; read it first.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from scvi_core._version import __version__
from scvi_core.config import ANNOTATION, Config, load_samples
from scvi_core.files import (
    Decisions,
    UserError,
    canonical_json,
    read_decisions,
    read_json,
    read_parquet,
    replacing,
    verify,
    write_json,
)
from scvi_core.mixing import mixing
from scvi_core.preprocess.preview import limits_table
from scvi_core.report import expression, figures
from scvi_core.report.celltypes import read_celltypes
from scvi_core.report.expression import gene_labels, read_expression
from scvi_core.report.manifest import manifest, public_config, software_versions
from scvi_core.report.sentences import (
    DRAWN,
    FLAGS,
    in_words,
    kept_epoch,
    limits_in_words,
    model_card,
    snippets,
    training_decisions,
    verdicts,
)
from scvi_core.report.viewer import (
    CELL_COLUMNS,
    MISSING,
    NAMED_CELLS,
    continuous,
    drawn,
    label_table,
    levels,
    viewer_data,
)

BEFORE = ("ingest", "qc", "genes", "store")  # steps, around training
AFTER = ("embed", "annotate", "cluster", "cells", "de", "contrast", "criticism", "report")
TOLD = (  # counted, yet no loss
    "panel", "genes_measured", "mitochondrial_genes", "ribosomal_genes", "haemoglobin_genes", "genes_harmonised",
)  # fmt: skip
TABLE_MARKERS = 25  # genes a group in the page's table
FACTOR_GENES = 10  # genes a factor and direction
CONTRAST_GENES = 5  # the same of a contrast in a cell group
TABLE_CALLED = 15  # the same in the table of a contrast's genes
FOLDED = 10  # samples that a table shows before it is opened
FIGURE = re.compile(  # names that `draw` gives
    r"(qc|umap|tsne|composition|condition|volcano)_.+|qc|genes|training|markers|celltypes|criticism|gene_maps|quality|violins|"
    r"heat_map"
)


def build_report(folder: Path, config: Config) -> None:
    """Write ``decisions.jsonl``, ``metrics.json``, ``figures/*.png``, ``report.html`` and, last, ``manifest.json``.

    Parameters
    ----------
    folder : ``results/{atlas}``, with the files of all steps before this one.
    config : the configuration of the build.

    Raises
    ------
    UserError
        When a file of an earlier step is missing, or a column of ``report.labels`` is not in ``cells.parquet``.
    """
    folder = Path(folder)
    data = read_atlas(folder, config)
    own = Decisions("report")
    found = data["expression"]
    genes = {found.names[gene]: found.of(gene) for gene in found.shown}
    viewer = viewer_data(data["cells"], config.labels, own, data["flags"], genes)
    own.write(folder / "decisions" / "report.jsonl")
    decisions = data["decisions"] = collect_decisions(folder, data["names"], data["model"], config)
    with replacing(folder / "decisions.jsonl", "JSONL") as temporary:
        temporary.write_text("".join(canonical_json(d) + "\n" for d in decisions), "utf-8")
    numbers = _metrics(data, config)
    write_json(folder / "metrics.json", numbers)
    pictures = draw(folder, data, config)
    with replacing(folder / "report.html", "HTML") as temporary:
        temporary.write_text(render(data, config, numbers, viewer, pictures), encoding="utf-8")
    write_json(folder / "manifest.json", manifest(folder, config, data["names"]))


def read_atlas(folder: Path, config: Config) -> dict[str, Any]:
    """Read every file the page is made of.

    Returns
    -------
    cells, genes, de, history : data frames; model : ``model.json``; names : rows of the sheet, in its order;
    qc : a frame a sample, of which an input may have several; decisions : a list, in the order of the flow;
    n_latent : an integer;
    factors : of a linear decoder, see :func:`factors`, else empty; contrasts : see :func:`contrasts`, empty where
    none is asked for; contrast : contrast.parquet, or None; criticism : see :func:`read_criticism`;
    expression : see :class:`scvi_core.report.expression.Expression`; labels : gene id: its name on the page;
    flags : see :func:`cell_flags`; mixing : see :class:`scvi_core.mixing.Mixing`, None of a single batch;
    dropped : see :func:`dropped_by_label`; celltypes : see :mod:`scvi_core.report.celltypes`.
    """
    from scvi_core.de import weakest  # loads torch, which qc, who needs the figures alone, does without

    cells = _read(folder / "cells.parquet", "cells", ids=NAMED_CELLS)
    names = sample_names(folder, config, cells)
    for column in config.report.labels:
        if column not in cells:
            have = ", ".join(c for c in cells if c not in ("cell_id", *CELL_COLUMNS))
            raise UserError(f"config report.labels: no column '{column}' in cells.parquet; there are {have}")
    model = read_json(folder / "model/model.json", "train")
    genes = read_parquet(folder / "genes.parquet", "genes")
    de = read_parquet(folder / "de.parquet", "de").astype({"group": str, "reference": str})
    latent = read_parquet(folder / "latent.parquet", "embed")
    z = [c for c in latent if c.startswith("z_")]
    contrast = read_parquet(folder / "contrast.parquet", "contrast") if config.contrast.tests else None
    labels = gene_labels(genes)
    qc = by_sample([_read(folder / f"samples/{s}/qc.parquet", "qc") for s in names])
    several = cells["batch"].nunique() > 1
    de = weakest(de) if config.de.reference == "pairs" else de
    return {
        "cells": cells,
        "genes": genes,
        "de": de,
        "expression": read_expression(folder, names, cells, genes, de, drawn(len(cells)), config),
        "labels": labels,
        "n_latent": len(z),
        "mixing": mixing(latent[z].to_numpy(), cells["batch"], cells["cluster"], config.seed, config.threads)
        if several
        else None,
        "factors": factors(read_parquet(folder / "loadings.parquet", "loadings"), latent, labels)
        if config.model.decoder == "linear"
        else [],
        "history": read_parquet(folder / "model/history.parquet", "train"),
        "model": model,
        "names": names,
        "qc": qc,
        "flags": cell_flags(folder, names, len(cells)),
        "dropped": dropped_by_label(folder, names, config),
        "decisions": collect_decisions(folder, names, model, config),
        "contrast": contrast,
        "contrasts": [] if contrast is None else contrasts(contrast, labels),
        "criticism": read_criticism(folder) if config.criticism.enabled else None,
        "celltypes": read_celltypes(folder, cells, model, config),
    }


def by_sample(tables: list[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """QC tables of inputs as one a sample, in the order in which samples appear."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for table in tables:
        for name in table["sample"].unique():
            parts.setdefault(str(name), []).append(table[table["sample"] == name])
    return {name: found[0] if len(found) == 1 else pd.concat(found, ignore_index=True) for name, found in parts.items()}


def warnings(decisions: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What steps warned of, as the summary shows it: each once, with the samples it is about."""
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for d in decisions:
        if d.get("warning"):
            of.setdefault((d["step"], d["what"]), []).append(d)
    said = []
    for (step, what), found in of.items():
        samples = [d["sample"] for d in found if d["sample"]]
        more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
        where = f", in {', '.join(samples[:3])}{more}" if samples else ""
        topic = what[:1].upper() + what[1:].replace("_", " ")
        said.append(("look", f"{topic}{where}: {found[0]['reason']} ({step}; value {_text(found[0]['value'])})."))
    return said


def read_criticism(folder: Path) -> dict[str, Any] | None:
    """Read the predictive checks: the summary, and the tables behind it as data frames; None where none were made."""
    if not (folder / "criticism" / "checks.json").exists():
        return None
    names, folder = ("genes", "cells", "groups", "de"), folder / "criticism"
    tables = {name: read_parquet(folder / f"{name}.parquet", "criticism") for name in names}
    return read_json(folder / "checks.json", "criticism") | tables


def _read(path: Path, by: str, ids: int = 0) -> pd.DataFrame:
    """Read a table of cells: texts as categories, which take a byte or two a cell; names of cells only up to `ids`."""
    import pyarrow.parquet as pq

    verify(path, by)
    file = pq.ParquetFile(path)
    texts = [f.name for f in file.schema_arrow if str(f.type) in ("string", "large_string")]
    names = ("cell_id", "barcode") if file.metadata.num_rows > ids else ()
    columns = [name for name in file.schema_arrow.names if name not in names]
    coded = [name for name in texts if name not in ("cell_id", "barcode")]
    return pq.read_table(path, columns=columns, read_dictionary=coded).to_pandas()


def cell_flags(folder: Path, names: list[str], n_cells: int) -> pd.Series:
    """Which flags the cells of the atlas bear, as words; (cells,) categories, missing where there is none."""
    import pyarrow.parquet as pq

    ids = pd.Index(pq.read_table(folder / "cells.parquet", columns=["cell_id"])["cell_id"].to_pandas())
    flags, at = np.full(n_cells, "", dtype=object), 0
    for name in names:  # as the store has them: samples in order, and their cells
        qc = pq.read_table(folder / f"samples/{name}/qc.parquet", columns=["cell_id", "keep", "flags"]).to_pandas()
        kept = qc[qc["keep"].to_numpy() & qc["cell_id"].isin(ids[at : at + len(qc)]).to_numpy()]
        flags[at : at + len(kept)] = kept["flags"].to_numpy()
        at += len(kept)
    return pd.Series(pd.Categorical([None if flag == "" else in_words(flag) for flag in flags]))


def dropped_by_label(folder: Path, names: list[str], config: Config) -> dict[str, list[dict[str, Any]]]:
    """What QC dropped by the labels that the inputs themselves have: those of ``report.labels`` that vary in a sample.

    Returns
    -------
    column: a row a label: label, n (barcodes), dropped, reason (the most frequent, as words, "" where none is dropped).
    """
    import h5py
    from anndata.io import read_elem

    out: dict[str, list[dict[str, Any]]] = {}
    for column in config.report.labels:
        parts, varies = [], False
        for name in names:
            with h5py.File(folder / f"samples/{name}/counts.h5ad", locking=False) as file:
                if column not in file["obs"]:
                    continue
                labels = pd.Series(np.asarray(read_elem(file["obs"][column]), dtype=object))
            if continuous(labels.infer_objects()):
                break
            qc = read_parquet(folder / f"samples/{name}/qc.parquet", "qc", ["keep", "reason"])
            varies |= labels.nunique() > 1
            parts.append(pd.DataFrame({"label": labels, "keep": qc["keep"], "reason": qc["reason"]}))
        if not varies:
            continue
        table = pd.concat(parts, ignore_index=True)
        table = table[~table["reason"].str.startswith("empty")]
        levels_, codes = levels(table["label"])
        out[column] = []
        for i, label in enumerate(levels_):
            mine = table[codes == i]
            why = _tally(mine["reason"])
            reason = in_words(max(why, key=lambda flag: why[flag])) if why else ""
            out[column].append(
                {"label": label, "n": len(mine), "dropped": int((~mine["keep"]).sum()), "reason": reason}
            )
    return out


def by_condition(cells: pd.DataFrame, config: Config) -> list[str]:
    """Columns to compare samples by: those of contrasts, then others that several samples share, four at most."""
    others = (*CELL_COLUMNS, "cell_id", "barcode", "sample", "batch", "predicted_doublet", *config.labels)
    own = [c for c in cells if c not in others]
    asked = [one.column for one in config.contrast.tests]
    out = []
    for column in dict.fromkeys([*asked, *own]):
        if column not in cells or re.fullmatch(DRAWN, column) or continuous(cells[column]):
            continue
        table = cells[["sample", column]].astype(object).drop_duplicates()
        n, samples = table[column].nunique(), table["sample"].nunique()
        if len(table) == samples and table[column].notna().all() and 1 < n <= 8 and n < samples:
            out.append(column)
    return out[:4]


def sample_names(folder: Path, config: Config, cells: pd.DataFrame) -> list[str]:
    """Give the samples in the order of the sheet; where the sheet is gone, as the folder has them."""
    if Path(config.sheet).is_file():
        return [s.sample for s in load_samples(config.sheet)]
    found = sorted(p.parent.name for p in folder.glob("samples/*/qc.parquet"))
    order = [str(sample) for sample in cells["sample"].unique()]
    return [s for s in order if s in found] + [s for s in found if s not in order]


def collect_decisions(folder: Path, names: list[str], model: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """Gather the decisions of all steps in the order of the flow, samples in that of the sheet.

    Steps that `config` does not ask for may have left files of an earlier build: these are passed over.

    Those on training are told from ``model.json``, not from the ``lookup`` and ``train`` steps' own files: these say
    whether this run trained or took a registered model, which is no part of the atlas.
    """

    def read(steps: tuple[str, ...]) -> list[dict[str, Any]]:
        paths = [
            (folder / "decisions" / f"{step}{s}.jsonl", step) for step in steps for s in ("", *(f".{n}" for n in names))
        ]
        return [d for path, step in paths if path.exists() for d in read_decisions(path, step)]

    typed = config.annotate.label is not None
    asked = {"annotate": typed, "contrast": bool(config.contrast.tests), "criticism": config.criticism.enabled}
    after = tuple(step for step in AFTER if asked.get(step, True))
    return read(BEFORE) + [dataclasses.asdict(d) for d in training_decisions(model)] + read(after)


def metrics(folder: Path, config: Config) -> dict[str, Any]:
    """Compute the numbers of the run from the files in `folder`: the content of ``metrics.json``."""
    return _metrics(read_atlas(Path(folder), config), config)


def _metrics(data: dict[str, Any], config: Config) -> dict[str, Any]:
    cells, genes, de = data["cells"], data["genes"], data["de"]
    samples = {}
    for name, qc in data["qc"].items():
        empty = qc["flags"].str.startswith("empty")
        qc, kept = qc[~empty], qc[qc["keep"]]
        row: dict[str, Any] = {"droplets_empty": int(empty.sum()), "cells_before": len(qc), "cells_after": len(kept)}
        for column in ("n_counts", "n_genes", "pct_mito"):
            row[f"median_{column}_before"] = number(qc[column].median())
            row[f"median_{column}_after"] = number(kept[column].median())
        row["predicted_doublets"] = int(qc["predicted_doublet"].sum())
        row["flags"], row["reasons"] = _tally(qc["flags"]), _tally(qc["reason"])
        samples[name] = row
    clusters, rows = levels(cells["cluster"])
    sizes = np.bincount(rows, minlength=len(clusters))
    batches, codes = levels(cells["batch"])
    table = np.zeros((len(clusters), len(batches)), dtype=np.int64)
    np.add.at(table, (rows, codes), 1)
    told = {d["what"]: d["value"] for d in data["decisions"] if d["step"] == "cluster"}
    significant = de[de["is_de"] & (de["lfc_mean"] > 0)].groupby("group").size()
    return {
        "cells": {
            "before": sum(s["cells_before"] for s in samples.values()),
            "after": len(cells),
            "median_n_counts": number(cells["n_counts"].median()),
            "median_n_genes": number(cells["n_genes"].median()),
        },
        "samples": samples,
        "batches": len(batches),
        "genes": {
            "harmonised": len(genes),
            "selected": int(genes["selected"].sum()),
            "in_all_samples": int((genes["n_samples"] == len(samples)).sum()),
            "excluded": int(genes["note"].fillna("").str.startswith("excluded").sum()),
            "below_min_cells": int((genes["note"] == "below min_cells").sum()),
        },
        "model": {"epochs": None, "train_elbo": None, "validation_elbo": None}
        | {k: number(v) if isinstance(v, float) else v for k, v in data["model"].get("metrics", {}).items()},
        "clusters": {
            "n": len(clusters),
            "sizes": {name: int(n) for name, n in zip(clusters, sizes, strict=True)},
            "one_batch": [c for c, row in zip(clusters, table, strict=True) if row.max() >= 0.9 * row.sum()],
            "stability": told.get("stability", {}),
            "suggested": told.get("suggested resolution"),
            "by_column": {c: int(cells[c].nunique()) for c in cells if re.fullmatch(r"cluster(_r[\d.]+)?", c)},
        },
        "mixing": dataclasses.asdict(data["mixing"]) if data["mixing"] else None,
        "dropped": data["dropped"],
        "labels": {
            c: agreement(cells["cluster"], cells[c])
            | {"of_samples": bool((cells.groupby("sample", observed=True)[c].nunique() <= 1).all())}
            for c in config.labels
            if not continuous(cells[c])
        },
        "de": {
            "groupby": config.de.groupby,
            "upregulated": {g: int(significant.get(g, 0)) for g in levels(de["group"])[0]},
        },
        "contrasts": {one.label: _tested(data["contrasts"], one.label, cells, config) for one in config.contrast.tests},
        "criticism": {
            c["check"]: {"value": c["value"], "verdict": c["verdict"]}
            for c in (data["criticism"]["checks"] if data["criticism"] else [])
        },
    }


def number(value: Any) -> float | None:
    """Give a finite float, or None (JSON has no NaN)."""
    return float(value) if value is not None and np.isfinite(value) else None


def _tally(flags: pd.Series) -> dict[str, int]:
    each: dict[str, int] = {}
    for text, n in flags.value_counts().items():
        for flag in filter(None, text.split(",")):
            each[flag] = each.get(flag, 0) + int(n)
    return dict(sorted(each.items()))


def agreement(clusters: pd.Series, labels: pd.Series) -> dict[str, Any]:
    """Compare clusters with a label over the labelled cells: adjusted Rand index, normalised mutual information."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    names, codes = levels(labels)
    has = codes != (names.index(MISSING) if MISSING in names else -1)
    if not has.any():
        return {"levels": 0, "labelled_cells": 0, "ari": None, "nmi": None}
    pair = levels(clusters)[1][has], codes[has]
    ari, nmi = adjusted_rand_score(*pair), normalized_mutual_info_score(*pair)
    return {
        "levels": len(names) - (MISSING in names),
        "labelled_cells": int(has.sum()),
        "ari": round(float(ari), 6),
        "nmi": round(float(nmi), 6),
    }


def markers(de: pd.DataFrame, n: int) -> dict[str, pd.DataFrame]:
    """Give each group's `n` first genes by rank among those higher in the group, significant or not."""
    up = de[de["lfc_median"] > 0].sort_values(["group", "rank", "gene_id"])
    return {g: up[up["group"] == g].head(n) for g in levels(de["group"])[0]}


def factors(loadings: pd.DataFrame, latent: pd.DataFrame, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Give each factor's name, spread over cells, genes with a loading, and the strongest of these up and down."""
    rows = []
    loadings = loadings.assign(gene_name=loadings["gene_id"].map(labels))
    for name in (c for c in loadings if c.startswith("z_")):
        ordered = loadings[loadings[name] != 0].sort_values([name, "gene_id"])[["gene_name", name]]
        up, down = ordered[ordered[name] > 0][::-1], ordered[ordered[name] < 0]
        ends = {key: end.head(FACTOR_GENES).values.tolist() for key, end in (("up", up), ("down", down))}
        rows.append({"name": name, "spread": float(latent[name].std(ddof=0)), "n_genes": len(ordered), **ends})
    return rows


def contrasts(frame: pd.DataFrame, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Give a row a (contrast, cell group): replicates, genes tested, called up and down, the first of these by rank."""
    rows = []
    for (name, group), part in frame.groupby(["contrast", "cell_group"], sort=False):
        called = part[part["is_de"]].sort_values("rank")
        ends = {"up": called[called["lfc"] > 0], "down": called[called["lfc"] < 0]}
        counts = {f"n_{key}": len(end) for key, end in ends.items()}
        genes = {key: [labels[gene] for gene in end["gene_id"].head(CONTRAST_GENES)] for key, end in ends.items()}
        first = part.iloc[0][["n_replicates_group", "n_replicates_reference"]].to_dict()
        rows.append({"contrast": name, "cell_group": group, "n_genes": len(part), **first, **counts, **genes})
    return rows


def called(frame: pd.DataFrame, labels: dict[str, str]) -> list[dict[str, Any]]:
    """The first genes called in each cell group of a contrast, up and down, for the page's table."""
    table = frame[frame["is_de"]].sort_values("rank", kind="stable")
    table = table.assign(gene=table["gene_id"].map(labels), up=table["lfc"] > 0)
    first = table.groupby(["cell_group", "up"], sort=False).head(TABLE_CALLED)
    order = {group: i for i, group in enumerate(frame["cell_group"].unique())}
    return first.sort_values("cell_group", key=lambda g: g.map(order), kind="stable").to_dict("records")


def _tested(rows: list[dict[str, Any]], label: str, cells: pd.DataFrame, config: Config) -> dict[str, int]:
    """How many cell groups there are, how many of them a contrast could be tested in, and genes called."""
    mine, within = [row for row in rows if row["contrast"] == label], config.contrast.within
    called = sum(row["n_up"] + row["n_down"] for row in mine)
    return {"groups": int(cells[within].nunique()) if within else 1, "tested": len(mine), "called": called}


def draw(folder: Path, data: dict[str, Any], config: Config) -> dict[str, dict[str, str]]:
    """Draw every picture twice: light, as ``figures/{name}.png`` and for the page; dark, for the page. Give base64."""
    cells, jobs = data["cells"], {}

    def add(name: str, *job: Any) -> None:
        jobs[name] = job

    add("qc", figures.qc_overview, data["qc"], data["decisions"])
    for name, qc in data["qc"].items():
        add(f"qc_{slug(name)}", figures.qc_figure, qc, [d for d in data["decisions"] if d["step"] == "qc"])
    add("genes", figures.genes_figure, data["genes"])
    add("training", figures.training_figure, data["history"], kept_epoch(data["model"]))
    for basis in ("umap", "tsne"):
        if f"{basis}_1" in cells and cells[f"{basis}_1"].notna().any():
            for column in dict.fromkeys(["cluster", "sample", "batch", *config.labels]):
                if not continuous(cells[column]):
                    add(f"{basis}_{slug(column)}", figures.umap_figure, cells, column, basis)
    for column in ("sample", "batch"):
        add(f"composition_{column}", figures.composition_figure, cells, column)
    for column in by_condition(cells, config):
        add(f"condition_{slug(column)}", expression.conditions, cells, column)
    found = data["expression"]
    basis = next((b for b in ("umap", "tsne") if f"{b}_1" in cells and cells[f"{b}_1"].notna().any()), None)
    if basis:
        add("quality", expression.quality_maps, cells, data["flags"], basis, found.rows)
    if basis and found.shown:
        add("gene_maps", expression.gene_maps, cells, found, basis)
    groups = cells[config.de.groupby]
    if found.shown:
        add("violins", expression.violins, groups, found)
    if found.heat:
        add("heat_map", expression.heat_map, groups, found)
    for i, one in enumerate(config.contrast.tests):
        frame = data["contrast"][data["contrast"]["contrast"] == one.label]
        first = list(frame["cell_group"].unique())[: expression.PANELS]
        if first:
            add(f"volcano_{i}", expression.volcano, frame[frame["cell_group"].isin(first)], data["labels"])
    chosen = {g: list(top["gene_id"]) for g, top in markers(data["de"], config.report.n_markers).items()}
    add(
        "markers",
        figures.markers_figure,
        data["de"].assign(gene_name=data["de"]["gene_id"].map(data["labels"])),
        chosen,
    )
    if data["celltypes"]:
        reliability, calls = data["celltypes"]["quality"]["reliability"], data["celltypes"]["calls"]
        add("celltypes", figures.celltypes_figure, reliability, cells, calls["novelty"].to_numpy())
    if data["criticism"]:
        add("criticism", figures.criticism_figure, data["criticism"])
    out = {}
    for name, themes in zip(jobs, _drawn(list(jobs.values()), config.threads), strict=True):
        with replacing(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(themes["light"])
        out[name] = {theme: base64.b64encode(content).decode() for theme, content in themes.items()}
    page = folder / "report.html"
    earlier = page.read_bytes() if page.is_file() else b""
    for path in (folder / "figures").glob("*.png"):  # of a sample or label that is no more; a user's own stay
        if path.stem not in jobs and FIGURE.fullmatch(path.stem) and base64.b64encode(path.read_bytes()) in earlier:
            path.unlink()
    return out


def _drawn(jobs: list[tuple[Any, ...]], processes: int) -> Iterator[dict[str, bytes]]:
    """Draw each (function, *arguments) in both themes, by processes that are forked so that they share the tables."""

    def drawn(i: int) -> dict[str, bytes]:
        function, *arguments = jobs[i]
        return {theme: figures.png(function(*arguments, theme=theme)) for theme in ("light", "dark")}

    processes = min(processes, 4)
    if processes == 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return map(drawn, range(len(jobs)))
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(processes, fork, initializer=_Drawing.begin, initargs=(drawn,)) as pool:
            return iter(list(pool.map(_Drawing.draw, range(len(jobs)))))
    except BrokenProcessPool:
        told = "report: a process that draws was killed, most likely for want of memory; give the step more"
        raise UserError(told) from None


class _Drawing:
    """In a forked process: what draws, and an end with the process that asked for it."""

    drawn: Any = None

    @classmethod
    def begin(cls, drawn: Any) -> None:
        cls.drawn = staticmethod(drawn)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    @classmethod
    def draw(cls, i: int) -> dict[str, bytes]:
        return cls.drawn(i)


def slug(name: str) -> str:
    """Make a column's name fit for a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:60]


def render(
    data: dict[str, Any],
    config: Config,
    numbers: dict[str, Any],
    viewer: dict[str, Any] | None,
    pictures: dict[str, dict[str, str]],
) -> str:
    """Fill the template. Every name is escaped, and the page's policy lets only its own script run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("scvi_core.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    env.filters["digest"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    env.filters["count"] = lambda n: "-" if n is None else f"{n:,.0f}"
    env.filters["num"] = lambda n, digits=2: "-" if n is None or not np.isfinite(n) else f"{n:,.{digits}f}"
    env.filters["slug"] = slug
    env.filters["words"] = in_words
    cells, decisions = data["cells"], data["decisions"]
    names = cluster_names(cells)
    env.filters["named"] = lambda group, by: f"{group}: {names[group]}" if by == "cluster" and group in names else group
    top = markers(data["de"], TABLE_MARKERS)
    pairs = cells[["sample", "batch"]].drop_duplicates().astype(str)
    batch_of = pairs.groupby("sample")["batch"].unique()
    return env.get_template("report.html.j2").render(
        config=config, m=numbers, model=data["model"], n_latent=data["n_latent"], viewer=viewer, pictures=pictures,
        verdicts=[*warnings(decisions), *verdicts(numbers, data, config)], card=model_card(data, config),
        snippets=snippets(data["model"], config), criticism=data["criticism"], celltypes=data["celltypes"],
        reasons=[r for r in FLAGS if any(r in s["reasons"] for s in numbers["samples"].values())],
        table_markers=TABLE_MARKERS,
        limit_text={s: limits_in_words([d for d in decisions if d["step"] == "qc"], s) for s in data["qc"]},
        batch_of={s: ", ".join(b) for s, b in batch_of.items()},
        same_batch=len(batch_of) == numbers["batches"] and all(len(b) == 1 for b in batch_of),
        beyond=_beyond(data, config), ambient=_ambient(decisions),
        losses=[d for d in decisions if (d["n_cells"] or d["n_genes"]) and d["what"] not in TOLD],
        kept_epoch=kept_epoch(data["model"]),
        tables={c: label_table(cells, c) for c in [*numbers["labels"], *_scored(cells)]},
        stability=sorted(numbers["clusters"]["stability"].items(), key=lambda item: float(item[0])),
        factors=data["factors"], contrasts=data["contrasts"],
        tests=[(i, one, called(data["contrast"][data["contrast"]["contrast"] == one.label], data["labels"]))
               for i, one in enumerate(config.contrast.tests)],
        by_condition=by_condition(cells, config), found=data["expression"], folded=FOLDED, panels=expression.PANELS,
        labels=data["labels"], show_ids=set(data["genes"]["gene_id"]) != set(data["genes"]["gene_name"]),
        flagged=int(data["flags"].notna().sum()), table_called=TABLE_CALLED,
        found_unit=expression.UNIT, heat_cells=expression.HEAT_CELLS,
        markers=[row for frame in top.values() for row in frame.to_dict("records")],
        unmarked=[g for g, frame in top.items() if not frame["is_de"].any()],
        decisions=[{**d, "text": _text(d["value"])} for d in decisions],
        software=software_versions(), package_version=__version__,
        settings=yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True),
    )  # fmt: skip


def cluster_names(cells: pd.DataFrame) -> dict[str, str]:
    """The names that users gave to clusters: of each that has one name, which is not its number."""
    if ANNOTATION not in cells:
        return {}
    pairs = cells[["cluster", ANNOTATION]].dropna().drop_duplicates().astype(str)
    once = pairs[~pairs["cluster"].duplicated(keep=False)]
    return {cluster: name for cluster, name in once.itertuples(index=False) if name != cluster}


def _beyond(data: dict[str, Any], config: Config) -> dict[str, list[dict[str, Any]]]:
    """Each sample's limits, with what each takes, alone or with others."""
    made = [d for d in data["decisions"] if d["step"] == "qc"]
    rows = {s: limits_table(qc, made).to_dict("records") for s, qc in data["qc"].items()}
    return {s: [{**r, "drops": r["limit"].partition(".")[0] in config.qc.drop} for r in of] for s, of in rows.items()}


def _ambient(decisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a sample of raw droplets: the share of ambient RNA, None where it cannot be told, and its genes."""
    found = {key: {d["sample"]: d for d in decisions if d["step"] == "qc" and d["what"] == f"ambient_{key}"}
             for key in ("share", "genes")}  # fmt: skip
    rows = []
    for sample, made in found["share"].items():
        genes = found["genes"][sample]["value"] if sample in found["genes"] else {}
        rows.append({"sample": sample, "share": made["value"], "reason": made["reason"], "genes": genes})
    return rows


def _scored(cells: pd.DataFrame) -> list[str]:
    """The columns of cell cycle phases and of called doublets, where there are any."""
    found = [
        ("cycle_phase", lambda values: values.str.len() > 0),
        ("predicted_doublet", lambda values: values == "True"),
    ]
    return [name for name, given in found if name in cells and given(cells[name].astype(str)).any()]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:400] + " …"
