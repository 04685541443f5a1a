"""Counts as large as wanted: drawn cell by cell from a model fitted to real ones.

    python benchmarks/simulate.py COUNTS.h5ad --cells 1300000 --genes 720 --out sim.zarr

Fits scvi-core to the most variable genes, then draws each cell from the model: the latent state of a random real cell
from its posterior, a little beside it; that cell's batch, its library size within some percent, and ZINB counts. An
`--out` that ends in .zarr is a store as the workflow's (`scvi-core train --store`), one in .h5ad is AnnData. Cells are
drawn in blocks and wait on disk, so memory does not grow with them. The same model and seed give the same cells.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from train import highly_variable, peak_mb

import scvi_core as sv
from scvi_core.files import UserError, canonical_json, replacing, sha256_text
from scvi_core.log import log
from scvi_core.preprocess.store import ZARR_CHUNK, _create, _seal

MODEL = sv.ModelConfig(likelihood="zinb", dispersion="gene", library="observed")  # what `draw` draws from
TILE = 1 << 22  # cells x genes drawn at a time
LARGEST = 2**16 - 1  # a count; larger ones, of which a model fitted to sound data draws none, are cut


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    log.setLevel(logging.WARNING)
    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Fit or load the model, draw the cells, write them."""
    if options.out.suffix not in (".zarr", ".h5ad"):
        raise UserError(f"--out: {options.out} ends neither in .zarr nor in .h5ad")
    if options.cells < 1:
        raise UserError(f"--cells: {options.cells} is less than 1")
    adata = ad.read_h5ad(options.counts)
    if options.batch_key not in adata.obs:
        adata.obs[options.batch_key] = "all"
    adata = ad.AnnData(adata.X, adata.obs[[options.batch_key]].astype(str), adata.var[[]])
    adata = highly_variable(adata, options.genes, options.batch_key)
    if adata.n_vars < options.genes:
        raise UserError(f"{options.counts}: {adata.n_vars} genes; ask for --genes {adata.n_vars} or fewer")
    model = _model(adata, options)
    with tempfile.TemporaryDirectory(prefix=".simulate.", dir=_folder(options.out)) as folder:
        drawn = draw(model, adata, options.cells, options.seed, Path(folder))
        write = {".zarr": _write_zarr, ".h5ad": _write_h5ad}[options.out.suffix]
        with replacing(options.out, "STORE" if options.out.suffix == ".zarr" else None) as temporary:
            write(temporary, drawn, model)
    size, density = drawn["indptr"][-1], drawn["indptr"][-1] / options.cells / options.genes
    print(
        f"{options.out}: {options.cells:,} cells x {options.genes:,} genes, {size:,} entries (density {density:.3f}), "
        f"the largest count {drawn['largest']}; peak memory {peak_mb():,.0f} MB",
        file=sys.stderr,
    )


def _model(adata: ad.AnnData, options: argparse.Namespace) -> sv.Model:
    """The model to draw from: that of `--model` if it is there, else fitted now, and kept there."""
    if options.model is not None and options.model.exists():
        try:
            model = sv.load(options.model)
            if model.gene_ids == list(map(str, adata.var_names)) and model.schema.batch_key == options.batch_key:
                return model
            print(f"{options.model}: of other genes or another batch column; fitted anew", file=sys.stderr)
        except UserError as error:  # such as one of an earlier version's format
            print(f"{error}\nfitted anew", file=sys.stderr)
    train = sv.TrainConfig(max_epochs=options.epochs) if options.epochs else None
    print(f"fitting {adata.n_obs:,} cells x {adata.n_vars:,} genes ...", file=sys.stderr, flush=True)
    model = sv.fit(adata, options.batch_key, model=MODEL, train=train, seed=0, device="cpu", progress=False)
    if options.model is not None:
        model.save(options.model)
    return model


@torch.inference_mode()
def draw(model: sv.Model, adata: ad.AnnData, n_cells: int, seed: int, folder: Path) -> dict[str, Any]:
    """Draw cells; their counts and genes go to two files in `folder`, the rest comes back.

    Returns
    -------
    indptr : (cells + 1,) where each cell begins in the files. batch : (cells,) codes. total : (cells,) library sizes.
    largest : count. data, indices : the files and their types.
    """
    counts = model._counts(adata)
    blocks = [counts.gather(rows) for rows in torch.arange(len(counts)).split(1024)]
    q = [model.network.encode(cells) for cells in blocks]
    mean_nk, variance_nk = torch.cat([p.mean_nk for p in q]).numpy(), torch.cat([p.variance_nk for p in q]).numpy()
    beside_k = 0.1 * mean_nk.std(0)  # so that no two cells of one real cell are its posterior alone
    library_n, batch_n = counts.library_n.numpy(), counts.batch_n.numpy()

    size = max(1, TILE // len(model.gene_ids))
    lengths, batches, totals, largest = [], [], [], 0
    starts = range(0, n_cells, size)
    with open(folder / "data", "wb") as data, open(folder / "indices", "wb") as indices:
        for block, start in enumerate(track(starts, "drawing cells", console=Console(stderr=True))):
            rng = np.random.default_rng([seed, block])  # of the block alone
            like = rng.integers(len(mean_nk), size=min(size, n_cells - start))
            normal_nk = rng.standard_normal((2, len(like), mean_nk.shape[1]), dtype=np.float32)
            z_nk = mean_nk[like] + np.sqrt(variance_nk[like]) * normal_nk[0] + beside_k * normal_nk[1]
            log_library_n = np.log(library_n[like]) + 0.1 * rng.standard_normal(len(like))
            x_m, gene_m, length_n = _counts_of(model.network, z_nk, batch_n[like], log_library_n, rng)
            data.write(x_m.astype("<u2").tobytes())
            indices.write(gene_m.astype("<i4").tobytes())
            largest = max(largest, int(x_m.max()))
            lengths.append(length_n)
            batches.append(batch_n[like])
            totals.append(np.add.reduceat(x_m, np.cumsum(length_n) - length_n))
    lengths_n = np.concatenate(lengths)
    return {
        "indptr": np.concatenate([[0], np.cumsum(lengths_n)]),
        "batch": np.concatenate(batches),
        "total": np.concatenate(totals),
        "largest": largest,
        "data": (folder / "data", np.dtype("<u2")),
        "indices": (folder / "indices", np.dtype("<i4")),
        "seed": seed,
    }


def _counts_of(
    network: Any, z_nk: np.ndarray, batch_n: np.ndarray, log_library_n: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of the non-zeros, cell by cell; their genes, rising; how many each cell has.

    A negative binomial is a sum of N numbers of the logarithmic distribution, N of the Poisson distribution. So where
    N = 0, which it is nearly everywhere, one uniform number is all that has to be drawn.
    """
    hidden_nh = network.hidden(torch.from_numpy(z_nk), torch.from_numpy(batch_n), torch.empty(len(z_nk), 0))
    mu_ng = (network.log_rho(hidden_nh) + torch.from_numpy(log_library_n).float()[:, None]).exp_()
    theta_g = network.log_theta_sg[0].exp()
    rate_ng = (mu_ng / theta_g).log1p_().mul_(theta_g)  # of N
    kept_ng = network.dropout_logit(hidden_nh).neg_().sigmoid_()  # 1 - pi
    some_ng = (rate_ng.neg().expm1_().neg_() * kept_ng).numpy()
    found_ng = rng.random(some_ng.shape, dtype=np.float32) < some_ng
    empty = np.flatnonzero(~found_ng.any(1))
    found_ng[empty, mu_ng.numpy()[empty].argmax(1)] = True  # a store has no empty cell: one count of its first gene
    cell_m, gene_m = np.nonzero(found_ng)

    rate_m = rate_ng.numpy()[cell_m, gene_m].astype(np.float64)
    mu_m, theta_m = mu_ng.numpy()[cell_m, gene_m].astype(np.float64), theta_g.numpy()[gene_m].astype(np.float64)
    # N given that it is not 0: the first of a Poisson process' events, given that it has one, then those after it
    first_m = -np.log1p(rng.random(len(rate_m)) * np.expm1(-rate_m))
    n_m = 1 + rng.poisson(np.maximum(rate_m - first_m, 0))
    parts = rng.logseries(np.repeat(mu_m / (mu_m + theta_m), n_m))
    x_m = np.add.reduceat(parts, np.cumsum(n_m) - n_m)
    return np.minimum(x_m, LARGEST), gene_m, found_ng.sum(1)


def _tables(drawn: dict[str, Any], model: sv.Model) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """The obs, var and uns that a store has: a sample a batch."""
    batches, n_cells = model.schema.batches, len(drawn["batch"])
    cells = pd.Index([f"cell_{i}" for i in range(n_cells)])
    names = np.array(batches, dtype=object)[drawn["batch"]]
    batch = pd.Categorical(names, pd.unique(names))  # in order of appearance, as in a store
    obs = {
        "sample": batch,
        "batch": batch,
        "n_counts": drawn["total"].astype(np.float64),
        "n_genes": np.diff(drawn["indptr"]),
        "pct_mito": np.zeros(n_cells),
        "doublet_score": np.zeros(n_cells),
    }
    var = pd.DataFrame({"gene_name": list(model.gene_names)}, index=pd.Index(model.gene_ids, name="gene_id"))
    origin = sha256_text(canonical_json([model.fingerprint, n_cells, drawn["seed"]]))
    sizes = pd.Series(batch).value_counts()
    record = {
        name: {"content_sha256": origin, "kept_sha256": origin, "n_cells": int(n), "n_cells_total": int(n)}
        for name, n in sizes.items()
    }
    return pd.DataFrame(obs, index=cells), var, {"organism": "unknown", "samples": canonical_json(record)}


def _write_zarr(path: Path, drawn: dict[str, Any], model: sv.Model) -> None:
    """A store as `scvi-core store` writes it."""
    dtype = np.min_scalar_type(drawn["largest"])
    arrays = _create(path, *_tables(drawn, model), drawn["indptr"], dtype)
    _copy(dict(zip(("data", "indices"), arrays, strict=True)), drawn)
    _seal(path)


def _write_h5ad(path: Path, drawn: dict[str, Any], model: sv.Model) -> None:
    """AnnData, its X a CSR matrix."""
    import h5py
    from anndata.io import write_elem

    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for key, value in zip(("obs", "var", "uns"), _tables(drawn, model), strict=True):
            write_elem(file, key, value)
        X = file.create_group("X")
        shape = np.array([len(drawn["batch"]), len(model.gene_ids)])
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        X.create_dataset("indptr", data=drawn["indptr"])
        size = int(drawn["indptr"][-1])
        types = {"data": np.min_scalar_type(drawn["largest"]), "indices": np.int32}
        given = {"shape": (size,), "chunks": (min(size, ZARR_CHUNK),), "compression": "lzf"}
        _copy({name: X.create_dataset(name, dtype=dtype, **given) for name, dtype in types.items()}, drawn)


def _copy(into: dict[str, Any], drawn: dict[str, Any]) -> None:
    """A chunk of the files at a time, so that each chunk of the array is written once."""
    for name, array in into.items():
        file, kind = drawn[name]
        for at in track(range(0, array.shape[0], ZARR_CHUNK), f"writing {name}", console=Console(stderr=True)):
            part = np.fromfile(file, kind, ZARR_CHUNK, offset=at * kind.itemsize)
            array[at : at + len(part)] = part.astype(array.dtype)


def _folder(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=Path, help="AnnData with raw counts in X, to fit the model to")
    parser.add_argument("--cells", type=int, required=True, help="how many to draw")
    parser.add_argument("--genes", type=int, default=720, help="the most variable ones")
    parser.add_argument("--out", type=Path, required=True, help="*.zarr (a store) or *.h5ad")
    parser.add_argument("--seed", type=int, default=0, help="of the cells drawn")
    parser.add_argument("--batch-key", default="batch", help="cell column with the batch; without it there is one")
    parser.add_argument("--model", type=Path, help="folder of the fitted model: taken if it is there, else kept there")
    parser.add_argument("--epochs", type=int, help="of the fit to the real cells; default: the rule")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
