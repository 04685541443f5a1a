"""What a row of a matrix is: a gene or something else, what the gene is called, and the organism it points to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from scvi_core.config import InputConfig, name_matcher
from scvi_core.files import Decisions, UserError
from scvi_core.io.blocks import Read, take_columns
from scvi_core.io.checks import listed, nearest

# Ensembl's gene ids: of vertebrates, and those that it takes from FlyBase and WormBase
ID = r"(?:ENS[A-Z]*G\d{11}|FB(?:gn|ti)\d{7}|WBGene\d{8})"
ENSEMBL = re.compile(ID + r"(?:\.\d+)?")
VERSION = re.compile(rf"^({ID})\.\d+")  # what follows stays: GENCODE writes ENSG00000182378.15_PAR_Y
JOINED = re.compile(
    rf"(?P<a>{ID}(?:\.\d+)?)[_|:;-]+(?P<b>.*)|(?P<d>.+?)(?:[_|:;.-]{{1,3}}| \()(?P<c>{ID}(?:\.\d+)?)\)?"
)  # id_symbol, or turned
PROBE = re.compile(r"\|[0-9a-f]{7}$")  # behind id and symbol, of the probes of a panel
ACCESSION = re.compile(
    rf"{ID}.*|ENS[A-Z]*T\d{{11}}.*|[NX][MR]_\d+(?:\.\d+)?|(?:MGI|HGNC|RGD):\d+|ZDB-GENE-[\d-]+"
)  # no symbols
CHROMOSOME = re.compile(r"__chr(?:\w{1,2}|Un\w*|\w+_(?:random|alt|fix))$", re.IGNORECASE)  # behind a name, of CEL-Seq2
# numbers of rows, and what R makes of them
NUMBER = re.compile(r"(?:[XV]|row_?)?\d+(?:\.0)?", re.IGNORECASE)
COUNTED = re.compile(r"(?:gene|feature|var)[-_ .]?\d+", re.IGNORECASE)  # names, for want of better ones
# what aligners put in front of names where a reference is of several genomes
GENOME = re.compile(
    r"^((?:GRC[a-z]\d+|hg\d\d|mm\d\d?|rn\d|dm\d|ce\d\d|danRer\d+|galGal\d+|susScr\d+|rheMac\d+|Mmul(?:_\d+)?|mRatBN\d)"
    r"(?:\.\d+)?\w*?(?:[_-](?:\d{4}-[A-Z]|pre-?m?rna))?)[_-]+"
)
QUOTED = re.compile(r"b?([\"']).*\1")  # also what Python makes of bytes
ORGANISMS = {
    "ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSMMUG": "rhesus macaque",
    "ENSMFAG": "crab-eating macaque", "ENSPTRG": "chimpanzee", "ENSSSCG": "pig", "ENSBTAG": "cow", "ENSOCUG": "rabbit",
    "ENSDARG": "zebrafish", "ENSGALG": "chicken", "FBgn": "fly", "WBGene": "worm",
}  # fmt: skip
BARCODE = re.compile(r"(?:.*[_:-])?[ACGT]{8,}(?:[-_.].*)?")
# column names of ids and of symbols as they are met in the wild, best first, as `plain` writes them
ID_COLUMNS = (
    "gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl_gene_id", "ensembl", "ensemblid", "feature_id",
    "gene_stable_id", "accession", "id", "ids", "geneid",
)  # fmt: skip
SYMBOL_COLUMNS = (
    "gene_name", "gene_names", "external_gene_name", "gene_symbol", "gene_symbols", "gene_short_name", "symbol",
    "symbols", "hgnc_symbol", "mgi_symbol", "feature_name", "gene", "genes", "genename", "name",
)  # fmt: skip
# what stands in place of a name, many times, where a gene has none
PLACEHOLDER = re.compile(
    r"nan|n/?a|<na>|none|null|unknown|[-.?]|protein[_ ]coding|l(?:nc|inc)RNA|misc_RNA|(?:\w+_)?pseudogene|mi?RNA",
    re.IGNORECASE,
)
MOST_ROWS = 5  # of one gene before it seems to be none
# genes by which a list of names is known to be one: in nearly every cell, or on most targeted panels
KNOWN = {
    "ACTB", "GAPDH", "MALAT1", "B2M", "EEF1A1", "RPLP0", "TMSB4X", "FTL", "FTH1", "TPT1", "UBC", "PPIA", "HPRT1",
    "TBP", "PTPRC", "CD3D", "CD3E", "CD3G", "CD4", "CD8A", "CD8B", "CD14", "CD19", "CD68", "CD74", "CD79A", "MS4A1",
    "NKG7", "GNLY", "LYZ", "S100A8", "S100A9", "FCGR3A", "IL7R", "CCR7", "FOXP3", "GZMB", "GZMK", "PRF1", "EPCAM",
    "KRT5", "KRT8", "KRT14", "KRT18", "KRT19", "VIM", "COL1A1", "COL1A2", "COL3A1", "ACTA2", "PECAM1", "VWF", "CDH1",
    "CDH5", "PDGFRA", "PDGFRB", "MKI67", "TOP2A", "PCNA", "ESR1", "ERBB2", "EGFR", "TP53", "MYC", "SOX2", "SOX9",
    "SOX10", "PAX6", "OLIG1", "OLIG2", "GFAP", "AQP4", "MBP", "PLP1", "MOG", "GAD1", "GAD2", "SLC17A7", "SLC17A6",
    "SLC32A1", "RBFOX3", "SNAP25", "CX3CR1", "P2RY12", "INS", "GCG", "SST", "PPY", "ALB", "APOE", "APOA1", "TTR",
    "CD34", "KIT", "HBB", "HBA1", "HBA2", "JCHAIN", "IGHM", "IGKC", "IGHG1", "TPSAB1", "CPA3", "CXCL8", "IL1B", "TNF",
    "IFNG", "STAT1", "JUN", "FOS",
}  # fmt: skip
FAMILIES = re.compile(r"MT[-.:]\S+|RP[SL]\d+[AXYL]?|HLA-\S+", re.IGNORECASE)

# What the kinds of features are called (lower case, blanks for _ and -). Spliced and unspliced counts are of genes.
TYPE_COLUMNS = ("feature_types", "feature_type", "modality", "feature_biotype")
GENE = "a gene"
OF_GENES = {
    "gene expression", "gex", "rna", "gene", "genes", "mrna", "transcriptome", "spliced", "unspliced", "ambiguous",
}  # fmt: skip
OF_OTHERS = {
    "multiplexing capture", "antigen capture", "custom", "adt", "hto", "prot", "cite", "atac",
    "chromatin accessibility", "cell hashing", "sgrna", "spike in", "spike ins", "ercc",
}  # fmt: skip
WORDS_OF_OTHERS = "antibod|protein(?! coding)|guide|peak|hashtag"
# and how their names tell, where no column does
OTHERS_BY_NAME = re.compile(
    r"(?:ADT|HTO|PROT|AB)[-:].+|.+[-_.](?:ADT|HTO|PROT|TotalSeq-?[A-D]?|Total[A-D])|HTO\d+"  # not the worm's adt-1
    r"|(?i:(?:adt|hto|prot|protein(?!_coding)|ab)_.+|.+_(?:adt|hto|prot|protein)|.+[|.](?:p|st)AbO)|CMO3\d\d"
    r"|.+-[ACGT]{12,}|unmapped"  # of CITE-seq-Count
    r"|(?i:.*TotalSeq.*|.*hashtag.*|.*isotype.*)"
    r"|(?i:(?:(?:rat|mouse|hamster|human)[-_ ])?IgG(?:\d[a-c]?|\d?[a-c]?[-_ ].*(?:control|ctrl)\S*))"
    r"|(?:Hu|HuMs|HuMsRt|Ms)\.[A-Z].+|(?i:.*anti[-_ .](?:human|mouse|rat).*)"
    r"|.+_[+-]_\d+\.\d+-P1?P?2?(?:_.*)?"  # of guides, by promoter
    r"|.+:\d+-\d+|(?:chr\w+|\d\d?|[XYM]|MT|[A-Z]{2}\d{6}\.\d)[:_-]\d+[-_]\d+"  # peaks
    r"|(?i:(?:gRNA|sgRNA|guide|crispr)[-_].+|.+[-_](?:gRNA|sgRNA|sg\d)(?:[-_]?\d+)?|non[-_]?targeting.*)"  # guides
    r"|sg[A-Z][\w.-]*|(?i:(?:gspikein_)?ERCC[-_.]\d{5})"  # and spike-ins
    r"|(?i:neg(?:control\w*|(?:ative|prb)\d+)|blank[-_]\d+|(?:unassigned|deprecated|blank)codeword\w*)"  # of imaging
    r"|(?:__)?(?:no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique)"  # what htseq-count and STAR add
    r"|N_(?:unmapped|multimapping|noFeature|ambiguous)"
)
# Controls of screens: names of their own in each, but always a family of them. One alone may be a gene (NTC2, CTRL).
CONTROLS = re.compile(
    r"(?:(?:NTC|NT|NegCtrl|CTRL|control|safe|intergenic|NO[-_]?SITE)[-_.]|(?:non|no)[-_. ]?target\w*|scrambled?"
    r"|neg(?:ative)?[-_. ](?:ctrl|ctl|control|guide)s?|safe[-_. ]?(?:target\w*|harbou?r)"
    r"|ONE[-_](?:NON-GENE|INTERGENIC)[-_]SITE)"
    r"(?:[-_. ]?(?:sg|g|guide|sgRNA|gRNA|control|ctrl))?[-_. ]?(?P<number>\d+)",
    re.IGNORECASE,
)
GUIDE = re.compile(r"(?P<gene>.+)_(?:g|sg|guide)?\d{1,2}")  # of a gene, where such controls are there
FAMILY = 3
REPEAT = re.compile(r"(.*[A-Za-z].*)[-.]\d{1,2}")  # as scanpy (-1) and R (.1) make names unique
# gene names that a spreadsheet made dates or numbers of: 1-Mar, Sep-07, 2021-03-01, 2.31E+13
MONTHS = (  # in English, German, French, Italian, Spanish and Dutch
    "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec|mrz|mär|mai|okt|dez|mars|avr|août|déc|gen|mag|giu|lug|ago|"
    "set|ott|dic|ene|abr|mrt|mei)"
)
SPREADSHEET = re.compile(
    rf"\d{{1,2}}(?:[-/. ]|\. ){MONTHS}[a-z]*\.?(?:[-/. ]\d{{2,4}})?|(?-i:(?![a-z])){MONTHS}[-/. ]\d{{1,4}}"  # not dec-7
    r"|\d{4}[-/]\d\d[-/]\d\d(?: 00:00:00)?|\d{1,2}/\d{1,2}/\d{2,4}|4[0-6]\d{3}"  # the last: days since 1900
    r"|\d(?:\.\d+)?E\+\d\d|#(?:NAME\?|REF!|VALUE!|NUM!|N/A|DIV/0!)",
    re.IGNORECASE,
)


def as_text(values: object) -> np.ndarray:
    """Strings of anything: bytes decoded, missing as "", no white space around. Object array, one-dimensional."""
    array = np.asarray(pd.Series(values).astype(object) if not isinstance(values, np.ndarray) else values)
    if array.ndim != 1:
        raise ValueError(f"names in {array.ndim} dimensions")
    out = np.empty(len(array), object)
    for i, value in enumerate(array.tolist()):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif value is None or value is pd.NA or value is pd.NaT or value != value:  # NaN differs from itself
            value = ""
        out[i] = str(value).strip()
    return out


def plain(column: str) -> str:
    """A column's name without what people write in different ways: capitals, blanks, points and hyphens."""
    return re.sub(r"[ ._-]+", "_", column.strip().lower())


def gene_evidence(names: np.ndarray) -> int:
    """How many of `names` are recognised as genes: Ensembl ids, symbols and families that are known, in any case."""
    upper = [GENOME.sub("", n, count=1).upper().strip("\"'") for n in names]
    return sum(
        n in KNOWN or bool(FAMILIES.fullmatch(n) or ENSEMBL.match(name)) for n, name in zip(upper, names, strict=True)
    )


def looks_like_genes(names: np.ndarray) -> bool:
    """Whether `names` are gene names: half of them, or three, are recognised."""
    return bool(len(names)) and gene_evidence(names) >= min(3, -(-len(names) // 2))


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
    var: pd.DataFrame, config: InputConfig, where: str, decisions: Decisions
) -> tuple[np.ndarray, np.ndarray, str]:
    """Find what identifies each gene of an input.

    Parameters
    ----------
    var : the input's gene table, one row a gene; its index and all its text columns are looked at.
    config : ``gene_ids``: ``"auto"`` (Ensembl ids where 90 % of an index or a column are such, else symbols),
        ``"ensembl"`` or ``"symbol"``; ``gene_names``: the column that holds symbols, where it is not one of the usual.
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
        When ids are asked for that the file does not hold, and where genes are only numbered.
    """
    choice, index = config.gene_ids, "the gene index"
    texts = {index: as_text(var.index)}
    for column in var.columns:
        if not (pd.api.types.is_numeric_dtype(var[column]) or pd.api.types.is_bool_dtype(var[column])):
            texts.setdefault(f"column '{column}'", as_text(var[column]))
    for field, values in list(texts.items()):
        texts.update(_untangled(field, values, decisions))
    id_field = _id_field(texts, index, decisions)
    has_ids = id_field is not None
    symbol_field = _symbol_field(texts, index, config.gene_names, where, decisions)

    if choice == "ensembl" and not has_ids:
        raise UserError(
            f"{where}: input.gene_ids asks for ensembl, but neither the gene index (such as {_example(texts[index])}) "
            f"nor a column of the gene table ({listed(var.columns) or 'it has none'}) holds Ensembl ids; "
            "set input.gene_ids to symbol"
        )
    if choice == "symbol" and symbol_field is None and has_ids:
        raise UserError(
            f"{where}: input.gene_ids asks for symbol, but the gene table has Ensembl ids only "
            f"(such as {_example(texts[index])}); set input.gene_ids to ensembl"
        )
    if id_field is not None and choice != "symbol":
        ids, kind = texts[id_field].copy(), "ensembl"
        names = texts[symbol_field].copy() if symbol_field else ids.copy()
        decisions.add("gene_ids", kind, f"{_ensembl_share(ids):.1%} of {id_field} are Ensembl gene ids")
        empty = ids == ""
        if (n := int((empty & (names != "")).sum())) > 0:
            decisions.add("gene_ids_missing", n, "genes without an id are identified by their symbol", n_genes=n)
            ids[empty] = names[empty]
        odd = [i for i in ids[~empty] if not ENSEMBL.match(i)]
        if odd:
            text = (
                f"ids that are not of Ensembl, such as {odd[0]!r}, are kept: are these genes? else see input.not_genes"
            )
            decisions.add("other_gene_ids", len(odd), text, n_genes=len(odd), warn=True)
    else:
        if symbol_field is None:
            others = [f for f in texts if f != index and _nameable(texts[f])]
            raise UserError(
                f"{where}: its genes are only numbered (such as {_example(texts[index])}), which says nothing of which "
                f"gene it is; set input.gene_names to the column that names them ({listed(others) or 'none is left'}), "
                "or write their names into the file"
            )
        ids, kind = texts[symbol_field].copy(), "symbol"
        names = ids.copy()
        why = "as configured" if choice == "symbol" else "no index or column holds Ensembl gene ids"
        decisions.add("gene_ids", kind, f"{symbol_field} is taken: {why}")
        ids = _kept_apart(ids, decisions)
        there = set(ids.tolist())
        repeats = [name for name in there if (match := REPEAT.fullmatch(name)) and match[1] in there]
        if len(repeats) >= FAMILY:
            text = (
                f"names such as {min(repeats)!r} beside the same without a number look like repeats that were made "
                "unique; each stays a gene of its own, where samples that have ids or repeats would have them as one"
            )
            decisions.add("names_made_unique", len(repeats), text, n_genes=len(repeats), warn=True)
    cut = np.array([VERSION.sub(r"\1", i) for i in ids], object)
    if (n := int((cut != ids).sum())) > 0:
        first = int(np.flatnonzero(cut != ids)[0])
        decisions.add("gene_versions_cut", n, f"version suffixes do not tell genes apart ({ids[first]})", n_genes=n)
    unnamed = names == ""
    names = np.where(unnamed | (names == ids), cut, names)
    return cut, names, kind


def unquoted(values: np.ndarray) -> np.ndarray:
    """Texts without the quotes around nearly all of them, and the b of what Python writes of bytes."""
    filled = [v for v in values.tolist() if v]
    if not filled or sum(QUOTED.fullmatch(v) is not None for v in filled) < 0.9 * len(filled):
        return values
    return np.array([v[v[:1] == "b" and QUOTED.fullmatch(v) is not None :].strip("\"'") for v in values], object)


def _untangled(field: str, values: np.ndarray, decisions: Decisions) -> dict[str, np.ndarray]:
    """One field of names as one or two: quotes, the name of the genome and joined ids and symbols taken apart.

    Words that stand for a name that is missing become "".
    """
    often = {n for n, times in pd.Series(values).value_counts().items() if times > 1 and PLACEHOLDER.fullmatch(n)}
    values = np.array(["" if v in often else v for v in values.tolist()], object)
    filled = [v for v in values.tolist() if v]
    most = 0.9 * len(filled)
    if not filled:
        return {field: values}
    if (plain_values := unquoted(values)) is not values:
        values, filled = plain_values, [v for v in plain_values.tolist() if v]
        decisions.add("quotes", len(filled), f"{field}: names are in quotes, which were taken off", n_genes=len(filled))
    if sum(CHROMOSOME.search(v) is not None for v in filled) >= most:
        values = np.array([CHROMOSOME.sub("", v) for v in values], object)
        filled = [v for v in values.tolist() if v]
        decisions.add(
            "chromosomes_cut", len(filled), f"{field}: the chromosome behind names is cut", n_genes=len(filled)
        )
    genomes = [match[1] for v in filled if (match := GENOME.match(v))]
    if len(genomes) >= most:
        cut = np.array([GENOME.sub("", v, count=1) for v in values], object)
        # of several genomes, symbols need theirs to differ; Ensembl ids do not
        if len(set(genomes)) == 1 or _ensembl_share(cut) >= 0.9:
            text = f"{field}: the genome in front of names is cut ({listed(sorted(set(genomes)))})"
            decisions.add("genome_cut", len(genomes), text, n_genes=len(genomes))
            values = cut
    parts = [JOINED.fullmatch(v) for v in values.tolist()]
    if sum(part is not None for part in parts) >= most and not all(VERSION.match(v) for v in filled):
        ids = [(part["a"] or part["c"]) if part else v for part, v in zip(parts, values, strict=True)]
        symbols = [(part["b"] or part["d"] or "") if part else v for part, v in zip(parts, values, strict=True)]
        symbols = [PROBE.sub("", symbol) for symbol in symbols]
        if 2 * len(set(symbols)) < len(filled):  # gene:ENSG..., human_ENSG...
            beside = listed(sorted(set(symbols))[:3])
            text = f"{field}: what stands beside ids is cut, as it is the same for many ({beside})"
            decisions.add("ids_cut", len(filled), text, n_genes=len(filled))
            return {field: np.array(ids, object)}
        decisions.add("ids_joined", len(filled), f"{field}: ids and symbols are joined, and were taken apart")
        return {field: np.array(ids, object), f"{field}, behind the id": np.array(symbols, object)}
    return {field: values}


def _nameable(values: np.ndarray, distinct: float = 0.0) -> bool:
    """Whether a field can hold names: not ids, not numbers, and hardly ever the same."""
    filled = [v for v in values.tolist() if v]
    if 2 * len(filled) < len(values) or not filled or len(set(filled)) < distinct * len(filled):
        return False
    unlike = sum(not (ACCESSION.fullmatch(v) or NUMBER.fullmatch(v)) for v in filled)
    return unlike > 0.5 * len(filled)


def _columns(texts: dict[str, np.ndarray]) -> dict[str, str]:
    """The fields that are columns, by their plain names."""
    of: dict[str, str] = {}
    for field in texts:
        if field.startswith("column '"):
            of.setdefault(plain(field.removeprefix("column '").removesuffix("'")), field)
    return of


def _id_field(texts: dict[str, np.ndarray], index: str, decisions: Decisions) -> str | None:
    """Which field holds Ensembl ids: the index, a column known for it, or one that hardly ever repeats one.

    Ids of orthologs say what another species' gene is called.
    """
    full = [field for field, values in texts.items() if _ensembl_share(values) >= 0.9]
    columns = _columns(texts)
    known = [columns[name] for name in ID_COLUMNS if name in columns]
    others = [field for field in full if not re.search("ortholog|homolog", field, re.IGNORECASE)]
    others = [field for field in others if pd.Index(texts[field][texts[field] != ""]).duplicated().mean() <= 0.05]
    found = next((field for field in (index, *known, *others) if field in full), None)
    species = {field: next(re.sub(r"\d.*", "", v) for v in texts[field] if ENSEMBL.fullmatch(v)) for field in full}
    if found is not None and len(set(species.values())) > 1:
        held = ", ".join(f"{field} {prefix}..." for field, prefix in species.items())
        decisions.add("ids_of_two_species", found, f"it is taken, and others are not; there are {held}", warn=True)
    return found


def _symbol_field(
    texts: dict[str, np.ndarray], index: str, asked: str | None, where: str, decisions: Decisions
) -> str | None:
    """Which field holds symbols: the one asked for, one known for it, the index, or the only one that can."""
    if asked is not None:
        if f"column '{asked}'" not in texts:
            columns = [f.removeprefix("column '").removesuffix("'") for f in texts if f.startswith("column '")]
            raise UserError(
                f"{where}: input.gene_names: no text column {asked!r} in its gene table{nearest(asked, columns)}; "
                f"there are {listed(columns) or 'none'}"
            )
        return f"column '{asked}'"
    columns = _columns(texts)
    known = [columns[name] for name in SYMBOL_COLUMNS if name in columns]
    known += [field for field in texts if field.endswith(", behind the id")]
    # an index that can name is what the file's maker calls its genes; their columns may lag behind
    counted = sum(COUNTED.fullmatch(name) is not None for name in texts[index]) >= 0.9 * len(texts[index])
    candidates = [*known, index] if counted or not _nameable(texts[index]) else [index, *known]
    usable = [field for field in candidates if _nameable(texts[field])]
    if usable:
        return usable[0]
    left = [field for field in texts if field not in candidates and _nameable(texts[field], distinct=0.9)]
    if len(left) == 1:
        decisions.add(
            "gene_names", left[0], "the only field whose texts tell genes apart is taken for their names", warn=True
        )
        return left[0]
    if not left and _accessions(texts[index]):
        return index
    return None


def _accessions(values: np.ndarray) -> bool:
    """Whether names are ids of another kind than Ensembl's: they tell genes apart, whatever they say to a reader."""
    return _ensembl_share(values) < 0.9 and sum(not NUMBER.fullmatch(v) for v in values) > 0.5 * len(values)


def _kept_apart(ids: np.ndarray, decisions: Decisions) -> np.ndarray:
    """Names that a spreadsheet made dates of, counted; two genes that became one date stay two."""
    damaged = np.flatnonzero([SPREADSHEET.fullmatch(i) is not None for i in ids])
    if not len(damaged):
        return ids
    repeated = pd.Series(ids[damaged]).duplicated(keep=False).to_numpy()
    text = f"names such as {ids[damaged[0]]!r} look like dates that a spreadsheet made of genes; get the names anew"
    if repeated.any():
        text += f"; {int(repeated.sum())} that became the same stay apart, by their row"
    decisions.add("spreadsheet_names", len(damaged), text, n_genes=len(damaged), warn=True)
    ids = ids.copy()
    for row in damaged[repeated]:
        ids[row] = f"{ids[row]} (row {row + 1})"
    return ids


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
        rows = np.bincount(codes)
        most = int(rows.argmax())
        text = f"rows of one gene are summed ({unique[most]} has most of them, {rows[most]})"
        decisions.add("genes_merged", n, text, n_genes=n, warn=bool(rows[most] > MOST_ROWS))
    to = np.full(len(ids), -1)
    to[named] = codes
    first = named[np.unique(codes, return_index=True)[1]]
    return to, ids[first], names[first]


def genes_only(read: Read, where: str, config: InputConfig, decisions: Decisions) -> Read:
    """Keep the features that are genes, and say what else there was; sum what was counted spliced and unspliced.

    Raises
    ------
    UserError
        For a matrix without a gene.
    """
    (n_cells, n_features), var = read.shape, read.var
    told = _others_by_type(var, decisions)
    genes = np.ones(n_features, bool) if told is None else (told == GENE).to_numpy()
    dropped = told[~genes].value_counts().sort_index() if told is not None else pd.Series(dtype=int)
    said = ", ".join(f"{n:,} {name or 'without a type'}" for name, n in dropped.items())
    by_name = config.not_genes
    matches = name_matcher(by_name or ()) if by_name is not None or told is not None else OTHERS_BY_NAME.fullmatch
    other = np.zeros(n_features, bool)
    for names in _names_of_features(var, config):
        other |= np.array([bool(matches(name)) for name in names], bool)
        if by_name is None and told is None:
            other |= _of_a_screen(names)
    if by_name and not other.any():
        text = f"input.not_genes ({listed(by_name[:5])}) is no feature's name; look at how they are written"
        decisions.add("features_dropped_by_name", 0, text, n_genes=0, warn=True)
    other &= genes
    if not (genes & ~other).any():
        raise UserError(
            f"{where}: no feature is a gene, by type or name ({said or listed(as_text(var.index)[:5])}); name the "
            "matrix of gene expression, or see input.not_genes"
        )
    if (n := int((~genes).sum())) > 0:
        decisions.add("features_dropped", n, f"only genes are modelled (not {said})", n_genes=n, warn="" in dropped)
    if (n := int(other.sum())) > 0:
        example = listed(as_text(var.index)[other][:3])
        why = (
            "as input.not_genes says" if by_name is not None else "their names look like no genes; see input.not_genes"
        )
        text = f"left out: {why} (such as {example})"
        decisions.add("features_dropped_by_name", n, text, n_genes=n, warn=by_name is None)
    genes &= ~other
    if "genome" in var and var.loc[genes, "genome"].nunique() > 1:
        names = sorted(set(var.loc[genes, "genome"]))
        decisions.add("genomes", names, "the genes of all genomes are kept, as one gene set")
    kept = var[genes].drop(columns=[c for c in TYPE_COLUMNS if c in var])
    to = np.where(genes, np.cumsum(genes) - 1, -1)
    blocks = read.blocks if genes.all() else (take_columns(block, to, int(genes.sum())) for block in read.blocks)
    kept.index = pd.Index(_unsplit(as_text(kept.index), decisions))
    if "gene_ids" in kept:
        kept["gene_ids"] = _unsplit(as_text(kept["gene_ids"]), None)
    return dataclasses.replace(read, blocks=blocks, shape=(n_cells, len(kept)), var=kept)


def _others_by_type(var: pd.DataFrame, decisions: Decisions) -> pd.Series | None:
    """``GENE``, or what kind a feature is, if columns say so in words that are known; each may tell of others."""
    told = None
    for column in TYPE_COLUMNS:
        if column in var:
            kinds = pd.Series(as_text(var[column]))
            words = kinds.str.lower().str.replace("[_-]", " ", regex=True)
            of_genes, of_others = words.isin(OF_GENES), words.isin(OF_OTHERS) | words.str.contains(WORDS_OF_OTHERS)
            if (of_genes | of_others).any():
                kinds = kinds.mask(of_genes if of_genes.any() else ~of_others, GENE)
                told = kinds if told is None else told.where(told != GENE, kinds)
                continue
            text = f"it has no kind of feature that is known (such as {kinds.iloc[0]!r}), so it says nothing here"
            decisions.add(f"column {column}", "ignored", text)
    return told


def _names_of_features(var: pd.DataFrame, config: InputConfig) -> Iterator[list[str]]:
    """The names and ids of features, in all columns that hold such, as they are and without quotes and genome."""
    index = as_text(var.index).tolist()
    numbered = all(NUMBER.fullmatch(name) for name in index)
    texts = [index]
    for column in var:
        known = column == config.gene_names or plain(str(column)) in (*ID_COLUMNS, *SYMBOL_COLUMNS)
        if known or (numbered and _nameable(as_text(var[column]), distinct=0.9)):
            texts.append(as_text(var[column]).tolist())
    for names in texts:
        yield names
        yield [GENOME.sub("", name.strip("\"'"), count=1) for name in names]


def _of_a_screen(names: list[str]) -> np.ndarray:
    """Which names are of a family of controls, such as NTC_1, NTC_2 ..., and with them of guides, such as TP53_1."""
    controls = [CONTROLS.fullmatch(name) for name in names]
    if len({match["number"] for match in controls if match}) < FAMILY:
        return np.zeros(len(names), bool)
    there = set(names)
    guides = [match["gene"] in there if (match := GUIDE.fullmatch(name)) else False for name in names]
    return np.array([control is not None or guide for control, guide in zip(controls, guides, strict=True)], bool)


def _unsplit(names: np.ndarray, decisions: Decisions | None) -> np.ndarray:
    """Names without alevin-fry's endings: G, G-U, G-A and G-I are spliced, unspliced, ambiguous, intronic counts."""
    there = set(names.tolist())
    of = {n: n[:-2] for n in there if n[-2:] in ("-U", "-A", "-I") and n[:-2] in there}
    if len(of) < max(10, 0.05 * len(there)):  # two thirds where every gene has both; HLA-A is none
        return names
    if decisions is not None:
        text = "unspliced (-U), ambiguous (-A) and intronic (-I) counts are added to the spliced ones of their gene"
        decisions.add("spliced_unspliced_summed", len(of), text, n_genes=len(of), warn=True)
    return np.array([of.get(n, n) for n in names], object)


def guess_organism(ids: np.ndarray, names: np.ndarray) -> str:
    """Guess from Ensembl prefixes, else from how symbols are written: "human", "mouse" ... or "unknown".

    A guess to label models by: other species' symbols are written the same way (rat's as mouse's).
    """
    ensembl = [i for i in ids if ENSEMBL.fullmatch(i)]
    if len(ensembl) >= min(10, 0.5 * len(ids)):  # among symbols, of genes that have none
        prefixes = pd.Series(ensembl).str.extract(r"^([A-Za-z]+)\d")[0].value_counts()
        return ORGANISMS.get(prefixes.index[0], "unknown") if prefixes.iloc[0] >= 0.9 * len(ensembl) else "unknown"
    words = [n for n in names if re.fullmatch(r"[A-Za-z]{3,}[A-Za-z0-9-]*", n)]
    upper = sum(bool(re.fullmatch(r"[A-Z0-9-]+(?:orf[A-Z0-9-]+)?", n)) for n in words)
    title = sum(bool(re.fullmatch(r"[A-Z][a-z]+[A-Za-z0-9-]*", n)) for n in words)
    if len(words) < 10:
        return "unknown"
    return "human" if upper >= 0.8 * len(words) else "mouse" if title >= 0.8 * len(words) else "unknown"
