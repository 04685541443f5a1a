"""Cell types: ours against logistic regression and scvi-tools' SCANVI on the same folds, in one run.

    python benchmarks/annotate.py --data FOLDER --peer-python PYTHON --seeds 0 1 2 --json annotate.json
    python benchmarks/annotate.py --data FOLDER --quick      # one seed, small sets, no peer unless asked for

A fold hides the labels of one batch (a donor, a protocol, a sample); every method sees all cells and the other
batches' labels, and is scored on the hidden ones. FOLDER holds the labelled sets named in :data:`SETS` as ``.h5ad``:
raw counts in X, ``obs.batch``, ``obs.cell_type``; those that are missing are left out, and said so. scvi-tools comes
from --peer-python, an environment of its own; without it the peer's rows are left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

UNKNOWN = "unknown"
SETS = {  # name -> (file of the labelled cells, file of cells of another study to annotate)
    "baron_mouse": ("baron_mouse_pancreas", None),
    "cellbench": ("cellbench_3protocols", None),
    "kang": ("kang_muscat", None),
    "pbmc_3assays": ("pbmc_3assays_symphony", None),
    "baron_human": ("baron_human_pancreas", None),
    "mixology": ("sc_mixology_5batches", None),
    "zheng_pbmc68k": ("zheng_pbmc_mudan", "pbmc68k_reduced_scanpy"),
    "zheng_pbmc3k": ("zheng_pbmc_mudan", "pbmc3k"),
}
QUICK = ("baron_mouse", "cellbench", "kang", "pbmc_3assays")
# labels of the sorted cells and of the two sets that they are transferred to, in one vocabulary; others are left out
SHARED = {
    "B": ("bcells", "B", "CD19+ B"),
    "NK": ("nk", "NK", "CD56+ NK"),
    "Mono": ("monocytes", "CD14+ Mono", "FCGR3A+ Mono", "CD14+ Monocyte"),
    "CD4 T": (
        "memoryt", "naivet", "regulatoryt", "thelper", "Memory CD4 T", "Naive CD4 T", "CD4+/CD25 T Reg",
        "CD4+/CD45RA+/CD25- Naive T", "CD4+/CD45RO+ Memory",
    ),
    "CD8 T": ("cytotoxict", "naivecytotoxic", "CD8 T", "CD8+ Cytotoxic T", "CD8+/CD45RA+ Naive Cytotoxic"),
}  # fmt: skip

# child, parent: of the sets whose labels a coarser level summarises
TREES = {
    "pbmc_3assays": [
        ("Mono_CD14", "Mono"), ("Mono_CD16", "Mono"), ("T_CD4", "T"), ("T_CD8", "T"), ("B", "blood"), ("DC", "blood"),
        ("HSC", "blood"), ("MK", "blood"), ("Mono", "blood"), ("NK", "blood"), ("T", "blood"),
    ],
    "baron_human": [
        ("alpha", "endocrine"), ("beta", "endocrine"), ("delta", "endocrine"), ("gamma", "endocrine"),
        ("epsilon", "endocrine"), ("acinar", "exocrine"), ("ductal", "exocrine"), ("macrophage", "immune"),
        ("mast", "immune"), ("t_cell", "immune"), ("activated_stellate", "stellate"),
        ("quiescent_stellate", "stellate"), ("endothelial", "pancreas"), ("schwann", "pancreas"),
        ("endocrine", "pancreas"), ("exocrine", "pancreas"), ("immune", "pancreas"), ("stellate", "pancreas"),
    ],
}  # fmt: skip


def cells_of(name: str, folder: Path, n_genes: int = 2000) -> Any:
    """One labelled set: counts of its variable genes, ``obs.batch`` and ``obs.cell_type``."""
    import anndata as ad
    from train import highly_variable

    parts = []
    for file in filter(None, SETS[name]):
        adata = ad.read_h5ad(folder / f"{file}.h5ad")
        label = adata.obs["cell_type"].astype(str)
        if SETS[name][1]:
            label = label.map({theirs: ours for ours, names in SHARED.items() for theirs in names})
            adata, label = adata[label.notna().to_numpy()], label[label.notna()]
        obs = pd.DataFrame({"batch": adata.obs["batch"].astype(str), "cell_type": label}, adata.obs_names.astype(str))
        var = pd.DataFrame(index=adata.var_names.astype(str))
        parts.append(ad.AnnData(adata.X.astype(np.float32), obs, var)[:, ~var.index.duplicated()])
    adata = ad.concat(parts) if len(parts) > 1 else parts[0].copy()
    adata.obs_names_make_unique("_")
    return highly_variable(adata, n_genes, "batch")


def folds_of(name: str, adata: Any) -> list[str]:
    """The batches that are hidden in turn: all, or the one of the other study."""
    batches = list(dict.fromkeys(adata.obs["batch"]))
    return [batches[-1]] if SETS[name][1] else sorted(batches)


# ---- scvi-tools, in a process of its own


def peer(path: str, out: str, seed: int, epochs: int | None = None) -> None:
    """SCANVI by its recommended flow, linear and MLP, from one SCVI; (cells, labels) probabilities to `out`."""
    warnings.filterwarnings("ignore")
    import anndata as ad
    import scvi
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    scvi.settings.seed = seed
    adata = ad.read_h5ad(path)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    began = time.perf_counter()
    base = scvi.model.SCVI(adata)
    base.train(max_epochs=epochs, **quiet)
    shared, found = time.perf_counter() - began, {}
    for kind in ("linear", "mlp"):
        began = time.perf_counter()
        model = scvi.model.SCANVI.from_scvi_model(base, UNKNOWN, labels_key="given", linear_classifier=kind == "linear")
        # the warm-up of the KL weight completes within the fit
        model.train(max_epochs=20, n_samples_per_label=100, plan_kwargs={"n_epochs_kl_warmup": 10}, **quiet)
        soft = model.predict(soft=True)
        found[kind] = soft.to_numpy()
        found[f"{kind}_seconds"] = shared + time.perf_counter() - began
    np.savez(out, names=soft.columns.to_numpy().astype(str), version=scvi.__version__, **found)


def run_peer(python: str | None, fold: Any, folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Probabilities of SCANVI, linear and MLP, by the labels' names; nothing where it cannot be run."""
    out = folder / f"{name}.peer{seed}.npz"
    if not out.exists():
        if python is None:
            return {}
        fold.write_h5ad(folder / "fold.h5ad")
        command = [python, __file__, "--peer", str(folder / "fold.h5ad"), str(out), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{name}: scvi-tools failed ({last})", file=sys.stderr)
            return {}
    found = np.load(out, allow_pickle=False)
    return {
        f"SCANVI {kind}": (pd.DataFrame(found[kind], fold.obs_names, found["names"]), float(found[f"{kind}_seconds"]))
        for kind in ("linear", "mlp")
    }


# ---- ours, and logistic regression


def known_of(fold: Any, column: str, tree: Any = (), config: Any = None) -> Any:
    """The fold's labels as the model takes them."""
    from scvi_core.config import AnnotateConfig
    from scvi_core.labels import Known

    return Known.of(fold.obs, config or AnnotateConfig(label=column, unknown=UNKNOWN), tree, fold.obs["batch"])


def learned(model: Any, fold: Any, column: str, seed: int, tree: Any = ()) -> Any:
    """The annotator of labels in `column` on a fitted model: what `fit` with these labels gives, as the latent state
    is that of scVI whatever the labels are, and so fitted once for all folds.
    """
    from scvi_core import celltypes, posterior

    counts = model._counts(fold)  # with the batches, which the folds of calibration are made of
    z_nk, known = posterior.latent(model.network, counts), known_of(fold, column, tree)
    annotator = celltypes.learn(lambda _: z_nk, counts, known.node_n, known.taxonomy, known.config, seed)
    return annotator, z_nk, counts


def logistic(fold: Any, column: str = "given", C: float = 1.0) -> pd.DataFrame:
    """L2 logistic regression on log-normalised counts, scikit-learn's defaults but the iterations."""
    from sklearn.linear_model import LogisticRegression

    dense = fold.X.toarray()
    dense = np.log1p(dense / dense.sum(1, keepdims=True) * 1e4)
    labels = fold.obs[column].astype(str).to_numpy()
    shown = labels != UNKNOWN
    fitted = LogisticRegression(C=C, max_iter=200).fit(dense[shown], labels[shown])
    return pd.DataFrame(fitted.predict_proba(dense), fold.obs_names, fitted.classes_)


def scores(p: pd.DataFrame, truth: pd.Series) -> dict[str, float]:
    """Macro-F1 over the types that are there, accuracy, calibration error and Brier score."""
    from sklearn.metrics import f1_score

    from scvi_core.celltypes import ece_of

    found, types = p.idxmax(axis=1), sorted(set(truth))
    right = (found == truth).to_numpy()
    hot = truth.to_numpy()[:, None] == p.columns.to_numpy()
    return {
        "macro_f1": float(f1_score(truth, found, average="macro", labels=types, zero_division=0)),
        "accuracy": float(right.mean()),
        "ece": float(ece_of(p.max(1).to_numpy(), right)[0]),
        "brier": float(((p.to_numpy() - hot) ** 2).sum(1).mean() + (~hot.any(1)).mean()),
    }


def one_fold(model: Any, seconds: float, adata: Any, name: str, batch: str, seed: int, options: Any) -> list[dict]:
    """Every method on one fold: a row each."""
    hidden = (adata.obs["batch"] == batch).to_numpy()
    fold = adata.copy()
    fold.obs["given"] = fold.obs["cell_type"].astype(str).where(~hidden, UNKNOWN)
    truth, rows = fold.obs["cell_type"].astype(str)[hidden], []

    def row(method: str, p: pd.DataFrame, seconds: float, **more: float) -> None:
        about = {"set": name, "batch": batch, "seed": seed, "method": method, "seconds": seconds}
        rows.append(about | scores(p[hidden], truth) | more)

    began = time.perf_counter()
    annotator, z_nk, counts = learned(model, fold, "given", seed)
    p_ny, novelty_n = annotator.probabilities(z_nk, counts, fold.obs["batch"])
    seconds += time.perf_counter() - began
    calls = annotator.calls(p_ny, novelty_n, fold.obs_names)[hidden]
    covered = float(np.mean([label in each for label, each in zip(truth, calls["label_set"], strict=True)]))
    size = float(calls["label_set"].map(len).mean())
    p = annotator.node_probabilities(p_ny, "leaf", fold.obs_names)
    row("scvi-core", p, seconds, coverage=covered, set_size=size, false_novel=float(calls["is_novel"].mean()))
    if name in TREES:
        tree, rng = TREES[name], np.random.default_rng(seed)
        root = tree[-1][1]  # which says nothing
        parent = {child: above for child, above in tree if above != root}
        half = (rng.random(fold.n_obs) < 0.5) & ~hidden
        fold.obs["coarse"] = [
            parent.get(label, label) if c else label for c, label in zip(half, fold.obs["given"], strict=True)
        ]
        annotator, z_nk, counts = learned(model, fold, "coarse", seed, tree)
        p_ny = annotator.probabilities(z_nk, counts, fold.obs["batch"])[0]
        row("scvi-core, half coarse", annotator.node_probabilities(p_ny, "leaf", fold.obs_names), 0.0)
    if not options.no_logistic:
        began = time.perf_counter()
        p = logistic(fold)
        row("logistic regression", p, time.perf_counter() - began)
    for method, (p, peer_seconds) in run_peer(options.peer_python, fold, options.out, f"{name}.{batch}", seed).items():
        row(method, p, peer_seconds)
    return rows


# ---- types that were never shown


def novel_types(adata: Any, name: str, batch: str, seed: int, least: int = 30) -> list[dict]:
    """Each type of `least` cells or more left out of all that is fitted; AUROC of its cells in the hidden batch."""
    from sklearn.metrics import roc_auc_score, roc_curve

    import scvi_core as sv

    rows, n = [], adata.obs["cell_type"].astype(str).value_counts()
    test = adata[adata.obs["batch"] == batch].copy()
    for kind in sorted(n.index[n >= least]):
        new = (test.obs["cell_type"] == kind).to_numpy()
        shown = adata[(adata.obs["batch"] != batch) & (adata.obs["cell_type"] != kind)].copy()
        known = new | test.obs["cell_type"].isin(set(shown.obs["cell_type"])).to_numpy()
        if new.sum() < 5 or shown.obs["cell_type"].nunique() < 2:
            continue
        several = shown.obs["batch"].nunique() > 1
        model = sv.fit(shown, "batch" if several else None, label_key="cell_type", seed=seed, progress=False)
        calls = model.annotate(test)
        z_nk, of_nk = model.latent(test), model.latent(shown)
        found = {
            "novelty": calls["novelty"].to_numpy(),
            "1 - max softmax": 1 - calls["probability"].to_numpy(),
            "kNN": neighbour_uncertainty(of_nk, shown.obs["cell_type"].to_numpy().astype(str), z_nk),
        }
        row = {"set": name, "batch": batch, "seed": seed, "type": kind, "n": int(new.sum())}
        for score, value in found.items():
            row[score] = float(roc_auc_score(new[known], value[known]))
        false, hit, _ = roc_curve(new[known], found["novelty"][known])
        row["fpr_at_95"] = float(false[np.argmax(hit >= 0.95)])
        row["called"] = float(calls["is_novel"].to_numpy()[new].mean())
        row["false"] = float(calls["is_novel"].to_numpy()[known & ~new].mean())
        rows.append(row)
        if os.environ.get("SCORES"):
            keep = {
                "new": new,
                "known": known,
                "z": z_nk,
                "zt": of_nk,
                "yt": shown.obs["cell_type"].to_numpy().astype(str),
                "bt": shown.obs["batch"].to_numpy().astype(str),
                "p": model.label_probabilities(test).to_numpy(),
                "pt": model.label_probabilities(shown).to_numpy(),
                **found,
            }
            np.savez(Path(os.environ["SCORES"]) / f"{name}.{batch}.{kind.replace('/', '_')}.npz", **keep)
    return rows


def neighbour_uncertainty(of_nk: np.ndarray, labels: np.ndarray, z_nk: np.ndarray, k: int = 50) -> np.ndarray:
    """1 - the largest share of labels among 50 neighbours, by a Gaussian kernel of their distances (HLCA's)."""
    from sklearn.neighbors import NearestNeighbors

    distance, place = NearestNeighbors(n_neighbors=min(k, len(of_nk))).fit(of_nk).kneighbors(z_nk)
    weight = np.exp(-distance * distance.std() ** 2 / 4)
    weight /= weight.sum(1, keepdims=True)
    return 1 - np.max([(weight * (labels[place] == kind)).sum(1) for kind in np.unique(labels)], axis=0)


def table(rows: list[dict], by: list[str], columns: list[str]) -> str:
    """Means over folds and seeds, in Markdown."""
    frame = pd.DataFrame(rows).groupby(by, sort=False)[columns].mean().reset_index()
    lines = [" | ".join(frame.columns), " | ".join("---" for _ in frame.columns)]
    for values in frame.itertuples(index=False):
        lines.append(" | ".join(v if isinstance(v, str) else "" if np.isnan(v) else f"{v:.3f}" for v in values))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        return peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), help="which; default: all, or --quick's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the fits")
    parser.add_argument("--peer-python", help="Python of an environment that has scvi-tools")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks/annotate"), help="keeps the peer's answers"
    )
    parser.add_argument("--quick", action="store_true", help="small sets, one hidden batch of each for unknown types")
    parser.add_argument("--no-logistic", action="store_true", help="leave logistic regression out")
    parser.add_argument("--no-novel", action="store_true", help="leave the unknown types out")
    parser.add_argument("--no-folds", action="store_true", help="the unknown types alone")
    parser.add_argument("--json", type=Path, help="write all rows here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import scvi_core as sv

    options.out.mkdir(parents=True, exist_ok=True)
    if options.peer_python is None:
        print("scvi-tools is left out where it has not answered before: give --peer-python", file=sys.stderr)
    rows, new = [], []
    for name in options.sets or (QUICK if options.quick else SETS):
        if not all((options.data / f"{file}.h5ad").is_file() for file in filter(None, SETS[name])):
            print(f"{name} is left out: not in {options.data}", file=sys.stderr)
            continue
        adata = cells_of(name, options.data)
        folds = folds_of(name, adata)
        for seed in options.seeds:
            if not options.no_folds:
                began = time.perf_counter()
                model = sv.fit(adata, "batch", seed=seed, progress=False)
                seconds = time.perf_counter() - began
                for batch in folds:
                    rows += one_fold(model, seconds, adata, name, batch, seed, options)
            if not options.no_novel:
                for batch in folds[-1:] if options.quick else folds:
                    new += novel_types(adata, name, batch, seed)
    if rows:
        columns = ["macro_f1", "accuracy", "ece", "brier", "coverage", "set_size", "false_novel", "seconds"]
        print(table(rows, ["set", "method"], columns), "\n")
        print(table(rows, ["method"], columns), "\n")
    if new:
        columns = ["novelty", "1 - max softmax", "kNN", "fpr_at_95", "called", "false"]
        print(table(new, ["set", "type"], columns), "\n")
        print(table([row | {"all": "mean"} for row in new], ["all"], columns))
    if options.json:
        options.json.write_text(json.dumps({"folds": rows, "novel": new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
