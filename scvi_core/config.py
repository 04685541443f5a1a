"""The configuration: what may be asked for, its defaults and its checks. The one place that knows.

Imports only pydantic and PyYAML, so that the Snakefile can read a configuration without the numerical stack.
``workflow/schemas/*.yaml`` are written from here (``scvi-core validate --schemas DIR``).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from scvi_core.explain import as_written, explain, refuse_truth
from scvi_core.files import SMALL, UserError
from scvi_core.log import log, redacted

# environment variables, by which a workflow tells its jobs what changes no result: the registry, whose address may hold
# secrets, and the sample sheet, which only says in which order samples come
TRACKING_URI, SHEET = "SCVI_CORE_TRACKING_URI", "SCVI_CORE_SAMPLES"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # names become folders and shell words: nothing else gets in
Name = Annotated[str, Field(pattern=NAME)]
NUMBER = r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-][0-9]+)?"  # 007 and 1E1 are names
# of paths: what Snakemake takes for wildcards, commands for options, and terminals for orders stays out
PLAIN = r"^[^-{}\x00-\x1f\x7f][^{}\x00-\x1f\x7f]*$"
Plain = Annotated[str, Field(pattern=PLAIN)]
REMEDY = {
    NAME: "use letters, digits, '.', '_' and '-' (first a letter or digit, no '..', at most 64)",
    PLAIN: "write a path without braces and control characters that does not start with '-' (./-x is one)",
}
# URLs that a sample's path may be, and the storage plugin by which Snakemake fetches them
PLUGINS = {"s3": "s3", "gs": "gcs", "az": "azure", "http": "http", "https": "http", "ftp": "ftp", "sftp": "sftp"}
# columns of cells.parquet, latent.parquet and of the inside of the store, which a sample sheet may not redefine
COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_ .-]{0,63}")  # a column of the sample sheet
COLUMN_NAMES = "name it by letters, digits, spaces, '_', '-' and '.'"
RESERVED = {
    "_index", "cell_id", "barcode", "n_counts", "n_genes", "pct_mito", "pct_ribo", "pct_hb", "pct_top50",
    "doublet_score", "s_score", "g2m_score", "cycle_phase", "predicted_doublet", "flags", "keep", "reason", "cluster",
    "umap_1", "umap_2", "tsne_1", "tsne_2",
}  # fmt: skip
ANNOTATION = "annotation"  # the column of cells.parquet with the names that users give to clusters or cells
ANNOTATED = ("label", "safe_label", "novelty")  # its columns where annotate.label is set


def is_reserved(column: str) -> bool:
    """Whether a column is called as one of ours; case is ignored, as DuckDB and other readers of tables ignore it."""
    return column.casefold() in RESERVED or re.fullmatch(r"cluster_r[\d.]+", column.casefold()) is not None


def same_column(column: str, others: Iterable[str]) -> str | None:
    """The column among others that readers which ignore case take for the same."""
    return next((other for other in others if other.casefold() == column.casefold()), None)


def model_name(name: str) -> str:
    """A name that MLflow takes for a registered model, if it is one.

    Raises
    ------
    ValueError
        For any other, with what it may be.
    """
    odd = re.search(r"[/:\x00-\x1f\x7f]", name) or not 0 < len(name.strip()) <= len(name) <= 200
    if odd or name in (".", "..") or {"'", '"'} <= {*name}:
        raise ValueError("write a name of 200 characters at most, without '/', ':' and both kinds of quotes")
    return name


ModelName = Annotated[str, AfterValidator(model_name)]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        refuse_truth(cls, values)
        return values


def name_matcher(entries: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a name is among `entries`: names, or regular expressions between slashes that match within it."""
    patterns = [re.compile(entry[1:-1]) for entry in entries if _is_pattern(entry)]
    names = {entry for entry in entries if not _is_pattern(entry)}
    return lambda name: name in names or any(pattern.search(name) for pattern in patterns)


def _is_pattern(entry: str) -> bool:
    return len(entry) > 2 and entry.startswith("/") and entry.endswith("/")


def _compiled(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        try:
            re.compile(entry[1:-1] if _is_pattern(entry) else "")
        except re.error as error:
            raise ValueError(f"{entry!r} is not a regular expression ({error})") from None
    return entries


def _of_file(value: Any) -> Any:
    """A list as it is; of one text, the lines of the file that it names, or the one pattern that it is."""
    if not isinstance(value, str):
        return value
    if _is_pattern(value):
        return (value,)
    try:
        if not os.path.isfile(value) or os.path.getsize(value) > 2**24:
            raise ValueError(f"no list of genes in a file {value!r}; give a list [A, B], a /pattern/ or such a file")
        lines = Path(value).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file {value!r} cannot be read ({error})") from None
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_of_file, json_schema_input_type=tuple[str, ...] | str),
    AfterValidator(_compiled),
]


class InputConfig(Section):
    """How the count matrices are read. In the sample sheet, a column of a key's name overrides it for its sample."""

    layer: str = Field(
        "auto",
        min_length=1,
        description="AnnData inputs: 'X', 'raw', or the name of a layer that holds raw counts; auto: the first of "
        "raw, layers such as counts, and X that holds whole numbers",
    )
    gene_ids: Literal["auto", "ensembl", "symbol"] = Field(
        "auto", description="what identifies a gene; auto takes Ensembl ids where a sample has them, else symbols"
    )
    gene_names: str | None = Field(
        None, min_length=1, description="column of the inputs' gene tables that names genes; default: the usual ones"
    )
    not_genes: Names | None = Field(
        None,
        description="features that are no genes, names or /patterns/; default: by their type, or without one by "
        "how antibodies, hashtags, peaks, guides and spike-ins are called; [] keeps all",
    )
    genes: Literal["intersection", "union"] = Field(
        "intersection", description="which genes are kept when samples differ; union fills the missing with zeros"
    )
    orientation: Literal["auto", "cells_as_rows", "genes_as_rows"] = Field(
        "auto", description="CSV and TSV inputs: what a row is; auto tells by the names of genes and barcodes"
    )
    batch_column: str | None = Field(
        None, min_length=1, description="column of the inputs' own cell tables that is the batch, not the sheet's"
    )
    sample_column: str | None = Field(
        None, min_length=1, description="the same for the sample, where one file holds several; QC is by sample"
    )
    metadata: tuple[str, ...] = Field((), description="columns of the inputs' own cell tables to carry along")

    @field_validator("metadata", mode="before")
    @classmethod
    def _from_a_sheet(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @property
    def cell_columns(self) -> tuple[str, ...]:
        """All columns of an input's own cell table that are asked for."""
        own = [name for name in (self.batch_column, self.sample_column) if name is not None]
        return tuple(dict.fromkeys([*own, *self.metadata]))


# what a column of the sample sheet may say of its sample alone
READING = tuple(name for name in InputConfig.model_fields if name not in ("genes", "not_genes"))


# what QC flags a cell for, in the order of the column `flags`
Flag = Literal[
    "empty", "low_counts", "high_counts", "low_genes", "high_genes", "high_mito", "high_hb", "high_top50", "doublet"
]


class QcConfig(Section):
    """Which cells are flagged, and which flags drop a cell."""

    cells: Literal["auto", "all", "raw"] = Field(
        "auto",
        description="which barcodes may be cells: auto tells cells from empty droplets where it recognises raw "
        "droplets, raw demands them, all takes every barcode",
    )
    n_mads: float = Field(
        5.0,
        gt=0,
        le=1e06,
        description="flag counts, genes, mitochondrial and top-50 shares beyond median +- n_mads x MAD; few counts or "
        "genes only below 5 % of the median, much mitochondrial only if more than others of its kind",
    )
    min_counts: int = Field(
        200, ge=0, le=2**31 - 1, description="fixed limit: fewest counts a cell; scaled down for panels and nuclei"
    )
    min_genes: int = Field(100, ge=0, le=2**31 - 1, description="the same for detected genes; not for red cells")
    max_counts: int | None = Field(None, ge=1, le=2**31 - 1, description="fixed limit: most counts a cell")
    max_pct_mito: float | None = Field(
        None, ge=0, le=100, description="fixed limit: largest mitochondrial share, per cent"
    )
    max_pct_hb: float | None = Field(None, ge=0, le=100, description="fixed limit: largest haemoglobin share, per cent")
    cell_cycle: bool = Field(True, description="score the S and G2M phases of kept cells (human, mouse)")
    doublets: bool = Field(True, description="score doublets, sample by sample")
    expected_doublet_rate: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="share of a sample's cells; default: told by the scores, beside 0.008 per 1,000 cells captured",
    )
    mitochondrial: Names | None = Field(
        None,
        description="mitochondrial genes: ids, names or /patterns/, or a file with one a line; default: MT- and so on, "
        "ND1, COX1 ... of species without a prefix, Ensembl ids of twelve species",
    )
    ribosomal: Names | None = Field(None, description="the same for ribosomal proteins; default: RPS and RPL")
    haemoglobin: Names | None = Field(None, description="the same for haemoglobin; default: HBA, HBB and the like")
    drop: tuple[Flag, ...] = Field(
        ("empty", "low_counts", "low_genes", "high_mito"),
        description="flags that drop a cell: signs of damage; the others, doublets too, only flag unless listed",
    )


class GenesConfig(Section):
    """Which genes the model sees."""

    n_top: int | Literal["auto", "all"] = Field(
        "auto",
        description="highly variable genes to select; auto is 2000 or, with fewer genes, all that pass min_cells",
    )
    min_cells: int = Field(3, ge=1, le=2**31 - 1, description="genes detected in fewer kept cells are left out")
    per_batch: bool = Field(True, description="rank within each batch, then combine, as scanpy's batch_key does")
    span: float = Field(0.3, ge=0.01, le=1, description="loess span of the mean-variance fit")
    include: tuple[str, ...] = Field((), description="always selected: ids, names, /regular expressions/ or @groups")
    exclude: tuple[str, ...] = Field(
        (),
        description="never selected; groups: @mitochondrial @ribosomal @haemoglobin @immunoglobulin @tcr @nuclear "
        "@cell_cycle",
    )

    @field_validator("n_top")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 1_000_000:
            raise ValueError("must be at least 1, and 1,000,000 at most")
        return value


class ModelConfig(Section):
    """The generative model and its inference networks. With TrainConfig, data and seed it decides the weights."""

    likelihood: Literal["zinb", "nb", "poisson"] = Field("zinb", description="of a count, given the decoder's output")
    dispersion: Literal["gene", "gene-batch", "gene-cell"] = Field("gene", description="what theta depends on")
    library: Literal["observed", "latent"] = Field(
        "observed", description="l_n: the cell's count total, or a latent variable with the batch's log-normal prior"
    )
    n_latent: int = Field(10, ge=1, le=512, description="dimensions of z")
    n_hidden: int = Field(128, ge=1, le=4096, description="width of hidden layers")
    n_layers: int = Field(
        1, ge=1, le=10, description="hidden layers of the encoder, and of the decoder where it is a network"
    )
    decoder: Literal["network", "linear"] = Field(
        "network", description="from z to genes; linear is one matrix, whose columns are factors (`loadings.parquet`)"
    )
    loadings_l1: float = Field(
        0.0,
        ge=0,
        le=1e06,
        description="Laplace prior: pull of the linear decoder's loadings to exactly zero, in lengths of Adam's step",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="of the encoder")
    encoder_norm: Literal["batch", "layer", "none"] = Field("batch", description="of the encoder's hidden layers")
    decoder_norm: Literal["batch", "layer", "none"] = Field("batch", description="of the decoder's hidden layers")
    encode_covariates: bool = Field(False, description="whether the encoder sees batch and covariates, too")
    covariates_in: Literal["every", "first"] = Field(
        "every", description="hidden layers that see batch and covariates, of each network that does"
    )
    categorical_covariates: tuple[str, ...] = Field((), description="cell columns the decoder sees besides the batch")
    continuous_covariates: tuple[str, ...] = Field((), description="the same, for numbers; standardised")


class ModelSection(ModelConfig):
    """The model in a workflow: the same, and whether a registered one may be taken instead of training."""

    reuse: Literal["exact", "never", "require"] = Field(
        "exact", description="take the registered model of the same fingerprint; never train; or fail if there is none"
    )


class TrainConfig(Section):
    """How the weights are found. The defaults are the recipe that `benchmarks/README.md` compares."""

    max_epochs: int | Literal["auto"] = Field(
        "auto", description="auto: 60 up to 2,000 cells, then falling with the root of their number, 10 at least"
    )
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] | Literal["auto"] = Field(
        "auto", description="cells a step; auto: 128 up to 20,000 cells, then rising with the root of their number"
    )
    learning_rate: float = Field(
        1e-2, gt=0, le=10, description="of Adam, at its highest; a linear decoder fits better with 0.03"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="of the learning rate; cosine rises over a tenth of all steps and then falls to zero"
    )
    weight_decay: float = Field(1e-6, ge=0, le=10, description="of Adam")
    adam_eps: float = Field(
        1e-4, gt=0, le=10, description="of Adam; far above 1e-8, so that rarely seen genes move slowly"
    )
    kl_weight: float = Field(
        2.0, gt=0, le=10000, description="final weight of the KL term in the loss; above 1 it mixes batches better"
    )
    kl_warmup: float = Field(
        0.17, ge=0, le=1, description="share of all steps over which the KL weight rises from 0; always completes"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="of the decoder's matrix products in training, and on a GPU TF32 of the others beside bf16; auto "
        "is bf16 on a GPU that multiplies in it, float32 elsewhere",
    )
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="cells set aside to measure the held-out ELBO, 10,000 at most"
    )
    early_stopping: bool = Field(
        False,
        description="stop when the validation ELBO no longer rises, and keep the best weights; off, as the schedule is "
        "sized to the data and the embedding mixes batches later than the ELBO peaks",
    )
    patience: int = Field(45, ge=1, le=1_000_000, description="epochs without a better validation ELBO before stopping")
    memory_gb: float = Field(
        8.0,
        gt=0,
        le=1e06,
        description="10^9 bytes that packed counts may take, 3 to 8 a non-zero; larger stores stream in blocks",
    )
    gradient_clip: float = Field(
        0.0, ge=0, le=1e09, description="largest gradient norm; 0 leaves gradients as they are"
    )

    @field_validator("max_epochs")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 1_000_000:
            raise ValueError("must be at least 1, and 1,000,000 at most")
        return value


class ClusterConfig(Section):
    """The neighbour graph on the latent space, Leiden clusters and two-dimensional pictures."""

    n_neighbors: int = Field(15, ge=2, le=1000, description="of each cell in the graph")
    resolutions: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        (0.5, 1.0),
        min_length=1,
        description="Leiden resolutions; the first gives `cluster`, others cluster_r{resolution}",
    )
    stability: bool = Field(True, description="cluster anew by other seeds and resolutions, and suggest one that stays")
    umap: bool = Field(True, description="draw a UMAP")
    umap_min_dist: float = Field(0.5, ge=0, le=10, description="how tightly the UMAP packs cells")
    tsne: bool | Literal["auto"] = Field("auto", description="draw a t-SNE; auto: up to 10,000 cells, as it is slow")
    tsne_perplexity: float = Field(30.0, ge=1, le=1000, description="of the t-SNE; lowered where cells are too few")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of clusters, one a resolution."""
        return ("cluster", *(f"cluster_r{resolution:g}" for resolution in self.resolutions[1:]))


class AnnotateConfig(Section):
    """Cell types: known for some cells, wanted for all."""

    label: str | None = Field(None, description="cell column that holds known cell types; without it, no cell types")
    unknown: str | None = Field("unknown", description="its value for cells without a label; no value says the same")
    tree: Plain | None = Field(
        None, description="file of the taxonomy: two tab-separated columns, child and parent, or an ontology's .obo"
    )
    coverage: float = Field(0.9, ge=0.5, lt=1, description="share of cells whose set of labels is to hold the true one")
    max_false_novel: float = Field(
        0.05, gt=0, le=0.5, description="share of cells of known types that may be called novel"
    )
    method: Literal["frozen", "two-stage", "joint"] = Field(
        "frozen",
        description="frozen leaves the embedding as scVI finds it; two-stage goes on from it with scANVI's loss, joint "
        "begins with that",
    )


class DeConfig(Section):
    """Differential expression by sampling the posterior."""

    groupby: str = Field("cluster", description="cell column whose groups are compared")
    reference: Literal["rest", "pairs"] = Field("rest", description="each group against all others, or all pairs")
    compare: Literal["means", "cells"] = Field(
        "means", description="the groups' means: has the average changed; or pairs of cells: do single cells differ"
    )
    mode: Literal["change", "vanilla"] = Field("change", description="|LFC| > delta, or the sign alone (the paper's)")
    delta: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] = Field(
        0.25, description="smallest log2 fold change that counts; auto estimates it for each comparison"
    )
    fdr: float = Field(0.05, gt=0, lt=1, description="expected share of false calls allowed in `is_de`")
    n_samples: int = Field(
        2000, ge=100, le=1_000_000, description="posterior samples a group; 2000 give probabilities to 0.01"
    )
    batches: Literal["auto", "all", "within", "own"] = Field(
        "auto",
        description="all decodes every cell under every batch, within pairs cells of one batch only, own does neither; "
        "auto is all, but own where no batch holds two groups",
    )
    balance: bool = Field(
        True, description="a batch's weight rises with its cells up to 100 only, so that the largest does not decide"
    )
    min_cells: int = Field(5, ge=1, le=2**31 - 1, description="smaller groups are left out, and said so")


class CriticismConfig(Section):
    """Predictive checks: counts that the model makes, held against those measured."""

    enabled: bool = Field(True, description="make them, and show them in the report")
    n_replicates: int = Field(
        20, ge=19, le=1000, description="data sets that the model makes; with fewer, 90% has no meaning"
    )
    n_cells: int = Field(10_000, ge=100, le=100_000_000, description="cells examined at most, drawn at random")


class Comparison(Section):
    """Two levels of a column, compared across replicates."""

    column: str = Field(description="cell column with one value a replicate, such as condition")
    group: str = Field(coerce_numbers_to_str=True, description="the level that is tested")
    reference: str = Field(coerce_numbers_to_str=True, description="the level it is compared with")
    categorical_covariates: tuple[str, ...] = Field((), description="columns that the test adjusts for: batch, sex")
    continuous_covariates: tuple[str, ...] = Field((), description="the same, for numbers such as age; standardised")
    name: Name | None = Field(None, description="in contrast.parquet; default: {column}_{group}_vs_{reference}")

    @model_validator(mode="after")
    def _differ(self) -> Comparison:
        if self.group == self.reference:
            raise ValueError(f"group and reference are both {self.group!r}; name two levels of '{self.column}'")
        used = [self.column, *self.categorical_covariates, *self.continuous_covariates]
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' is named twice among column and covariates; keep one")
        return self

    @property
    def label(self) -> str:
        """As named, else by column and levels."""
        return self.name or f"{self.column}_{self.group}_vs_{self.reference}"


class ContrastConfig(Section):
    """Contrasts between conditions: counts summed by replicate and cell group, tested by PyDESeq2."""

    tests: tuple[Comparison, ...] = Field((), description="the contrasts; without any the step does not run")
    replicate: str = Field("sample", description="cell column whose levels are the replicates: sample, or donor")
    within: str | None = Field(
        "cluster", description="cell column; each of its groups is tested by itself; null: all cells as one group"
    )
    min_cells: int = Field(10, ge=1, le=2**31 - 1, description="pseudobulks of fewer cells are left out")
    min_counts: int = Field(
        10,
        ge=1,
        le=2**31 - 1,
        description="a gene is tested where as many replicates as the smaller level has reach this count",
    )
    min_replicates: int = Field(
        2, ge=2, le=1_000_000, description="of each level; cell groups with fewer are not tested"
    )
    fdr: float = Field(0.05, gt=0, lt=1, description="false discovery rate of `is_de`, by cell group and contrast")

    @model_validator(mode="after")
    def _names_differ(self) -> ContrastConfig:
        labels = [one.label for one in self.tests]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"tests: two contrasts are named {twice[0]!r}; give one another `name`")
        return self


class RegistryConfig(Section):
    """Where models are registered and looked up."""

    tracking_uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: MLFLOW_TRACKING_URI of the environment, then an SQLite file under "
        "results/",
    )
    name: ModelName | None = Field(None, description="registered model name; default: the atlas name")
    experiment: str | None = Field(None, description="MLflow experiment; default: scvi-core/{atlas}")
    organism: str | None = Field(None, description="tag of the model version; default: guessed from gene ids")
    figures: bool = Field(True, description="log figures to the run")


class ExportConfig(Section):
    """The whole atlas as one file, for scanpy, cellxgene and R: `atlas.h5ad`."""

    h5ad: bool = Field(False, description="write atlas.h5ad: counts, cells, genes, embeddings, neighbour graph")
    genes: Literal["selected", "all"] = Field("all", description="which genes it holds")
    x: Literal["log1p", "counts"] = Field(
        "log1p",
        description="what its X holds: log(1 + counts per 10,000 of the cell), or the counts, which are a layer too",
    )


class ReportConfig(Section):
    """The page."""

    title: str | None = Field(None, description="default: the atlas name")
    labels: tuple[str, ...] = Field((), description="cell columns (such as known cell types) to colour embeddings by")
    genes: tuple[str, ...] = Field(
        (), description="genes on the UMAP and in violins: names or ids; default: the first marker of each cluster"
    )
    n_markers: int = Field(5, ge=1, le=50, description="markers a cluster in the dot plot")


class Config(Section):
    """Everything one atlas build is asked for."""

    atlas: Name = Field("atlas", description="names the results folder and the registered model")
    samples: str = Field("config/samples.tsv", description="the sample sheet: sample, path, batch, further columns")
    annotations: Plain | None = Field(
        None,
        description="table of names for clusters or cells, tab-separated: cluster (or cell_id), name; gives the column "
        "`annotation`, without training or clustering anew",
    )
    results: Plain = Field("results", description="folder that holds {atlas}/")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")
    threads: int = Field(
        2,
        ge=1,
        le=1024,
        description="CPU threads of train and what follows; here, as it decides the last bits of results",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes a GPU where there is one, and says so"
    )
    devices: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that share each minibatch of training: a GPU each, or `threads` among them",
    )
    input: InputConfig = InputConfig()
    qc: QcConfig = QcConfig()
    genes: GenesConfig = GenesConfig()
    model: ModelSection = ModelSection()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    de: DeConfig = DeConfig()
    criticism: CriticismConfig = CriticismConfig()
    contrast: ContrastConfig = ContrastConfig()
    registry: RegistryConfig = RegistryConfig()
    report: ReportConfig = ReportConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("atlas")
    @classmethod
    def _no_dots(cls, value: str) -> str:
        return _checked_name(value)

    @model_validator(mode="after")
    def _covariates_differ(self) -> Config:
        both = set(self.model.categorical_covariates) & set(self.model.continuous_covariates)
        if both:
            raise ValueError(f"model: {sorted(both)} is asked for as categorical and as continuous; keep one")
        return self

    @property
    def folder(self) -> Path:
        """``results/{atlas}``."""
        return Path(self.results) / self.atlas

    @property
    def sheet(self) -> str:
        """The sample sheet: as configured, else as the workflow says by the environment."""
        return self.samples if "samples" in self.model_fields_set else os.environ.get(SHEET, self.samples)

    @property
    def labels(self) -> tuple[str, ...]:
        """The cell columns that the report colours embeddings by: the names first."""
        return tuple(dict.fromkeys([ANNOTATION] * (self.annotations is not None) + [*self.report.labels]))

    @property
    def tracking_uri(self) -> str:
        """Where MLflow writes, as :func:`tracking_place`."""
        return tracking_place(None, self.registry.tracking_uri, self.results)[0]

    @property
    def registered_name(self) -> str:
        """The registered model's name: as configured, else the atlas'."""
        return self.registry.name or self.atlas


def tracking_place(option: str | None, configured: str | None, results: str) -> tuple[str, str]:
    """Where MLflow writes, and what says so: an option, the configuration, the environment, or the default.

    The default is one SQLite file for all atlases under `results`.

    Raises
    ------
    UserError
        Where an address lacks its password, and the environment does not have it.
    """
    whole = os.environ.get(TRACKING_URI, "")  # where a command line or a file has it without its secrets
    places = {
        "--tracking-uri": option,
        "registry.tracking_uri": configured,
        TRACKING_URI: whole,
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI"),
        "the default": f"sqlite:///{results}/mlflow.db",
    }
    by, uri = next((by, uri) for by, uri in places.items() if uri)
    if uri == redacted(whole):
        return whole, by
    if "://***@" in uri or "=***" in uri:
        raise UserError(f"{by}: {uri} is without its password; set {TRACKING_URI} to the whole")
    return uri, by


class Sample(Section):
    """One row of the sample sheet."""

    sample: Name
    path: Plain
    batch: str = Field(min_length=1, max_length=200)
    metadata: dict[str, str] = Field({}, description="the sheet's further columns")
    reading: dict[str, str] = Field({}, description="its columns that are called as keys of `input`")

    @field_validator("metadata")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        for column, text in value.items():
            if not COLUMN.fullmatch(column):
                raise ValueError(f"column name {column!r}; {COLUMN_NAMES}")
            if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text) or len(text) > 10_000:
                raise ValueError(f"column {column!r} has {text[:80]!r}, a control character or a text without end")
        return value

    @field_validator("sample")
    @classmethod
    def _no_dots(cls, value: str) -> str:
        return _checked_name(value)

    @field_validator("path")
    @classmethod
    def _whole_url(cls, value: str) -> str:
        return _checked_url(value) if "://" in value else value

    def reads(self, config: InputConfig) -> InputConfig:
        """How this sample is read: the configuration, but for what its row of the sheet says."""
        return InputConfig.model_validate(config.model_dump() | self.reading)

    @property
    def plugin(self) -> str | None:
        """The storage plugin of Snakemake that fetches the path; None for a local one."""
        return PLUGINS[self.path.partition("://")[0]] if "://" in self.path else None


def _checked_url(value: str) -> str:
    # plugins drop what follows '?' or '#' and fold '..' and '//': another file would be read, or the copy lie elsewhere
    scheme, _, rest = value.partition("://")
    if scheme not in PLUGINS:
        raise ValueError(f"a URL starts with {'://, '.join(PLUGINS)}://; a local path has no scheme")
    host, *parts = rest.split("/")
    if "@" in host:
        raise ValueError("take user and password out of the URL; Snakemake's settings have a place for them")
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(?::\d+)?", host)
        or not parts
        or not {"", ".", ".."}.isdisjoint(parts)
    ):
        raise ValueError(f"write a URL as {scheme}://bucket/folder/name, without '..', '//' and a slash at its end")
    if re.search(r"[?#\\]", rest):
        raise ValueError("a URL of a plain file is needed, without '?', '#' and backslash")
    return value


def _checked_name(value: str) -> str:
    # pydantic's $ is strict, but '..' is made of allowed characters
    if not re.fullmatch(NAME, value) or ".." in value:
        raise ValueError(REMEDY[NAME])
    return value


class _Loader(yaml.SafeLoader):
    """YAML without keys given twice, of which the last would win, and without aliases, which stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ComposerError(None, None, f"an alias (*{alias.anchor}); write it out", alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file of 1 MiB at most.

    Raises
    ------
    UserError
        Naming the file and line that is no configuration.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such configuration file; see config/README.md")
    if not os.path.isfile(path) or os.path.getsize(path) > SMALL:
        raise UserError(f"{path}: not a file of 1 MiB at most; name a configuration file")
    try:
        raw = yaml.load(Path(path).read_text("utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a configuration has four levels at most") from None
    except Exception as error:  # YAML's own, and whatever there is for dates, numbers and tags that cannot be
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = f" line {line + 1}" if line is not None else ""
        problem = str(getattr(error, "problem", error))
        if "'\\t'" in problem:
            problem = "a tab; indent with spaces"
        raise UserError(f"{path}{at}: not valid YAML ({problem})") from None
    if not isinstance(raw, dict):
        found = {type(None): "nothing", list: "a list", str: "a text"}.get(type(raw), type(raw).__name__)
        raise UserError(f"{path}: expected keys and values, such as `atlas: pancreas`, found {found}")
    return raw


def parse_json(text: str) -> Any:
    """Read JSON, whose keys may not repeat: the last would win.

    Raises
    ------
    ValueError
        For what is no such JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is given twice")
        return seen

    try:
        value = json.loads(text, object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, as \\ud800 alone, can be written nowhere
        return value
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start : error.end]!r} is no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_config(source: str | Path | dict[str, Any], where: str = "config") -> Config:
    """Read and check a configuration.

    Parameters
    ----------
    source : a YAML file's path, a JSON object as text (it starts with ``{``), or a mapping.
    where : what messages call a mapping: the file that it was read from.

    Raises
    ------
    UserError
        For a missing or malformed file, an unknown key (the nearest valid one is named), a value out of range.
    """
    if isinstance(source, dict):
        raw = source
    elif str(source).lstrip().startswith("{"):
        where = "--config"
        try:
            raw = parse_json(str(source))
        except ValueError as error:
            raise UserError(f"{where}: starts with '{{' but is not JSON ({error}); give JSON text or a file") from None
    else:
        where, raw = str(source), read_yaml(source)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        written = as_written(Path(where).read_text("utf-8"), _Loader) if os.path.isfile(where) else lambda _: None
        raise UserError(f"{where}: " + "; ".join(explain(Config, error, REMEDY, written))) from None


def level_text(value: object) -> str:
    """A level as text: 24, 24.0 and '24' are one; '007', '1E1' and '1.10' are names."""
    text = str(value).strip()
    whole = re.fullmatch(r"([+-]?(?:0|[1-9][0-9]*))(?:\.0*)?", text)
    return whole[1] if whole else text


MISSING = ("NA", "N/A", "n/a", "#N/A", "NaN", "nan", "<NA>")  # what spreadsheets and R write where nothing is known


def sheet_text(path: str | Path, what: str) -> str:
    """Read a user's table as text, or say what it is instead; `what` should be there."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such {what}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file; name a {what}")
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"PK\x03\x04"):
            raise UserError(f"{path}: an Excel workbook; save it as tab-separated text")
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: UTF-16 text, as spreadsheets save 'Unicode text'; save it as UTF-8")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line}: not UTF-8 text (byte {content[error.start]:#x}; Windows-1252, as of spreadsheets?)"
            "; save it as UTF-8"
        ) from None


def load_samples(path: str | Path) -> list[Sample]:
    """Read and check a sample sheet: tab-separated, columns sample, path, batch, then any of the user's.

    Paths are relative to the working directory. Nothing is opened here but the sheet;
    ``scvi-core validate`` also looks at the files.

    Raises
    ------
    UserError
        Naming the line, column and value that is wrong.
    """
    text = sheet_text(path, "sample sheet; it has the columns sample, path, batch")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    try:
        lines = [(reader.line_num, line) for line in reader if any(map(str.strip, line))]
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.line_num}: cannot be read ({error}); columns are separated by tabs"
        ) from None
    rows = [(number, line) for number, line in lines if not line[0].startswith("#")]
    comments = [(number, line) for number, line in lines if line[0].startswith("#")]
    for number, line in rows:
        for cell in line:
            if re.search(r"[\x00-\x1f\x7f]", cell):
                raise UserError(f"{path} line {number}: {cell!r} has a line break or control character; take it out")
    if not rows:
        raise UserError(f"{path}: empty; expected a header with the columns sample, path, batch")
    header = [column.strip() for column in rows[0][1]]
    while not header[-1]:  # columns that a spreadsheet adds
        header.pop()
    if len(header) == 1 and (other := re.search("[;,]", header[0])):
        raise UserError(f"{path}: columns are separated by tabs, not {other[0]!r}; save it as tab-separated text")
    for number, line in comments:
        if "sample" not in header and line[0].lstrip("# ") == "sample":
            raise UserError(f"{path} line {number}: the header begins with '#', as comments do; write 'sample'")
    for column in ("sample", "path", "batch"):
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            found = f"found '{near[0]}'" if near else f"found {', '.join(header)}"
            raise UserError(f"{path}: no column '{column}' ({found}); columns are separated by tabs")
    columns = [column for column in header if COLUMN.fullmatch(column)]
    for i, column in enumerate(columns):
        if (same := same_column(column, columns[:i])) is not None:
            alike = "appears twice" if same == column else f"differs from '{same}' by case alone"
            raise UserError(f"{path}: column '{column}' {alike}; rename one")
        if is_reserved(column):
            raise UserError(f"{path}: column '{column}' is one that scvi-core writes itself; rename it")
    if left := [column for column in header if not COLUMN.fullmatch(column)]:
        log.warning(
            "%s: columns left out for their names: %s; to keep one, %s", path, ", ".join(map(repr, left)), COLUMN_NAMES
        )
    for number, line in comments:
        if len(line) == len(header):
            log.warning(
                "%s line %d: %r begins with '#': skipped, as a comment; a sample's name has none", path, number, line[0]
            )
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, line in rows[1:]:
        while len(line) > len(header) and not line[-1].strip():
            line.pop()
        if len(line) != len(header):
            raise UserError(f"{path} line {number}: {len(line)} columns where the header has {len(header)}")
        cells = zip(header, (cell.strip() for cell in line), strict=True)
        row = {key: "" if value in MISSING else value for key, value in cells if key in columns}
        reading = {key: value for key, value in row.items() if key in READING and value}
        extra = {key: value for key, value in row.items() if key not in ("sample", "path", "batch", *READING)}
        try:
            sample = Sample(sample=row["sample"], path=row["path"], batch=row["batch"], metadata=extra, reading=reading)
            sample.reads(InputConfig())
        except ValidationError as error:
            column = str(error.errors()[0]["loc"][0])
            told = explain(Sample if column in Sample.model_fields else InputConfig, error, REMEDY)[0]
            raise UserError(f"{path} line {number}: {told if row[column] else f'{column}: is empty'}") from None
        folded = sample.sample.casefold()
        if folded in seen:
            raise UserError(
                f"{path} line {number}: sample {sample.sample!r} is already on line {seen[folded]} (case is ignored)"
            )
        seen[folded] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: a header but no samples")
    return samples


def carried(config: Config, samples: list[Sample]) -> tuple[str, ...]:
    """The columns of the inputs' own cell tables that any sample carries along."""
    return tuple(dict.fromkeys(name for sample in samples for name in sample.reads(config.input).metadata))


def check_columns(config: Config, samples: list[Sample], where: str = "config") -> None:
    """Check what configuration and sample sheet say only together: the cell columns asked for, and their levels.

    Raises
    ------
    UserError
        For a column that neither the sheet nor `input.metadata` gives, and for one level where two are needed.
    """
    own = list(samples[0].metadata)
    for i, name in enumerate(names := carried(config, samples)):
        if (same := same_column(name, (*own, *names[:i]))) is not None:
            raise UserError(
                f"{where}: input.metadata names '{name}', and {config.samples} or itself '{same}': case is ignored in "
                "names of columns; rename one"
            )
    if config.annotate.tree is not None:
        if config.annotate.label is None:
            raise UserError(f"{where}: annotate.tree is given without annotate.label, the column that holds the labels")
        if not os.path.isfile(config.annotate.tree):
            raise UserError(f"{where}: annotate.tree: no file {config.annotate.tree}; mend the path")
    if config.annotate.label is not None:
        for name in (*own, *carried(config, samples)):
            if name.casefold() in ANNOTATED:
                raise UserError(
                    f"{where}: annotate.label is set, and annotation writes the columns {', '.join(ANNOTATED)}: rename "
                    f"'{name}' in {config.samples}, or as input.metadata reads it"
                )
    columns = {*own, *carried(config, samples), "sample", "batch", "n_counts", "n_genes", "pct_mito"}
    clusters = set(config.cluster.columns)
    if config.annotations is not None:
        if not os.path.isfile(config.annotations):
            raise UserError(f"{where}: annotations: no file {config.annotations}; mend the path")
        if ANNOTATION in columns:
            raise UserError(f"{where}: annotations: the samples have a column '{ANNOTATION}' of their own; rename it")
        clusters.add(ANNOTATION)
    if config.annotate.label is not None:
        clusters |= {"label", "safe_label"}
    asked = {
        "annotate.label": (filter(None, [config.annotate.label]), columns),
        "model.categorical_covariates": (config.model.categorical_covariates, columns),
        "model.continuous_covariates": (config.model.continuous_covariates, columns),
        "report.labels": (config.report.labels, columns | clusters),
        "de.groupby": ((config.de.groupby,), columns | clusters),
    }
    if config.contrast.tests:
        asked["contrast.within"] = ((config.contrast.within or "cluster",), columns | clusters)
        asked["contrast.replicate"] = ((config.contrast.replicate,), columns)
    for i, one in enumerate(config.contrast.tests):
        used = (one.column, *one.categorical_covariates, *one.continuous_covariates)
        asked[f"contrast.tests.{i}"] = (used, columns)
    for key, (names, allowed) in asked.items():
        for name in names:
            if name not in allowed:
                near = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.5)
                if name == ANNOTATION and name not in carried(config, samples):
                    raise UserError(
                        f"{where}: {key}: no column '{name}'; name clusters in a table, and the table by "
                        "the key annotations"
                    )
                hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(allowed))};"
                raise UserError(
                    f"{where}: {key}: no cell column '{name}'; {hint} mend it, or add the column to {config.samples} "
                    "or to input.metadata"
                )
    own_batches = any(s.reads(config.input).batch_column for s in samples)
    if config.model.dispersion == "gene-batch" and len({s.batch for s in samples}) < 2 and not own_batches:
        raise UserError(
            f"{where}: model.dispersion: 'gene-batch' needs two batches or more; {config.samples} has one; use 'gene'"
        )
    if config.model.loadings_l1 and config.model.decoder != "linear":
        raise UserError(
            f"{where}: model.loadings_l1: {config.model.loadings_l1:g}, but a network decoder has no loadings; "
            "set model.decoder: linear or leave it out"
        )
    for name in (*config.model.categorical_covariates, *config.model.continuous_covariates):
        levels = {s.metadata[name] if name in own else getattr(s, name, None) for s in samples}
        if name in (*own, "sample", "batch") and len(levels) < 2:
            raise UserError(
                f"{where}: model covariate '{name}': has one level ({levels.pop()!r}) in {config.samples}; leave it out"
            )
    for i, one in enumerate(config.contrast.tests):
        if one.column in own or (
            one.column == "batch" and not own_batches
        ):  # else the inputs' own tables have it, and the step itself looks
            given = [s.batch if one.column == "batch" else s.metadata[one.column] for s in samples]
            if one.column != "batch" and all(re.fullmatch(NUMBER, level) for level in given if level):
                # the store makes numbers of these, where 0.50 is 0.5
                given = [str(float(level)) if re.search("[.eE]", level) else level for level in given]
            levels = [level_text(level) for level in given]
            for key in ("group", "reference"):
                found = levels.count(level_text(getattr(one, key)))
                if not found:
                    have = ", ".join(sorted(set(levels)))
                    raise UserError(
                        f"{where}: contrast.tests.{i}.{key}: no sample has {one.column} "
                        f"'{getattr(one, key)}' in {config.samples}; there are {have}"
                    )
                if found < config.contrast.min_replicates and config.contrast.replicate == "sample":
                    raise UserError(
                        f"{where}: contrast.tests.{i}.{key}: {config.samples} has {found} sample of {one.column} "
                        f"'{getattr(one, key)}'; a test across samples needs {config.contrast.min_replicates} of each "
                        "level"
                    )
