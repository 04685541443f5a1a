"""``kernels.c``, called through pointers. Built when scvi-core is installed, where there is a C compiler.

:data:`library` is None where it was not: :mod:`scvi_core.kernels` then does the same in plain PyTorch, several times
slower, and training says so. All functions want contiguous tensors on the CPU, float32 where they are not integers.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import torch  # before the library is opened: it takes OpenMP from PyTorch, so that both share one set of threads

INTERFACE = 1
POINTER, INT64, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {
    "scvi_log_likelihood": [INT, *[INT64] * 2, *[POINTER] * 6, INT64, *[POINTER] * 6],
    "scvi_sparse_linear": [*[INT64] * 2, *[POINTER] * 5],
    "scvi_sparse_linear_gradient": [*[INT64] * 2, *[POINTER] * 5],
    "scvi_gather": [INT64, *[POINTER] * 2, INT, POINTER, INT, *[POINTER] * 3],
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
    inputs = [None if t is None else t.contiguous() for t in (logit_rho_ng, log_library_n, log_theta_ng, logit_pi_ng)]
    value_n, library_n = torch.empty(n_cells, dtype=torch.float64), torch.empty(n_cells)
    rho_ng = torch.empty(n_cells, n_genes) if gradient else None
    theta_ng = torch.empty(n_cells, n_genes) if gradient and kind >= 1 else None
    pi_ng = torch.empty(n_cells, n_genes) if gradient and kind == 2 else None
    failed = library.scvi_log_likelihood(
        kind, n_cells, n_genes, _at(indptr_n), _at(genes_m), _at(x_m), _at(inputs[0]), _at(inputs[1]), _at(inputs[2]),
        0 if log_theta_ng is None else len(log_theta_ng), _at(inputs[3]),
        _at(value_n), _at(rho_ng), _at(library_n), _at(theta_ng), _at(pi_ng),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the rows of a minibatch")
    return value_n.float(), rho_ng, library_n if gradient else None, theta_ng, pi_ng


def sparse_linear(
    indptr_n: torch.Tensor, genes_m: torch.Tensor, value_m: torch.Tensor, weight_gh: torch.Tensor
) -> torch.Tensor:
    """(cells, hidden): the sum over each cell's non-zeros of value × the gene's row of weights."""
    weight_gh = weight_gh.contiguous()
    out_nh = torch.empty(len(indptr_n) - 1, weight_gh.shape[1])
    library.scvi_sparse_linear(*out_nh.shape, _at(indptr_n), _at(genes_m), _at(value_m), _at(weight_gh), _at(out_nh))
    return out_nh


def sparse_linear_gradient(
    indptr_n: torch.Tensor, genes_m: torch.Tensor, value_m: torch.Tensor, grad_out_nh: torch.Tensor, n_genes: int
) -> torch.Tensor:
    """(genes, hidden): its gradient by the weights."""
    grad_out_nh = grad_out_nh.contiguous()
    grad_gh = torch.zeros(n_genes, grad_out_nh.shape[1])
    library.scvi_sparse_linear_gradient(
        *grad_out_nh.shape, _at(indptr_n), _at(genes_m), _at(value_m), _at(grad_out_nh), _at(grad_gh)
    )
    return grad_gh


def gather(
    starts_n: torch.Tensor, genes_m: torch.Tensor, values_m: torch.Tensor, indptr_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The genes (int32) and counts (float32) of cells of packed counts, which begin at `starts_n`.

    `indptr_n` says where each begins in the answer, and so how many non-zeros it has.
    """
    length = int(indptr_n[-1])
    out_genes_m, out_x_m = torch.empty(length, dtype=torch.int32), torch.empty(length)
    library.scvi_gather(
        len(starts_n), _at(starts_n), _at(genes_m), genes_m.element_size(), _at(values_m), values_m.element_size(),
        _at(indptr_n), _at(out_genes_m), _at(out_x_m),
    )  # fmt: skip
    return out_genes_m, out_x_m
