"""Differential expression by sampling the posterior: sample cells first, decode only these, compare."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from scvi_core.config import DeConfig
from scvi_core.counts import Counts
from scvi_core.files import UserError
from scvi_core.log import log
from scvi_core.model import SCVI, Noise
from scvi_core.posterior import BLOCK, blocks


@torch.inference_mode()
def _draw(
    model: SCVI, counts: Counts, rows: np.ndarray, n_samples: int, batches: np.ndarray | None, rng: np.random.Generator
) -> torch.Tensor:
    """Hidden decoder states of `n_samples` posterior cells of `rows`, (samples, hidden).

    Sample first, decode later: cells are drawn with replacement, one z each; with `batches`, sample i is decoded
    under batch ``batches[i % len]``, so that every group stands under the same mixture of batches and the i-th
    samples of two groups share theirs.
    """
    drawn = rng.choice(rows, n_samples)
    noise = Noise(int(rng.integers(2**31)), counts.indptr_n.device)
    hidden = []
    for at, cells in blocks(counts, drawn):
        q = model.encode(cells)
        z_nk, _ = model.sample(cells, q, noise)
        batch_n = cells.batch_n
        if batches is not None:
            under = batches[np.arange(at.start, at.stop) % len(batches)]
            batch_n = torch.from_numpy(under).to(batch_n.device)
        hidden.append(model.hidden(z_nk, batch_n, cells.covariates_nc))
    return torch.cat(hidden)


@torch.inference_mode()
def _log_normaliser(model: SCVI, hidden_mh: torch.Tensor) -> torch.Tensor:
    """(samples,) log sum over genes of exp(rho logits): the softmax's denominator, in blocks of samples."""
    return torch.cat([torch.logsumexp(model.rho(block), 1) for block in hidden_mh.split(4 * BLOCK)])


def differential_expression(
    model: SCVI,
    counts: Counts,
    groups: pd.Series,
    gene_ids: list[str],
    gene_names: list[str],
    config: DeConfig,
    seed: int,
) -> pd.DataFrame:
    """Each group against the rest, by sampling the posterior.

    Pairs of posterior samples (a, b) give log2 fold changes LFC = log2(rho_a + c) - log2(rho_b + c). In mode
    ``change`` a gene's ``proba_de`` is the larger of P(LFC > delta) and P(LFC < -delta): a posterior that is merely
    wide, with mass on both sides, is not called changed. In mode ``vanilla`` it is the larger of P(rho_a > rho_b)
    and its opposite (Lopez et al. 2018). ``is_de`` takes genes from the top of ``proba_de`` while the expected
    share of false discoveries, the running mean of 1 - proba_de, stays within ``config.fdr``.

    The pseudocount is c = 0.01 / (median library size): a gene expected less than once in a hundred cells counts as
    not expressed, so that fold changes between two vanishing rates do not lead the list. It is a rate on the scale
    of rho, so it needs no further division by the number of genes.

    Parameters
    ----------
    groups : (cells,) group of each cell; cells without one (NaN) take no part.
    gene_ids, gene_names : (genes,) in the model's order.

    Returns
    -------
    pandas.DataFrame
        A row a (group, gene), by group and rank; columns as ``de.parquet``. LFCs are log2; ``scale_*`` are mean rho;
        ``raw_mean_*`` counts a cell; ``nonzero_*`` shares of cells. ``rank`` 1 is the strongest marker, by
        lfc_median × sqrt(nonzero_group): a large change, in many of the group's cells. Rank orders, ``is_de`` decides:
        where the rest holds cells much like the group's (two clusters of one type), pairs often show no change,
        and a gene can rank high without being called.

    Raises
    ------
    UserError
        When fewer than two groups have ``config.min_cells`` cells.
    """
    labels = groups.astype("string")
    sizes = labels.value_counts().sort_index()
    small = [name for name in sizes.index if sizes[name] < config.min_cells]
    if small:
        log.info("de: %d groups with fewer than %d cells left out: %s", len(small), config.min_cells, ", ".join(small))
    names = [name for name in sizes.index if name not in small]
    if len(names) < 2:
        raise UserError(
            f"de: {len(names)} groups of '{groups.name}' have {config.min_cells} cells or more; two are needed "
            "(de.groupby, de.min_cells)"
        )
    values = labels.to_numpy(dtype=object, na_value=None)
    rows = [np.flatnonzero(values == name) for name in names]
    rng = np.random.default_rng(seed)
    batches = np.arange(model.n_batches) if config.batch_correction and model.n_batches > 1 else None
    pool_mh = torch.cat([_draw(model, counts, r, config.n_samples, batches, rng) for r in rows])
    normaliser_m = _log_normaliser(model, pool_mh)
    rest = _rest_of_pool(np.array([len(r) for r in rows]), config.n_samples, batches, rng)
    c = 0.01 / float(counts.library_n.median())
    raw_kg, nonzero_kg = _raw_moments(counts, rows)
    n_genes = counts.n_genes
    columns = {key: np.empty((len(names), n_genes)) for key in (
        "lfc_mean", "lfc_median", "lfc_std", "lfc_ci_low", "lfc_ci_high", "proba_de", "scale_group", "scale_reference"
    )}  # fmt: skip
    # genes in blocks, so that no samples x genes array is ever whole
    width = max(1, 2**24 // len(pool_mh))
    for start in range(0, n_genes, width):
        at = slice(start, min(start + width, n_genes))
        rho_mg = _rho_block(model, pool_mh, normaliser_m, at)
        for k in range(len(names)):
            a_mg = rho_mg[k * config.n_samples : (k + 1) * config.n_samples]
            b_mg = rho_mg[rest[k]]
            lfc_mg = torch.log2(a_mg + c) - torch.log2(b_mg + c)
            above, below = (lfc_mg > config.delta), (lfc_mg < -config.delta)
            if config.mode == "vanilla":
                above, below = a_mg > b_mg, a_mg < b_mg
            columns["proba_de"][k, at] = torch.maximum(above.double().mean(0), below.double().mean(0)).cpu()
            ordered_mg = lfc_mg.sort(0).values
            for key, share in (("lfc_ci_low", 0.025), ("lfc_median", 0.5), ("lfc_ci_high", 0.975)):
                columns[key][k, at] = ordered_mg[round(share * (config.n_samples - 1))].cpu()
            columns["lfc_mean"][k, at] = lfc_mg.double().mean(0).cpu()
            columns["lfc_std"][k, at] = lfc_mg.double().std(0).cpu()
            columns["scale_group"][k, at] = a_mg.double().mean(0).cpu()
            columns["scale_reference"][k, at] = b_mg.double().mean(0).cpu()
    n_cells_k = np.array([len(r) for r in rows])[:, None]
    n_rest_k = n_cells_k.sum() - n_cells_k
    frames = []
    for k, name in enumerate(names):
        part = pd.DataFrame({key: value[k] for key, value in columns.items()})
        part.insert(0, "gene_name", gene_names)
        part.insert(0, "gene_id", gene_ids)
        part.insert(0, "reference", "rest")
        part.insert(0, "group", str(name))
        part["proba_not_de"] = 1 - part["proba_de"]
        tiny = 1e-8
        part["bayes_factor"] = np.log(part["proba_de"] + tiny) - np.log(part["proba_not_de"] + tiny)
        part["raw_mean_group"] = raw_kg[k] / n_cells_k[k]
        part["raw_mean_reference"] = (raw_kg.sum(0) - raw_kg[k]) / n_rest_k[k]
        part["nonzero_group"] = nonzero_kg[k] / n_cells_k[k]
        part["nonzero_reference"] = (nonzero_kg.sum(0) - nonzero_kg[k]) / n_rest_k[k]
        part["is_de"] = called_at_fdr(part["proba_de"].to_numpy(), config.fdr)
        part["strength"] = part["lfc_median"] * np.sqrt(part["nonzero_group"])
        part = part.sort_values(["strength", "gene_id"], ascending=[False, True], kind="stable")
        part["rank"] = np.arange(1, n_genes + 1, dtype=np.int32)
        frames.append(part)
    return pd.concat(frames, ignore_index=True)[DE_COLUMNS]


DE_COLUMNS = [
    "group", "reference", "gene_id", "gene_name", "lfc_mean", "lfc_median", "lfc_std", "lfc_ci_low", "lfc_ci_high",
    "proba_de", "proba_not_de", "bayes_factor", "scale_group", "scale_reference", "raw_mean_group",
    "raw_mean_reference", "nonzero_group", "nonzero_reference", "is_de", "rank",
]  # fmt: skip


def called_at_fdr(proba_de: np.ndarray, fdr: float) -> np.ndarray:
    """Genes from the top of `proba_de` whose expected false discovery proportion stays within `fdr`, as a mask."""
    order = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[order]) / np.arange(1, len(proba_de) + 1)
    called = np.zeros(len(proba_de), dtype=bool)
    called[order[: int((expected <= fdr).sum())]] = True  # expected never falls, so this is a prefix
    return called


def _rest_of_pool(
    sizes: np.ndarray, n_samples: int, batches: np.ndarray | None, rng: np.random.Generator
) -> list[torch.Tensor]:
    """For each group, which samples of the pool stand for the rest: the other groups', by their share of cells.

    Sample i of the rest is decoded under the same batch as sample i of the group.
    """
    lanes = 1 if batches is None else len(batches)
    rest = []
    for k in range(len(sizes)):
        share = np.where(np.arange(len(sizes)) == k, 0, sizes).astype(float)
        group_m = rng.choice(len(sizes), n_samples, p=share / share.sum())
        lane_m = np.arange(n_samples) % lanes
        n_turns_m = (n_samples - lane_m + lanes - 1) // lanes  # samples of one group in that lane
        turn_m = (rng.random(n_samples) * n_turns_m).astype(np.int64)
        rest.append(torch.from_numpy(group_m * n_samples + turn_m * lanes + lane_m))
    return rest


@torch.inference_mode()
def _rho_block(model: SCVI, hidden_mh: torch.Tensor, normaliser_m: torch.Tensor, at: slice) -> torch.Tensor:
    """Rho of some genes, (samples, len(at)), decoding only these."""
    logits_mg = torch.nn.functional.linear(hidden_mh, model.rho.weight[at], model.rho.bias[at])
    return (logits_mg - normaliser_m[:, None]).exp()


def _raw_moments(counts: Counts, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(groups, genes) sums of counts, and numbers of cells with any, over each group's cells."""
    group_n = np.full(len(counts), -1)
    for k, r in enumerate(rows):
        group_n[r] = k
    indptr_n = counts.indptr_n.cpu().numpy()
    genes_m, values_m = counts.genes_m.cpu().numpy(), counts.values_m.cpu().numpy()
    total_kg = np.zeros((len(rows), counts.n_genes))
    some_kg = np.zeros((len(rows), counts.n_genes))
    for start in range(0, len(counts), 2**16):
        stop = min(start + 2**16, len(counts))
        group_m = np.repeat(group_n[start:stop], np.diff(indptr_n[start : stop + 1]))
        part = slice(indptr_n[start], indptr_n[stop])
        kept_m = group_m >= 0
        flat_m = group_m[kept_m] * counts.n_genes + genes_m[part][kept_m]
        size = len(rows) * counts.n_genes
        total_kg += np.bincount(flat_m, values_m[part][kept_m], size).reshape(total_kg.shape)
        some_kg += np.bincount(flat_m, minlength=size).reshape(total_kg.shape)
    return total_kg, some_kg
