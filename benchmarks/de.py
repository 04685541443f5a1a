"""Differential expression: is it calibrated, does it find what is there, and how long does it take?

    python benchmarks/de.py COUNTS.h5ad [...] --experiments null truth replicate all --json de.json

A file holds raw counts in X, the batch in `--batch-key` and known cell types in `--label`. Experiments:

null        Random halves of each cell type: nothing differs. Which share of the genes is called at an FDR of 5 %?
truth       Counts drawn from a model fitted to the data, so that every gene's true change between two cell types is
            known. Every method starts from the counts. Realised FDR (calls that change by less than delta, or the
            other way), power, AUC.
replicate   Two cell types compared in one half of the batches; the calls judged by the plain means of the other half,
            which no method saw: a real truth. A call is false where these contradict it by two standard errors.
all         Every cell type against the rest: seconds, memory, agreement of fold changes with scvi-tools, and which of
            Wilcoxon's strongest markers are called.

Methods: scvi-core (means, the default; pairs of cells), scvi-tools (change mode, defaults), scanpy's Wilcoxon, PyDESeq2
on sums over batches. The fits of scvi-core and scvi-tools are each package's default. Each method runs in a process of
its own; finished ones are kept in `--out`, by content. What the figures say: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from train import highly_variable, peak_mb

METHODS = ("wilcoxon", "ours", "scvi-tools", "pydeseq2")  # the first is what the others are held against
NAMES = {"means": "scvi-core, means", "cells": "scvi-core, cells", "scvi-tools": "scvi-tools", "wilcoxon": "Wilcoxon",
         "pydeseq2": "PyDESeq2, pseudobulk"}  # fmt: skip
DELTA, FDR = 0.25, 0.05
SMALLEST = 30  # cells a side of a comparison
FEWEST = 5  # cells a pseudobulk
STRONGEST = 30  # markers of a type by Wilcoxon, which another method should know too
CLEAR = 1.0  # |LFC| of a change that any method should find


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    options = _options()
    warnings.filterwarnings("ignore")
    logging.getLogger("scvi_core").setLevel(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in options.counts:
        data = _prepared(path, options)
        for experiment, seed in itertools.product(options.experiments, options.seeds):
            task = TASKS[experiment](data, seed, options)
            if task is None:
                print(f"{path.stem}: not fit for '{experiment}' (too few batches or cells)", file=sys.stderr)
                continue
            for method in options.methods:
                found = _cached(task, method, seed, options, f"{path.stem}, {experiment}, {method}, seed {seed}")
                for name, part in found["table"].groupby("method", sort=False) if found is not None else ():
                    about = {"dataset": path.stem, "experiment": experiment, "seed": seed, "method": name}
                    rows.append(about | JUDGES[experiment](part, task) | found["about"])
    table = pd.DataFrame(rows)
    for experiment in options.experiments:
        of = table[table["experiment"] == experiment].dropna(axis=1, how="all")
        if len(of):
            print(f"\n{experiment}\n\n{_markdown(of)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, default=float) + "\n")


# ---- tasks: a file of counts, and pairs of groups of its cells


def _prepared(path: Path, options: argparse.Namespace) -> Path:
    out = options.out / f"{path.stem}.h5ad"
    if not out.exists():
        adata = ad.read_h5ad(path)
        adata = adata[adata.obs[options.label].notna().to_numpy()]
        obs = adata.obs[[options.batch_key, options.label]].astype(str)
        obs.columns = ["batch", "label"]
        adata = highly_variable(ad.AnnData(adata.X.astype(np.float32), obs, adata.var[[]]), options.genes, "batch")
        adata.write_h5ad(out)
    return out


def null_task(data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Random halves of each type, batch by batch, so that they hold the same batches."""
    obs, rng, pairs = ad.read_h5ad(data).obs, np.random.default_rng(seed), []
    for label, group in obs.groupby("label", observed=True):
        half = np.zeros(len(group), dtype=bool)
        for rows in group.groupby("batch", observed=True).indices.values():
            half[rng.permutation(rows)[: len(rows) // 2]] = True
        rows = np.flatnonzero((obs["label"] == label).to_numpy())
        if min(half.sum(), (~half).sum()) >= SMALLEST:
            pairs.append([str(label), rows[half].tolist(), rows[~half].tolist()])
    return {"counts": data, "pairs": pairs} if pairs else None


def truth_task(data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Counts drawn from a fitted model, and the true fold changes in it: of mean rho, averaged over batches."""
    import torch

    import scvi_core as sv
    from scvi_core.model import Noise
    from scvi_core.posterior import blocks

    out = options.out / f"{data.stem}.simulated{seed}.h5ad"
    adata = ad.read_h5ad(data)
    if not out.exists():
        model = sv.fit(adata, batch_key="batch", seed=100 + seed, device="cpu", progress=False)
        network, counts = model.network, model._counts(adata)
        rng, noise, x = np.random.default_rng([seed, 7]), Noise(seed), np.empty(adata.shape, dtype=np.float32)
        n_batches = len(model.schema.batches)
        rho_bng = np.empty((n_batches, *adata.shape), dtype=np.float32)
        with torch.inference_mode():
            theta_g = network.log_theta_sg.exp()[0].double().numpy()
            for at, cells in blocks(counts):
                z_nk, log_library_n = network.sample(cells, network.encode(cells), noise)
                for b in range(n_batches):
                    under_n = torch.full_like(cells.batch_n, b)
                    rho_bng[b, at] = network.log_rho(network.hidden(z_nk, under_n, cells.covariates_nc)).exp().numpy()
                own_nh = network.hidden(z_nk, cells.batch_n, cells.covariates_nc)
                mu_ng = (network.log_rho(own_nh) + log_library_n[:, None]).exp().double().numpy()
                dropped_ng = rng.random(mu_ng.shape) < network.dropout_logit(own_nh).sigmoid().numpy()
                x[at] = np.where(dropped_ng, 0, rng.poisson(rng.gamma(theta_g, mu_ng / theta_g)))
        simulated = ad.AnnData(x, adata.obs.copy(), adata.var.copy())
        simulated.X[x.sum(1) == 0, 0] = 1
        means = {}
        for label, rows in adata.obs.groupby("label", observed=True).indices.items():
            means[str(label)] = rho_bng[:, rows].mean(1, dtype=np.float64)
        simulated.uns["labels"] = list(means)
        simulated.varm["log_rho"] = np.log2(np.stack(list(means.values()))).transpose(2, 0, 1).reshape(x.shape[1], -1)
        simulated.write_h5ad(out)
    simulated = ad.read_h5ad(out)
    labels = [str(v) for v in simulated.uns["labels"]]
    log_rho_glb = simulated.varm["log_rho"].reshape(simulated.n_vars, len(labels), -1)
    rows = simulated.obs.groupby("label", observed=True).indices
    large = [i for i, name in enumerate(labels) if len(rows[name]) >= SMALLEST]
    pairs, truth = [], []
    for i, j in itertools.combinations(large, 2):
        pairs.append([f"{labels[i]} / {labels[j]}", rows[labels[i]].tolist(), rows[labels[j]].tolist()])
        truth.append((log_rho_glb[:, i] - log_rho_glb[:, j]).mean(1).tolist())
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(pairs))[:12]
    return {"counts": out, "pairs": [pairs[i] for i in some], "truth": [truth[i] for i in some]} if len(some) else None


def replicate_task(data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Half of the batches to test in, the other half to judge by."""
    adata = ad.read_h5ad(data)
    batches = sorted(adata.obs["batch"].unique())
    if len(batches) < 2:
        return None
    mine = np.random.default_rng(seed).permutation(batches)[: max(1, len(batches) // 2)]
    here = adata.obs["batch"].isin(mine).to_numpy()
    out = options.out / f"{data.stem}.half{seed}.h5ad"
    if not out.exists():
        adata[here].copy().write_h5ad(out)
    part, other = ad.read_h5ad(out), adata[~here]
    rows, there = (a.obs.groupby("label", observed=True).indices for a in (part, other))
    share = other.X / np.asarray(other.X.sum(1)).reshape(-1, 1)
    share = np.asarray(share.todense()) if hasattr(share, "todense") else np.asarray(share)
    c = 0.01 / float(np.median(np.asarray(other.X.sum(1))))
    pairs, truth, error = [], [], []
    for a, b in itertools.combinations([k for k in rows if k in there], 2):
        if min(len(rows[a]), len(rows[b]), len(there[a]), len(there[b])) < SMALLEST:
            continue
        pairs.append([f"{a} / {b}", rows[a].tolist(), rows[b].tolist()])
        mean_a, mean_b = share[there[a]].mean(0), share[there[b]].mean(0)
        truth.append((np.log2(mean_a + c) - np.log2(mean_b + c)).tolist())
        parts = ((there[a], mean_a), (there[b], mean_b))
        variance = sum((share[at].var(0) / len(at) / (mean + c) ** 2 for at, mean in parts), np.zeros(len(mean_a)))
        # a gene never seen in either may still be there: one count more or less in all cells
        unseen = sum((1 / np.asarray(other.X[at].sum()) / (mean + c)) ** 2 for at, mean in parts)
        error.append((np.sqrt(variance + unseen) / np.log(2)).tolist())
    return {"counts": out, "pairs": pairs, "truth": truth, "error": error} if pairs else None


def all_task(data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every type against the rest."""
    return {"counts": data, "pairs": None}


TASKS = {"null": null_task, "truth": truth_task, "replicate": replicate_task, "all": all_task}


# ---- judges: the tables of a method against what is known


def null_judge(table: pd.DataFrame, task: dict[str, Any]) -> dict[str, float]:
    share = table.groupby("pair")["called"].mean()
    return {"comparisons": len(share), "called, mean": share.mean(), "called, worst": share.max()}


def truth_judge(table: pd.DataFrame, task: dict[str, Any]) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    found = []
    for i, (name, _, _) in enumerate(task["pairs"]):
        part, lfc = table[table["pair"] == name].set_index("gene"), np.array(task["truth"][i])
        if not len(part):
            continue
        part = part.loc[[str(g) for g in range(len(lfc))]]
        called, estimate = part["called"].to_numpy(), part["lfc"].to_numpy()
        # what is taken for the truth may have an error of its own: then only what it says beyond twice that counts
        doubt = 2 * np.array(task["error"][i]) if "error" in task else np.zeros(len(lfc))
        wrong = called & (np.sign(estimate) * lfc + doubt <= DELTA)
        changed, still = np.abs(lfc) - doubt > DELTA, np.abs(lfc) + doubt <= DELTA
        clear, known = np.abs(lfc) - doubt > CLEAR, changed | still
        found.append(
            {
                "calls": called.sum(),
                "realised FDR": wrong.sum() / max(1, called.sum()),
                f"power, LFC > {DELTA}": (called & changed).sum() / max(1, changed.sum()),
                f"power, LFC > {CLEAR:g}": (called & clear).sum() / max(1, clear.sum()),
                "AUC": roc_auc_score(changed[known], part["score"][known]) if changed.any() and still.any() else np.nan,
                "Spearman of LFC": pd.Series(estimate).corr(pd.Series(lfc), "spearman"),
            }
        )
    return {"comparisons": len(found)} | pd.DataFrame(found).mean().to_dict()


def all_judge(table: pd.DataFrame, task: dict[str, Any]) -> dict[str, float]:
    task.setdefault("tables", {})[table["method"].iloc[0]] = table
    out = {"called": int(table["called"].sum())}
    if (theirs := task["tables"].get("wilcoxon")) is not None and theirs is not table:
        up = theirs[theirs["called"] & (theirs["lfc"] > 0)].sort_values("score", ascending=False, kind="stable")
        first = up.groupby("pair").head(STRONGEST).merge(table[["pair", "gene", "called"]], on=["pair", "gene"])
        share = first.groupby("pair")["called_y"].mean()
        out |= {f"of Wilcoxon's {STRONGEST}, called": share.mean(), "types under half": int((share < 0.5).sum())}
    for name in ("cells", "means"):
        ours = task["tables"].get(name)
        if ours is not None and name != table["method"].iloc[0]:
            both = ours.merge(table, on=["pair", "gene"])
            rank = both.groupby("pair").apply(lambda p: p["lfc_x"].corr(p["lfc_y"], "spearman"), include_groups=False)
            out[f"Spearman with {NAMES[name]}, median"] = rank.median()
            out[f"Spearman with {NAMES[name]}, lowest"] = rank.min()
    return out


JUDGES = {"null": null_judge, "truth": truth_judge, "replicate": truth_judge, "all": all_judge}


# ---- methods, each in a process of its own


def _cached(task: dict[str, Any], method: str, seed: int, options: argparse.Namespace, name: str) -> dict | None:
    from scvi_core.config import ModelConfig, TrainConfig
    from scvi_core.files import canonical_json, code_sha256, replacing, sha256_file, sha256_text

    here = Path(__file__).parents[1] / "scvi_core"
    code = [code_sha256(), TrainConfig().model_dump(), ModelConfig().model_dump()]
    of = [sha256_file(task["counts"]), task["pairs"], method, seed]
    of += [[sha256_file(here / "de.py"), *code] if method == "ours" else None]
    path = options.out / f"{task['counts'].stem}.{method}.{sha256_text(canonical_json(of))[:12]}.parquet"
    if not path.exists():
        print(f"{name} ...", file=sys.stderr, flush=True)
        spec = {"counts": str(task["counts"]), "pairs": task["pairs"], "method": method, "seed": seed}
        spec |= {"threads": options.threads, "fits": str(options.out / "fits"), "code": sha256_text(str(code))[:12]}
        python = options.peer_python if method == "scvi-tools" else sys.executable
        environment = os.environ | {f"{of}_NUM_THREADS": str(options.threads) for of in ("OMP", "MKL", "OPENBLAS")}
        with contextlib.suppress(subprocess.CalledProcessError), replacing(path) as temporary:
            given = temporary.with_suffix(".json")
            given.write_text(json.dumps(spec))
            command = [python, __file__, "--worker", json.dumps({"spec": str(given)}), str(temporary)]
            subprocess.run(command, env=environment, check=True)
        if not path.exists():
            print(f"{name}: failed; its own message stands above", file=sys.stderr)
            return None
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {"table": table.to_pandas(), "about": json.loads(table.schema.metadata[b"about"])}


def work(spec: dict[str, Any], out: Path) -> None:
    """Run one method on all pairs; write its table: pair, gene, lfc, score (of a ranking), called, method."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    spec = json.loads(Path(spec["spec"]).read_text())
    adata = ad.read_h5ad(spec["counts"])
    adata.var_names = [str(g) for g in range(adata.n_vars)]
    run = {"ours": _ours, "scvi-tools": _peer, "wilcoxon": _wilcoxon, "pydeseq2": _pydeseq2}[spec["method"]]
    frames, about = run(adata, spec)
    table = pa.Table.from_pandas(pd.concat(frames, ignore_index=True), preserve_index=False)
    pq.write_table(table.replace_schema_metadata({"about": json.dumps(about)}), out)


def _tidy(pair: str, gene: Any, lfc: Any, score: Any, called: Any, method: str) -> pd.DataFrame:
    gene = np.asarray(gene, dtype=str)
    frame = pd.DataFrame({"pair": pair, "gene": gene, "lfc": lfc, "score": score, "called": called, "method": method})
    return frame.astype({"lfc": float, "score": float, "called": bool})


def _ours(adata: ad.AnnData, spec: dict[str, Any]) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    import torch

    import scvi_core as sv
    from scvi_core.config import DeConfig

    torch.set_num_threads(spec["threads"])
    kept = Path(spec["fits"]) / f"{Path(spec['counts']).stem}.{spec['seed']}.{spec['code']}"
    if not kept.exists():
        sv.fit(adata, batch_key="batch", seed=spec["seed"], device="cpu", progress=False).save(kept)
    model, frames, about = sv.load(kept), [], {"seconds": {}}
    before = peak_mb()
    for compare in ("means", "cells"):
        config = DeConfig(compare=compare, delta=DELTA, fdr=FDR)
        began = time.perf_counter()
        if spec["pairs"] is None:
            found = {"": model.differential_expression(adata, "label", spec["seed"], config)}
        else:
            masks = {name: [np.isin(np.arange(adata.n_obs), rows) for rows in ab] for name, *ab in spec["pairs"]}
            found = {
                name: model.differential_expression(adata, seed=spec["seed"], config=config, cells=a, reference=b)
                for name, (a, b) in masks.items()
            }
        about["seconds"][compare] = time.perf_counter() - began
        for name, t in found.items():
            t["pair"] = name or t["group"]
            frames.append(_tidy(t["pair"], t["gene_id"], t["lfc_mean"], t["proba_de"], t["is_de"], compare))
    return frames, about | {"peak MB": peak_mb(), "MB before": before}


def _peer(adata: ad.AnnData, spec: dict[str, Any]) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    import scvi
    import torch

    torch.set_num_threads(spec["threads"])
    scvi.settings.seed = spec["seed"]
    kept = Path(spec["fits"]) / f"{Path(spec['counts']).stem}.{spec['seed']}.scvi-tools.pt"
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    if kept.exists():
        model.module.load_state_dict(torch.load(kept, weights_only=True))
        model.is_trained_ = True
        model.module.eval()
    else:
        model.train(accelerator="cpu", enable_progress_bar=False, logger=False)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.module.state_dict(), kept)
    before, frames = peak_mb(), []
    began = time.perf_counter()
    given = {"mode": "change", "delta": DELTA, "fdr_target": FDR, "silent": True}
    if spec["pairs"] is None:
        found = model.differential_expression(groupby="label", **given)
        found = {name: part for name, part in found.groupby("group1")}
    else:
        found = {name: model.differential_expression(idx1=a, idx2=b, **given) for name, a, b in spec["pairs"]}
    seconds = time.perf_counter() - began
    for name, t in found.items():
        frames.append(_tidy(name, t.index, t["lfc_mean"], t["proba_de"], t[f"is_de_fdr_{FDR}"], "scvi-tools"))
    return frames, {"seconds": {"scvi-tools": seconds}, "peak MB": peak_mb(), "MB before": before}


def _wilcoxon(adata: ad.AnnData, spec: dict[str, Any]) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    import scanpy as sc

    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    frames, began = [], time.perf_counter()
    for name, a, b in spec["pairs"] or [[label, None, None] for label in sorted(adata.obs["label"].unique())]:
        if a is None:
            part, key = adata, np.where(adata.obs["label"] == name, "a", "b")
        else:
            part, key = adata[[*a, *b]].copy(), np.repeat(["a", "b"], [len(a), len(b)])
        part.obs["side"] = pd.Categorical(key)
        sc.tl.rank_genes_groups(part, "side", groups=["a"], reference="b", method="wilcoxon", tie_correct=True)
        t = sc.get.rank_genes_groups_df(part, "a")
        called = (t["pvals_adj"] < FDR) & (t["logfoldchanges"].abs() > DELTA)
        frames.append(_tidy(name, t["names"], t["logfoldchanges"], t["scores"].abs(), called, "wilcoxon"))
    return frames, {"seconds": {"wilcoxon": time.perf_counter() - began}, "peak MB": peak_mb()}


def _pydeseq2(adata: ad.AnnData, spec: dict[str, Any]) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    """Sums over each side's cells of a batch; batch in the design where both sides share batches."""
    import io

    from pydeseq2.dds import DeseqDataSet
    from pydeseq2.ds import DeseqStats

    frames, began = [], time.perf_counter()
    everything = [[label, None, None] for label in sorted(adata.obs["label"].unique())]
    for name, a, b in spec["pairs"] or everything:
        if a is None:
            a, b = (np.flatnonzero((adata.obs["label"] == name) == side) for side in (True, False))
        sums, about = [], []
        for side, rows in (("a", a), ("b", b)):
            for batch, part in adata.obs["batch"].iloc[rows].groupby(adata.obs["batch"].iloc[rows], observed=True):
                if len(part) >= FEWEST:
                    at = adata.obs_names.get_indexer(part.index)
                    sums.append(np.asarray(adata.X[at].sum(0)).ravel())
                    about.append((side, str(batch)))
        about = pd.DataFrame(about, columns=["side", "batch"], index=[f"s{i}" for i in range(len(about))])
        if (about["side"].value_counts().reindex(["a", "b"]).fillna(0) < 2).any():
            continue
        both = about.groupby("batch")["side"].nunique()
        design = "~batch + side" if (both == 2).sum() >= 2 else "~side"
        if design != "~side":
            keep = about["batch"].isin(both.index[both == 2]).to_numpy()
            sums, about = [s for s, k in zip(sums, keep, strict=True) if k], about[keep]
        counts = pd.DataFrame(np.array(sums).astype(int), about.index, adata.var_names)
        seen = counts.columns[counts.sum() >= 10]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dds = DeseqDataSet(counts=counts[seen], metadata=about, design=design, quiet=True, n_cpus=1)
            dds.deseq2()
            stats = DeseqStats(dds, contrast=["side", "a", "b"], quiet=True, n_cpus=1)
            stats.summary()
        t = stats.results_df.reindex(adata.var_names)
        called = (t["padj"] < FDR) & (t["log2FoldChange"].abs() > DELTA)
        score = -np.log10(t["pvalue"].fillna(1).clip(1e-300))
        frames.append(_tidy(name, t.index, t["log2FoldChange"].fillna(0), score, called, "pydeseq2"))
    if not frames:
        frames = [_tidy([], [], [], [], [], "pydeseq2")]
    return frames, {"seconds": {"pydeseq2": time.perf_counter() - began}, "peak MB": peak_mb()}


# ---- what is shown


def _markdown(rows: pd.DataFrame) -> str:
    rows = rows.copy()
    if "seconds" in rows:
        rows["seconds"] = [s.get(m) for s, m in zip(rows["seconds"], rows["method"], strict=True)]
    numbers = [c for c in rows.columns if c not in ("dataset", "experiment", "seed", "method")]
    median = rows.groupby(["dataset", "method"], sort=False)[numbers].median()
    lines = ["| dataset | method | " + " | ".join(numbers) + " |", "|---|---|" + "---:|" * len(numbers)]
    for (dataset, method), row in median.iterrows():
        cells = ["-" if pd.isna(v) else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in row]
        lines.append(f"| {dataset} | {NAMES[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="+", type=Path, help="AnnData with raw counts in X")
    parser.add_argument("--experiments", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch-key", default="batch", help="cell column of the batch")
    parser.add_argument("--label", default="cell_type", help="cell column of known types")
    parser.add_argument("--genes", type=int, default=2000, help="most variable genes to take")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each method")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with scvi-tools")
    parser.add_argument("--out", type=Path, default=Path("results/de-benchmark"), help="folder of finished runs")
    parser.add_argument("--json", type=Path, help="also write every number here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
