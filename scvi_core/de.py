"""Differential expression by sampling the posterior: sample cells first, decode only these, compare.

Of each group some thousand posterior cells are drawn (a cell of the group, a z from its q), and only these are
decoded, once, for every comparison that the group takes part in. So the cost does not grow with cells, and genes are
gone through in blocks: no array of cells × genes, nor of samples × genes, is ever whole.

The quantity is the log2 fold change LFC = log2(rho_a + c) - log2(rho_b + c), where rho is the expected share of a gene
and c = 0.01 / (median library size): what a gene has that is seen once in a hundred cells. It keeps fold changes
between two vanishing rates from leading the list. As rho sums to one over genes, a pseudocount on its scale already
falls with their number, and is not to be divided by it once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from scvi_core.config import DeConfig
from scvi_core.counts import Counts
from scvi_core.files import Decisions, UserError
from scvi_core.kernels import native
from scvi_core.log import progress
from scvi_core.model import SCVI, Noise
from scvi_core.posterior import blocks
from scvi_core.tables import natural

DE_COLUMNS = [
    "group", "reference", "gene_id", "gene_name", "lfc_mean", "lfc_median", "lfc_std", "lfc_ci_low", "lfc_ci_high",
    "proba_de", "proba_not_de", "bayes_factor", "scale_group", "scale_reference", "raw_mean_group",
    "raw_mean_reference", "nonzero_group", "nonzero_reference", "is_de", "rank",
]  # fmt: skip
BATCH_CAP = 100  # cells of a group and batch beyond which the batch counts no more
CREDIBLE = 0.95  # mass of the credible interval
TINY = 1e-8  # added to both probabilities of a Bayes factor
REST = "rest"  # the reference of a group against all others
TILE = 2**22  # samples × genes at a time: 16 MB, which is faster than more


def differential_expression(
    model: SCVI,
    counts: Counts,
    groups: pd.Series,
    gene_ids: list[str],
    gene_names: list[str],
    config: DeConfig,
    seed: int,
    made: Decisions | None = None,
) -> pd.DataFrame:
    """Each group of cells against the rest, or against each other group (`config.reference`).

    What is compared, ``config.compare``:

    ``means``
        The groups' mean rho: has the average changed? The model gives the estimate, the counts its standard error, as
        the posterior leaves out how surely the weights are known: that of the groups' mean shares of counts over cells,
        or that of LFC over batches that hold both sides, whichever is larger. LFC is taken as normal. A change is as
        probable as the less sure of two says: the model's LFC and the counts' own. For the model smooths a small group
        towards its neighbours, and the counts know nothing of a batch that lacks one side.
    ``cells``
        Pairs of posterior cells, one of the group and one of the reference: is a cell of the group different from one
        of the reference? The spread of LFC is that between cells, and does not shrink with their number.

    In mode ``change``, ``proba_de`` is the larger of P(LFC > delta) and P(LFC < -delta): a posterior that is merely
    wide, with mass on both sides, is not called changed. In mode ``vanilla`` it is the larger of P(rho_a > rho_b) and
    its opposite (Lopez et al. 2018), ``bayes_factor`` the log of their ratio. ``is_de`` takes genes from the top of
    ``proba_de`` while the expected share of false discoveries, the running mean of 1 - proba_de, stays within
    ``config.fdr``.

    Batches, ``config.batches``: ``all`` decodes every sample under each batch of the model by turns, and a pair shares
    its batch, so that groups from different batches are compared as if they came from the same; ``within`` pairs cells
    of the same batch only, each batch that has both with the same weight; ``own`` leaves every cell in its own.
    ``auto`` is ``all``, unless no batch holds two groups, as where each condition was a batch: under every batch such
    groups would lose all that tells them apart, so it is then ``own``, and what differs between batches is in the
    result.
    With ``config.balance``, a batch's share of a group's samples rises with its cells up to 100 and no further, and the
    rest is made up as it is in the average batch: the largest batch does not decide.

    Parameters
    ----------
    groups : (cells,) group of each cell; cells without one (NaN) take no part.
    gene_ids, gene_names : (genes,) in the model's order.
    made : takes the choices made, such as groups left out; default: they are logged alone.

    Returns
    -------
    pandas.DataFrame
        A row a (group, reference, gene), by group, reference and rank; columns as ``de.parquet``. LFCs are log2;
        ``scale_*`` are mean rho; ``raw_mean_*`` counts a cell; ``nonzero_*`` shares of cells. ``rank`` 1 is the
        strongest marker, by lfc_median × sqrt(nonzero_group): a large change, in many of the group's cells. Rank
        orders, ``is_de`` decides, and a gene can rank high without being called: where cells are few, or, of pairs of
        cells, where the rest holds some much like the group's. Of two groups each pair comes once.

    Raises
    ------
    UserError
        When fewer than two groups have ``config.min_cells`` cells, or no batch has both sides of any comparison.
    """
    made = Decisions("de") if made is None else made
    rows_k = _groups(groups, config, made)
    batch_n = counts.batch_n.cpu().numpy()
    n_batches = max(model.n_batches, int(batch_n.max(initial=0)) + 1)
    n_kb = np.array([np.bincount(batch_n[rows], minlength=n_batches) for rows in rows_k.values()])
    config = config.model_copy(update={"batches": _resolved(config, n_kb, made)})
    if n_new := int((batch_n >= model.n_batches).sum()):
        if config.batches != "all":
            raise UserError(
                f"de.batches: {config.batches!r} decodes each cell under its own batch, and {n_new} cells are of "
                "batches that the model was not trained on; use 'all', which takes the model's"
            )
        made.add("new batches", n_batches - model.n_batches, "decoded under the model's batches", n_cells=n_new)
    rng = np.random.default_rng(seed)
    pool = _draw(model, counts, list(rows_k.values()), n_kb, config, rng)
    comparisons = _comparisons(list(rows_k), n_kb, pool, config, rng, made)
    c = 0.01 / float(counts.library_n.median())
    shares = _shares_of_counts(counts, list(rows_k.values()), n_kb) if config.compare == "means" else None
    columns = _compare(pool, model, comparisons, n_kb, shares, config, c, made)
    total_kg, some_kg = _raw_moments(counts, list(rows_k.values()))
    size_k = n_kb.sum(1)
    frames = []
    for i, one in enumerate(comparisons):
        part = pd.DataFrame({key: value[i] for key, value in columns.items()})
        part.insert(0, "gene_name", gene_names)
        part.insert(0, "gene_id", gene_ids)
        part.insert(0, "reference", one.reference)
        part.insert(0, "group", one.group)
        part["proba_not_de"] = 1 - part["proba_de"]
        part["bayes_factor"] = np.log(part["proba_de"] + TINY) - np.log(part["proba_not_de"] + TINY)
        part["raw_mean_group"] = total_kg[one.a] / size_k[one.a]
        part["raw_mean_reference"] = total_kg[one.b].sum(0) / size_k[one.b].sum()
        part["nonzero_group"] = some_kg[one.a] / size_k[one.a]
        part["nonzero_reference"] = some_kg[one.b].sum(0) / size_k[one.b].sum()
        part["is_de"] = called_at_fdr(part["proba_de"].to_numpy(), config.fdr)
        part["strength"] = part["lfc_median"] * np.sqrt(part["nonzero_group"])
        part = part.sort_values(["strength", "gene_id"], ascending=[False, True], kind="stable")
        part["rank"] = np.arange(1, len(part) + 1, dtype=np.int32)
        frames.append(part[DE_COLUMNS])
    return pd.concat(frames, ignore_index=True)


def weakest(pairs: pd.DataFrame) -> pd.DataFrame:
    """Of a table of all pairs: each group's genes by the pair in which they stand out least, a row a (group, gene).

    What leads this list is higher in the group than in every single other one: a marker of it alone. Columns are those
    of `pairs`, seen from the group, whichever side of the pair it was on; ``rank`` is anew.
    """
    turned = pairs.copy()
    for a, b in (
        ("group", "reference"),
        *((f"{of}_group", f"{of}_reference") for of in ("scale", "raw_mean", "nonzero")),
    ):
        turned[a], turned[b] = pairs[b], pairs[a]
    for column, of in (("lfc_mean", "lfc_mean"), ("lfc_median", "lfc_median"), ("lfc_ci_low", "lfc_ci_high"),
                       ("lfc_ci_high", "lfc_ci_low")):  # fmt: skip
        turned[column] = -pairs[of]
    both = pd.concat([pairs, turned], ignore_index=True)
    both["strength"] = both["lfc_median"] * np.sqrt(both["nonzero_group"])
    order = ["group", "gene_id", "lfc_median", "reference"]
    least = both.sort_values(order, kind="stable").drop_duplicates(["group", "gene_id"])
    least = least.sort_values(["strength", "gene_id"], ascending=[False, True], kind="stable")
    place = {name: i for i, name in enumerate(sorted(set(least["group"]), key=natural))}
    least = least.sort_values("group", key=lambda of: of.map(place), kind="stable")
    least["rank"] = (least.groupby("group").cumcount() + 1).astype(np.int32)
    return least[list(pairs.columns)].reset_index(drop=True)


def called_at_fdr(proba_de: np.ndarray, fdr: float) -> np.ndarray:
    """Genes from the top of `proba_de` whose expected false discovery proportion stays within `fdr`, as a mask."""
    order = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[order]) / np.arange(1, len(proba_de) + 1)
    called = np.zeros(len(proba_de), dtype=bool)
    called[order[: int((expected <= fdr).sum())]] = True  # expected never falls, so this is a prefix
    return called


def _groups(groups: pd.Series, config: DeConfig, made: Decisions) -> dict[str, np.ndarray]:
    """Group -> positions of its cells, for the groups that are large enough, by name."""
    labels = groups.astype("string").to_numpy(dtype=object, na_value=None)
    named = labels[[label is not None for label in labels]]
    found, counts = np.unique(named.astype(str), return_counts=True)
    sizes = dict(sorted(zip(map(str, found), counts, strict=True), key=lambda item: natural(item[0])))
    small = [name for name, n in sizes.items() if n < config.min_cells]
    if small:
        n_cells = int(sum(sizes[name] for name in small))
        made.add("groups left out", small, f"fewer than {config.min_cells} cells (de.min_cells)", n_cells=n_cells)
    names = [name for name in sizes if name not in small]
    if len(names) < 2:
        raise UserError(
            f"de: {len(names)} groups of '{groups.name}' have {config.min_cells} cells or more; two are needed "
            "(de.groupby, de.min_cells)"
        )
    return {name: np.flatnonzero(labels == name) for name in names}


def _resolved(config: DeConfig, n_kb: np.ndarray, made: Decisions) -> str:
    """What `batches` is, and a word where groups and batches cannot be told apart."""
    apart = n_kb.shape[1] > 1 and ((n_kb >= config.min_cells).sum(0) < 2).all()
    if config.batches == "auto" and apart:
        text = (
            "no batch holds two groups: decoded under all batches they would lose what tells them apart, so each cell "
            "is decoded under its own, and what differs between batches is part of every fold change"
        )
        made.add("batches", "own", text)
        return "own"
    if config.batches == "all" and apart:
        text = "asked for, though no batch holds two groups: what differs between batches is taken out, biology with it"
        made.add("batches", "all", text)
    return "all" if config.batches == "auto" else config.batches


@dataclasses.dataclass
class Pool:
    """Posterior samples of all groups, up to the decoder's heads.

    Attributes
    ----------
    hidden_mh : (samples, hidden) float32 input of the heads.
    log_total_m : (samples,) log sum over genes of exp(logit): the softmax's denominator.
    start_kb : (groups, lanes) where the samples of a group in a lane begin, -1 where it has none. A lane is the batch
        that cells are decoded under; with `batches: own` there is one for all.
    size : samples of a group in a lane.
    """

    hidden_mh: torch.Tensor
    log_total_m: torch.Tensor
    start_kb: np.ndarray
    size: int


@torch.inference_mode()
def _draw(
    model: SCVI, counts: Counts, rows_k: list[np.ndarray], n_kb: np.ndarray, config: DeConfig, rng: np.random.Generator
) -> Pool:
    """Draw each group's posterior cells, lane by lane, and take them through the decoder's hidden layers."""
    batch_n = counts.batch_n.cpu().numpy()
    n_lanes = 1 if config.batches == "own" else model.n_batches
    size = math.ceil(config.n_samples / n_lanes)
    start_kb = np.full((len(rows_k), n_lanes), -1)
    drawn: list[np.ndarray] = []
    for k, rows in enumerate(rows_k):
        for b in range(n_lanes):
            cells = rows[batch_n[rows] == b] if config.batches == "within" else rows
            if config.batches == "within" and len(cells) < config.min_cells:
                continue
            start_kb[k, b] = size * len(drawn)
            drawn.append(rng.choice(cells, size, p=_weights(batch_n[cells], n_kb[k]) if config.balance else None))
    if not drawn:
        raise UserError(
            f"de.batches: 'within': no group has {config.min_cells} cells in any one batch; use 'all', or lower "
            "de.min_cells"
        )
    under = np.nonzero(start_kb.ravel() >= 0)[0] % n_lanes
    unique, place_m = np.unique(np.concatenate(drawn), return_inverse=True)  # each cell is read and encoded once
    parts = []  # all but the counts, which would fill memory
    for _, cells in blocks(counts, unique):
        q = model.encode(cells)
        parts.append((q.mean_nk, q.variance_nk.sqrt(), cells.batch_n, cells.covariates_nc))
    mean_uk, deviation_uk, batch_u, covariates_uc = (torch.cat(part) for part in zip(*parts, strict=True))
    place_m = torch.from_numpy(place_m).to(mean_uk.device)
    noise = Noise(int(rng.integers(2**31)), mean_uk.device)
    z_mk = mean_uk[place_m] + deviation_uk[place_m] * noise.normal(mean_uk[place_m])
    batch_m = batch_u[place_m]
    if config.batches == "all":
        batch_m = torch.from_numpy(np.repeat(under, size)).to(batch_m.device)
    hidden, log_total = [], []
    for at in torch.arange(len(place_m), device=place_m.device).split(max(1, TILE // counts.n_genes)):
        hidden.append(model.hidden(z_mk[at], batch_m[at], covariates_uc[place_m[at]]))
        logit_gm = torch.addmm(model.rho.bias[:, None], model.rho.weight, hidden[-1].t())
        top_m = logit_gm.amax(0)
        log_total.append(top_m + logit_gm.sub_(top_m).exp_().sum(0).log())  # in place: sooner than logsumexp
    return Pool(torch.cat(hidden), torch.cat(log_total), start_kb, size)


def _weights(batch_n: np.ndarray, n_b: np.ndarray) -> np.ndarray:
    """(cells,) chance of each cell of a group: its batch's, which rises with `n_b` up to the cap, shared alike."""
    weight_b = np.minimum(n_b, BATCH_CAP) / np.maximum(n_b, 1)
    weight_n = weight_b[batch_n]
    return weight_n / weight_n.sum()


@dataclasses.dataclass
class Comparison:
    """A group against one or more others.

    Attributes
    ----------
    group, reference : names. a : the group. b : the groups that make up the reference.
    lanes : those that have both sides.
    share_kb : (groups, lanes of the pool) what each group adds to the reference; sums to one in each of `lanes`.
    a_m, b_m : (pairs,) int32 samples of the pool that are paired.
    """

    group: str
    reference: str
    a: int
    b: list[int]
    lanes: np.ndarray
    share_kb: np.ndarray
    a_m: torch.Tensor
    b_m: torch.Tensor


def _comparisons(
    names: list[str], n_kb: np.ndarray, pool: Pool, config: DeConfig, rng: np.random.Generator, made: Decisions
) -> list[Comparison]:
    """All that is to be compared, with the pairs drawn; what no lane has both sides of is left out, and said so."""
    n_groups, n_lanes = pool.start_kb.shape
    if config.reference == "rest":
        rest = REST
        while rest in names:  # a group may be called so
            rest = f"the {rest}"
        if rest != REST:
            made.add("reference", rest, f"what each group is compared with; a group is called '{REST}'")
        asked = [(names[k], rest, k, [j for j in range(n_groups) if j != k]) for k in range(n_groups)]
    else:
        asked = [(names[k], names[j], k, [j]) for k in range(n_groups) for j in range(k + 1, n_groups)]
    found, apart, partly = [], [], []
    for group, reference, a, b in asked:
        share_kb = np.zeros((n_groups, n_lanes))
        share_kb[b] = _shares(n_kb[b], config, n_lanes)
        share_kb[pool.start_kb < 0] = 0
        lanes = np.flatnonzero((pool.start_kb[a] >= 0) & (share_kb.sum(0) > 0))
        if len(lanes) == 0:
            apart.append(f"{group} against {reference}")
            continue
        if len(lanes) < n_lanes:
            partly.append(f"{group} against {reference}: {len(lanes)}")
        share_kb[:, lanes] /= share_kb[:, lanes].sum(0)
        a_m = np.concatenate([pool.start_kb[a, lane] + np.arange(pool.size) for lane in lanes])
        b_m = np.concatenate([_mixture(pool, lane, share_kb[:, lane], rng) for lane in lanes])
        pairs = (torch.from_numpy(m.astype(np.int32)).to(pool.hidden_mh.device) for m in (a_m, b_m))
        found.append(Comparison(group, reference, a, b, lanes, share_kb, *pairs))
    if apart:
        made.add("comparisons left out", apart, f"no batch has {config.min_cells} cells of both sides (de.batches)")
    if partly:
        made.add("batches compared within", partly, f"of {n_lanes}; the others lack one side (de.batches: within)")
    if not found:
        raise UserError(
            f"de.batches: 'within': no batch has {config.min_cells} cells of two groups; use 'all', or lower "
            "de.min_cells"
        )
    if config.batches == "all":
        rows = zip(names, n_kb[:, :n_lanes], strict=True)
        absent = {name: int((row == 0).sum()) for name, row in rows if (row == 0).any()}
        across = [
            f"{one.group} against {one.reference}"
            for one in found
            if np.minimum(n_kb[one.a], n_kb[one.b].sum(0)).max() < config.min_cells
        ]
        if across and n_lanes > 1:
            text = f"no batch has {config.min_cells} cells of both sides: their difference is treated as a batch effect"
            made.add("comparisons across batches", across, f"{text} and removed")
        if absent:
            text = (
                "number of batches without a cell of the group: what differs between these and its own is treated as a"
            )
            made.add("groups absent from batches", absent, f"{text} batch effect and removed")
    return found


def _shares(n_kb: np.ndarray, config: DeConfig, n_lanes: int) -> np.ndarray:
    """(groups, lanes) what each of some groups adds to their union: by cells, or as in the average batch."""
    if config.batches == "within":
        return n_kb / np.maximum(n_kb.sum(0), 1)
    size_k = n_kb.sum(1)
    if config.balance:
        # mean over batches, each weighted by its cells up to the cap, of the groups' shares there
        weight_b = np.minimum(n_kb.sum(0), BATCH_CAP)
        size_k = (n_kb / np.maximum(n_kb.sum(0), 1) * weight_b).sum(1)
    return np.repeat(size_k[:, None] / size_k.sum(), n_lanes, axis=1)


def _mixture(pool: Pool, lane: int, share_k: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(pool.size,) samples of a lane that stand for a mixture of groups.

    In rising order, in which they are read sooner: those that they are paired with come in a random one.
    """
    group_m = rng.choice(len(share_k), pool.size, p=share_k)
    return np.sort(pool.start_kb[group_m, lane] + rng.permutation(pool.size))


@torch.inference_mode()
def _compare(
    pool: Pool,
    model: SCVI,
    comparisons: list[Comparison],
    n_kb: np.ndarray,
    shares: Shares | None,
    config: DeConfig,
    c: float,
    made: Decisions,
) -> dict[str, np.ndarray]:
    """(comparisons, genes) columns of the table, block by block of genes."""
    names = ("lfc_mean", "lfc_median", "lfc_std", "lfc_ci_low", "lfc_ci_high", "proba_de")
    n_genes = model.rho.out_features
    columns = {key: np.empty((len(comparisons), n_genes)) for key in (*names, "scale_group", "scale_reference")}
    delta_i = _deltas(pool, model, comparisons, config, c, made)
    blocks_of_genes = progress(_decoded(pool, model), "genes compared", n_genes, lambda b: b[0].stop - b[0].start)
    for at, rho_gm in blocks_of_genes:
        mean_gkb = _by_group(rho_gm, pool)
        log_gm = rho_gm.add_(c).log2_()
        for i, one in enumerate(comparisons):
            columns["scale_group"][i, at] = mean_gkb[:, one.a][:, one.lanes].mean(1)
            columns["scale_reference"][i, at] = (mean_gkb * one.share_kb)[:, :, one.lanes].sum(1).mean(1)
            if config.compare == "means":
                found = _of_means(one, mean_gkb, shares.of(at), n_kb, config, c, delta_i[i])
            else:
                found = _of_pairs(log_gm, one, delta_i[i])
            for key, value in zip(names, found, strict=True):
                columns[key][i, at] = value
    return columns


def _decoded(pool: Pool, model: SCVI) -> Iterator[tuple[slice, torch.Tensor]]:
    """(genes, rho of the samples, (genes of the block, samples) float32), block by block of genes."""
    width = max(1, TILE // len(pool.hidden_mh))
    for start in range(0, model.rho.out_features, width):
        at = slice(start, min(start + width, model.rho.out_features))
        logit_gm = torch.addmm(model.rho.bias[at, None], model.rho.weight[at], pool.hidden_mh.t())
        yield at, logit_gm.sub_(pool.log_total_m).exp_()


def _by_group(value_gm: torch.Tensor, pool: Pool) -> np.ndarray:
    """(genes, groups, lanes) float64 means of (genes, samples); zeros where a group has no samples."""
    out = np.zeros((len(value_gm), *pool.start_kb.shape))
    out[:, pool.start_kb >= 0] = value_gm.unflatten(1, (-1, pool.size)).mean(2).double().cpu().numpy()
    return out


def _of_pairs(log_gm: torch.Tensor, one: Comparison, delta: float) -> tuple[np.ndarray, ...]:
    """Mean, median, deviation, credible interval and probability of change of LFC over pairs, each (genes,)."""
    n_pairs, tail = len(one.a_m), (1 - CREDIBLE) / 2
    ranks = tuple(round(q * (n_pairs - 1)) for q in (tail, 0.5, 1 - tail))
    if native.serves(log_gm):
        summary_g7 = native.fold_changes(log_gm.contiguous(), one.a_m, one.b_m, delta, ranks)
    else:
        lfc_gm = log_gm.index_select(1, one.a_m) - log_gm.index_select(1, one.b_m)
        beyond = ((lfc_gm > delta).double().mean(1), (lfc_gm < -delta).double().mean(1))
        ordered_gm = lfc_gm.sort(1).values
        ordered = (ordered_gm[:, rank].double() for rank in ranks)
        summary_g7 = torch.stack([lfc_gm.double().mean(1), lfc_gm.double().std(1), *beyond, *ordered], 1)
    mean_g, deviation_g, above_g, below_g, low_g, median_g, high_g = summary_g7.cpu().numpy().T
    return mean_g, median_g, deviation_g, low_g, high_g, np.maximum(above_g, below_g)


@dataclasses.dataclass
class Shares:
    """What share of its cell's counts a gene has, x / l, summed by group.

    Attributes
    ----------
    sum_kbg : (groups, batches, genes) float64. square_kg : (groups, genes) float64 sums of squares.
    library_k : (groups,) all counts of a group's cells.
    """

    sum_kbg: np.ndarray
    square_kg: np.ndarray
    library_k: np.ndarray

    def of(self, at: slice) -> Shares:
        """Of some genes."""
        return Shares(self.sum_kbg[:, :, at], self.square_kg[:, at], self.library_k)


def _shares_of_counts(counts: Counts, rows_k: list[np.ndarray], n_kb: np.ndarray) -> Shares:
    shape = *n_kb.shape, counts.n_genes
    total, square = np.zeros(math.prod(shape)), np.zeros(shape[0] * shape[2])
    batch_n, library_n = counts.batch_n.cpu().numpy(), counts.library_n.cpu().numpy()
    # on the CPU wherever the counts are: a GPU's sums of fractions are others at every run
    for group_m, genes_m, x_m, cells_m in (map(_numpy, part) for part in _nonzeros(counts, rows_k)):
        share_m = x_m / library_n[cells_m]
        total += np.bincount((group_m * shape[1] + batch_n[cells_m]) * shape[2] + genes_m, share_m, len(total))
        square += np.bincount(group_m * shape[2] + genes_m, share_m**2, len(square))
    library_k = np.array([library_n[rows].sum() for rows in rows_k])
    return Shares(total.reshape(shape), square.reshape(shape[0], shape[2]), library_k)


def _of_means(
    one: Comparison, mean_gkb: np.ndarray, shares: Shares, n_kb: np.ndarray, config: DeConfig, c: float, delta: float
) -> tuple[np.ndarray, ...]:
    """The same of the LFC of mean rho, normal, with the standard error of the counts' own means (delta method).

    The model smooths a small group towards its neighbours, the counts know nothing of batches that lack one side: a
    change is as probable as the less sure of the two says.
    """
    from scipy.stats import norm

    a_gb, b_gb = mean_gkb[:, one.a][:, one.lanes], (mean_gkb * one.share_kb)[:, :, one.lanes].sum(1)
    lfc_g = (np.log2(a_gb + c) - np.log2(b_gb + c)).mean(1)
    # over cells
    mean_kg = shares.sum_kbg.sum(1) / n_kb.sum(1)[:, None]
    error_kg = (shares.square_kg / n_kb.sum(1)[:, None] - mean_kg**2).clip(0) / _effective(n_kb, config)[:, None]
    error_kg += 1 / shares.library_k[:, None] ** 2  # a gene never seen may be there: one count more or less
    share_k = one.share_kb[:, one.lanes].mean(1)
    variance_g = error_kg[one.a] / (mean_kg[one.a] + c) ** 2
    variance_g += share_k**2 @ error_kg / (share_k @ mean_kg + c) ** 2
    variance_g /= math.log(2) ** 2
    # over batches
    n_ab, n_bb = n_kb[one.a], n_kb[one.b].sum(0)
    both = np.minimum(n_ab, n_bb) >= config.min_cells
    if both.sum() > 1:
        a_bg = shares.sum_kbg[one.a, both] / n_ab[both, None]
        b_bg = shares.sum_kbg[one.b][:, both].sum(0) / n_bb[both, None]
        lfc_bg = np.log2(a_bg + c) - np.log2(b_bg + c)
        variance_g = np.maximum(variance_g, lfc_bg.var(0, ddof=1) / both.sum())
    deviation_g = np.sqrt(variance_g) + 1e-12
    # the counts' own LFC: of batches that hold both sides where any does, with weights that let their effects cancel
    weight_b = n_ab * n_bb / np.maximum(n_ab + n_bb, 1)
    if weight_b.any():
        weight_b = weight_b / weight_b.sum()
        a_g = weight_b / np.maximum(n_ab, 1) @ shares.sum_kbg[one.a]
        b_g = weight_b / np.maximum(n_bb, 1) @ shares.sum_kbg[one.b].sum(0)
    else:
        a_g, b_g = mean_kg[one.a], share_k @ mean_kg
    lfc_2g = np.stack([lfc_g, np.log2(a_g + c) - np.log2(b_g + c)])
    above_g, below_g = norm.sf((delta - lfc_2g) / deviation_g).min(0), norm.cdf((-delta - lfc_2g) / deviation_g).min(0)
    half_g = norm.isf((1 - CREDIBLE) / 2) * deviation_g
    return lfc_g, lfc_g, deviation_g, lfc_g - half_g, lfc_g + half_g, np.maximum(above_g, below_g)


def _effective(n_kb: np.ndarray, config: DeConfig) -> np.ndarray:
    """(groups,) how many cells of equal weight tell as much as those that the samples were drawn of (Kish)."""
    if not config.balance:
        return n_kb.sum(1)
    weight_kb = np.minimum(n_kb, BATCH_CAP)
    return weight_kb.sum(1) ** 2 / (weight_kb**2 / np.maximum(n_kb, 1)).sum(1)


def _deltas(
    pool: Pool, model: SCVI, comparisons: list[Comparison], config: DeConfig, c: float, made: Decisions
) -> list[float]:
    """The smallest |LFC| that counts, of each comparison; `auto` reads it off the genes' mean LFCs."""
    if config.mode == "vanilla":
        return [0.0] * len(comparisons)
    if config.delta != "auto":
        return [config.delta] * len(comparisons)
    lfc_ig = np.empty((len(comparisons), model.rho.out_features))
    for at, rho_gm in _decoded(pool, model):
        mean_gkb = _by_group(rho_gm.add_(c).log2_(), pool)
        for i, one in enumerate(comparisons):
            lfc_gb = mean_gkb[:, one.a] - (mean_gkb * one.share_kb).sum(1)
            lfc_ig[i, at] = lfc_gb[:, one.lanes].mean(1)
    found = [estimate_delta(lfc_g) for lfc_g in lfc_ig]
    told = {f"{one.group} against {one.reference}": round(d, 3) for one, d in zip(comparisons, found, strict=True)}
    made.add("delta", told, "where a gene's mean LFC is as likely of the genes that change as of those that do not")
    return found


def estimate_delta(lfc_g: np.ndarray) -> float:
    """The |LFC| from which a gene is rather one that changes, 0.1 at least.

    Mean LFCs of genes are taken for a mixture of three normal distributions: higher, lower, and about the same. Delta
    is the smallest |LFC| at which the middle one has less than half of the density.
    """
    from sklearn.mixture import GaussianMixture

    q = np.quantile(lfc_g, [0.05, 0.5, 0.95])
    if len(lfc_g) < 10 or q[2] - q[0] < 1e-6:
        return 0.1
    mixture = GaussianMixture(3, means_init=q[:, None], random_state=0).fit(lfc_g[:, None])
    middle = int(np.argmin(np.abs(mixture.means_[:, 0])))
    grid = np.arange(0.1, max(0.2, np.abs(lfc_g).max()), 0.01)
    share = np.minimum(*(mixture.predict_proba(sign * grid[:, None])[:, middle] for sign in (1, -1)))
    outside = share < 0.5
    return float(grid[outside.argmax()]) if outside.any() else 0.1


def _raw_moments(counts: Counts, rows_k: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(groups, genes) sums of counts, and numbers of cells with any, over each group's cells."""
    shape, size = (len(rows_k), counts.n_genes), len(rows_k) * counts.n_genes
    total, some = 0, 0
    for group_m, genes_m, x_m, _ in _nonzeros(counts, rows_k):  # whole numbers: exact in float64, in any order
        place_m = group_m * counts.n_genes + genes_m
        total = total + torch.bincount(place_m, x_m.double(), size)
        some = some + torch.bincount(place_m, minlength=size)
    return _numpy(total).reshape(shape), _numpy(some).astype(np.float64).reshape(shape)


def _nonzeros(counts: Counts, rows_k: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Group, gene, count and cell of each non-zero of the groups' cells, block by block of cells."""
    group_n = np.full(len(counts), -1)
    for k, rows in enumerate(rows_k):
        group_n[rows] = k
    rows = np.flatnonzero(group_n >= 0)
    for at, cells in blocks(counts, rows, size=4096):
        row_m = cells.x.rows()
        rows_n, groups_n = (torch.from_numpy(of).to(row_m.device) for of in (rows[at], group_n[rows[at]]))
        yield groups_n[row_m], cells.x.genes_m, cells.x.x_m, rows_n[row_m]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
