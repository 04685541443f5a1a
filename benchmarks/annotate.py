"""Cell types: ours against logistic regression and scvi-tools' SCANVI on the same folds, in one run.

    python benchmarks/annotate.py --data FOLDER --peer-python PYTHON --seeds 0 1 2 --json annotate.json
    python benchmarks/annotate.py --data FOLDER --quick      # one seed, small sets, no peer unless asked for

A fold hides the labels of one batch (a donor, a protocol, a sample); every method sees all cells and the other
batches' labels, and is scored on the hidden ones. FOLDER holds the labelled sets named in :data:`SETS` as ``.h5ad``:
raw counts in X, ``obs.batch``, ``obs.cell_type``; those that are missing are left out, and said so. scvi-tools comes
from --peer-python, an environment of its own; without it the peer's rows are left out, and said so.
"""

from __future__ import annotations

import os
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
