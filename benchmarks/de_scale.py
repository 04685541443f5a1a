"""Differential expression on many cells: 20 groups against the rest, ours and scvi-tools, seconds and memory.

    python benchmarks/simulate.py hemato_tusi.h5ad --cells 100000 --genes 2000 --out sim.zarr
    python benchmarks/de_scale.py sim.zarr --peer-python PYTHON

Time does not depend on the weights, so both models have random ones and none is fitted. Groups are random too.
scvi-tools compares `--peer-groups` of them, and the time of all is extrapolated. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from train import peak_mb

from scvi_core.preprocess.store import read_store

GROUPS = 20


def main() -> None:
    options = _options()
    if options.worker:
        return work(options)
    print("| method | groups compared | seconds, of all groups | peak MB |\n|---|---:|---:|---:|")
    for method, python in (("ours", sys.executable), ("scvi-tools", options.peer_python)):
        command = [python, *sys.argv, "--worker", method]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
        print(f"| {method} | {found['groups']} | {found['seconds']:.1f} | {found['peak_mb']:,.0f} |", flush=True)


def work(options: argparse.Namespace) -> None:
    """One method; its figures as a line of JSON."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    n_groups, run = {"ours": (GROUPS, _ours), "scvi-tools": (options.peer_groups, _peer)}[options.worker]
    seconds = run(options, n_groups) * GROUPS / n_groups
    print(json.dumps({"groups": n_groups, "seconds": seconds, "peak_mb": peak_mb()}))


def _ours(options: argparse.Namespace, n_groups: int) -> float:
    from scvi_core.config import DeConfig, ModelConfig
    from scvi_core.counts import Schema
    from scvi_core.de import differential_expression
    from scvi_core.model import build
    from scvi_core.stream import open_counts

    adata = read_store(options.store, counts=False)
    schema = Schema.of(adata, "batch")
    counts = open_counts(options.store, adata, schema, 8.0)
    model = build(ModelConfig(), adata.n_vars, len(schema.batches), 0, 0).eval()
    ids, groups = list(schema.gene_ids), pd.Series(_groups(adata.n_obs), name="group")
    began = time.perf_counter()
    differential_expression(model, counts, groups, ids, ids, DeConfig(), 0)
    return time.perf_counter() - began


def _peer(options: argparse.Namespace, n_groups: int) -> float:
    import scvi

    adata = read_store(options.store)
    adata.X, adata.obs["group"] = adata.X.astype(np.float32), _groups(adata.n_obs)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    model.is_trained_ = True
    model.module.eval()
    some = [str(i) for i in range(n_groups)]
    began = time.perf_counter()
    model.differential_expression(groupby="group", group1=some, mode="change", silent=True)
    return time.perf_counter() - began


def _groups(n_cells: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, GROUPS, n_cells).astype(str)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="counts.zarr, as benchmarks/simulate.py or the workflow writes it")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with scvi-tools")
    parser.add_argument("--peer-groups", type=int, default=2, help=f"that scvi-tools compares, of {GROUPS}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each")
    parser.add_argument("--worker", choices=["ours", "scvi-tools"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
