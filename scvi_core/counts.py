"""Packed counts in memory: a compressed sparse row matrix of small integers, from which minibatches are gathered.

Nothing is ever densified but one minibatch. The cells' batch and covariates travel along as integer codes and
standardised numbers, by the :class:`Schema` that is stored with the model, so that new cells are coded alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from scvi_core.config import level_text
from scvi_core.files import UserError, sha256_text
from scvi_core.kernels import Nonzeros, gpu, native
from scvi_core.kernels.gpu import Rows
from scvi_core.log import log

if TYPE_CHECKING:
    from anndata import AnnData


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the columns of a model's input mean: genes, batches and covariates in order.

    Attributes
    ----------
    gene_ids : (genes,) identifiers in the order of the decoder's output.
    batch_key : cell column that holds the batch, or None for one batch.
    batches : category names of the batch, sorted.
    categorical : covariate column -> its category names, sorted.
    continuous : covariate column -> (mean, standard deviation) over the training cells.
    """

    gene_ids: tuple[str, ...]
    batch_key: str | None
    batches: tuple[str, ...]
    categorical: dict[str, tuple[str, ...]]
    continuous: dict[str, tuple[float, float]]

    @staticmethod
    def of(
        adata: AnnData, batch_key: str | None, categorical: tuple[str, ...] = (), continuous: tuple[str, ...] = ()
    ) -> Schema:
        """Read the schema off the cells a model is to be fitted to."""
        names = [batch_key] if batch_key else []
        for column in (*names, *categorical, *continuous):
            _column(adata, column)
        moments = {}
        for column in continuous:
            values = _numbers(adata, column)
            spread = float(values.std())
            if spread == 0:
                raise UserError(f"covariate '{column}': the same value in every cell; leave it out")
            moments[column] = (float(values.mean()), spread)
        return Schema(
            gene_ids=tuple(map(str, adata.var_names)),
            batch_key=batch_key,
            batches=_levels(adata, batch_key) if batch_key else ("all",),
            categorical={column: _levels(adata, column) for column in categorical},
            continuous=moments,
        )

    def batch_code(self, value: object) -> int | None:
        """Position of a batch among the model's; None where it is none of them."""
        return _place_of(self.batches)(value)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Schema:
        """Rebuild a schema from the JSON that :func:`dataclasses.asdict` gave."""
        return Schema(
            gene_ids=tuple(value["gene_ids"]),
            batch_key=value["batch_key"],
            batches=tuple(value["batches"]),
            categorical={k: tuple(v) for k, v in value["categorical"].items()},
            continuous={k: (float(v[0]), float(v[1])) for k, v in value["continuous"].items()},
        )


@dataclasses.dataclass
class Minibatch:
    """Some cells, ready for the model.

    Attributes
    ----------
    x : counts, by their non-zeros: gathered, or left where they lie.
    library_n : (cells,) float32, total counts over the model's genes.
    batch_n : (cells,) int64 batch codes.
    covariates_nc : (cells, columns) float32: one-hot categorical covariates, then standardised continuous ones.
    label_n : (cells,) int64 nodes of a taxonomy, -1 without a label; None for a model without labels.
    """

    x: Nonzeros | Rows
    library_n: torch.Tensor
    batch_n: torch.Tensor
    covariates_nc: torch.Tensor
    label_n: torch.Tensor | None = None

    def to(self, device: torch.device) -> Minibatch:
        """The same cells on another device."""
        x = map_tensors(self.x, lambda t: t.to(device))
        return map_tensors(dataclasses.replace(self, x=x), lambda t: t.to(device))


@dataclasses.dataclass
class Counts:
    """Cells × genes counts, packed, with the cells' codes. All tensors live on one device.

    Attributes
    ----------
    indptr_n : (cells + 1,) int64.
    genes_m : (non-zeros,) int16 or int32 column of each non-zero.
    values_m : (non-zeros,) uint8, int16 or int32 counts. 16-bit numbers, here and in `genes_m`, have no sign
        (:func:`unsigned`).
    library_n : (cells,) float64 total counts of each cell.
    batch_n : (cells,) int64. categories_nc : (cells, covariates) int64. continuous_nc : (cells, covariates) float32.
    n_genes : columns. levels : number of categories of each categorical covariate.
    label_n : (cells,) int64 nodes of a taxonomy, -1 without a label; None for a model without labels.
    """

    indptr_n: torch.Tensor
    genes_m: torch.Tensor
    values_m: torch.Tensor
    library_n: torch.Tensor
    batch_n: torch.Tensor
    categories_nc: torch.Tensor
    continuous_nc: torch.Tensor
    n_genes: int
    levels: tuple[int, ...]
    label_n: torch.Tensor | None = dataclasses.field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.indptr_n) - 1

    @property
    def nbytes(self) -> int:
        """What all of it takes."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor))

    def to(self, device: torch.device, beside: int = 2**30) -> Counts:
        """The same cells on another device; on a GPU without room for them and `beside` bytes, their minibatches."""
        free = gpu.free_bytes(device)
        if self.indptr_n.device.type == "cpu" and self.nbytes + beside > free:
            log.info(
                "counts stay in the computer's memory: %.2f GB packed, and %.2f GB for other uses, are more than the "
                "%.2f GB of GPU memory that are free", self.nbytes / 1e9, beside / 1e9, free / 1e9,
            )  # fmt: skip
            return OnHost(**vars(self), device=device)
        return map_tensors(self, lambda t: t.to(device))

    def subset(self, rows: np.ndarray) -> Counts:
        """Some of the cells, by position or by a mask, packed and in memory."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=np.int64)
        rows_n = torch.from_numpy(rows).to(self.indptr_n.device)
        columns = [
            "library_n",
            "batch_n",
            "categories_nc",
            "continuous_nc",
            *(["label_n"] * (self.label_n is not None)),
        ]
        taken = {name: getattr(self, name)[rows_n] for name in columns}
        return Counts(*self.nonzeros(rows_n, packed=True), **taken, n_genes=self.n_genes, levels=self.levels)

    def order(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """In which order an epoch goes through some cells: any, as all are in memory."""
        return rng.permutation(rows)

    def starts(self, rows_n: torch.Tensor) -> torch.Tensor:
        """Where some cells begin in `genes_m` and `values_m`, (cells,) int64."""
        return self.indptr_n[rows_n]

    def nonzeros(self, rows_n: torch.Tensor, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the cells at positions `rows_n`: where each begins, genes (int32) and counts (float32), or as `packed`."""
        lengths_n = self.indptr_n[rows_n + 1] - self.indptr_n[rows_n]
        return gather_nonzeros(self.starts(rows_n), lengths_n, self.genes_m, self.values_m, packed)

    def gather(self, rows_n: torch.Tensor) -> Minibatch:
        """The cells at positions `rows_n` (int64, on the same device), in that order, without Python per cell."""
        return self.minibatch(rows_n, Nonzeros(*self.nonzeros(rows_n), self.n_genes))

    def minibatch(self, rows_n: torch.Tensor, x: Nonzeros | Rows) -> Minibatch:
        """Some cells' counts, and what else the model wants to know of them."""
        one_hots = [
            torch.nn.functional.one_hot(self.categories_nc[rows_n, i], n).float() for i, n in enumerate(self.levels)
        ]
        return Minibatch(
            x=x,
            library_n=self.library_n[rows_n].float(),
            batch_n=self.batch_n[rows_n],
            covariates_nc=torch.cat([*one_hots, self.continuous_nc[rows_n]], 1),
            label_n=None if self.label_n is None else self.label_n[rows_n],
        )


@dataclasses.dataclass
class OnHost(Counts):
    """Counts in the computer's memory whose minibatches are made on another device, `device`."""

    device: torch.device

    def to(self, device: torch.device, beside: int = 0) -> Counts:
        """The same cells, with minibatches on another device; all of them, if it is the computer's memory."""
        whole = Counts(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Counts)})
        return whole if device.type == "cpu" else OnHost(**vars(whole), device=device)

    def gather(self, rows_n: torch.Tensor) -> Minibatch:
        """As :meth:`Counts.gather`, then moved."""
        return super().gather(rows_n.cpu()).to(self.device)


def gather_nonzeros(
    starts_n: torch.Tensor, lengths_n: torch.Tensor, genes_m: torch.Tensor, values_m: torch.Tensor, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells of packed counts, by where each begins and its number of non-zeros; see :meth:`Counts.nonzeros`."""
    indptr_n = torch.cat([lengths_n.new_zeros(1), lengths_n.cumsum(0)])
    if native.library is not None and genes_m.device.type == "cpu":
        return indptr_n, *native.gather(starts_n, genes_m, values_m, indptr_n, packed)
    place_m = torch.repeat_interleave(starts_n - indptr_n[:-1], lengths_n)
    place_m += torch.arange(len(place_m), device=place_m.device)
    genes_m, values_m = genes_m[place_m], values_m[place_m]
    return (indptr_n, genes_m, values_m) if packed else (indptr_n, unsigned(genes_m).int(), unsigned(values_m).float())


def unsigned(of: torch.Tensor) -> torch.Tensor:
    """16-bit numbers, which have no sign in packed counts but in most of PyTorch, as int32; others as they are."""
    return of.int() & 0xFFFF if of.dtype == torch.int16 else of


def map_tensors(of: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A dataclass with something done to its tensors."""
    fields = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
    return dataclasses.replace(of, **{k: change(v) for k, v in fields.items() if isinstance(v, torch.Tensor)})


def matrix_of(adata: AnnData, layer: str | None = None) -> sp.csr_matrix:
    """The counts of an AnnData, in memory, of whatever numbers they are.

    Raises
    ------
    UserError
        When there is no such layer, or what is there are no numbers.
    """
    if layer is not None and layer not in adata.layers:
        raise UserError(f"adata: no layer '{layer}' (layers: {', '.join(adata.layers) or 'none'})")
    if adata.isbacked:
        adata = adata.to_memory()
    x = adata.layers[layer] if layer is not None else adata.X
    if getattr(x, "dtype", np.dtype(object)).kind not in "uibf":
        what = "nothing" if x is None else f"{getattr(x, 'dtype', type(x).__name__)} values"
        raise UserError(f"adata: {what} in {f'layer {layer!r}' if layer is not None else 'X'}; give raw counts")
    return sp.csr_matrix(x.astype(np.float32) if x.dtype == np.float16 else x)  # scipy has no sparse float16


def pack(
    adata: AnnData, schema: Schema, layer: str | None = None, design: bool = True, new_batches: bool = False
) -> Counts:
    """Pack the counts of an AnnData by a model's schema.

    Parameters
    ----------
    adata : cells × genes, raw counts in ``X`` or `layer`. Its genes may be more than the schema's and in another
        order, but none of the schema's may be missing.
    schema : of the model.
    design : False leaves batch and covariates out (all zeros): the encoder does not see them, so new cells can be
        embedded whose batch and covariates the model never met.
    new_batches : True lets cells be of batches that the model never met, or of none that is known, for questions that
        decode them under batches of the model: they get codes beyond those of the model's.

    Raises
    ------
    UserError
        For counts that are negative, fractional or not finite, for missing genes or columns, for unknown batches
        or categories, and for cells with no counts in the model's genes.
    """
    have = {str(gene): i for i, gene in enumerate(adata.var_names)}
    if len(have) < adata.n_vars:
        raise UserError("adata.var_names: gene names repeat; make them unique first")
    missing = [gene for gene in schema.gene_ids if gene not in have]
    if missing:
        raise UserError(
            f"adata: {len(missing)} of the model's {len(schema.gene_ids)} genes are missing (such as {missing[0]!r}); "
            "name genes by the model's ids, or use `scvi-core map`, which says how to fill what was not measured"
        )
    x = matrix_of(adata, layer)
    if tuple(map(str, adata.var_names)) != schema.gene_ids:
        x = x[:, [have[gene] for gene in schema.gene_ids]]
    values = check_counts(x.data, "adata")
    if not x.has_canonical_format or (values == 0).any():
        x = x.astype(np.int64)  # a copy, in which sums of duplicates cannot overflow
        x.sum_duplicates()
        x.eliminate_zeros()
        values = check_counts(x.data, "adata")
    empty = np.flatnonzero(np.diff(x.indptr) == 0)
    if len(empty):
        raise UserError(
            f"adata: {len(empty)} cells have no counts in the model's genes (such as {adata.obs_names[empty[0]]!r}); "
            "drop them first"
        )
    gene_type, value_type = small_types(len(schema.gene_ids), int(values.max(initial=0)))
    return Counts(
        indptr_n=torch.from_numpy(x.indptr.astype(np.int64)),
        genes_m=tensor_of(x.indices, gene_type),
        values_m=tensor_of(values, value_type),
        library_n=torch.from_numpy(np.asarray(x.sum(1, dtype=np.float64)).ravel()),
        n_genes=len(schema.gene_ids),
        **codes(adata, schema, design, new_batches),
    )


def small_types(n_genes: int, largest: int) -> tuple[type, type]:
    """The smallest types of gene numbers and of counts; :func:`tensor_of` makes tensors of them."""
    value_type = np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32
    return np.uint16 if n_genes <= 2**16 else np.int32, value_type


def tensor_of(array: np.ndarray, kind: type) -> torch.Tensor:
    """Whole numbers in one of the :func:`small_types`; uint16, which PyTorch cannot index on a GPU, as int16."""
    array = array.astype(kind)
    return torch.from_numpy(array.view(np.int16) if kind is np.uint16 else array)


def codes(adata: AnnData, schema: Schema, design: bool = True, new_batches: bool = False) -> dict[str, Any]:
    """The fields of :class:`Counts` that come from the cells' columns: batch, covariates and their levels.

    `design` and `new_batches` as for :func:`pack`.
    """
    batch = np.zeros(adata.n_obs, dtype=np.int64)
    categories = np.zeros((adata.n_obs, len(schema.categorical)), dtype=np.int64)
    numbers = np.zeros((adata.n_obs, len(schema.continuous)), dtype=np.float32)
    if design:
        if schema.batch_key is not None and new_batches and schema.batch_key not in adata.obs:
            batch += len(schema.batches)
        elif schema.batch_key is not None:
            batch = _codes(adata, schema.batch_key, schema.batches, new_batches)
        for i, (column, levels) in enumerate(schema.categorical.items()):
            categories[:, i] = _codes(adata, column, levels)
        for i, (column, (mean, spread)) in enumerate(schema.continuous.items()):
            numbers[:, i] = (_numbers(adata, column) - mean) / spread
    return {
        "batch_n": torch.from_numpy(batch),
        "categories_nc": torch.from_numpy(categories),
        "continuous_nc": torch.from_numpy(numbers),
        "levels": tuple(len(levels) for levels in schema.categorical.values()),
    }


def check_counts(values: np.ndarray, where: str) -> np.ndarray:
    """Return `values` if they are counts.

    Raises
    ------
    UserError
        When a value is not finite, negative, or not a whole number.
    """
    if values.dtype.kind not in "uib":
        if not np.isfinite(values).all():
            raise UserError(f"{where}: counts that are not finite (NaN or infinite)")
        fractional = values != np.rint(values)
        if fractional.any():
            example = values[fractional.argmax()]
            raise UserError(
                f"{where}: counts are not whole numbers (such as {example}): they look normalised; give raw "
                "counts, in X or by naming their layer"
            )
    if values.size and values.min() < 0:
        raise UserError(f"{where}: negative counts (such as {values.min():g}); give raw counts")
    if values.size and values.max() >= 2**31:
        raise UserError(f"{where}: a count of {values.max():g} is beyond 2^31")
    return values


def content_digest(adata: AnnData, counts: Counts) -> str:
    """SHA-256 of the cells' names, counts and codes: which data a model was fitted to."""
    digest = hashlib.sha256(sha256_text("\n".join(map(str, adata.obs_names))).encode())
    columns = (counts.batch_n, counts.categories_nc, counts.continuous_nc)
    for tensor in (counts.indptr_n, counts.genes_m, counts.values_m, *columns):
        for part in tensor.split(1 << 22):  # as numbers of 64 bits, whatever they are packed in
            digest.update((unsigned(part).long() if tensor.dtype != torch.float32 else part).numpy())
    return digest.hexdigest()


def _column(adata: AnnData, column: str) -> Any:
    if column not in adata.obs:
        import difflib

        near = difflib.get_close_matches(column, map(str, adata.obs.columns), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"columns: {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise UserError(f"adata.obs: no column '{column}'; {hint}")
    values = adata.obs[column]
    if values.ndim > 1:
        raise UserError(f"adata.obs: {values.shape[1]} columns are called '{column}'; rename all but one")
    if values.isna().any():
        raise UserError(f"adata.obs['{column}']: {int(values.isna().sum())} cells have no value; fill or drop them")
    return values


def _levels(adata: AnnData, column: str) -> tuple[str, ...]:
    return tuple(sorted(set(_column(adata, column).astype(str))))


def _place_of(levels: tuple[str, ...]) -> Callable[[object], int | None]:
    """Where a level stands among some; 1, 1.0 and '1' are one, unless the levels themselves tell them apart."""
    place = {level: code for code, level in enumerate(levels)}
    texts = [level_text(level) for level in levels]
    alike = {text: code for code, text in enumerate(texts) if texts.count(text) == 1}
    return lambda value: place.get(str(value), alike.get(level_text(value)))


def _codes(adata: AnnData, column: str, levels: tuple[str, ...], new: bool = False) -> np.ndarray:
    """(cells,) int64 positions of a column's levels among `levels`; if `new`, the others' are beyond these."""
    values, place_of = _column(adata, column).astype(str).to_numpy(), _place_of(levels)
    place = {value: place_of(value) for value in sorted(set(values))}
    unknown = [value for value, code in place.items() if code is None]
    if unknown and not new:
        raise UserError(
            f"adata.obs['{column}']: {unknown[0]!r} is not one the model was trained on ({', '.join(levels[:8])}"
            + (", ...)" if len(levels) > 8 else ")")
        )
    place |= {value: code for code, value in enumerate(unknown, len(levels))}
    return np.fromiter((place[value] for value in values), dtype=np.int64, count=len(values))


def _numbers(adata: AnnData, column: str) -> np.ndarray:
    try:
        values = _column(adata, column).astype(float).to_numpy()
    except (TypeError, ValueError):
        raise UserError(f"adata.obs['{column}']: not numbers; list it under categorical_covariates instead") from None
    if not np.isfinite(values).all():
        raise UserError(f"adata.obs['{column}']: values that are not finite")
    return values
