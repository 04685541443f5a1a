"""Quality control: types that the limits drop, doublets found and called, cells told from empty droplets, ambient RNA.

    python benchmarks/qc.py ../shared/data/*.h5ad --seeds 0 1 2 --peers /path/to/venv/bin/python
    python benchmarks/qc.py baron_human_pancreas.h5ad --sizes 1000 10000 100000

Sets are of raw counts with `obs.cell_type`. Parts, all of them unless `--parts` picks some:

limits     each batch as it is; with damaged cells (10 to 50 % of the counts left, 12 to 60 % mitochondrial); as a panel
           of 1,000 genes; as nuclei; and with 15 cells of a type that secretes, is large, small, red, or rich in
           mitochondria. Told are the type of ten cells or more that loses most, undamaged, and the damaged dropped.
doublets   a planted doublet is the sum of two cells that then leave the set, or their mean with noise of library size
           (`--made mean`): of two types, or of one (`--same`), which no method finds. Each cell has one part at most.
           With `--given` each method is told the planted rate. Real doublets that a set holds count as cells.
droplets   cells with 5 and 20 % of ambient RNA, some of them small, among 20,000 empty droplets of up to 600 counts.
ambient    cells of human and mouse in one run, whose ambient share is known by the other's genes.

Peers run by the interpreter that `--peers` names, in processes of their own: Scrublet as scanpy calls it,
pyscdblfinder, doubletdetection. One that cannot be imported there is left out, with the reason.

With `--sizes` samples of many cells are drawn from the set instead, a Poisson draw around a random cell of it, 6 %
planted, and judged by the command itself in a process of its own. OMP_NUM_THREADS=1 keeps threads from competing.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import average_precision_score

from scvi_core.files import seal

MEASURED = """
import resource, sys
from scvi_core.cli import main
sys.argv[1:1] = ["qc"]
try:
    main()
finally:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(spent.ru_utime + spent.ru_stime, peak / 1e6)
"""


PARTS = ("limits", "doublets", "droplets", "ambient")
PEERS = {  # what gives (scores, calls) of `counts`, cells x genes, at the share `rate` or None
    "scrublet": """
import anndata, scanpy
cells = anndata.AnnData(counts.astype("float32"))
told = {} if rate is None else {"expected_doublet_rate": rate}
scanpy.pp.scrublet(cells, random_state=seed, use_approx_neighbors=False, verbose=False, **told)
score = cells.obs["doublet_score"].to_numpy()
called = cells.obs["predicted_doublet"].fillna(False).to_numpy(bool) if "predicted_doublet" in cells.obs else score > 2
""",
    "pyscdblfinder": """
import pyscdblfinder
found = pyscdblfinder.sc_dbl_finder(counts.T.tocsr(), dbr=rate, random_state=seed, progress=False).table
found = found[found["type"] == "real"]
score, called = found["score"].to_numpy(), (found["class"] == "doublet").to_numpy()
""",
    "doubletdetection": """
import doubletdetection
found = doubletdetection.BoostClassifier(n_iters=10, random_state=seed, verbose=False, n_jobs=1).fit(counts)
called, score = found.predict() == 1, found.doublet_score().filled(0)
""",
}
PEER = """
import sys, warnings
import numpy, scipy.sparse
warnings.filterwarnings("ignore")
source, target, rate, seed = sys.argv[1:]
counts, rate, seed = scipy.sparse.load_npz(source), float(rate) if rate else None, int(seed)
{method}
numpy.savez(target, score=score, called=called)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, help="h5ad of raw counts, with obs.cell_type")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.06, 0.12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", type=Path, help="the Python of an environment with the peers")
    parser.add_argument("--methods", nargs="+", choices=PEERS, default=list(PEERS), help="of the peers")
    parser.add_argument("--given", action="store_true", help="tell each method the planted rate")
    parser.add_argument("--same", action="store_true", help="also doublets of one type")
    parser.add_argument("--made", choices=("sum", "mean"), default="sum", help="how two cells become a doublet")
    parser.add_argument("--cells", nargs="+", type=int, default=[1_000_000], help="at most so many of a set, at random")
    parser.add_argument("--sizes", nargs="+", type=int, help="judge drawn samples of so many cells by scvi-core qc")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("scvi_core").setLevel(logging.ERROR)
    if options.sizes:
        rows = []
        for path in options.sets:
            counts, types, _ = read(path, None, 0)
            rows += [{"set": path.stem} | cost(counts, types, n, seed) for seed in options.seeds for n in options.sizes]
        print(pd.DataFrame(rows).to_string(index=False))
        return
    sets = [path for path in options.sets if labelled(path)]
    for part in options.parts:
        print(f"\n{part}", flush=True)
        globals()[f"{part}_part"](sets, options)


def labelled(path: Path) -> bool:
    with h5py.File(path) as file:
        found = "cell_type" in file["obs"]
    if not found:
        print(f"{path.stem} is left out: it has no obs.cell_type", file=sys.stderr)
    return found


def doublets_part(sets: list[Path], options: argparse.Namespace) -> None:
    methods = {"own": own} | usable_peers(options.peers, options.methods)
    rows = []
    for path in sets:
        for seed in options.seeds:
            for cells in options.cells:
                counts, types, _ = read(path, cells, seed)
                for rate in options.rates:
                    about = {"set": path.stem, "cells": cells, "seed": seed}
                    rows += [about | row for row in compare(counts, types, rate, seed, methods, options)]
    table = pd.DataFrame(rows)
    numbers = [c for c in ("ap", "ap_same_type", "called", "cpu_s") if c in table]
    print(table.groupby(["set", "cells", "rate", "method"])[numbers].mean().unstack("method").round(3).to_string())
    table["within_1.5"] = table["called"].between(1 / 1.5, 1.5)
    told = [*numbers, "within_1.5"]
    print("\ncalled: cells called, as a multiple of the planted")
    print(table.groupby(["cells", "rate", "method"])[told].mean().round(3).to_string())
    print(table.groupby("method")[told].mean().round(3).to_string())


def usable_peers(python: Path | None, methods: list[str]) -> dict:
    if python is None:
        print("peers are left out: --peers names no environment", file=sys.stderr)
        return {}
    found = {}
    for name, method in ((name, PEERS[name]) for name in methods):
        package = method.split("import ", 1)[1].split("\n")[0]
        code = f"import {package}{', skimage' if name == 'scrublet' else ''}"
        tried = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if tried.returncode:
            print(f"{name} is left out: {tried.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            found[name] = functools.partial(peer, python, method)
    return found


def peer(python: Path, method: str, counts: sp.csr_matrix, rate: float | None, seed: int):
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "counts.npz", Path(folder) / "found.npz"
        sp.save_npz(source, counts)
        words = [python, "-c", PEER.format(method=method), source, target, "" if rate is None else str(rate), str(seed)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"a peer failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return np.full(counts.shape[0], np.nan), np.zeros(counts.shape[0], bool)
        with np.load(target) as found:
            return found["score"], found["called"]


def read(path: Path, n: int | None, seed: int) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Counts and types of the cells that have one, or of `n` of them; genes."""
    adata = ad.read_h5ad(path)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isin(types, ["nan", "unlabelled"])))[:n]
    return sp.csr_matrix(adata.X)[rows].astype(np.int64), types[rows], adata.var_names.to_numpy(str)


def plant(counts: sp.csr_matrix, types: np.ndarray, rate: float, seed: int, same: bool = False, made: str = "sum"):
    """The set with a share `rate` of doublets, of cells of the same type or of two; which rows they are."""
    rng = np.random.default_rng(seed)
    wanted = max(1, round(rate * len(types) / (1 + rate)))
    free, pairs = list(rng.permutation(len(types))), []
    while len(pairs) < wanted and len(free) > 1:
        a = free.pop()
        at = next((i for i in range(len(free) - 1, -1, -1) if (types[free[i]] == types[a]) == same), None)
        if at is not None:
            pairs.append((a, free.pop(at)))
    first, second = np.array(pairs).T
    both = counts[first] + counts[second]
    if made == "mean":
        both = thinned(both, np.minimum(0.5 * rng.lognormal(0, 0.3, len(pairs)), 1), rng)
    single = np.setdiff1d(np.arange(len(types)), pairs)
    order = rng.permutation(len(single) + len(pairs))
    return sp.vstack([counts[single], both], format="csr")[order], order >= len(single)


def thinned(counts: sp.csr_matrix, share, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of which a share, of each cell or of all, is left."""
    counts = counts.tocsr().copy()
    each = np.repeat(share, np.diff(counts.indptr)) if np.ndim(share) else share
    counts.data = rng.binomial(counts.data.astype(np.int64), each)
    counts.eliminate_zeros()
    return counts


def compare(counts, types, rate: float, seed: int, methods: dict, options: argparse.Namespace) -> list[dict]:
    planted, truth = plant(counts, types, rate, seed, made=options.made)
    given = truth.mean() if options.given else None
    rows = []
    for name, method in methods.items():
        began = os.times()
        score, called = method(planted, given, seed)
        spent = sum(b - a for a, b in zip(began[:4], os.times()[:4], strict=True))  # children's, too
        row = {"rate": rate, "method": name, "cpu_s": spent, "ap": np.nan, "called": called.sum() / truth.sum()}
        if np.isfinite(score).all():
            row["ap"] = average_precision_score(truth, score)
        if options.same:
            alike, of_one_type = plant(counts, types, rate, seed, same=True, made=options.made)
            score = method(alike, given, seed)[0]
            row["ap_same_type"] = average_precision_score(of_one_type, score) if np.isfinite(score).all() else np.nan
        rows.append(row)
    return rows


def own(counts: sp.csr_matrix, rate: float | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from scvi_core.config import QcConfig
    from scvi_core.preprocess.qc import qc

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.h5ad"
        write(path, counts.shape[1], [counts])
        frame, _ = qc(path, QcConfig(drop=(), cell_cycle=False, cells="all", expected_doublet_rate=rate), seed)
    return frame["doublet_score"].to_numpy(), frame["predicted_doublet"].to_numpy()


def limits_part(sets: list[Path], options: argparse.Namespace) -> None:
    rows = []
    for path in sets:
        batches = ad.read_h5ad(path, backed="r").obs["batch"].astype(str).to_numpy()
        for seed in options.seeds:
            adata = ad.read_h5ad(path)
            types = adata.obs["cell_type"].astype(str).to_numpy()
            for batch in np.unique(batches):
                mine = (batches == batch) & ~np.isin(types, ["nan", "unlabelled"])
                if mine.sum() < 200:
                    continue
                rng = np.random.default_rng(seed)
                names, counts = adata.var_names.to_numpy(str), sp.csr_matrix(adata.X)[mine].astype(np.int64)
                for name, changed, genes, hurt, rare in variants(counts, types[mine], names, rng):
                    found = judged(changed, genes, seed)["keep"].to_numpy()
                    lost = {kind: 1 - found[of].mean() for kind in np.unique(types[mine])
                            if (of := (np.where(rare, "rare", types[mine]) == kind) & ~hurt).sum() >= 10}  # fmt: skip
                    lost |= {"rare": 1 - found[rare].mean()} if rare.any() else {}
                    kind = max(lost, key=lost.get)
                    dropped = 1 - found[hurt].mean() if hurt.any() else np.nan
                    rows.append(
                        {"variant": name, "set": path.stem, "type": kind, "lost": lost[kind], "damaged": dropped}
                    )
    table = pd.DataFrame(rows)
    worst = table.loc[table.groupby("variant", sort=False)["lost"].idxmax()].set_index("variant")[
        ["set", "type", "lost"]
    ]
    worst["mean_lost"] = table.groupby("variant")["lost"].mean()
    worst["damaged_dropped"] = table.groupby("variant")["damaged"].mean()
    worst["lowest"] = table.groupby("variant")["damaged"].min()
    print(worst.round(3).to_string())


def variants(counts, types, names, rng):
    """(name, counts, genes, which are damaged, which are of the changed type)."""
    from scvi_core.preprocess.qc import in_group

    mito = in_group("mitochondrial", names, names)
    total, none = np.asarray(counts.sum(axis=1)).ravel(), np.zeros(len(types), dtype=bool)
    yield "as it is", counts, names, none, none
    if counts.shape[1] < 5000:
        return
    genes = rng.permutation(np.flatnonzero(~mito & (np.asarray(counts.mean(axis=0)).ravel() > 0.02)))
    yield "panel", counts[:, np.sort(genes[:1000])], names[np.sort(genes[:1000])], none, none
    if mito.sum() < 10:  # a set without: 13 genes with 3 %
        names = np.concatenate([names[~mito], [f"MT-ND{i}" for i in range(1, 14)]])
        share = rng.beta(3, 97, len(types))
        added = rng.multinomial(rng.poisson(total * share / (1 - share)), np.full(13, 1 / 13))
        counts = sp.hstack([counts[:, ~mito], sp.csr_matrix(added)], format="csr")
        mito = np.isin(np.arange(len(names)), np.arange(len(names) - 13, len(names)))
    others, of_mito = sp.csr_matrix(counts[:, ~mito]), counts[:, mito].toarray()
    total = np.asarray(others.sum(axis=1)).ravel()

    def joined(others, of_mito):
        return sp.hstack([others, sp.csr_matrix(of_mito)], format="csr"), np.append(names[~mito], names[mito])

    def damage(others, of_mito, spare=none, share=0.08):
        hurt = (rng.random(len(types)) < share) & ~spare
        left = thinned(others, np.where(hurt, rng.uniform(0.1, 0.5, len(types)), 1), rng)
        odds = rng.uniform(0.12, 0.6, len(types))
        many = rng.poisson(np.asarray(left.sum(axis=1)).ravel() * odds / (1 - odds))
        raised = rng.multinomial(many, (of_mito.sum(axis=0) + 1) / (of_mito.sum() + mito.sum()))
        return *joined(left, np.where(hurt[:, None], raised, of_mito)), hurt

    yield "8 % damaged", *damage(others, of_mito), none
    yield "30 % damaged", *damage(others, of_mito, share=0.3), none
    within = np.where(in_group("ribosomal", names, names)[~mito], 0.03, 0.35)
    nuclei = others.tocsc()
    nuclei.data = rng.binomial(nuclei.data, np.repeat(within, np.diff(nuclei.indptr)))
    stay = in_group("nuclear", names, names)[~mito]
    if stay.any():
        nuclei = nuclei.tolil()
        nuclei[:, np.flatnonzero(stay)[0]] = rng.poisson(0.02 * total + 1)[:, None]
    nuclei = sp.csr_matrix(nuclei)
    nuclei.eliminate_zeros()
    yield "nuclei", *joined(nuclei, rng.binomial(of_mito, 0.03)), none, none

    kinds = pd.Series(types).value_counts()
    rare = np.zeros(len(types), dtype=bool)
    rare[rng.permutation(np.flatnonzero(types == kinds.index[min(1, len(kinds) - 1)]))[:15]] = True
    own = thinned(others, np.where(rare, 0.3, 1), rng).tolil()
    for row in np.flatnonzero(rare):
        own[row, genes[:6] % others.shape[1]] = rng.multinomial(int(0.7 * total[row]), rng.dirichlet(np.full(6, 2)))
    yield "15 that secrete", *damage(sp.csr_matrix(own), of_mito, rare), rare
    large = others.copy()
    large.data = large.data * np.repeat(np.where(rare, 8, 1), np.diff(large.indptr))
    yield "15 large", *damage(large, of_mito * np.where(rare, 8, 1)[:, None], rare), rare
    small = thinned(others, np.where(rare & (total > 2000), 0.125, 1), rng)
    yield (
        "15 small",
        *damage(small, rng.binomial(of_mito, np.where(rare & (total > 2000), 0.125, 1)[:, None]), rare),
        rare,
    )
    blood = np.flatnonzero(in_group("haemoglobin", names, names)[~mito])
    if len(blood):
        red = thinned(others, np.where(rare, 80 / np.maximum(total, 80), 1), rng).tolil()
        for row in np.flatnonzero(rare):
            red[row, blood[:3]] = rng.poisson(1500 / len(blood[:3]), len(blood[:3]))
        yield "15 red", *damage(sp.csr_matrix(red), of_mito, rare), rare
    # all of a type that is unlike others, as a type is not that differs in its mitochondria alone
    apart = types == distinct(others, types)
    raised = np.where(apart[:, None], rng.poisson(of_mito * 8), of_mito)
    yield "rich in mitochondria", *damage(others, raised, apart), apart


def distinct(counts: sp.csr_matrix, types: np.ndarray) -> str:
    """The type of ten cells or more, no smaller than most, whose profile correlates least with any other's."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    kinds = [kind for kind in np.unique(types) if (of := types == kind).sum() >= 10
             and np.median(total[of]) >= 0.7 * np.median(total)]  # fmt: skip
    means = np.log1p(
        np.stack([1e4 * (s := np.asarray(counts[types == k].sum(axis=0)).ravel()) / s.sum() for k in kinds])
    )
    close = np.corrcoef(means) - 2 * np.eye(len(kinds))
    return kinds[int(close.max(axis=1).argmin())] if len(kinds) > 1 else kinds[0]


def judged(counts: sp.csr_matrix, names: np.ndarray, seed: int) -> pd.DataFrame:
    from scvi_core.config import QcConfig
    from scvi_core.preprocess.qc import qc

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "counts.h5ad", counts.shape[1], [counts], names)
        return qc(Path(folder) / "counts.h5ad", QcConfig(doublets=False, cell_cycle=False), seed)[0]


def ambient_rna(profile: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """(droplets, genes) draws of so many counts each."""
    rows = np.repeat(np.arange(len(totals)), totals)
    genes = rng.choice(len(profile), p=profile, size=len(rows))
    found = sp.csr_matrix((np.ones(len(rows), dtype=np.int64), (rows, genes)), shape=(len(totals), len(profile)))
    found.sum_duplicates()
    return found


def raw_droplets(counts, share: float, rng, n_empty: int = 20_000, depths=((1, 0.5, 0.2, 0.1), (0.6, 0.2, 0.1, 0.1))):
    """(counts of cells with ambient RNA, then of empty droplets; the ambient counts of cells)."""
    profile = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    cells = thinned(counts, (1 - share) * rng.choice(depths[0], counts.shape[0], p=depths[1]), rng)
    soup = ambient_rna(profile / profile.sum(), rng.poisson(cells.sum(axis=1).A1 * share / (1 - share)), rng)
    totals = rng.geometric(1 / 20, n_empty) + rng.choice([0, 40, 150], n_empty, p=[0.8, 0.15, 0.05])
    empty = ambient_rna(profile / profile.sum(), np.minimum(totals, 600), rng)
    return sp.vstack([cells + soup, empty], format="csr"), soup


def told(droplets: sp.csr_matrix, seed: int):
    from scvi_core.preprocess.droplets import barcode_ranks, find_cells

    totals = np.asarray(droplets.sum(axis=1)).ravel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.h5ad"
        write(path, droplets.shape[1], [droplets])
        began = time.process_time()
        found = find_cells(path, np.arange(len(totals)), totals, barcode_ranks(totals), seed)
    return totals, found, time.process_time() - began


def droplets_part(sets: list[Path], options: argparse.Namespace) -> None:
    rows = []
    for path in sets:
        for seed in options.seeds:
            counts, types, _ = read(path, 2000, seed)
            if counts.shape[1] < 5000:
                continue
            for share in (0.05, 0.2):
                droplets, soup = raw_droplets(counts, share, np.random.default_rng(seed))
                totals, found, spent = told(droplets, seed)
                real = np.arange(len(totals)) < len(types)
                row = {"set": path.stem, "share": share, "kept_200": found.cell[real & (totals >= 200)].mean()}
                row["kept_100_to_200"] = found.cell[real & (totals >= 100) & (totals < 200)].mean()
                row["false"] = (found.cell & ~real).sum() / found.cell.sum()
                row |= {"estimated": found.share, "true": soup.sum() / totals[real].sum(), "cpu_s": spent}
                rows.append(row)
    table = pd.DataFrame(rows)
    print("kept_200: of cells with 200 counts or more; estimated includes what ambient RNA a set had before")
    print(table.groupby(["set", "share"]).mean().round(4).to_string())


def ambient_part(sets: list[Path], options: argparse.Namespace) -> None:
    human = [path for path in sets if "human" in path.stem or "pbmc" in path.stem]
    mouse = [path for path in sets if "mouse" in path.stem or "tusi" in path.stem]
    rows = []
    for a, b in [(a, b) for a in human for b in mouse]:
        for seed in options.seeds:
            (one, _, _), (two, _, _) = read(a, 800, seed), read(b, 800, seed)
            if min(one.shape[1], two.shape[1]) < 5000:
                continue
            for share in (0.02, 0.05, 0.1, 0.2):
                rng = np.random.default_rng(seed)
                counts = sp.block_diag([one, two], format="csr")
                droplets, soup = raw_droplets(counts, share, rng, depths=((1, 0.5), (0.5, 0.5)))
                totals, found, _ = told(droplets, seed)
                true = soup.sum() / totals[: counts.shape[0]].sum()
                rows.append({"sets": f"{a.stem} + {b.stem}", "share": share, "true": true, "estimated": found.share})
    table = pd.DataFrame(rows)
    if len(table):
        table["off"] = (table["estimated"] - table["true"]).abs()
        print(
            table.groupby(["sets", "share"])
            .agg({"true": "mean", "estimated": "mean", "off": "max"})
            .round(4)
            .to_string()
        )
    else:
        print("left out: no set of human and of mouse cells among those given")


def write(path: Path, n_genes: int, blocks, names: np.ndarray | None = None) -> None:
    """A counts.h5ad as `scvi-core ingest` writes it, block of cells by block."""
    with h5py.File(path, "w") as file:
        empty = sp.csr_matrix((0, n_genes), dtype=np.uint16)
        uns = {"sample": "s", "gene_ids": "symbol", "organism": "unknown", "content_sha256": ""}
        names = [f"g{i}" for i in range(n_genes)] if names is None else list(names)
        var = pd.DataFrame({"gene_name": names}, index=names)
        ad.io.write_elem(file, "/", ad.AnnData(empty, var=var, uns=uns))
        X, indptr = file["X"], [0]
        kind = {"data": np.uint16, "indices": np.int32}
        for name, dtype in kind.items():
            del X[name]
            X.create_dataset(
                name, (0,), dtype, maxshape=(None,), chunks=(1 << 16,), compression="gzip", compression_opts=1
            )
        for block in blocks:
            last = indptr[-1]
            for name in kind:
                X[name].resize((last + block.nnz,))
                X[name][last:] = getattr(block, name)
            indptr += list(last + block.indptr[1:].astype(np.int64))
        del X["indptr"], file["obs"]
        X["indptr"] = np.array(indptr)
        n = len(indptr) - 1
        X.attrs["shape"] = (n, n_genes)
        cells = [f"c{i}" for i in range(n)]
        same = {column: pd.Categorical.from_codes(np.zeros(n, np.int8), ["s"]) for column in ("sample", "batch")}
        ad.io.write_elem(file, "obs", pd.DataFrame({"barcode": cells, **same}, index=cells))
    seal(path, append=True)


def cost(counts: sp.csr_matrix, types: np.ndarray, n: int, seed: int, rate: float = 0.06) -> dict:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < rate
    numbers = pd.factorize(types)[0]

    def draw():
        for start in range(0, n, 2000):
            doublet = truth[start : start + 2000]
            first, second = rng.integers(len(types), size=(2, len(doublet)))
            while (alike := doublet & (numbers[first] == numbers[second])).any():
                second[alike] = rng.integers(len(types), size=alike.sum())
            block = (counts[first] + sp.diags(doublet.astype(np.int64)) @ counts[second]).tocsr()
            block.data = rng.poisson(block.data)
            block.eliminate_zeros()
            block.sort_indices()
            yield block

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "counts.h5ad", Path(folder) / "qc.parquet"
        write(path, counts.shape[1], draw())
        with h5py.File(path) as file:
            stored = file["X/data"].shape[0]
        command = [sys.executable, "-c", MEASURED, path, "--out", out, "--figure", out.with_suffix(".png")]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        frame = pd.read_parquet(out)
    row = {"cells": n, "counts_1e6": round(stored / 1e6, 1), "cpu_s": float(told[0]), "peak_GB": float(told[1])}
    scored = frame["doublet_score"].notna().to_numpy()
    row["ap"] = average_precision_score(truth[scored], frame["doublet_score"][scored]) if scored.any() else np.nan
    return row | {"called": frame["predicted_doublet"].sum() / truth.sum()}


if __name__ == "__main__":
    main()
