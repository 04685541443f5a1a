"""What a gene is called: Ensembl ids or symbols, one row a gene, and the organism they point to."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from scvi_core.files import Decisions, UserError
from scvi_core.io.blocks import Read, take_columns
from scvi_core.io.checks import listed

ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")
VERSION = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+")  # what follows stays: GENCODE writes ENSG00000182378.15_PAR_Y
BARCODE = re.compile(r"(?:.*[_:-])?[ACGT]{8,}(?:[-_.].*)?")
# column names of symbols as they are met in the wild, best first, in lower case
SYMBOL_COLUMNS = (
    "gene_name", "gene_names", "gene_symbol", "gene_symbols", "gene_short_name", "symbol", "symbols", "hgnc_symbol",
    "mgi_symbol", "feature_name", "gene", "genes", "genename", "name",
)  # fmt: skip
HOUSEKEEPING = {"ACTB", "GAPDH", "MALAT1", "B2M", "EEF1A1", "RPLP0", "TMSB4X", "FTL", "RPL13", "RPS27"}


def as_text(values: object) -> np.ndarray:
    """Strings of anything: bytes decoded, missing as "", no white space around. Object array, one-dimensional."""
    array = np.asarray(pd.Series(values).astype(object) if not isinstance(values, np.ndarray) else values)
    out = np.empty(len(array), object)
    for i, value in enumerate(array.tolist()):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif value is None or value is pd.NA or value is pd.NaT or value != value:  # NaN differs from itself
            value = ""
        out[i] = str(value).strip()
    return out


def looks_like_genes(names: np.ndarray) -> bool:
    """Whether `names` are gene names: Ensembl ids, or known symbols of human or mouse among them."""
    return _ensembl_share(names) >= 0.5 or len(HOUSEKEEPING.intersection(n.upper() for n in names)) >= 3


def looks_like_barcodes(names: np.ndarray) -> bool:
    """Whether most of `names` hold a stretch of nucleotides, as cell barcodes do."""
    return bool(len(names)) and np.mean([bool(BARCODE.fullmatch(n)) for n in names[:1000]]) >= 0.9


def _ensembl_share(names: np.ndarray) -> float:
    """Share of the non-empty names that are Ensembl gene ids; 0 where most names are empty."""
    filled = [n for n in names if n]
    if not filled or len(filled) < len(names) / 2:
        return 0.0
    return sum(ENSEMBL.fullmatch(n) is not None for n in filled) / len(filled)


def gene_identity(
    var: pd.DataFrame, choice: str, where: str, decisions: Decisions
) -> tuple[np.ndarray, np.ndarray, str]:
    """Find what identifies each gene of an input.

    Parameters
    ----------
    var : the input's gene table, one row a gene; its index and all its text columns are looked at.
    choice : ``"auto"`` (Ensembl ids where 90 % of an index or a column are such, else symbols), ``"ensembl"`` or
        ``"symbol"``.
    where : the file, for messages.
    decisions : what was taken, and what was changed, is added.

    Returns
    -------
    ids : (genes,) object; version suffixes are cut; may repeat; "" where a gene has neither id nor name.
    names : (genes,) object; the symbol, or the id where there is none.
    kind : ``"ensembl"`` or ``"symbol"``.

    Raises
    ------
    UserError
        When ids are asked for that the file does not hold.
    """
    index = "the gene index"
    texts = {index: as_text(var.index)}
    for column in var.columns:
        if not (pd.api.types.is_numeric_dtype(var[column]) or pd.api.types.is_bool_dtype(var[column])):
            texts.setdefault(f"column '{column}'", as_text(var[column]))
    shares = {field: _ensembl_share(values) for field, values in texts.items()}
    id_field = max(shares, key=shares.__getitem__)  # ties: the first, so the index before columns
    has_ids = shares[id_field] >= 0.9
    symbol_field = _symbol_field(texts, shares, index)

    if choice == "ensembl" and not has_ids:
        raise UserError(
            f"{where}: input.gene_ids asks for ensembl, but neither the gene index (such as {_example(texts[index])}) "
            f"nor a column of the gene table ({listed(var.columns) or 'it has none'}) holds Ensembl ids; "
            "set input.gene_ids to symbol"
        )
    if choice == "symbol" and symbol_field is None:
        raise UserError(
            f"{where}: input.gene_ids asks for symbol, but the gene table has Ensembl ids only "
            f"(such as {_example(texts[index])}); set input.gene_ids to ensembl"
        )
    if has_ids and choice != "symbol":
        ids, kind = texts[id_field].copy(), "ensembl"
        names = texts[symbol_field].copy() if symbol_field else ids.copy()
        decisions.add("gene_ids", kind, f"{shares[id_field]:.1%} of {id_field} are Ensembl gene ids")
        empty = ids == ""
        if (n := int((empty & (names != "")).sum())) > 0:
            decisions.add("gene_ids_missing", n, "genes without an id are identified by their symbol", n_genes=n)
            ids[empty] = names[empty]
    else:
        symbol_field = symbol_field or index
        ids, kind = texts[symbol_field].copy(), "symbol"
        names = ids.copy()
        why = "as configured" if choice == "symbol" else "no index or column holds Ensembl gene ids"
        decisions.add("gene_ids", kind, f"{symbol_field} is taken: {why}")
    cut = np.array([VERSION.sub(r"\1", i) for i in ids], object)
    if (n := int((cut != ids).sum())) > 0:
        first = int(np.flatnonzero(cut != ids)[0])
        decisions.add("gene_versions_cut", n, f"version suffixes do not tell genes apart ({ids[first]})", n_genes=n)
    unnamed = names == ""
    names = np.where(unnamed | (names == ids), cut, names)
    return cut, names, kind


def _symbol_field(texts: dict[str, np.ndarray], shares: dict[str, float], index: str) -> str | None:
    """Which field holds symbols: a column known for it, or the index; never Ensembl ids, never row numbers."""
    lower = {field.removeprefix("column '").removesuffix("'").lower(): field for field in texts if field != index}
    numbered = all(name.isdigit() for name in texts[index])
    candidates = [lower[name] for name in SYMBOL_COLUMNS if name in lower]
    # an index that is no id and no number is what the file's maker calls its genes; their columns may lag behind
    candidates = [*candidates, index] if numbered or shares[index] >= 0.5 else [index, *candidates]
    usable = [f for f in candidates if shares[f] < 0.5 and (texts[f] != "").any() and not (f == index and numbered)]
    return usable[0] if usable else None


def _example(names: np.ndarray) -> str:
    return repr(next((n for n in names if n), "")) if len(names) else "none"


def merge_genes(ids: np.ndarray, names: np.ndarray, decisions: Decisions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One column a gene id: drop genes without any name, sum those that share one; say how many.

    Parameters
    ----------
    ids, names : (genes,) object, as :func:`gene_identity` gives them.

    Returns
    -------
    to : (genes,) int; the column of the result that each goes to, -1 where it is dropped; see
        :func:`scvi_core.io.blocks.take_columns`.
    ids, names
        In the order of first appearance.
    """
    named = np.flatnonzero(ids != "")
    if (n := len(ids) - len(named)) > 0:
        decisions.add("genes_without_name", n, "genes with neither id nor name are dropped", n_genes=n)
    codes, unique = pd.factorize(ids[named])
    if (n := len(named) - len(unique)) > 0:
        repeated = ids[named][pd.Index(ids[named]).duplicated()]
        decisions.add("genes_merged", n, f"rows of one gene are summed ({repeated[0]} is one of them)", n_genes=n)
    to = np.full(len(ids), -1)
    to[named] = codes
    first = named[np.unique(codes, return_index=True)[1]]
    return to, ids[first], names[first]


def gene_expression_only(read: Read, path: Path, decisions: Decisions) -> Read:
    """Keep the features of type Gene Expression, and say what else there was."""
    blocks, (n_cells, n_genes), obs, var = read.blocks, read.shape, read.obs, read.var
    if "feature_type" not in var or len(var) != n_genes:  # the lengths are compared when the reader is done
        return read
    genes = (var["feature_type"] == "Gene Expression").to_numpy()
    if not genes.any():
        raise UserError(
            f"{path}: no feature of type 'Gene Expression' (found {listed(sorted(set(var['feature_type'])))})"
        )
    if not genes.all():
        others = var.loc[~genes, "feature_type"].value_counts().sort_index()
        said = ", ".join(f"{n:,} {name}" for name, n in others.items())
        n = int((~genes).sum())
        decisions.add("features_dropped", n, f"only Gene Expression features are modelled (not {said})", n_genes=n)
        to, n_genes = np.where(genes, np.cumsum(genes) - 1, -1), len(genes) - n
        blocks, var = (take_columns(block, to, n_genes) for block in read.blocks), var[genes]
    if "genome" in var and var["genome"].nunique() > 1:
        names = sorted(set(var["genome"]))
        decisions.add("genomes", names, "the genes of all genomes are kept, as one gene set")
    return Read(blocks, (n_cells, n_genes), obs, var.drop(columns=["feature_type"]))


def guess_organism(ids: np.ndarray, names: np.ndarray) -> str:
    """Guess from Ensembl prefixes, else from how symbols are written: "human", "mouse" or "unknown".

    A guess to label models by: other species' symbols are written the same way (rat's as mouse's).
    """
    ensembl = [i for i in ids if ENSEMBL.fullmatch(i)]
    if len(ensembl) >= 0.5 * len(ids):
        for prefix, organism in (("ENSG", "human"), ("ENSMUSG", "mouse")):
            if sum(i.startswith(prefix) and i[len(prefix)].isdigit() for i in ensembl) >= 0.9 * len(ensembl):
                return organism
        return "unknown"
    words = [n for n in names if re.fullmatch(r"[A-Z][A-Za-z]{2,}[A-Za-z0-9-]*", n)]
    upper = sum(bool(re.fullmatch(r"[A-Z0-9-]+(?:orf[A-Z0-9-]+)?", n)) for n in words)
    title = sum(bool(re.fullmatch(r"[A-Z][a-z]+[A-Za-z0-9-]*", n)) for n in words)
    if len(words) < 10:
        return "unknown"
    return "human" if upper >= 0.8 * len(words) else "mouse" if title >= 0.8 * len(words) else "unknown"
