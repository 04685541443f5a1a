"""The page in words: what came out, what the model is, how to load it."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from scvi_core.config import Config
from scvi_core.design import remarks
from scvi_core.files import Decisions
from scvi_core.report.viewer import CELL_COLUMNS

AGREES, FOLLOWS = 0.5, 0.2  # adjusted Rand index: all is well from there with cell types, up to there with samples
FALL = 0.01  # of the best held-out ELBO: in fits that are as they should be it ends within half of that
DRAWN = r"(umap|tsne)_\d|cluster(_r[\d.]+)?|cycle_phase"  # columns that are made of the cells


def verdicts(numbers: dict[str, Any], data: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """Say in plain sentences what came out: ``("good" or "look", sentence)``; "look" asks for the reader's eye.

    Those that ask come first.
    """
    cells, model, clusters = numbers["cells"], numbers["model"], numbers["clusters"]
    out = _design(numbers["contrasts"], data["cells"], config)
    lost = cells["before"] - cells["after"]
    share = lost / max(cells["before"], 1)
    tally = pd.DataFrame([s["reasons"] for s in numbers["samples"].values()]).sum()
    why = f", most often for {tally.idxmax()}" if len(tally) else ""
    text = f"QC kept {cells['after']:,} of {cells['before']:,} barcodes and dropped {lost:,} ({share:.1%}{why})."
    out.append(("look" if share > 0.3 else "good", text))
    rates = {n: 1 - s["cells_after"] / max(s["cells_before"], 1) for n, s in numbers["samples"].items()}
    worst = max(rates, key=lambda n: rates[n])
    if rates[worst] > max(0.3, 2 * share):
        out.append(("look", f"Sample {worst} lost {rates[worst]:.0%} of its barcodes, far more than the others."))
    elbo, best, epochs = model.get("validation_elbo"), kept_epoch(data["model"]), model.get("epochs")
    if elbo is not None:
        text = f"The ELBO on held-out cells is {elbo:,.1f} nats a cell; on training cells {model['train_elbo']:,.1f}."
        gap = (model["train_elbo"] - elbo) / max(abs(elbo), 1e-9)
        more = " The gap is wide: few cells for so large a model, or cells unlike the rest." if gap > 0.1 else ""
        out.append(("look" if more else "good", text + more))
    held_out = data["history"]["validation_elbo"].dropna()
    if len(held_out) and not config.train.early_stopping:
        fall = float(held_out.max() - held_out.iloc[-1])
        if fall > FALL * abs(held_out.max()):
            epoch = int(data["history"]["epoch"][held_out.idxmax()])
            text = (
                f"The ELBO on held-out cells was highest at epoch {epoch} and has fallen by {fall:,.1f} nats a cell "
                "since: the model learns these cells by heart. train.early_stopping: true keeps the best weights; the "
                "default goes on, as batches mix later: compare both where batches matter."
            )
            out.append(("look", text))
    if config.train.early_stopping and best is not None and best == epochs:
        out.append(("look", "The last epoch was the best one: more epochs (train.max_epochs) may fit better."))
    sizes = clusters["sizes"]
    text = f"{clusters['n']} clusters, of {min(sizes.values()):,} to {max(sizes.values()):,} cells."
    out.append(("good" if clusters["n"] > 1 else "look", text))
    used = f"{config.cluster.resolutions[0]:g}"
    if used in clusters["stability"]:
        agreement, best = clusters["stability"][used]["agreement"], clusters["suggested"]
        text = f"By another seed, clusters at resolution {used} agree by an adjusted Rand index of {agreement:.2f}"
        finest = f"{best:g} is suggested (cluster.resolutions), as the finest at which seeds agree"
        kind = "good" if float(used) <= best else "look"
        out.append((kind, f"{text}{'.' if float(used) == best else f'; {finest}.'}"))
    if numbers["batches"] > 1:
        names = ", ".join(clusters["one_batch"][:12])
        one = f"At least 90% of cells are of one batch in cluster {names}: biology of that batch, or a batch effect."
        good = "No cluster has 90% or more of its cells from one batch."
        out.append(("look", one) if names else ("good", good))
    for column, a in numbers["labels"].items():
        if a["ari"] is None:
            continue
        text = f"adjusted Rand index of {a['ari']:.2f} (1: identical, 0: as by chance)."
        if a["of_samples"]:  # such as sex: of samples, so that clusters are not meant to find it
            if a["ari"] > FOLLOWS:
                out.append(("look", f"Clusters follow {column}, which is one value a sample: {text}"))
            continue
        out.append(("good" if a["ari"] >= AGREES else "look", f"Clusters and the labels {column} agree with an {text}"))
    out += _criticism(data["criticism"])
    counts = numbers["de"]["upregulated"]
    few = [g for g, n in counts.items() if n < 3]
    text = f"{sum(counts.values()):,} significant markers over {len(counts)} groups of {config.de.groupby}."
    out.append(("good", text))
    if few:
        text = f"Fewer than three significant markers for group {', '.join(few[:12])}: "
        if config.de.compare == "cells":
            text += "single cells of it often look like some of the rest. Its average may differ: de.compare: means."
        else:
            text += "few averages differ for sure, as where a group is small, shallow or much like the rest."
        out.append(("look", text))
    return sorted(out, key=lambda verdict: verdict[0] != "look")


def _design(contrasts: dict[str, Any], cells: pd.DataFrame, config: Config) -> list[tuple[str, str]]:
    """How far each contrast could be tested, and what the design makes hard to tell."""
    out = []
    for label, n in contrasts.items():
        what = f"of {n['groups']} groups of {config.contrast.within}" if config.contrast.within else "of 1 group"
        text = f"Contrast {label}: {n['tested']} {what} could be tested, with {n['called']:,} genes called."
        whole = n["tested"] == n["groups"]
        out.append(("good" if whole else "look", text + ("" if whole else " Decisions says why not the others.")))
    own = [c for c in cells if c not in (*CELL_COLUMNS, "cell_id", "barcode") and not re.fullmatch(DRAWN, c)]
    return out + [("look", text) for text in remarks(cells[own].drop_duplicates(), config)]


def _criticism(criticism: dict[str, Any] | None) -> list[tuple[str, str]]:
    if criticism is None:
        return []
    checks = criticism["checks"]
    good = sum(c["verdict"] == "good" for c in checks)
    text = f"The counts that the model makes are like those measured in {good} of {len(checks)} checks."
    weak = [c["title"].lower() for c in checks if c["verdict"] == "look"]
    if weak:
        text += f" Less so: {'; '.join(weak)}."
    poor = [("look", f"{c['title']}: {c['sentence']}") for c in checks if c["verdict"] == "poor"]
    return [("look" if poor else "good", text), *poor]


def model_card(data: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """List what the model is and was trained on, as (term, text)."""
    m, c, t = data["model"], data["model"]["model"], data["model"].get("metrics", {})

    def listed(names: list[Any]) -> str:
        return ", ".join(map(str, names[:40])) + (f" and {len(names) - 40} more" if len(names) > 40 else "")

    covariates = [*c.get("categorical_covariates", []), *c.get("continuous_covariates", [])]
    elbo = t.get("validation_elbo")
    library = "observed count total" if c.get("library") == "observed" else "latent, log-normal prior of the batch"
    return [
        ("Registered name", config.registered_name),
        ("Fingerprint", m["fingerprint"]),
        ("Trained on", f"{m['n_cells']:,} cells of {len(data['names'])} samples: {listed(data['names'])}"),
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
        what = f"on {quality['n_cells']:,} cells, each of a {quality['held_out']} that was held out"
        made.add("labels", labels["taxonomy"]["n_leaves"], f"macro-F1 {quality['macro_f1']:.3f} {what}")
        made.add("temperature", round(labels["temperature"], 3), f"ECE {quality['ece']:.3f} {what}")
        if quality["held_out"] != "batch":
            why = "labels are in one batch: probabilities are calibrated within it, and sets and novelty too"
            made.add("calibration", "within a batch", why, warn=True)
    return made
