"""Counts of a minibatch, by their non-zeros."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class Nonzeros:
    """Counts of some cells, by their non-zeros: a compressed sparse row matrix.

    Attributes
    ----------
    indptr_n : (cells + 1,) int64, where each cell begins.
    genes_m : (non-zeros,) int32 gene of each, rising within a cell.
    x_m : (non-zeros,) counts, float32.
    n_genes : columns.
    """

    indptr_n: torch.Tensor
    genes_m: torch.Tensor
    x_m: torch.Tensor
    n_genes: int

    @staticmethod
    def of(x_ng: torch.Tensor) -> Nonzeros:
        """From a dense (cells, genes) tensor."""
        row_m, gene_m = x_ng.nonzero(as_tuple=True)
        lengths_n = (x_ng != 0).sum(1)
        indptr_n = torch.cat([lengths_n.new_zeros(1), lengths_n.cumsum(0)])
        return Nonzeros(indptr_n, gene_m.int(), x_ng[row_m, gene_m].float(), x_ng.shape[1])

    def __len__(self) -> int:
        return len(self.indptr_n) - 1

    def rows(self) -> torch.Tensor:
        """(non-zeros,) int64 cell of each."""
        cells_n = torch.arange(len(self), device=self.indptr_n.device)
        return torch.repeat_interleave(cells_n, self.indptr_n.diff(), output_size=len(self.genes_m))

    def totals(self) -> torch.Tensor:
        """(cells,) float64 sums of the counts."""
        total_m = torch.cat([self.x_m.new_zeros(1, dtype=torch.float64), self.x_m.double().cumsum(0)])
        return total_m[self.indptr_n[1:]] - total_m[self.indptr_n[:-1]]

    def dense(self, value_m: torch.Tensor | None = None) -> torch.Tensor:
        """(cells, genes), of the counts or of other values of the non-zeros."""
        value_m = self.x_m if value_m is None else value_m
        out_ng = value_m.new_zeros(len(self), self.n_genes)
        out_ng.view(-1).scatter_(0, self.rows() * self.n_genes + self.genes_m, value_m)
        return out_ng
