"""``kernels.c``, called through pointers. Built when scvi-core is installed, where there is a C compiler.

:data:`library` is None where it was not: :mod:`scvi_core.kernels` then does the same in plain PyTorch, several times
slower, and training says so. All functions want contiguous tensors on the CPU, float32 where they are not integers.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # before the library is opened: it takes OpenMP from PyTorch, so that both share one set of threads

if TYPE_CHECKING:
    from scvi_core.kernels import Nonzeros

INTERFACE = 3
POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "scvi_log_likelihood": [INT, INT, *[INT64] * 2, *[POINTER] * 7, INT64, *[POINTER] * 2, FLOAT, *[POINTER] * 8],
    "scvi_hidden": [*[INT64] * 2, *[POINTER] * 3, FLOAT, FLOAT, POINTER, FLOAT, *[POINTER] * 5],
    "scvi_hidden_gradient": [*[INT64] * 2, *[POINTER] * 2, FLOAT, *[POINTER] * 6],
    "scvi_sparse_linear": [*[INT64] * 2, *[POINTER] * 5],
    "scvi_sparse_linear_gradient": [*[INT64] * 2, *[POINTER] * 3, INT64, *[POINTER] * 2],
    "scvi_adam": [INT64, *[POINTER] * 4, *[FLOAT] * 6],
    "scvi_fold_changes": [*[INT64] * 3, *[POINTER] * 3, FLOAT, *[POINTER] * 2],
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
        return None, "not built: scvi-core was installed where there was no C compiler with OpenMP"
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


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels take it: they are for float32 on the CPU."""
    return library is not None and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def log_likelihood(
    indptr_n: torch.Tensor,
    genes_m: torch.Tensor,
    x_m: torch.Tensor,
    logit_rho_ng: torch.Tensor,
    log_library_n: torch.Tensor,
    log_theta_ng: torch.Tensor | None,
    logit_pi_ng: torch.Tensor | None,
    gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """As :func:`scvi_core.kernels.log_likelihood`: the value, then its gradients by the four inputs, or None."""
    n_cells, n_genes = logit_rho_ng.shape
    kind = 0 if log_theta_ng is None else 1 if logit_pi_ng is None else 2
    rho_ng, log_library_n, theta_ng, pi_ng = (
        None if t is None else t.contiguous() for t in (logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng)
    )
    tile = lambda wanted: torch.empty(n_cells, n_genes) if gradient and wanted else None  # noqa: E731
    grad_rho_ng, grad_theta_ng, grad_pi_ng = tile(True), tile(kind >= 1), tile(kind == 2)
    value_n, grad_library_n = torch.empty(n_cells, dtype=torch.float64), torch.empty(n_cells)
    _done(library.scvi_log_likelihood(
        kind, 0, n_cells, n_genes, _at(indptr_n), _at(genes_m), _at(x_m), _at(rho_ng), None, _at(log_library_n),
        _at(theta_ng), 0 if theta_ng is None else len(theta_ng), _at(pi_ng), None, 1.0, _at(value_n), _at(grad_rho_ng),
        _at(grad_library_n), _at(grad_theta_ng), _at(grad_pi_ng), None, None, None,
    ))  # fmt: skip
    return value_n.float(), grad_rho_ng, grad_library_n if gradient else None, grad_theta_ng, grad_pi_ng


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the rows of a minibatch")


def log_likelihood_gradients(
    x: Nonzeros,
    logits: list[torch.Tensor],
    biases: list[torch.Tensor],
    log_library_n: torch.Tensor,
    log_theta_ng: torch.Tensor | None,
    scale: float,
    sums: list[torch.Tensor],
    sum_theta_g: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """The value, and its gradients times `scale`, for one known loss.

    Parameters
    ----------
    logits : of rho and, for a zero-inflated likelihood, of pi; (cells, genes) each. Float32 with their biases, or
        bfloat16 to which `biases` are added in float32.
    sums, sum_theta_g : (genes,) where the gradients by logits, and by a theta of one row, are summed over cells.

    Returns
    -------
    value_n; a tile of gradients for each of `logits`, in their type; one of theta where it has a row a cell, else
    None; the gradient by log library size, (cells,).
    """
    n_cells, n_genes = logits[0].shape
    half = logits[0].dtype == torch.bfloat16
    kind = 0 if log_theta_ng is None else len(logits)
    log_library_n = log_library_n.contiguous()
    tiles = [torch.empty_like(logit) for logit in logits]
    theta_ng = torch.empty(n_cells, n_genes) if kind and sum_theta_g is None else None
    value_n, library_n = torch.empty(n_cells, dtype=torch.float64), torch.empty(n_cells)
    rho, pi = ([_at(of[i]) if i < len(of) else None for of in (logits, biases, tiles, sums)] for i in (0, 1))
    _done(library.scvi_log_likelihood(
        kind, int(half), n_cells, n_genes, _at(x.indptr_n), _at(x.genes_m), _at(x.x_m), rho[0], rho[1],
        _at(log_library_n), _at(log_theta_ng), 0 if kind == 0 else len(log_theta_ng), pi[0], pi[1], scale,
        _at(value_n), rho[2], _at(library_n), _at(theta_ng), pi[2], rho[3], _at(sum_theta_g), pi[3],
    ))  # fmt: skip
    return value_n.float(), tiles, theta_ng, library_n


def hidden(
    a_nh: torch.Tensor, norm: torch.nn.BatchNorm1d, kept_nh: torch.Tensor | None, kept_scale: float
) -> tuple[torch.Tensor, tuple]:
    """Batch norm in training, ReLU and dropout of (cells, hidden); and what :func:`hidden_gradient` needs."""
    normal_nh, out_nh, inverse_h = torch.empty_like(a_nh), torch.empty_like(a_nh), torch.empty(a_nh.shape[1])
    kept_scale = 1.0 if kept_nh is None else kept_scale
    library.scvi_hidden(
        *a_nh.shape, _at(a_nh), _at(norm.weight), _at(norm.bias), norm.eps, norm.momentum, _at(kept_nh), kept_scale,
        _at(norm.running_mean), _at(norm.running_var), _at(normal_nh), _at(inverse_h), _at(out_nh),
    )  # fmt: skip
    norm.num_batches_tracked += 1
    return out_nh, (kept_scale, normal_nh, inverse_h)


def hidden_gradient(
    outer_nh: torch.Tensor, out_nh: torch.Tensor, norm: torch.nn.BatchNorm1d, saved: tuple
) -> torch.Tensor:
    """The gradient by the input; those by the norm's weight and bias are left in their ``.grad``."""
    kept_scale, normal_nh, inverse_h = saved
    grad_a_nh = torch.empty_like(outer_nh)
    library.scvi_hidden_gradient(
        *outer_nh.shape, _at(outer_nh), _at(out_nh), kept_scale, _at(normal_nh), _at(inverse_h), _at(norm.weight),
        _at(grad_a_nh), _at(norm.weight.grad), _at(norm.bias.grad),
    )  # fmt: skip
    return grad_a_nh


def sparse_linear(
    indptr_n: torch.Tensor, genes_m: torch.Tensor, value_m: torch.Tensor, weight_gh: torch.Tensor
) -> torch.Tensor:
    """(cells, hidden): the sum over each cell's non-zeros of value × the gene's row of weights."""
    weight_gh = weight_gh.contiguous()
    out_nh = torch.empty(len(indptr_n) - 1, weight_gh.shape[1])
    library.scvi_sparse_linear(*out_nh.shape, _at(indptr_n), _at(genes_m), _at(value_m), _at(weight_gh), _at(out_nh))
    return out_nh


def sparse_linear_gradient(
    indptr_n: torch.Tensor,
    genes_m: torch.Tensor,
    value_m: torch.Tensor,
    grad_out_nh: torch.Tensor,
    n_genes: int,
    grad_gh: torch.Tensor | None = None,
) -> torch.Tensor:
    """(genes, hidden): its gradient by the weights, written to `grad_gh` if given."""
    grad_out_nh = grad_out_nh.contiguous()
    grad_gh = torch.empty(n_genes, grad_out_nh.shape[1]) if grad_gh is None else grad_gh
    library.scvi_sparse_linear_gradient(
        *grad_out_nh.shape, _at(indptr_n), _at(genes_m), _at(value_m), n_genes, _at(grad_out_nh), _at(grad_gh)
    )
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
    weights: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    rate: float,
    mean_rate: float,
    square_rate: float,
    eps: float,
    decay: float,
    square_scale: float,
) -> None:
    """As :func:`scvi_core.kernels.adam`, whose bias corrections are already in `rate` and `square_scale`."""
    library.scvi_adam(
        len(weights), _at(weights), _at(gradient), _at(mean), _at(square), rate, mean_rate, square_rate, eps, decay,
        square_scale,
    )  # fmt: skip


def fold_changes(
    log_gm: torch.Tensor, a_m: torch.Tensor, b_m: torch.Tensor, delta: float, ranks: tuple[int, int, int]
) -> torch.Tensor:
    """Summary over pairs of ``log_gm[:, a_m] - log_gm[:, b_m]``, (genes, 7) float64; `a_m` and `b_m` are int32.

    Mean, standard deviation, shares above `delta` and below its opposite, and the values of three rising `ranks`.
    """
    out_g7 = torch.empty(len(log_gm), 7, dtype=torch.float64)
    wanted = torch.tensor(ranks, dtype=torch.int64)
    _done(library.scvi_fold_changes(
        *log_gm.shape, len(a_m), _at(log_gm), _at(a_m), _at(b_m), delta, _at(wanted), _at(out_g7)
    ))  # fmt: skip
    return out_g7
