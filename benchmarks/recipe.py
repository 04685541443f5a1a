"""The training recipe: what other choices do to held-out likelihood and embedding.

    python benchmarks/recipe.py COUNTS.h5ad [...] --seeds 0 1 2 --json recipe.json

Data, split and scores are those of benchmarks/train.py; every recipe differs from the default in what its name says.
Needs scib-metrics: pip install scvi-core[peer]. Finished fits and scores are kept in `--out`: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from quality import _scib
from train import N_DRAWS, prepare, split

import scvi_core as sv
from scvi_core.files import canonical_json, code_sha256, replacing, sha256_file, sha256_text, write_json

# name -> model, training; the rows of benchmarks/README.md
SLOW = {"kl_weight": 1.5, "kl_warmup": 0.5}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "dropout 0.2": ({"dropout": 0.2}, {}),
    "40 epochs": ({}, {"max_epochs": 40}),
    "30 epochs, twice the rate": ({}, {"max_epochs": 30, "learning_rate": 2e-2}),
    "89 epochs": ({}, {"max_epochs": 89}),
    "twice the rate": ({}, {"learning_rate": 2e-2}),
    "minibatches of 64": ({}, {"batch_size": 64}),
    "40 epochs, KL weight 3": ({}, {"max_epochs": 40, "kl_weight": 3.0}),
    "KL weight 1.5 after half of the steps, dropout 0.2": ({"dropout": 0.2}, SLOW),
    "the same, eps 1e-3": ({"dropout": 0.2}, SLOW | {"adam_eps": 1e-3}),
    "the same, eps 1e-2": ({"dropout": 0.2}, SLOW | {"adam_eps": 1e-2}),
    "the same, eps 1e-2, rate 2e-2": ({"dropout": 0.2}, SLOW | {"adam_eps": 1e-2, "learning_rate": 2e-2}),
    "the same, constant rate 4e-3, eps 1e-2, dropout 0.3": (
        {"dropout": 0.3},
        SLOW | {"schedule": "constant", "learning_rate": 4e-3, "adam_eps": 1e-2},
    ),
    "float32": ({}, {"precision": "float32"}),
}


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore")
    logging.getLogger("scvi_core").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    rows = []
    for path in options.counts:
        data = prepare(path, options)
        for name in options.recipes or RECIPES:
            rows += [_row(data, path.stem, name, seed, options) for seed in options.seeds]
    if options.json:
        write_json(options.json, {"rows": rows})
    print(_table(rows))


def _row(data: Path, dataset: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One fit and its scores; kept in a file named by all that decides them."""
    import anndata as ad

    model, train = RECIPES[name]
    of = canonical_json([sha256_file(data), model, train, seed, options.threads, code_sha256()])
    kept = data.parent / f"recipe.{sha256_text(of)[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    adata = ad.read_h5ad(data)
    adata.obs[options.batch_key] = adata.obs[options.batch_key].astype(str)
    _, held = split(adata.n_obs)
    fitted = sv.fit(
        adata, options.batch_key, model=sv.ModelConfig(**model), train=sv.TrainConfig(**train), holdout=held, seed=seed,
        device="cpu", progress=False,
    )  # fmt: skip
    row = {"dataset": dataset, "recipe": name, "seed": seed, "epochs": len(fitted.history)}
    row["nelbo"] = -float(fitted.elbo(adata[held].copy(), n_samples=N_DRAWS).mean())
    row["seconds"] = float(fitted.history["seconds"].sum())
    labels = adata.obs.get(options.label, pd.Series(dtype=object)).astype(object)
    known = (~labels.astype(str).isin(["", "nan", "None"])).to_numpy()
    if len(labels) and labels[known].nunique() > 1 and adata.obs[options.batch_key][known].nunique() > 1:
        found = _scib({"z": fitted.latent(adata)[known]}, labels[known], adata.obs[options.batch_key][known]).loc["z"]
        row |= {"bio": found["Bio conservation"], "batch": found["Batch correction"], "total": found["Total"]}
    with replacing(kept) as temporary:
        temporary.write_text(json.dumps(row))
    print(f"{dataset}  {name}  seed {seed}: " + "  ".join(f"{k} {v:.3f}" for k, v in list(row.items())[4:]), flush=True)
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a recipe; for each data set held-out -ELBO and scIB total, medians over seeds."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    lines = ["| recipe | " + " | ".join(f"{d}: -ELBO | bio | batch | total" for d in datasets) + " |"]
    lines.append("|---|" + "---:|---:|---:|---:|" * len(datasets))
    for name in dict.fromkeys(row["recipe"] for row in rows):
        cells = []
        for dataset in datasets:
            mine = [r for r in rows if r["recipe"] == name and r["dataset"] == dataset]
            for key, digits in (("nelbo", 1), ("bio", 3), ("batch", 3), ("total", 3)):
                values = [r[key] for r in mine if key in r and np.isfinite(r[key])]
                cells.append(f"{statistics.median(values):.{digits}f}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES))
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label", default="cell_type")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/train-benchmark"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
