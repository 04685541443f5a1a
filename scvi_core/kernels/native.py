"""``kernels.c``, called through pointers. Built when scvi-core is installed, where there is a C compiler.

:data:`library` is None where it was not: :mod:`scvi_core.kernels.ops` then does the same in plain PyTorch, several
times slower, and training says so. Tensors are on the CPU, float32 where they are not integers. All functions
run on :func:`threads` threads; no result depends on their number.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from scvi_core.kernels.nonzeros import Nonzeros

INTERFACE = 4
POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "scvi_linear": [INT, *[INT64] * 3, *[POINTER] * 4],
    "scvi_linear_gradient": [INT, *[INT64] * 3, *[POINTER] * 7],
    "scvi_log_likelihood": [*[INT] * 3, *[INT64] * 2, *[POINTER] * 7, INT64, *[POINTER] * 8],
    "scvi_sums": [INT, *[INT64] * 3, *[POINTER] * 4],
    "scvi_hidden": [INT, *[INT64] * 2, *[POINTER] * 3, FLOAT, FLOAT, POINTER, FLOAT, *[POINTER] * 5],
    "scvi_hidden_gradient": [INT, *[INT64] * 2, *[POINTER] * 2, FLOAT, *[POINTER] * 6],
    "scvi_sparse_linear": [INT, *[INT64] * 2, *[POINTER] * 6],
    "scvi_sparse_linear_gradient": [INT, *[INT64] * 2, *[POINTER] * 3, INT64, *[POINTER] * 2],
    "scvi_adam": [INT, INT64, *[POINTER] * 6, *[FLOAT] * 6],
    "scvi_fold_changes": [INT, *[INT64] * 3, *[POINTER] * 3, FLOAT, *[POINTER] * 2],
    "scvi_gather": [INT64, *[POINTER] * 2, INT, POINTER, INT, *[POINTER] * 3],
    "scvi_gather_packed": [INT64, *[POINTER] * 2, INT64, *[POINTER] * 2],
}


def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = here / f"_kernels{suffix}"
        if path.is_file():
            break
    else:
        return None, "not built: scvi-core was installed where there was no C compiler"
    try:
        found = ctypes.CDLL(str(path))
        if found.scvi_interface() != INTERFACE:
            return None, f"{path.name} was built from another version; install scvi-core again"
        for name, arguments in SIGNATURES.items():
            getattr(found, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be used ({error})"
    return found, ""


library, reason = _open()

# The threads that PyTorch had before a fork are not there after it, and it would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels take it: they are for float32 on the CPU."""
    return library is not None and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


_kept: int | None = None


def threads() -> int:
    """On how many threads the functions here run: PyTorch's number, or that of :func:`our_threads`."""
    return _kept or torch.get_num_threads()


@contextlib.contextmanager
def our_threads() -> Iterator[None]:
    """Have the functions here run on as many threads as PyTorch would, and PyTorch's own on one.

    Its threads wait for one another after every operation, spinning: on cores that others use too that takes many times
    longer than what there is to do.
    """
    global _kept
    before, _kept = _kept, threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_kept)
        _kept = before


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the rows of a minibatch")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(cells, out): x weight' + bias."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty(len(x), len(weight))
    library.scvi_linear(threads(), *x.shape, len(weight), _at(x), _at(weight), _at(bias), _at(out))
    return out


def linear_gradient(
    outer: torch.Tensor,
    scale_n: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of :func:`linear` by x, weight and bias, those `wanted`, from that by its output, `outer`.

    `scale_n` multiplies the rows of `outer`, if given.
    """
    outer, x, weight = outer.contiguous(), x.contiguous(), weight.contiguous()
    shapes = x.shape, weight.shape, weight.shape[:1]
    gradients = tuple(torch.empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True))
    given = outer, scale_n, x, weight, *gradients
    _done(library.scvi_linear_gradient(threads(), *x.shape, len(weight), *map(_at, given)))
    return gradients


def tile(
    x: Nonzeros,
    logits: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    log_library_n: torch.Tensor,
    log_theta_rg: torch.Tensor | None,
    row_n: torch.Tensor | None,
    gradient: bool,
    in_place: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """The likelihood of a minibatch, and its gradients.

    Parameters
    ----------
    logits : of rho and, for a zero-inflated likelihood, of pi; (cells, genes) each. Float32 with their biases, or
        bfloat16 to which `biases` are added in float32.
    log_theta_rg : one row, one a cell, or those of which `row_n` names each cell's; None for Poisson.
    in_place : whether gradients may take the place of the logits.

    Returns
    -------
    value_n, (cells,); and, if asked for, its gradients: a tile for each of `logits`, in their type; one by log theta,
    float32 and a row a cell, or None; by log library size, (cells,).
    """
    n_cells, n_genes = logits[0].shape
    half, kind = logits[0].dtype == torch.bfloat16, 0 if log_theta_rg is None else len(logits)
    log_library_n = log_library_n.contiguous()
    log_theta_rg = None if log_theta_rg is None else log_theta_rg.contiguous()
    tiles = list(logits if in_place else map(torch.empty_like, logits)) if gradient else []
    theta_ng = torch.empty(n_cells, n_genes) if gradient and kind else None
    value_n, library_n = torch.empty(n_cells, dtype=torch.float64), torch.empty(n_cells)
    rho, pi = ([_at(of[i]) if i < len(of) else None for of in (logits, biases or [], tiles)] for i in (0, 1))
    _done(library.scvi_log_likelihood(
        threads(), kind, int(half), n_cells, n_genes, _at(x.indptr_n), _at(x.genes_m), _at(x.x_m), rho[0],
        rho[1], _at(log_library_n), _at(log_theta_rg), len(log_theta_rg) if kind else 0, _at(row_n), pi[0], pi[1],
        _at(value_n), rho[2], _at(library_n), _at(theta_ng), pi[2],
    ))  # fmt: skip
    return value_n.float(), tiles, theta_ng, library_n


def sums(tile_ng: torch.Tensor, scale_n: torch.Tensor, row_n: torch.Tensor | None, n_rows: int) -> torch.Tensor:
    """(rows, genes): over the cells that `row_n` gives to each row, or over all, the sum of scale × tile."""
    out_rg = torch.empty(n_rows, tile_ng.shape[1])
    library.scvi_sums(threads(), *tile_ng.shape, n_rows, *map(_at, (tile_ng, scale_n, row_n, out_rg)))
    return out_rg


def hidden(
    a_nh: torch.Tensor, norm: torch.nn.Module, kept_nh: torch.Tensor | None, kept_scale: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Norm, ReLU and dropout of (cells, hidden); and what :func:`hidden_gradient` needs."""
    a_nh, kind = a_nh.contiguous(), _norm(norm, norm.training)
    normal_nh = torch.empty_like(a_nh) if kind else None
    inverse = torch.empty(a_nh.shape[0 if kind == LAYER else 1]) if kind else None
    out_nh, batch = torch.empty_like(a_nh), kind in (BATCH, FROZEN)
    library.scvi_hidden(
        kind, *a_nh.shape, _at(a_nh), _at(norm.weight) if batch else None, _at(norm.bias) if batch else None,
        norm.eps if kind else 0.0, norm.momentum if batch else 0.0, _at(kept_nh), kept_scale,
        _at(norm.running_mean) if batch else None, _at(norm.running_var) if batch else None, _at(normal_nh),
        _at(inverse), _at(out_nh),
    )  # fmt: skip
    if kind == BATCH:
        norm.num_batches_tracked += 1
    return out_nh, normal_nh, inverse


def hidden_gradient(
    outer_nh: torch.Tensor,
    out_nh: torch.Tensor,
    weight_h: torch.Tensor | None,
    normal_nh: torch.Tensor | None,
    inverse: torch.Tensor | None,
    norm: torch.nn.Module,
    training: bool,
    kept_scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients by the input and by the weight and bias of a batch norm."""
    outer_nh, kind = outer_nh.contiguous(), _norm(norm, training)
    grad_a_nh = torch.empty_like(outer_nh)
    by_weight = [None if weight_h is None else torch.empty_like(weight_h) for _ in range(2)]
    given = outer_nh, out_nh, normal_nh, inverse, weight_h, grad_a_nh, *by_weight
    pointers = [_at(t) for t in given]
    library.scvi_hidden_gradient(kind, *outer_nh.shape, *pointers[:2], kept_scale, *pointers[2:])
    return grad_a_nh, *by_weight


NONE, LAYER, BATCH, FROZEN = range(4)


def _norm(norm: torch.nn.Module, training: bool) -> int:
    if isinstance(norm, torch.nn.BatchNorm1d):
        return BATCH if training else FROZEN
    return LAYER if isinstance(norm, torch.nn.LayerNorm) else NONE


def sparse_linear(x: Nonzeros, weight_gh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cells, hidden): log(1 + counts) times weights, over each cell's non-zeros; and these logs, (non-zeros,)."""
    weight_gh = weight_gh.contiguous()
    out_nh, value_m = torch.empty(len(x), weight_gh.shape[1]), torch.empty(len(x.x_m))
    given = x.indptr_n, x.genes_m, x.x_m, weight_gh, value_m, out_nh
    library.scvi_sparse_linear(threads(), *out_nh.shape, *map(_at, given))
    return out_nh, value_m


def sparse_linear_gradient(x: Nonzeros, value_m: torch.Tensor, grad_out_nh: torch.Tensor) -> torch.Tensor:
    """(genes, hidden): its gradient by the weights."""
    grad_out_nh = grad_out_nh.contiguous()
    grad_gh = torch.empty(x.n_genes, grad_out_nh.shape[1])
    given = _at(x.indptr_n), _at(x.genes_m), _at(value_m), x.n_genes, _at(grad_out_nh), _at(grad_gh)
    library.scvi_sparse_linear_gradient(threads(), *grad_out_nh.shape, *given)
    return grad_gh


def gather(
    starts_n: torch.Tensor, genes_m: torch.Tensor, values_m: torch.Tensor, indptr_n: torch.Tensor, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The genes and counts of cells of packed counts, which begin at `starts_n`: int32 and float32, or as `packed`.

    `indptr_n` says where each begins in the answer, and so how many non-zeros it has.
    """
    length = int(indptr_n[-1])
    if packed:
        out_genes_m, out_x_m = genes_m.new_empty(length), values_m.new_empty(length)
        for from_m, to_m in ((genes_m, out_genes_m), (values_m, out_x_m)):
            given = _at(starts_n), _at(from_m), from_m.element_size(), _at(indptr_n), _at(to_m)
            library.scvi_gather_packed(len(starts_n), *given)
    else:
        out_genes_m, out_x_m = torch.empty(length, dtype=torch.int32), torch.empty(length)
        library.scvi_gather(
            len(starts_n), _at(starts_n), _at(genes_m), genes_m.element_size(), _at(values_m), values_m.element_size(),
            _at(indptr_n), _at(out_genes_m), _at(out_x_m),
        )  # fmt: skip
    return out_genes_m, out_x_m


def adam(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    trainable: Sequence[torch.Tensor | None],
    numbers: tuple[float, float],
    mean_rate: float,
    square_rate: float,
    eps: float,
    decay: float,
) -> None:
    """As :func:`scvi_core.kernels.adam`."""
    gradients = [g.contiguous() for g in gradients]
    tables = [
        (POINTER * len(weights))(*map(_at, tensors)) for tensors in (weights, gradients, means, squares, trainable)
    ]
    sizes = (INT64 * len(weights))(*(w.numel() for w in weights))
    rate, square_scale = numbers
    library.scvi_adam(threads(), len(weights), sizes, *tables, rate, mean_rate, square_rate, eps, decay, square_scale)


def fold_changes(
    log_gm: torch.Tensor, a_m: torch.Tensor, b_m: torch.Tensor, delta: float, ranks: tuple[int, int, int]
) -> torch.Tensor:
    """Summary over pairs of ``log_gm[:, a_m] - log_gm[:, b_m]``, (genes, 7) float64; `a_m` and `b_m` are int32.

    Mean, standard deviation, shares above `delta` and below its opposite, and the values of three rising `ranks`.
    """
    out_g7 = torch.empty(len(log_gm), 7, dtype=torch.float64)
    wanted = torch.tensor(ranks, dtype=torch.int64)
    _done(library.scvi_fold_changes(
        threads(), *log_gm.shape, len(a_m), _at(log_gm), _at(a_m), _at(b_m), delta, _at(wanted), _at(out_g7)
    ))  # fmt: skip
    return out_g7
