"""Scores of the S and G2M phases, by genes that rise in them; chunk by chunk.

A phase's score is the mean of log(1 + counts per 10,000) over its genes, less that over all other genes of the same
expression: ``scanpy.tl.score_genes_cell_cycle``, where it takes every gene of a bin for a control (a test says so).
Genes: Tirosh et al., Science 352:189 (2016), as Seurat lists them in ``cc.genes``, and the names that three have today.
The mouse's genes, and many others', have the same names in other capitals.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_core.files import Decisions
from scvi_core.normalise import log_normalised
from scvi_core.preprocess.samples import read_chunks

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_matrix

CYCLE_OBS = ("s_score", "g2m_score", "cycle_phase")
S_PHASE = """MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 MLF1IP CENPU HELLS RFC2 RPA2 NASP
RAD51AP1 GMNN WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 CLSPN
POLA1 CHAF1B BRIP1 E2F8""".split()  # noqa: SIM905
G2M_PHASE = """HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF TACC3 FAM64A PIMREG SMC4
CCNB2 CKAP2L CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 HN1 JPT1 CDC20 TTK CDC25C KIF2C RANGAP1
NCAPD2 DLGAP5 CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 G2E3 GAS2L3 CBX5 CENPA""".split()  # noqa: SIM905
FEWEST = 10  # genes of either phase that a score needs
BINS = 25  # of genes by their mean


def cell_cycle(
    h5ad: Path, frame: pd.DataFrame, s_g: np.ndarray, g2m_g: np.ndarray, decisions: Decisions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score the kept cells of one sample, in two readings of its file.

    Parameters
    ----------
    h5ad : counts.h5ad. frame : a row a cell of it: ``n_counts``, ``keep``.
    s_g, g2m_g : (genes,) bool, the genes of either phase.
    decisions : which genes there are, or that they are too few.

    Returns
    -------
    s_n, g2m_n : (cells,) float32, NaN where not scored.
    phase_n : (cells,) S, G2M or G1 (neither score is above 0), "" where not scored.
    """
    sets = {"S": s_g, "G2M": g2m_g}
    s_n, g2m_n, phase_n = unscored(len(frame))
    found = {phase: int(of.sum()) for phase, of in sets.items()}
    if min(found.values()) < FEWEST:
        text = f"not scored: {FEWEST} genes of either phase are needed, known by name (human, mouse)"
        decisions.add("cell_cycle_genes", found, text)
        return s_n, g2m_n, phase_n
    decisions.add("cell_cycle_genes", found, "genes of S and G2M phase that are measured (Tirosh et al. 2016)")
    keep, size_n = frame["keep"].to_numpy(bool), np.maximum(frame["n_counts"].to_numpy(), 1)

    def chunks() -> Iterator[tuple[np.ndarray, csr_matrix]]:
        for rows, counts in read_chunks(h5ad, keep):
            yield rows, _normalised(counts, size_n[rows])

    total_g = sum(np.asarray(x_ng.sum(0)).ravel() for _, x_ng in chunks())
    bin_g = _bins(total_g)
    weights = []
    for of in sets.values():
        control = np.isin(bin_g, bin_g[of]) & ~of
        weights.append(of / of.sum() - control / max(1, control.sum()))
    weight_g2 = np.stack(weights, 1)
    for rows, x_ng in chunks():
        s_n[rows], g2m_n[rows] = (x_ng @ weight_g2).T
    phase_n[keep] = np.select([(s_n <= 0) & (g2m_n <= 0), g2m_n > s_n], ["G1", "G2M"], "S")[keep]
    share = {phase: round(float((phase_n[keep] == phase).mean()), 3) for phase in ("G1", "S", "G2M")}
    decisions.add("cell_cycle", share, "share of kept cells whose highest score, if above 0, is of that phase")
    return s_n, g2m_n, phase_n


def unscored(n_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What :func:`cell_cycle` gives of cells that it does not score."""
    return np.full(n_cells, np.nan, np.float32), np.full(n_cells, np.nan, np.float32), np.full(n_cells, "", object)


def _normalised(counts: csr_matrix, size_n: np.ndarray) -> csr_matrix:
    """Log of one plus counts per 10,000."""
    x_ng = counts.astype(np.float64)
    x_ng.data = log_normalised(x_ng.data, x_ng.indptr, size_n)
    return x_ng


def _bins(total_g: np.ndarray) -> np.ndarray:
    """(genes,) number of each gene's bin: some ``BINS`` of as many genes each, by rising mean; equal ones together."""
    rank_g = np.searchsorted(np.sort(total_g), total_g) + 1
    return rank_g // max(1, round(len(total_g) / (BINS - 1)))
