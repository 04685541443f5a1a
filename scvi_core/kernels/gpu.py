"""``triton_kernels.py``, called as ``native.py`` calls ``kernels.c``: the same functions, for tensors on a GPU.

Where Triton cannot be imported :mod:`scvi_core.kernels.ops` does the same in plain PyTorch, and training says so.
Nothing here waits for the device, and no size depends on what a tensor holds: a step of these can be recorded
(``train/recorded.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from scvi_core.kernels.nonzeros import Nonzeros

BLOCK, SOME = 1024, 256  # genes, and non-zeros, that a program takes at a time


@functools.cache
def _triton() -> tuple[ModuleType | None, str]:
    """The kernels, or None and the reason. Not at import, as Triton's takes long and only GPUs need it."""
    try:
        from scvi_core.kernels import triton_kernels

        if torch.cuda.is_available():  # whether Triton can compile here: it needs a C compiler, a card it knows
            one = torch.zeros(1, dtype=torch.int64, device="cuda")
            triton_kernels.log1p_kernel[(1,)](1, one, one, one, one, one.float(), SOME=SOME)
    except Exception as error:  # Triton and drivers raise errors of many types
        return None, f"Triton cannot be used ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return triton_kernels, ""


def reason() -> str:
    """Why there are no kernels for a GPU; empty where there are."""
    return _triton()[1]


def serves(tensor: torch.Tensor) -> bool:
    """Whether these kernels take it: they are for float32 on a GPU."""
    return tensor.dtype == torch.float32 and tensor.is_cuda and _triton()[0] is not None


def free_bytes(device: torch.device) -> float:
    """GPU memory that nobody uses; boundless where there is no GPU."""
    if torch.device(device).type != "cuda":
        return math.inf
    with contextlib.suppress(RuntimeError):  # of a recording that failed, after which PyTorch may refuse
        torch.cuda.empty_cache()  # what PyTorch keeps for tensors to come looks used otherwise
    return torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Have a GPU multiply float32 matrices as TF32: by their first 11 bits, and the sums in float32."""
    if not wanted:
        yield
        return
    settings = torch.backends.cuda.matmul
    # the one that PyTorch goes by; from 2.9 on it refuses to tell the other where a caller has set this one
    name, on = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, on)
    try:
        yield
    finally:
        setattr(settings, name, before)


@dataclasses.dataclass
class Rows:
    """Some cells of packed counts, left where they lie.

    Attributes
    ----------
    begin_n, end_n : (cells,) int64, of each cell's non-zeros.
    genes_m : (non-zeros of all cells,) int16 without a sign, or int32.
    values_m : their counts, likewise, or uint8, or float32 where they were gathered.
    n_genes : columns.
    """

    begin_n: torch.Tensor
    end_n: torch.Tensor
    genes_m: torch.Tensor
    values_m: torch.Tensor
    n_genes: int

    @staticmethod
    def of(x: Nonzeros | Rows) -> Rows:
        """Of a minibatch that was gathered."""
        return x if isinstance(x, Rows) else Rows(x.indptr_n[:-1], x.indptr_n[1:], x.genes_m, x.x_m, x.n_genes)

    def __len__(self) -> int:
        return len(self.begin_n)

    def log1p(self) -> torch.Tensor:
        """(cells, genes) float32 log(1 + counts). Dense: the encoder's products are small, and need no atomic sums."""
        out_ng = torch.zeros(len(self), self.n_genes, device=self.begin_n.device)
        if len(self):
            _triton()[0].log1p_kernel[(len(self),)](
                self.n_genes, self.begin_n, self.end_n, self.genes_m, self.values_m, out_ng, SOME=SOME
            )
        return out_ng


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(cells, out): x weight' + bias."""
    return torch.addmm(bias, x, weight.t())


def linear_gradient(
    outer: torch.Tensor, scale_n: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """As :func:`scvi_core.kernels.native.linear_gradient`."""
    scale_n1 = scale_n[:, None]
    return (
        (outer @ weight).mul_(scale_n1) if wanted[0] else None,
        outer.t() @ (x * scale_n1) if wanted[1] else None,
        outer.t().mv(scale_n) if wanted[2] else None,
    )


def sums(tile_ng: torch.Tensor, scale_n: torch.Tensor, row_n: torch.Tensor | None, n_rows: int) -> torch.Tensor:
    """As :func:`scvi_core.kernels.native.sums`."""
    if row_n is None:
        return (scale_n[:, None] * tile_ng).sum(0, keepdim=True)
    # not by index_add, whose sums may take any order
    return (functional.one_hot(row_n, n_rows) * scale_n[:, None]).t() @ tile_ng


def tile(
    x: Nonzeros | Rows,
    logits: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    log_library_n: torch.Tensor,
    log_theta_rg: torch.Tensor | None,
    row_n: torch.Tensor | None,
    gradient: bool,
    in_place: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """As :func:`scvi_core.kernels.native.tile`, never in place; by a theta that cells share in the logits' type."""
    shared = log_theta_rg is not None and len(log_theta_rg) == 1 and len(logits[0]) > 1
    log_theta_ng = log_theta_rg if row_n is None else log_theta_rg[row_n]
    of = _Tile(Rows.of(x), list(logits), biases, log_library_n.contiguous(), log_theta_ng)
    value_n, slope_n = of.values()
    if not gradient:
        return value_n, [], None, slope_n
    kind = logits[0].dtype if shared else torch.float32  # others go on into further products
    return value_n, *of.gradients(torch.ones_like(slope_n), kind), slope_n


class _Tile:
    """The likelihood of one minibatch: what its kernels are given. Any tensor stands where there is nothing to read."""

    def __init__(
        self,
        rows: Rows,
        logits: list[torch.Tensor],
        biases: list[torch.Tensor] | None,
        log_library_n: torch.Tensor,
        log_theta_ng: torch.Tensor | None,
    ):
        rho_ng, pi_ng = logits[0], logits[-1]
        bias_rho_g, bias_pi_g = (rho_ng, rho_ng) if biases is None else (biases[0], biases[-1])
        kind = 0 if log_theta_ng is None else len(logits)
        log_theta_ng = rho_ng if log_theta_ng is None else log_theta_ng.contiguous()
        theta_ng = inverse_ng = log_theta_ng
        if kind:
            theta_ng, inverse_ng = (torch.empty_like(log_theta_ng) for _ in range(2))
            n = theta_ng.numel()
            _triton()[0].theta_kernel[(-(-n // BLOCK),)](n, log_theta_ng, theta_ng, inverse_ng, BLOCK=BLOCK)
        stride = rows.n_genes * (len(log_theta_ng) > 1)
        head = kind, biases is not None, rows.n_genes, rho_ng, bias_rho_g, pi_ng, bias_pi_g, stride
        cells = rows.begin_n, rows.end_n, rows.genes_m, rows.values_m
        self.state_n5 = torch.empty(len(rows), 5, dtype=torch.float64, device=rho_ng.device)
        self.zeros = *head, theta_ng, inverse_ng, log_library_n, self.state_n5
        self.nonzeros = *head, log_theta_ng, *cells, log_library_n, self.state_n5
        self.logits, self.log_library_n, self.theta, self.shape = logits, log_library_n, bool(kind), rho_ng.shape

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log p(x) and its slope by log library, (cells,)."""
        value_n, slope_n = (torch.empty_like(self.log_library_n) for _ in range(2))
        if self.shape[0]:
            _triton()[0].zeros_kernel[(self.shape[0],)](*self.zeros, BLOCK=BLOCK)
            _triton()[0].nonzeros_kernel[(self.shape[0],)](*self.nonzeros, value_n, slope_n, SOME=SOME)
        return value_n, slope_n

    def gradients(self, outer_n: torch.Tensor, kind: Any) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """After :meth:`values`: tiles of gradients by the logits, in their type, and by log theta, in `kind`.

        Times `outer_n`.
        """
        tiles = [torch.empty_like(logit) for logit in self.logits]
        theta_ng = torch.empty_like(self.logits[0], dtype=kind) if self.theta else None
        if self.shape[0]:
            given = outer_n, tiles[0], tiles[-1], tiles[0] if theta_ng is None else theta_ng
            grid = self.shape[0], -(-self.shape[1] // BLOCK)
            _triton()[0].zeros_gradient_kernel[grid](*self.zeros, *given, BLOCK=BLOCK)
            _triton()[0].nonzeros_gradient_kernel[grid[:1]](*self.nonzeros, *given, SOME=SOME)
        return tiles, theta_ng


def adam(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    trainable: Sequence[torch.Tensor | None],
    numbers_2: torch.Tensor,
    mean_rate: float,
    square_rate: float,
    eps: float,
    decay: float,
) -> None:
    """As :func:`scvi_core.kernels.adam`; `numbers_2` lies on the device."""
    for w, gradient, mean, square, mask in zip(weights, gradients, means, squares, trainable, strict=True):
        n, masked = w.numel(), mask is not None
        rates = numbers_2, mean_rate, square_rate, eps, decay
        _triton()[0].adam_kernel[(-(-n // BLOCK),)](
            masked,
            n,
            w,
            gradient.contiguous(),
            mean,
            square,
            mask.view(torch.uint8) if masked else w,
            *rates,
            BLOCK=BLOCK,
        )
