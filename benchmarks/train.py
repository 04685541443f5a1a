"""Ours against scvi-tools in one run: time to fit, held-out likelihood, embedding and memory, on the same cells.

    python benchmarks/train.py COUNTS.h5ad [...] --seeds 0 1 2 --json train.json --plot train.png

A file holds raw counts in X, the batch in `--batch-key` (else there is one batch) and, to score the embedding, known
cell types in `--label`. Needs scvi-tools and scib-metrics: pip install scvi-core[peer], or --peer-python with the
Python of an environment that has them (and, for the embedding's scores, scvi-core).

Every fit runs alone in a fresh process, ours and the peer's by turns. Both train on the same nine tenths of the cells;
the rest, by one fixed permutation, serve for no choice of either. Finished fits are kept in `--out`, by content: the
same command goes on where it was, and prints again what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

# A fit's process imports, in its own function, what its own package needs: that is what its memory is the peak of.

SPLIT_SEED, HELD_OUT = 123, 0.1
SHORT = 10  # epochs of the run that times an epoch
N_DRAWS = 10  # of the held-out ELBO
N_WEIGHTS, N_WEIGHED = 100, 200  # importance samples of log p(x), and on how many held-out cells at most
KINDS = {"ours": "scvi-core", "peer": "scvi-tools"}
# header -> key, digits, and how the two methods are compared
COLUMNS = {
    "seconds": ("seconds", 1, "ratio"),
    "epochs": ("epochs", 0, None),
    f"seconds an epoch, batches of 128, {SHORT} epochs": ("epoch_seconds", 3, "ratio"),
    "held-out -ELBO": ("heldout_nelbo", 2, "difference"),
    "held-out log p(x)": ("marginal_ll", 2, "difference"),
    "seconds to the peer's ELBO": ("seconds_to_peer", 1, "ratio"),
    "peak MB": ("peak_mb", 0, "ratio"),
    "scIB bio": ("bio", 3, "difference"),
    "scIB batch": ("batch", 3, "difference"),
    "scIB total": ("total", 3, "difference"),
}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:  # this file, as the process of one fit
        return work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    options = _options()
    warnings.filterwarnings("ignore")
    from scvi_core.files import UserError

    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Fit everything, or find it fitted; print the table."""
    from scvi_core.files import sha256_file, write_json

    versions = _versions(options)
    rows, datasets = [], []
    for path in options.counts:
        data = prepare(path, options)
        made = _fits(data, options, versions)
        scores = _scored(data, made, options, versions)
        for (kind, seed), fit in made.items():
            rows.append(
                {"dataset": path.stem, "method": kind, "seed": seed} | fit["about"] | scores.get((kind, seed), {})
            )
        about = {"name": path.stem, "sha256": sha256_file(path), "prepared_sha256": sha256_file(data)}
        datasets.append(about | {key: rows[-1][key] for key in ("n_cells", "n_genes", "n_batches")})
    _overtaking(rows)
    names = {"ours": f"scvi-core {versions['scvi-core']}", "peer": f"scvi-tools {versions.get('scvi-tools')}"}
    print(_table(rows, names))
    if options.json:
        about = {
            "split_seed": SPLIT_SEED, "held_out": HELD_OUT, "threads": options.threads, "genes": options.genes,
            "max_epochs": options.max_epochs, "importance_samples": N_WEIGHTS, "importance_cells": N_WEIGHED,
            "elbo_draws": N_DRAWS, "versions": versions, "datasets": datasets, "results": rows,
        }  # fmt: skip
        write_json(options.json, about)
    if options.plot:
        _plot(rows, options.plot, names)


# In this process: data, the order of fits, scores.


def prepare(path: Path, options: argparse.Namespace) -> Path:
    """The cells and genes that all fits see, as a file; by content, made once."""
    from scvi_core.files import UserError, canonical_json, replacing, sha256_file, sha256_text

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    of = canonical_json([sha256_file(path), options.genes, options.batch_key, options.label])
    out = options.out / path.stem / f"counts.{sha256_text(of)[:12]}.h5ad"
    if not out.exists():
        import anndata as ad

        adata = ad.read_h5ad(path)
        columns = [c for c in (options.batch_key, options.label) if c in adata.obs]
        adata = ad.AnnData(adata.X, adata.obs[columns], adata.var[[]])
        adata.X = adata.X.astype(np.float32)
        adata = highly_variable(adata, options.genes, options.batch_key)
        with replacing(out) as temporary:
            adata.write_h5ad(temporary)
    return out


def highly_variable(adata: Any, n_genes: int, batch_key: str) -> Any:
    """The cells on at most `n_genes` genes, by scanpy's seurat_v3 ranking; without cells that have none of them."""
    import scanpy as sc

    if adata.n_vars > n_genes:
        adata = adata.copy()
        sc.pp.filter_genes(adata, min_cells=3)
        several = batch_key in adata.obs and adata.obs[batch_key].nunique() > 1
        given = {"n_top_genes": min(n_genes, adata.n_vars), "batch_key": batch_key if several else None}
        for span in (0.3, 0.5, 0.8):  # scanpy's default; wider where the loess of a small batch fails
            try:
                sc.pp.highly_variable_genes(adata, flavor="seurat_v3", span=span, **given)
                break
            except ValueError as error:
                if span == 0.8:
                    raise
                print(f"loess with span {span} failed ({error}); trying a wider one", file=sys.stderr)
        adata = adata[:, adata.var["highly_variable"].to_numpy()]
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    return type(adata)(adata.X, adata.obs, adata.var[[]])


def _fits(data: Path, options: argparse.Namespace, versions: dict[str, str]) -> dict[tuple[str, int], dict[str, Any]]:
    """(kind, seed) -> its fit. By turns, so that what else the machine does falls on both alike."""
    found = {}
    for seed, kind in itertools.product(options.seeds, options.methods):
        for short in (False, True):
            spec = {
                "kind": kind,
                "seed": seed,
                "short": short,
                "threads": options.threads,
                "batch_key": options.batch_key,
            }
            spec |= {"max_epochs": SHORT if short else options.max_epochs}
            fit = _cached(data, spec, options, _identity(kind, versions), f"{KINDS[kind]}, seed {seed}")
            if short:
                told = ("epoch_seconds", "epoch_seconds_all", "loads")
                found[kind, seed]["about"] |= {f"{k}_short" if k == "loads" else k: fit["about"][k] for k in told}
            else:
                found[kind, seed] = fit
    return found


def _scored(
    data: Path, made: dict[tuple[str, int], Any], options: argparse.Namespace, versions: dict[str, str]
) -> dict[tuple[str, int], dict[str, float]]:
    """scIB's scores by (kind, seed): in a process of their own, as scib-metrics may be in the peer's environment."""
    import anndata as ad

    if options.no_scib or options.label not in ad.read_h5ad(data, backed="r").obs:
        return {}
    if "scib-metrics" not in versions:
        print("no scIB scores: scib-metrics is not in the environment of --peer-python", file=sys.stderr)
        return {}
    spaces = {f"{kind} {seed}": str(fit["path"]) for (kind, seed), fit in made.items()}
    spec = {"kind": "scib", "spaces": spaces, "label": options.label, "batch_key": options.batch_key}
    scores = _cached(data, spec, options, [versions["scib-metrics"]], "scIB")["about"]["scores"]
    return {(kind, seed): scores[f"{kind} {seed}"] for kind, seed in made}


def _cached(
    data: Path, spec: dict[str, Any], options: argparse.Namespace, of: Any, name: str, script: str = __file__
) -> dict[str, Any]:
    """What a worker of `script` gives, kept in a file named by all that decides it."""
    from scvi_core.files import UserError, canonical_json, replacing, sha256_text

    digest = sha256_text(canonical_json([data.name, spec, of]))[:12]
    parts = [spec["kind"], spec.get("task"), "short" if spec.get("short") else None]
    stem = "-".join(filter(None, parts)) + (f".seed{spec['seed']}" if "seed" in spec else "")
    path = data.parent / f"{stem}.{digest}.npz"
    if not path.exists():
        print(f"{data.parent.name}: {name}{' (an epoch)' * spec.get('short', False)} ...", file=sys.stderr, flush=True)
        # OpenMP threads that spin briefly, then sleep, as scvi-core has them: long spinning would hurt the peer alone
        threads = {f"{of}_NUM_THREADS": str(options.threads) for of in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        environment = {"GOMP_SPINCOUNT": "20000"} | os.environ | threads
        python = sys.executable if spec["kind"] == "ours" else options.peer_python
        with replacing(path) as temporary:
            command = [python, script, "--worker", json.dumps(spec | {"counts": str(data)}), str(temporary)]
            done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
            if done.returncode:
                raise UserError(f"{data.parent.name}: {name} failed; its own message stands above")
    with np.load(path) as saved:
        return {"about": json.loads(str(saved["about"])), "path": path}


def _identity(kind: str, versions: dict[str, str]) -> list[Any]:
    """What else decides a fit than data, seed and threads: the code."""
    if kind == "peer":
        return [versions["scvi-tools"], versions["peer torch"]]
    from scvi_core.config import ModelConfig, TrainConfig
    from scvi_core.files import code_sha256

    return [code_sha256(), ModelConfig().model_dump(), TrainConfig().model_dump(), versions["torch"]]


def _versions(options: argparse.Namespace) -> dict[str, str]:
    """Versions of packages here and in the peer's environment."""
    from scvi_core.files import UserError

    here = _told(sys.executable, ["scvi-core", "torch", "numpy", "scanpy"])
    there = _told(options.peer_python, ["scvi-tools", "scib-metrics", "torch"])
    if "peer" in options.methods and "scvi-tools" not in there:
        raise UserError(f"--peer-python: {options.peer_python} has no scvi-tools; pip install scvi-core[peer]")
    if "torch" in there:
        there["peer torch"] = there.pop("torch")
    return here | there


def _told(python: str, names: list[str]) -> dict[str, str]:
    """Versions of those of the packages that a Python has."""
    from scvi_core.files import UserError

    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--peer-python: {python} does not run ({error})") from None
    return json.loads(done.stdout)


def _overtaking(rows: list[dict[str, Any]]) -> None:
    """Seconds until ours, measured after each epoch, is at the peer's final held-out ELBO of the same seed."""
    peers = {(row["dataset"], row["seed"]): row for row in rows if row["method"] == "peer"}
    for row in rows:
        peer = peers.get((row["dataset"], row["seed"]))
        if row["method"] == "peer":
            row["seconds_to_peer"] = row["seconds"]
        elif peer is not None:
            reached = [t for t, nelbo in row["curve"] if nelbo <= peer["heldout_nelbo"]]
            row["seconds_to_peer"] = reached[0] if reached else None  # None: never


# In a process of its own: one fit, or the scores.


def work(spec: dict[str, Any], out: Path) -> None:
    """Do what `spec` says and write it: a JSON text `about` and, of a whole fit, the latent space."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if spec["kind"] == "scib":
        about, latent = {"scores": _scib_scores(spec)}, np.empty(0)
    else:
        import anndata as ad
        import torch

        torch.set_num_threads(spec["threads"])
        adata = ad.read_h5ad(spec["counts"])
        spec["batch_key"] = spec["batch_key"] if spec["batch_key"] in adata.obs else None
        n_batches = adata.obs[spec["batch_key"]].nunique() if spec["batch_key"] else 1
        about = {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "n_batches": int(n_batches)}
        loads = [round(os.getloadavg()[0], 2)]
        told, latent = {"ours": _ours, "peer": _peer}[spec["kind"]](adata, spec)
        about |= told | {"loads": [*loads, round(os.getloadavg()[0], 2)]}  # of the machine, before and after
    with open(out, "wb") as handle:
        np.savez(handle, about=json.dumps(about), latent=latent)


def split(n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the cells to train on, and of those held out."""
    order = np.random.default_rng(SPLIT_SEED).permutation(n_cells)
    train, held = np.split(order, [int((1 - HELD_OUT) * n_cells)])
    return train, held


def _ours(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    import scvi_core as sv

    rows, held = split(adata.n_obs)
    fit = sv.fit  # imports what it needs, which is not part of a fit
    given = {"batch_key": spec["batch_key"], "seed": spec["seed"], "device": "cpu", "progress": False}
    if spec["short"]:  # nothing is held out, as the peer does not look at its held-out cells while training either
        cells = adata[rows].copy()
        config = sv.TrainConfig(max_epochs=spec["max_epochs"], batch_size=128)
        model = fit(cells, train=config, holdout=np.empty(0, np.int64), **given)
        return _epochs(model.history["seconds"]), np.empty(0)
    config = sv.TrainConfig(max_epochs=spec["max_epochs"]) if spec["max_epochs"] else None
    began = time.perf_counter()
    model = fit(adata, train=config, holdout=held, **given)
    seconds = time.perf_counter() - began
    peak = peak_mb()
    history = model.history
    # packing and building count from the start; the last cumulative time is then that of the whole fit
    at = seconds - history["seconds"].sum() + history["seconds"].cumsum()
    curve = [[round(float(t), 3), -round(float(e), 4)] for t, e in zip(at, history["validation_elbo"], strict=True)]
    weighed = adata[held[:N_WEIGHED]].copy()
    return {
        "seconds": seconds,
        "epochs": len(history),
        "heldout_nelbo": -float(model.elbo(adata[held].copy(), n_samples=N_DRAWS).mean()),
        "marginal_ll": float(model.marginal_log_likelihood(weighed, n_samples=N_WEIGHTS).mean()),
        "peak_mb": peak,
        "curve": curve,
        "batch_size": model.train.batch_size,
        "kernels": model.card.get("kernels"),
        "precision": model.card.get("precision"),
    }, model.latent(adata)


def _peer(adata: Any, spec: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """scvi-tools' SCVI, every setting its default but the split, which is ours."""
    import scvi
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def __init__(self):
            self.seconds = []

        def on_train_epoch_start(self, *_):
            self.began = time.perf_counter()

        def on_train_epoch_end(self, *_):
            self.seconds.append(time.perf_counter() - self.began)

    scvi.settings.seed = spec["seed"]
    rows, held = split(adata.n_obs)
    scvi.model.SCVI.setup_anndata(adata, batch_key=spec["batch_key"])
    model = scvi.model.SCVI(adata)
    clock = Clock()
    began = time.perf_counter()
    model.train(
        max_epochs=spec["max_epochs"],
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        callbacks=[clock] if spec["short"] else [],
        datasplitter_kwargs={"external_indexing": [rows, np.array([], dtype=int), held]},
    )
    seconds = time.perf_counter() - began
    if spec["short"]:
        return _epochs(clock.seconds), np.empty(0)
    peak = peak_mb()
    history = model.history or {}
    weighed = held[:N_WEIGHED]
    weights = {"indices": weighed, "n_mc_samples": N_WEIGHTS, "return_mean": True}
    return {
        "seconds": seconds,
        "epochs": len(history["elbo_train"]) if "elbo_train" in history else int(model.trainer.current_epoch),
        "heldout_nelbo": -float(np.mean([float(model.get_elbo(indices=held)) for _ in range(N_DRAWS)])),
        # one minibatch, as the mean it gives is one of minibatches' means
        "marginal_ll": float(model.get_marginal_ll(batch_size=len(weighed), **weights)),
        "peak_mb": peak,
        "batch_size": 128,
    }, model.get_latent_representation()


def _epochs(seconds: Any) -> dict[str, Any]:
    seconds = [float(s) for s in seconds]
    return {"epoch_seconds": statistics.median(seconds), "epoch_seconds_all": [round(s, 4) for s in seconds]}


def peak_mb() -> float:
    """The most memory this process has held so far, 10^6 bytes, the packages it imported included.

    Not by getrusage where it can be helped: Linux counts there what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _scib_scores(spec: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each space: bio, and with several batches batch and total, on the labelled cells."""
    import anndata as ad
    import pandas as pd
    from quality import _scib

    obs = ad.read_h5ad(spec["counts"], backed="r").obs
    labels = obs[spec["label"]].astype(object)
    known = ~labels.astype(str).isin(["", "nan", "None"]).to_numpy()
    if labels[known].nunique() < 2:
        return {name: {} for name in spec["spaces"]}
    batch = obs[spec["batch_key"]] if spec["batch_key"] in obs else pd.Series("all", obs.index)
    latents = {name: np.load(path)["latent"][known] for name, path in spec["spaces"].items()}
    found = _scib(latents, labels[known], batch[known])
    keys = {"bio": "Bio conservation", "batch": "Batch correction", "total": "Total"}
    if batch[known].nunique() < 2:
        keys = {"bio": "Bio conservation"}
    return {
        name: {key: float(found.loc[name, column]) for key, column in keys.items()}
        | {"scib": {str(k): float(v) for k, v in found.loc[name].items()}}
        for name in spec["spaces"]
    }


# What is shown.


def _table(rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Markdown: a row a dataset and method, and one that compares the two, seed by seed."""
    shown = {head: of for head, of in COLUMNS.items() if any(row.get(of[0]) is not None for row in rows)}
    lines = ["| dataset | method | " + " | ".join(shown) + " |", "|---|---|" + "---:|" * len(shown)]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = {kind: [r for r in rows if (r["dataset"], r["method"]) == (dataset, kind)] for kind in KINDS}
        some = next(r for r in rows if r["dataset"] == dataset)
        size = f"{dataset}: {some['n_cells']:,} x {some['n_genes']:,}, {some['n_batches']} batches"
        for kind in (k for k in KINDS if mine[k]):
            cells = [_cell([r.get(key) for r in mine[kind]], f"{{:.{digits}f}}") for key, digits, _ in shown.values()]
            lines.append(f"| {size} | {names[kind]} | " + " | ".join(cells) + " |")
            size = ""
        if all(mine.values()):
            pairs = [(a, b) for a in mine["ours"] for b in mine["peer"] if a["seed"] == b["seed"]]
            cells = [_compared(pairs, *of) for of in shown.values()]
            lines.append("| | peer / ours, or ours - peer | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compared(pairs: list[tuple[dict, dict]], key: str, digits: int, how: str | None) -> str:
    if how is None or all(a.get(key) is None for a, _ in pairs) or any(b.get(key) is None for _, b in pairs):
        return ""
    if how == "ratio":
        return _cell([a.get(key) and b[key] / a[key] for a, b in pairs], "{:.1f}x")
    return _cell([None if a.get(key) is None else a[key] - b[key] for a, b in pairs], f"{{:+.{digits}f}}")


def _cell(values: list[float | None], form: str) -> str:
    """Median and range; how often there was none, where there sometimes was."""
    have = [v for v in values if v is not None]
    if not have:
        return "-"
    low, middle, high = (form.format(v) for v in (min(have), statistics.median(have), max(have)))
    text = middle if low == high else f"{middle} ({low} to {high})"
    return text if len(have) == len(values) else f"{text}; never in {len(values) - len(have)} of {len(values)}"


def _plot(rows: list[dict[str, Any]], path: Path, names: dict[str, str]) -> None:
    """Held-out ELBO against seconds, a panel a dataset: ours as it trains, a line a seed; the peer's fits as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scvi_core.files import replacing
    from scvi_core.report.style import style

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    wide = min(3, len(datasets))
    high = -(-len(datasets) // wide)
    with matplotlib.rc_context(style() | {"text.parse_math": True}):  # powers of ten
        figure, axes = plt.subplots(high, wide, figsize=(3.6 * wide, 2.9 * high), squeeze=False, layout="constrained")
        for axis in axes.flat[len(datasets) :]:
            axis.axis("off")
        for axis, dataset in zip(axes.flat, datasets, strict=False):
            seen, first = [], {}
            for row in (r for r in rows if r["dataset"] == dataset):
                kind = row["method"]
                label, first[kind] = None if kind in first else names[kind], True
                if kind == "ours":
                    curve = np.array(row["curve"])
                    axis.plot(*curve.T, color="#0072B2", linewidth=1.2, label=label)
                    seen += list(curve[len(curve) // 10 :, 1])  # the first epochs would hide all that follows
                else:
                    point = row["seconds"], row["heldout_nelbo"]
                    axis.plot(*point, "o", color="#D55E00", markersize=5, label=label)
                    axis.axhline(point[1], color="#D55E00", linewidth=0.6, linestyle=":")
                    seen.append(point[1])
            if seen:
                room = 0.05 * (max(seen) - min(seen)) or 1.0
                axis.set_ylim(min(seen) - room, max(seen) + room)
            axis.set(title=dataset, xscale="log", xlabel="seconds of the fit", ylabel="held-out -ELBO, nats a cell")
        axes.flat[0].legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
        plt.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=Path, nargs="+", help="AnnData files with raw counts in X")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--genes", type=int, default=2000, help="where a file has more, that many variable ones")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, the same for both")
    parser.add_argument("--batch-key", default="batch", help="cell column with the batch; ignored where there is none")
    parser.add_argument(
        "--label", default="cell_type", help="cell column with the known cell types, where there is one"
    )
    parser.add_argument("--methods", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--no-scib", action="store_true", help="leave the embeddings unscored")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scvi-tools; default: this one")
    parser.add_argument("--max-epochs", type=int, help="of both fits, to try this script; default: each one's own rule")
    parser.add_argument("--out", type=Path, default=Path("results/train-benchmark"), help="folder that keeps the fits")
    parser.add_argument("--json", type=Path, help="also write every number, seed by seed, here")
    parser.add_argument("--plot", type=Path, help="also draw the held-out ELBO against seconds here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
