"""The page in words: what came out, what the model is, how to load it."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from scvi_core.config import ANNOTATION, Config, TrainConfig
from scvi_core.design import remarks
from scvi_core.files import Decisions
from scvi_core.report.viewer import CELL_COLUMNS
from scvi_core.tables import natural

AGREES, FOLLOWS = 0.5, 0.2  # adjusted Rand index: all is well from there with cell types, up to there with samples
FALL = 0.01  # of the best held-out ELBO: in fits that are as they should be it ends within half of that
MIXED, APART = 0.75, 0.5  # mixing: all is well from there; up to there batches lie apart
LOST, ENOUGH = 0.3, 20  # share of a label's barcodes that QC dropped, to be looked at; barcodes that can tell it
DRAWN = r"(umap|tsne)_\d|cluster(_r[\d.]+)?|cycle_phase"  # columns that are made of the cells
FLAGS = {  # of qc: as words, and as what follows "because"
    "empty": ("empty droplet", "it is a droplet without a cell"),
    "low_counts": ("few counts", "it has too few counts"),
    "high_counts": ("many counts", "it has too many counts"),
    "low_genes": ("few genes", "it has too few genes"),
    "high_genes": ("many genes", "it has too many genes"),
    "high_mito": ("high mitochondrial share", "too many of its counts are mitochondrial"),
    "high_hb": ("high haemoglobin share", "too many of its counts are haemoglobin"),
    "high_top50": ("50 genes hold most counts", "50 genes hold most of its counts"),
    "doublet": ("doublet", "it looks like two cells"),
}
UNITS = {  # of a limit's metric: what it is called, and how its numbers are written
    "counts": ("counts", "{:,.0f}"),
    "genes": ("genes", "{:,.0f}"),
    "mito": ("mitochondrial", "{:.3g} %"),
    "hb": ("haemoglobin", "{:.3g} %"),
    "top50": ("share of the 50 highest genes", "{:.3g} %"),
    "doublet": ("doublet score", "{:.2f}"),
}


def in_words(flags: str) -> str:
    """Flags of ``qc.parquet`` as words: "high_mito,doublet" is "high mitochondrial share, doublet"."""
    return ", ".join(FLAGS.get(flag, (flag.replace("_", " "),))[0] for flag in flags.split(",") if flag)


def limits_in_words(decisions: list[dict[str, Any]], sample: str) -> str:
    """The limits in force in a sample: "counts: 200 (fixed), 41 and 24,910 (outliers of this sample); genes: ..."."""
    found: dict[str, dict[str, list[str]]] = {}
    for d in decisions:
        match = re.fullmatch(r"(?:low_|high_)?(counts|genes|mito|hb|top50|doublet)\.(\w+)", str(d["what"]))
        number = isinstance(d["value"], int | float) and not isinstance(d["value"], bool)
        if match and number and d["sample"] in (None, sample):
            kind = {"mad": "outliers of this sample", "threshold": "called above"}.get(match[2], "fixed")
            text = UNITS[match[1]][1].format(d["value"])
            found.setdefault(UNITS[match[1]][0], {}).setdefault(kind, []).append(text)
    each = {
        name: ", ".join(f"{' and '.join(v)} ({kind})" for kind, v in kinds.items()) for name, kinds in found.items()
    }
    return "; ".join(f"{name}: {text}" for name, text in each.items())


def _some(names: list[str], n: int = 12) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _plural(column: str) -> str:
    """What the groups of a column are called: "clusters", or "groups of cell_type"."""
    return "clusters" if re.fullmatch(r"cluster(_r[\d.]+)?", column) else f"groups of {column}"


def verdicts(numbers: dict[str, Any], data: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """Say in plain sentences what came out: ``("good" or "look", sentence)``; "look" asks for the reader's eye.

    Those that ask come first.
    """
    out = [
        *_design(numbers["contrasts"], data["cells"], config),
        *_quality(numbers),
        *_mixing(numbers),
        *_conditions(data["cells"], config),
        *_clusters(numbers, config),
        *_markers(numbers["de"], config),
        *_training(numbers["model"], data, config),
        *_criticism(data["criticism"]),
    ]
    return sorted(out, key=lambda verdict: verdict[0] != "look")


def _quality(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """What QC dropped: of all, of a sample more than of the others, of a label."""
    cells = numbers["cells"]
    lost = cells["before"] - cells["after"]
    share = lost / max(cells["before"], 1)
    tally = pd.DataFrame([s["reasons"] for s in numbers["samples"].values()]).sum()
    text = f"QC kept {cells['after']:,} of {cells['before']:,} barcodes and dropped {lost:,} ({share:.1%})"
    if len(tally):
        most = str(tally.idxmax())
        text += f", most often because {FLAGS.get(most, (most, most))[1]}"
    out = [("look" if share > LOST else "good", text + ".")]
    rates = {n: 1 - s["cells_after"] / max(s["cells_before"], 1) for n, s in numbers["samples"].items()}
    worst = max(rates, key=lambda n: rates[n])
    if rates[worst] > max(LOST, 2 * share):
        out.append(("look", f"Sample {worst} lost {rates[worst]:.0%} of its barcodes, far more than the others."))
    for column, rows in numbers["dropped"].items():
        for row in rows:
            rate = row["dropped"] / row["n"]
            if row["n"] >= ENOUGH and rate > max(LOST, 2 * share):
                text = f"QC dropped {rate:.0%} of the barcodes labelled {row['label']} ({column}), mostly for"
                out.append(("look", f"{text} {row['reason']}. Is that damage, or what such cells are like?"))
    return out


def _mixing(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """How well batches are mixed within clusters."""
    if numbers["mixing"] is None:
        return []
    score, by_cluster = numbers["mixing"]["score"], numbers["mixing"]["by_cluster"]
    out = []
    if score is None:
        out.append(("good", "No cluster has enough cells of two batches to tell how well batches are mixed."))
    else:
        how = "well" if score >= MIXED else "partly" if score > APART else "poorly"
        text = (
            f"Batches are {how} mixed: within clusters, a cell's neighbours are of another batch {score:.0%} as often "
        )
        text += "as by chance."
        sizes = numbers["clusters"]["sizes"]
        unjudged = [c for c in sizes if c not in by_cluster]
        if unjudged:
            share = sum(sizes[c] for c in unjudged) / sum(sizes.values())
            text += f" Not judged, for too few cells of two batches: cluster {_some(unjudged)} ({share:.0%} of cells)."
        apart = sorted((c for c in by_cluster if by_cluster[c] <= APART), key=lambda c: by_cluster[c])
        if apart:
            least = _some([f"{c} ({by_cluster[c]:.0%})" for c in apart], 6)
            text += f" Least in cluster {least}: a batch effect that is left, or biology that differs between batches."
        out.append(("look" if score < MIXED or apart else "good", text))
    one = numbers["clusters"]["one_batch"]
    if one:
        text = (
            f"At least 90% of the cells of cluster {_some(one)} are from one batch: biology of that batch, or a batch "
        )
        out.append(("look", text + "effect."))
    return out


def _conditions(cells: pd.DataFrame, config: Config) -> list[tuple[str, str]]:
    """Which clusters hold one level of a contrast's column, however well the batches of that level are mixed."""
    out = []
    for column in dict.fromkeys(test.column for test in config.contrast.tests):
        if column not in cells:
            continue
        table = pd.crosstab(cells["cluster"], cells[column].astype(str))
        one = table.index[(table.max(axis=1) >= 0.9 * table.sum(axis=1))].astype(str).tolist()
        if not one or table.sum().max() >= 0.9 * len(cells):
            continue
        text = f"At least 90% of the cells of cluster {_some(sorted(one, key=natural))} have one value of {column}: "
        text += "cells that only it has, or cells of one type that the embedding keeps apart by it."
        if config.contrast.within == "cluster":
            text += " There a contrast misses what it does; within cell types (contrast.within) it would be found."
        out.append(("look", text))
    return out


def _clusters(numbers: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """How many clusters, whether other seeds find them, and how they go with the labels."""
    clusters, out = numbers["clusters"], []
    sizes = clusters["sizes"]
    text = f"{clusters['n']} cluster{'s' * (clusters['n'] != 1)}, of {min(sizes.values()):,} to "
    out.append(("good" if clusters["n"] > 1 else "look", f"{text}{max(sizes.values()):,} cells."))
    used = f"{config.cluster.resolutions[0]:g}"
    if used in clusters["stability"]:
        agreement, best = clusters["stability"][used]["agreement"], clusters["suggested"]
        text = "Clustered again with other random seeds, cells fall into "
        if float(used) <= best:
            text += f"the same clusters (adjusted Rand index {agreement:.2f}; 1 is identical)."
            if float(used) < best:
                text += f" So they do up to resolution {best:g}, which gives finer ones (cluster.resolutions)."
        else:
            text += (
                f"somewhat different clusters (adjusted Rand index {agreement:.2f}; 1 is identical): some borders are "
            )
            text += f"chance. Resolution {best:g} is the finest at which seeds agree (cluster.resolutions)."
        out.append(("good" if float(used) <= best else "look", text))
    for column, a in numbers["labels"].items():
        if a["ari"] is None or column == ANNOTATION:  # names that were given to the clusters agree with them
            continue
        text = f"(adjusted Rand index {a['ari']:.2f}; 1 is identical, 0 is chance)."
        if a["of_samples"]:  # such as sex: of samples, so that clusters are not meant to find it
            if a["ari"] > FOLLOWS:
                out.append(("look", f"Clusters follow {column}, which is one value a sample {text}"))
        elif a["ari"] >= AGREES:
            out.append(("good", f"Clusters agree with the labels in {column} {text}"))
        else:
            out.append(("look", f"Clusters differ from the labels in {column} {text}"))
    return out


def _markers(de: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """How many markers, and which groups have hardly any."""
    counts, what = de["upregulated"], _plural(config.de.groupby)
    out = [("good", f"{sum(counts.values()):,} marker genes are significant, over {len(counts)} {what}.")]
    few = [group for group, n in counts.items() if n < 3]
    if few:
        text = f"Fewer than three significant markers: {what} {_some(few)}. "
        if config.de.compare == "cells":
            text += "Their single cells often look like some of the rest; averages may differ (de.compare: means)."
        else:
            text += "Such a group is small, has few counts, or is much like the rest."
        out.append(("look", text))
    return out


def _training(model: dict[str, Any], data: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """How the fit went."""
    elbo, best, epochs = model.get("validation_elbo"), kept_epoch(data["model"]), model.get("epochs")
    out = []
    asked = config.train.max_epochs
    if asked != "auto" and "n_train" in model:
        from scvi_core.train.schedule import Schedule

        auto = Schedule.of(TrainConfig(), model["n_train"]).epochs
        if asked < auto / 2:
            text = (
                f"The model was trained for at most {asked} epochs (train.max_epochs); by default it would be {auto}. "
            )
            text += (
                "Such a fit is for trying out: it may not describe the data, and batches or conditions may stay apart."
            )
            out.append(("look", text))
    if elbo is not None:
        values = f"(ELBO {elbo:,.1f} nats a cell, against {model['train_elbo']:,.1f})"
        if (model["train_elbo"] - elbo) / max(abs(elbo), 1e-9) > 0.1:
            text = f"The model fits cells that it was not trained on far less well than those it was {values}: too few "
            out.append(("look", f"{text}cells for so large a model, or cells unlike the rest."))
        else:
            out.append(("good", f"The model fits cells it was not trained on about as well as those it was {values}."))
    held_out = data["history"]["validation_elbo"].dropna()
    if len(held_out) and not config.train.early_stopping:
        fall = float(held_out.max() - held_out.iloc[-1])
        if fall > FALL * abs(held_out.max()):
            epoch = int(data["history"]["epoch"][held_out.idxmax()])
            text = (
                f"The fit to held-out cells was best at epoch {epoch} and has fallen by {fall:,.1f} nats a cell since: "
                "the model learns its cells by heart. train.early_stopping: true keeps the best weights; the default "
                "trains on, as batches mix later. Compare both if batches matter."
            )
            out.append(("look", text))
    if config.train.early_stopping and best is not None and best == epochs:
        out.append(("look", "The last epoch was the best one: more epochs (train.max_epochs) may fit better."))
    return out


def _design(contrasts: dict[str, Any], cells: pd.DataFrame, config: Config) -> list[tuple[str, str]]:
    """How far each contrast could be tested, and what the design makes hard to tell."""
    out = []
    for label, n in contrasts.items():
        what = f"in {n['tested']} of {n['groups']} {_plural(config.contrast.within)}" if config.contrast.within else ""
        what = what or ("over all cells" if n["tested"] else "nowhere")
        text = f"Contrast {label} was tested {what}: {n['called']:,} genes differ."
        whole = n["tested"] == n["groups"]
        why = " The table of decisions says why the others could not be tested."
        out.append(("good" if whole else "look", text + ("" if whole else why)))
    own = [c for c in cells if c not in (*CELL_COLUMNS, "cell_id", "barcode") and not re.fullmatch(DRAWN, c)]
    return out + [("look", text) for text in remarks(cells[own].drop_duplicates(), config)]


def _criticism(criticism: dict[str, Any] | None) -> list[tuple[str, str]]:
    if criticism is None:
        return []
    checks = criticism["checks"]
    good = sum(c["verdict"] == "good" for c in checks)
    text = f"Data simulated from the model resemble yours in {good} of {len(checks)} checks."
    weak = [c["title"].lower() for c in checks if c["verdict"] == "look"]
    if weak:
        text += f" Less closely: {'; '.join(weak)}."
    poor = [("look", f"{c['title']}: {c['sentence']}") for c in checks if c["verdict"] == "poor"]
    return [("look" if poor else "good", text), *poor]


def model_card(data: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """List what the model is and was trained on, as (term, text)."""
    m, c, t = data["model"], data["model"]["model"], data["model"].get("metrics", {})

    def listed(names: list[Any]) -> str:
        return ", ".join(map(str, names[:40])) + (f" and {len(names) - 40} more" if len(names) > 40 else "")

    samples = f"{len(data['names'])} sample{'s' * (len(data['names']) > 1)}"
    covariates = [*c.get("categorical_covariates", []), *c.get("continuous_covariates", [])]
    elbo = t.get("validation_elbo")
    library = "observed count total" if c.get("library") == "observed" else "latent, log-normal prior of the batch"
    return [
        ("Registered name", config.registered_name),
        ("Fingerprint", m["fingerprint"]),
        ("Trained on", f"{m['n_cells']:,} cells of {samples}: {listed(data['names'])}"),
        ("Organism", str(m.get("organism") or "unknown")),
        ("Batches", f"{len(m['batches'])}: {listed(m['batches'])}"),
        ("Genes", f"{m['n_genes']:,}, listed in model.json"),
        ("Likelihood", f"{c.get('likelihood')}, dispersion by {c.get('dispersion')}"),
        ("Library size", library),
        ("Covariates", listed(covariates) or "none besides the batch"),
        ("Networks", f"{c.get('n_latent')} latent dimensions, {c.get('n_layers')} x {c.get('n_hidden')} hidden units"),
        ("Decoder", f"linear, loadings_l1 {c['loadings_l1']:g}" if c.get("decoder") == "linear" else "a network"),
        ("Parameters", f"{t['n_parameters']:,}" if "n_parameters" in t else "see model.json"),
        (
            "Held-out ELBO",
            "no validation cells" if elbo is None or elbo != elbo else f"{elbo:,.2f} nats a cell (higher is better)",
        ),
        ("Seed", str(m.get("seed"))),
        ("Weights", f"model/model.safetensors, SHA-256 {m.get('weights_sha256', 'in manifest.json')}"),
    ]


def snippets(model: dict[str, Any], config: Config) -> dict[str, str]:
    """Write the code that loads the model: from the folder, and from the registry by version, alias, fingerprint."""
    name, fingerprint = config.registered_name, model["fingerprint"]
    return {
        "folder": f"""import anndata
import scvi_core as sv

model = sv.load("model")                     # the folder beside this page
cells = anndata.read_zarr("counts.zarr")     # or your own: raw counts, the same genes
z = model.latent(cells)                      # (cells, {model["model"].get("n_latent", "latent")}) float32
# denoised expression, averaged over batches
rho = model.normalized_expression(cells, transform_batch=model.schema.batches)""",
        "whole": f"""import scanpy as sc

atlas = sc.read_h5ad("atlas.h5ad")           # counts, cells, genes, embeddings, neighbour graph
sc.pl.umap(atlas, color="{config.de.groupby}")
sc.tl.rank_genes_groups(atlas, "{config.de.groupby}")""",
        "registry": f"""import json
import mlflow

ref = json.load(open("model_ref.json"))
mlflow.set_tracking_uri(ref["tracking_uri"])

# this build's version; or, once promoted with `scvi-core models promote`, "models:/{name}@champion"
model = mlflow.pyfunc.load_model(f"models:/{name}/{{ref['version']}}")
z = model.predict(cells)

# any version with the same fingerprint
mlflow.search_model_versions(filter_string="tag.fingerprint = '{fingerprint}'")""",
    }


def kept_epoch(model: dict[str, Any]) -> int | None:
    """Give the epoch whose weights ``model.json`` says were kept."""
    return model.get("metrics", {}).get("kept_epoch", model.get("metrics", {}).get("best_epoch"))


def training_decisions(model: dict[str, Any]) -> Decisions:
    """Tell from ``model.json`` what was decided in training: the same whether it was trained here or registered."""
    made, numbers, kept = Decisions("train"), model.get("metrics", {}), kept_epoch(model)
    library = model["model"].get("library")
    made.add("library", library, "model.library: the size of a cell is its count total, or inferred with a prior")
    made.add("device", model.get("device"), "the kind of device that fitted these weights")
    stopping = model.get("train", {}).get("early_stopping") and numbers.get("validation_elbo") is not None
    text = "the best validation ELBO" if stopping else "the last, as training does not stop early"
    made.add("epochs", numbers.get("epochs"), f"the weights kept are those of epoch {kept}: {text}")
    if labels := model.get("annotation"):
        quality = labels["quality"]
        unit = "batch" if quality["held_out"] == "batch" else "fold"
        what = f"on {quality['n_cells']:,} cells, each of a {unit} that was held out"
        made.add("labels", labels["taxonomy"]["n_leaves"], f"macro-F1 {quality['macro_f1']:.3f} {what}")
        made.add("temperature", round(labels["temperature"], 3), f"ECE {quality['ece']:.3f} {what}")
        if quality["held_out"] != "batch":
            why = "labels are in one batch: probabilities are calibrated within it, and sets and novelty too"
            made.add("calibration", "within a batch", why, warn=True)
    return made
