"""``scvi-core COMMAND``: one subcommand a step, from files to files. Snakemake's rules call nothing else."""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from scvi_core._version import __version__
from scvi_core.config import (
    ANNOTATED,
    ANNOTATION,
    REMEDY,
    Config,
    Sample,
    check_columns,
    load_config,
    load_samples,
    parse_json,
    tracking_place,
)
from scvi_core.explain import explain
from scvi_core.files import (
    FILES,
    FOLDERS,
    Claim,
    Decisions,
    UserError,
    check_output,
    code_sha256,
    read_parquet,
    replacing,
    write_json,
    write_parquet,
)
from scvi_core.log import log, one_line, redacted, speak_utf8


class Step(typer.core.TyperCommand):
    """A command whose outputs, options that have a kind of output as metavar, are looked at before it begins."""

    def invoke(self, ctx: Any) -> Any:
        """Run it, unless an output would take the place of an input, of another output or of what is not our own."""
        if stat.S_ISREG(os.fstat(2).st_mode):  # the rule's log: a first line before imports, which take memory
            job, memory = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "MEM_PER_NODE"))
            where = [platform.node(), *([f"Slurm job {job}"] if job else []), *([f"{memory} MB"] if memory else [])]
            log.info("%s begins on %s", ctx.command.name, ", ".join(where))
        outputs, taken = [], set()
        for option in self.params:
            value = ctx.params.get(option.name)
            paths = [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]
            if any("\0" in str(path) for path in paths):
                raise UserError(f"{option.opts[0]}: {value!r} has a NUL in it; name a path")
            if option.metavar in {*FILES, *FOLDERS}:
                outputs += [(option, path) for path in paths]
            else:  # of several samples' counts.h5ad, what stands beside each is read too
                paths += [path.parent / "qc.parquet" for path in paths if isinstance(value, list)]
                paths += [file for path in paths if isinstance(value, list) for file in path.glob("*/*")]
                taken |= {os.path.realpath(path) for path in paths}
        for option, path in outputs:
            if os.path.realpath(path) in taken:
                raise UserError(f"{option.opts[0]} {path}: is read or written by the same command; name another path")
            check_output(path, str(option.metavar))
            taken.add(os.path.realpath(path))
        return super().invoke(ctx)


app = typer.Typer(
    help="From raw single-cell RNA-seq counts to a gene expression atlas that others can query and reuse.\n\n"
    "Run the whole with `snakemake --cores N`, or each step by hand: every subcommand goes from files to files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="The registry: list, show and promote registered models.", no_args_is_help=True)
app.add_typer(models, name="models")

ConfigOption = Annotated[
    str, typer.Option("--config", help="config.yaml, or the part of it that matters as JSON text ('{...}')")
]
BuiltConfig = Annotated[
    str | None,
    typer.Option("--config", help="config.yaml, or JSON text ('{...}'); default: what the folder was built with"),
]
Samples = Annotated[
    list[Path],
    typer.Argument(
        help="every sample's counts.h5ad, qc.parquet beside each; or the folder of all samples, in the sheet's order"
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="PARQUET", help="what to write")]
DecisionsOption = Annotated[
    Path | None,
    typer.Option("--decisions", metavar="JSONL", help="where to write the choices made, one JSON object a line"),
]
Tracking = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        help="MLflow tracking URI of the registry; default: registry.tracking_uri of the configuration, then "
        "MLFLOW_TRACKING_URI, then an SQLite file under results/",
    ),
]
Configured = Annotated[
    str | None, typer.Option("--config", help="configuration that names the registry; default: config/config.yaml")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        print(f"scvi-core {__version__}")
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(help="folder with your matrices, in any format that ingest reads; or one such file")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for samples.tsv and config.yaml; default: config/FOLDER")
    ] = None,
) -> None:
    """Begin an atlas: find the matrices in a folder, and write a sample sheet and a configuration for them.

    Says what it found and guessed. Nothing that is there is overwritten.

    Example: scvi-core init data/pbmc
    """
    from scvi_core.start import begin, stem

    for line in begin(folder, out or Path("config") / stem(folder)):
        print(line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    config: Annotated[str, typer.Option("--config", help="configuration of the atlas")] = "config/config.yaml",
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores to use; default: all")] = None,
) -> None:
    """Build an atlas: Snakemake, with the workflow of this clone. Further options are Snakemake's own.

    Example: scvi-core run --config config/pbmc/config.yaml --cores 4
    """
    settings = load_config(config)
    places = [Path(), Path(__file__).resolve().parents[1]]
    snakefile = next(
        (place / "Snakefile" for place in places if (place / "workflow" / "rules" / "ingest.smk").exists()), None
    )
    if snakefile is None:
        raise UserError(
            "no workflow here: `scvi-core run` works in a clone of scvi-core, or where it was installed from one"
        )
    # one line that says who builds, where Snakemake's own lock would speak of --unlock
    if (settings.folder / ".lock").exists() and not {"-n", "--dry-run", "--dryrun", "--unlock"} & {*context.args}:
        Claim(settings.folder).release()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--configfile", config]
    command += ["--cores", str(cores or os.cpu_count() or 1), *context.args]
    os.execv(sys.executable, command)


@app.command(cls=Step)
def validate(
    config: ConfigOption = "config/config.yaml",
    schemas: Annotated[
        Path | None, typer.Option("--schemas", help="write the JSON schemas of config and sample sheet here, no more")
    ] = None,
    inputs: Annotated[bool, typer.Option(help="open the inputs, and look at a sample of their counts")] = True,
) -> None:
    """Check configuration, sample sheet and inputs; run nothing.

    Inputs are opened, and of each a few million values are read: format, cells, genes, counts, organism, and whether
    these are counts of cells at all.

    Example: scvi-core validate --config config/config.yaml
    """
    if schemas is not None:
        _write_schemas(schemas)
        return
    from scvi_core import design
    from scvi_core.names import read_names

    settings = load_config(config)
    samples = load_samples(settings.samples)
    for sample in samples:
        if not sample.plugin and not Path(sample.path).exists():
            raise UserError(f"{settings.samples}: sample '{sample.sample}': no file {sample.path}; mend the path")
    check_columns(settings, samples, config if not config.lstrip().startswith("{") else "--config")
    if settings.annotations is not None:
        read_names(settings.annotations, ["cell_id", *settings.cluster.columns])
    table = design.sheet_table(samples, settings)
    design.check(table, settings)
    for remark in design.remarks(table, settings):
        log.warning("design: %s", remark)
    if inputs:
        from scvi_core.look import check_inputs

        print(check_inputs(samples, settings), flush=True)
    n, batches = len(samples), len({s.batch for s in samples})
    text = "valid: atlas '%s', %d sample%s in %d batch%s"
    log.info(text, settings.atlas, n, "s" if n > 1 else "", batches, "es" if batches > 1 else "")


@app.command(cls=Step)
def ingest(
    path: Annotated[Path, typer.Argument(help="h5ad, zarr, 10x .h5, 10x mtx folder, loom, CSV or TSV")],
    sample: Annotated[str, typer.Option(help="the sample's name")],
    batch: Annotated[str, typer.Option(help="the sample's batch")],
    out: Annotated[Path, typer.Option("--out", metavar="H5AD", help="what to write")],
    metadata: Annotated[str, typer.Option(help="further columns for every cell, as a JSON object")] = "{}",
    source: Annotated[str | None, typer.Option(help="the URL that PATH was fetched from; messages name it")] = None,
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Read one sample's counts from any supported format, check them, and write AnnData.

    Example: scvi-core ingest data/donor1.h5 --sample donor1 --batch lab_a --out donor1/counts.h5ad
    """
    from pydantic import ValidationError

    from scvi_core.io import ingest as read

    try:
        row = Sample(sample=sample, path=source or str(path), batch=batch, metadata=parse_json(metadata))
    except ValidationError as error:
        raise UserError("; ".join(f"--{clause}" for clause in explain(Sample, error, REMEDY))) from None
    except ValueError as error:
        raise UserError(f"--metadata {metadata!r}: not a JSON object of texts ({error})") from None
    try:
        digest, made = read(path, out, row, load_config(config).input)
    except UserError as error:
        if source is None or not str(error).startswith(str(path)):
            raise
        raise UserError(source + str(error).removeprefix(str(path))) from error  # the fetched copy is gone soon
    log.info("%s: read %s, content sha256 %s", sample, row.path, digest)
    made.write(decisions)


@app.command(cls=Step)
def qc(
    counts: Annotated[
        Path | None, typer.Argument(help="counts.h5ad of one sample; for a preview, counts in any format")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PARQUET", help="what to write")] = None,
    config: ConfigOption = "{}",
    figure: Annotated[Path | None, typer.Option(metavar="PNG", help="violin and scatter plots")] = None,
    decisions: DecisionsOption = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="print what each limit would take, and write nothing")
    ] = False,
    by: Annotated[list[str] | None, typer.Option(help="column of cell labels to count by, in a preview")] = None,
) -> None:
    """Measure and flag one sample's cells; with --preview show what each limit would take, of COUNTS or of all samples.

    Example: scvi-core qc donor1/counts.h5ad --out donor1/qc.parquet --figure donor1/qc.png

    Example: scvi-core qc --preview --config config/config.yaml
    """
    settings = load_config(config)
    if preview:
        from scvi_core.preprocess.preview import preview as tried

        if counts is not None:
            tries = [(counts, Sample(sample="preview", path="preview", batch="preview"))]
        else:
            tries = [(Path(sample.path), sample) for sample in load_samples(settings.samples)]
        for text in tried(tries, settings, by or []):
            print(text, flush=True)
        return
    if counts is None or out is None:
        raise UserError("qc: name counts.h5ad and --out, or --preview; see scvi-core qc --help")
    from scvi_core.preprocess.qc import qc as judge
    from scvi_core.report import figures

    frame, made = judge(counts, settings.qc, settings.seed)
    write_parquet(out, frame)
    if figure is not None:
        with replacing(figure, "PNG") as temporary:
            temporary.write_bytes(figures.png(figures.qc_figure(frame, made)))
    made.write(decisions)


@app.command(cls=Step)
def genes(
    counts: Samples,
    out: Out,
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Choose the genes that the model sees, in one streaming pass over all samples.

    Example: scvi-core genes samples/*/counts.h5ad --out genes.parquet
    """
    from scvi_core.preprocess.genes import select_genes

    settings = load_config(config)
    files = _counts(counts, settings)
    frame, made = select_genes(files, _beside(files), settings.input, settings.genes)
    write_parquet(out, frame)
    made.write(decisions)


@app.command(cls=Step)
def store(
    counts: Samples,
    genes: Annotated[Path, typer.Option(help="genes.parquet")],
    out: Annotated[Path, typer.Option("--out", metavar="STORE", help="the zarr folder to write")],
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Pack kept cells × selected genes of all samples into one AnnData zarr store.

    Example: scvi-core store samples/*/counts.h5ad --genes genes.parquet --out counts.zarr
    """
    from scvi_core.preprocess.store import write_store

    settings = load_config(config)
    files = _counts(counts, settings)
    made = write_store(out, files, _beside(files), read_parquet(genes, "genes"), settings.input.metadata)
    made.write(decisions)


@app.command(cls=Step)
def lookup(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    out: Annotated[Path, typer.Option(metavar="LOOKUP", help="folder for lookup.json and, if found, the model")],
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Look in the registry for a model of the same fingerprint, and fetch it if model.reuse allows.

    Example: scvi-core lookup --store counts.zarr --config config/config.yaml --out found
    """
    from scvi_core import steps

    steps.lookup(store, load_config(config), out).write(decisions)


@app.command(cls=Step)
def train(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    out: Annotated[Path, typer.Option(metavar="MODEL", help="the model's folder")],
    config: ConfigOption = "{}",
    found: Annotated[Path | None, typer.Option(help="folder that `scvi-core lookup` wrote")] = None,
    run: Annotated[Path | None, typer.Option(metavar="JSON", help="times, host and device of this run")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="folder that keeps the state of an unfinished fit; the same command goes on")
    ] = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="processes that share each minibatch: on a GPU each, or on `threads` CPU threads"
        ),
    ] = 1,
    decisions: DecisionsOption = None,
) -> None:
    """Fit the model, or take the registered one that `lookup` found.

    Sent SIGTERM, SIGUSR1 or Ctrl-C it writes a checkpoint and exits with 75; the same command then goes on from there.

    Example: scvi-core train --store counts.zarr --config config/config.yaml --out model --checkpoints .checkpoints
    """
    from scvi_core import steps

    code = steps.train(store, load_config(config), out, found, run, checkpoints, devices, decisions)
    if code:
        raise typer.Exit(code)


@app.command(cls=Step)
def embed(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    model: Annotated[Path, typer.Option(help="the model's folder")],
    out: Out,
    config: ConfigOption = "{}",
    uncertainty: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="where to write each cell's posterior standard deviations")
    ] = None,
) -> None:
    """Embed the store's cells: posterior means of the latent state.

    Example: scvi-core embed --store counts.zarr --model model --out latent.parquet
    """
    from scvi_core import steps

    steps.embed(store, model, load_config(config), out, uncertainty)


@app.command(cls=Step)
def expression(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    model: Annotated[Path, typer.Option(help="the model's folder")],
    out: Out,
    genes: Annotated[
        str | None,
        typer.Option(help="ids or names, with commas between, or @FILE with one a line; default: all, a column each"),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="as if measured in this batch; given several times: the mean over these; default: its own"),
    ] = None,
    library_size: Annotated[str, typer.Option(help="counts to scale each cell to, or 'own'")] = "10000",
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="posterior samples a cell, to be averaged")] = 10,
    config: ConfigOption = "{}",
) -> None:
    """Write denoised expression: posterior means of rho x library size. A row a cell, a float32 column a gene (its id).

    Memory does not grow with cells. Readers of Parquet slow down beyond some thousands of columns: name genes.

    Example: scvi-core expression --store counts.zarr --model model --genes INS,GCG --out expression.parquet
    """
    from scvi_core import steps

    wanted = None
    if genes is not None:
        text = _list_of(Path(genes[1:])) if genes.startswith("@") else genes.replace(",", "\n")
        wanted = [gene.strip() for gene in text.split("\n") if gene.strip()]
        if not wanted:
            raise UserError(f"--genes {genes!r}: names no gene; leave it out for all")
    try:
        size = None if library_size == "own" else float(library_size)
    except ValueError:
        raise UserError(f"--library-size {library_size!r}: neither a number nor 'own'") from None
    steps.expression(store, model, load_config(config), out, wanted, batch or None, size, samples)


@app.command(cls=Step)
def loadings(
    model: Annotated[Path, typer.Option(help="the model's folder; its decoder is linear")],
    out: Out,
) -> None:
    """Write a linear decoder's loadings: a row a gene, a column a factor.

    Example: scvi-core loadings --model model --out loadings.parquet
    """
    from scvi_core import api

    write_parquet(out, api.load(model).loadings())


@app.command(cls=Step)
def cluster(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    latent: Annotated[Path, typer.Option(help="latent.parquet")],
    out: Out,
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Cluster and draw the embedded cells.

    Example: scvi-core cluster --store counts.zarr --latent latent.parquet --out clusters.parquet
    """
    from scvi_core import tables
    from scvi_core.cluster import cluster as group
    from scvi_core.preprocess.store import read_store

    settings = load_config(config)
    ids, z = read_store(store, counts=False).obs_names, read_parquet(latent, "embed")
    if list(z["cell_id"]) != list(ids):
        raise UserError(f"{latent}: its cells are not those of {store}; run `scvi-core embed` again")
    made = Decisions("cluster")
    latent_nk = z.drop(columns="cell_id").to_numpy("float32")
    found = group(latent_nk, settings.cluster, settings.seed, settings.threads, made)
    write_parquet(out, tables.clusters_table(ids, found))
    made.write(decisions)


@app.command(cls=Step)
def cells(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    clusters: Annotated[Path, typer.Option(help="clusters.parquet")],
    out: Out,
    annotation: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="annotation.parquet: adds label, safe_label, novelty")
    ] = None,
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Write the table of cells: what is known of them, clusters, found labels, and names that you gave (`annotations`).

    Example: scvi-core cells --store counts.zarr --clusters clusters.parquet --config config/config.yaml
    --out cells.parquet
    """
    from scvi_core import tables
    from scvi_core.names import annotate
    from scvi_core.preprocess.store import read_store

    settings = load_config(config)
    obs, found = read_store(store, counts=False).obs, read_parquet(clusters, "cluster")
    if list(found["cell_id"]) != list(obs.index):
        raise UserError(f"{clusters}: its cells are not those of {store}; run `scvi-core cluster` again")
    made = Decisions("cells")
    if settings.annotations is not None:
        found[ANNOTATION] = annotate(settings.annotations, found, made)
    if annotation is not None:
        calls = read_parquet(annotation, "annotate")
        if list(calls["cell_id"]) != list(obs.index):
            raise UserError(f"{annotation}: its cells are not those of {store}; run `scvi-core annotate` again")
        found[list(ANNOTATED)] = calls[list(ANNOTATED)]
    write_parquet(out, tables.cells_table(obs, found))
    made.write(decisions)


@app.command(cls=Step)
def annotate(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    model: Annotated[Path, typer.Option(help="the model's folder, of a fit with annotate.label")],
    out: Out,
    probabilities: Annotated[Path, typer.Option(metavar="PARQUET", help="where to write cells x labels")],
    labels: Annotated[Path, typer.Option(metavar="PARQUET", help="where to write what is known of each label")],
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Cell types of all cells: label, probability, label set, safe label, novelty.

    Example: scvi-core annotate --store counts.zarr --model model --out annotation.parquet
    --probabilities label_probabilities.parquet --labels labels.parquet
    """
    from scvi_core import steps

    steps.annotate(store, model, load_config(config), out, probabilities, labels).write(decisions)


@app.command(cls=Step)
def de(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    model: Annotated[Path, typer.Option(help="the model's folder")],
    cells: Annotated[Path, typer.Option(help="cells.parquet")],
    out: Out,
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Differential expression between groups of cells, by sampling the posterior.

    Each group against the rest, or all pairs (de.reference); cells against cells, or means against means (de.compare).

    Example: scvi-core de --store counts.zarr --model model --cells cells.parquet --out de.parquet
    """
    from scvi_core import steps

    steps.de(store, model, cells, load_config(config), out).write(decisions)


@app.command(cls=Step)
def contrast(
    counts: Samples,
    cells: Annotated[Path, typer.Option(help="cells.parquet")],
    genes: Annotated[Path, typer.Option(help="genes.parquet")],
    out: Out,
    config: ConfigOption = "{}",
    pseudobulk: Annotated[
        Path | None, typer.Option(metavar="PARQUET", help="where to write the sums of counts")
    ] = None,
    decisions: DecisionsOption = None,
) -> None:
    """Test conditions against each other across samples, in each group of cells: pseudobulks and PyDESeq2.

    Example: scvi-core contrast samples/*/counts.h5ad --cells cells.parquet --genes genes.parquet --config
    config/config.yaml --out contrast.parquet --pseudobulk pseudobulk.parquet
    """
    from scvi_core import pseudobulk as sums

    settings = load_config(config)
    table, of_genes = read_parquet(cells, "cells"), read_parquet(genes, "genes")
    files = _counts(counts, settings)
    frame, bulks, made = sums.contrast(files, _beside(files), table, of_genes, settings.contrast)
    write_parquet(out, frame)
    if pseudobulk is not None:
        write_parquet(pseudobulk, bulks.table())
    made.write(decisions)


@app.command(cls=Step)
def criticism(
    store: Annotated[Path, typer.Option(help="counts.zarr")],
    model: Annotated[Path, typer.Option(help="the model's folder")],
    cells: Annotated[Path, typer.Option(help="cells.parquet")],
    out: Annotated[
        Path, typer.Option("--out", metavar="CRITICISM", help="folder for checks.json and the tables it is made of")
    ],
    config: ConfigOption = "{}",
    decisions: DecisionsOption = None,
) -> None:
    """Hold counts that the model makes against those measured: zeros, variance, variation, markers.

    Example: scvi-core criticism --store counts.zarr --model model --cells cells.parquet --out criticism
    """
    from scvi_core import steps

    steps.criticism(store, model, cells, load_config(config), out).write(decisions)


@app.command(cls=Step)
def register(
    folder: Annotated[Path, typer.Argument(help="results/{atlas}")],
    config: BuiltConfig = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="JSON", help="default: model_ref.json in the folder")
    ] = None,
) -> None:
    """Register the model with its metrics and figures in MLflow; write model_ref.json.

    Running it again makes no second version: the same fingerprint and weights are one version.

    Example: scvi-core register results/pancreas --config config/config.yaml
    """
    from scvi_core.registry.atlas import register
    from scvi_core.report.manifest import built_with

    settings = load_config(config) if config else built_with(folder)
    write_json(out or folder / "model_ref.json", register(folder, settings))


@app.command(cls=Step)
def report(
    folder: Annotated[Path, typer.Argument(help="results/{atlas}")],
    config: ConfigOption = "{}",
) -> None:
    """Write the report, metrics, decisions and manifest of an atlas from the files in its folder.

    Example: scvi-core report results/pancreas --config config/config.yaml
    """
    from scvi_core.report import build_report

    build_report(folder, load_config(config))


@app.command(cls=Step)
def export(
    folder: Annotated[Path, typer.Argument(help="results/{atlas}")],
    config: BuiltConfig = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="H5AD", help="default: atlas.h5ad in the folder")] = None,
) -> None:
    """Write the whole atlas as one AnnData file, for scanpy, cellxgene and R; memory does not grow with counts.

    Example: scvi-core export results/pancreas
    """
    from scvi_core.export import write_h5ad
    from scvi_core.report.manifest import built_with

    write_h5ad(out or folder / "atlas.h5ad", folder, load_config(config) if config else built_with(folder))


@app.command(cls=Step)
def times(folder: Annotated[Path, typer.Argument(help="results/{atlas}")]) -> None:
    """Show where the time of a build went: each rule's jobs, seconds and memory, the longest first.

    Example: scvi-core times results/pancreas
    """
    from scvi_core.times import times_table

    if not (folder / "benchmarks").is_dir():
        raise UserError(f"{folder}: has no benchmarks/; name a folder results/ATLAS that Snakemake has built")
    print(times_table(folder))


@app.command(cls=Step)
def why(folder: Annotated[Path, typer.Argument(help="results/{atlas}")]) -> None:
    """Say why a build stopped: each step that did not end well, its sample, its log, the reason and what to do.

    Example: scvi-core why results/pancreas
    """
    from scvi_core.why import why as told

    if not (folder / "logs").is_dir():
        raise UserError(f"{folder}: has no logs/; name a folder results/ATLAS that Snakemake has built")
    newest = sorted(Path(".snakemake/log").glob("*.log"))[-1:]  # Snakemake's own, where it ran here
    print(told(folder, logs=newest) or f"{folder}: every step that ran ended well")


@app.command()
def leftovers(
    config: ConfigOption = "config/config.yaml",
    remove: Annotated[bool, typer.Option("--remove", help="remove them")] = False,
) -> None:
    """List what earlier builds left in the atlas' folder that is no part of it: of samples and steps that are no more.

    Only files that scvi-core has written are looked at; your own are neither listed nor removed.

    Example: scvi-core leftovers --config config/config.yaml
    """
    from scvi_core import leftovers as left

    settings = load_config(config)
    found = left.leftovers(settings.folder, settings, [row.sample for row in load_samples(settings.samples)])
    for path in found:
        print(path)
    if remove and found:
        claim = Claim(settings.folder)  # no build is at it
        left.remove(found, settings.folder)
        claim.release()
    said = "removed" if remove else "listed; --remove removes them"
    log.info("%s: %d files of earlier builds%s", settings.folder, len(found), f": {said}" if found else "")


@app.command("map", cls=Step)
def map_(
    query: Annotated[Path, typer.Argument(help="new cells, in any format that ingest reads")],
    model: Annotated[
        str,
        typer.Option(
            help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model, or the folder of a model or atlas"
        ),
    ],
    out: Out,
    config: ConfigOption = "{}",
    tracking_uri: Tracking = None,
) -> None:
    """Embed new cells with a fitted model: latent.parquet of the query, in the atlas' own space.

    Example: scvi-core map new.h5ad --model models:/pancreas@champion --out query/latent.parquet
    """
    from scvi_core import api, registry
    from scvi_core.io import read_counts
    from scvi_core.mapping import embed

    settings = load_config(config)
    cells = read_counts(query, settings.input, Decisions("map"))
    with tempfile.TemporaryDirectory() as scratch:
        named = model.startswith(("models:", "runs:"))
        at = _registry(tracking_uri, config) if named else ""
        folder = registry.resolve(at, model, Path(scratch) / "model")
        write_parquet(out, embed(api.load(folder, settings.device), cells))


@models.command("list")
def models_list(tracking_uri: Tracking = None, config: Configured = None) -> None:
    """List registered models and their versions.

    Example: scvi-core models list
    """
    from scvi_core.registry import list_models

    at = _registry(tracking_uri, config)
    frame = list_models(at)
    print(f"no models are registered in {redacted(at)}" if frame.empty else frame.to_string(index=False))


@models.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="the registered model's name")],
    version: Annotated[str | None, typer.Argument(help="a version or an alias; default: the newest")] = None,
    tracking_uri: Tracking = None,
    config: Configured = None,
) -> None:
    """Show one version of a registered model as JSON.

    Example: scvi-core models show pancreas champion
    """
    from scvi_core.registry import show_model

    print(json.dumps(show_model(_registry(tracking_uri, config), name, version), indent=2, sort_keys=True))


@models.command("promote")
def models_promote(
    name: Annotated[str, typer.Argument(help="the registered model's name")],
    version: Annotated[str, typer.Argument(help="the version")],
    alias: Annotated[str, typer.Option(help="the alias to point at it")] = "champion",
    tracking_uri: Tracking = None,
    config: Configured = None,
) -> None:
    """Point an alias at a version, so that models:/NAME@ALIAS finds it.

    Example: scvi-core models promote pancreas 2 --alias champion
    """
    from scvi_core.registry import promote

    promote(_registry(tracking_uri, config), name, version, alias)
    log.info("models:/%s@%s is version %s", name, alias, version)


def _registry(option: str | None, config: str | None) -> str:
    """The registry to look in, said in the log with what names it."""
    file = Path("config/config.yaml")
    if config in (None, "{}"):
        config = str(file) if file.is_file() else "{}"
    settings = load_config(config)
    uri, by = tracking_place(option, settings.registry.tracking_uri, settings.results)
    log.info("registry: %s (%s)", redacted(uri), config if by == "registry.tracking_uri" else by)
    return uri


def _list_of(path: Path) -> str:
    """The text of a file of names."""
    if not path.is_file() or path.stat().st_size > 2**24:
        raise UserError(f"--genes @{path}: not a file of 16 MiB at most; name one with a gene a line")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--genes @{path}: not UTF-8 text ({error.reason}); name a file with a gene a line") from None


def _counts(given: list[Path], settings: Config) -> list[Path]:
    """The samples' counts.h5ad: as given, or of a folder those of all rows of the sheet, however many they are."""
    rows = [row.sample for row in load_samples(settings.sheet)] if any(path.is_dir() for path in given) else []
    return [file for path in given for file in ([path / s / "counts.h5ad" for s in rows] if path.is_dir() else [path])]


def _beside(counts: list[Path]) -> list[Path]:
    paths = [path.parent / "qc.parquet" for path in counts]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not there; run `scvi-core qc` on the counts.h5ad beside it")
    return paths


def _write_schemas(folder: Path) -> None:
    import yaml

    for name, model in (("config", Config), ("samples", Sample)):
        text = yaml.safe_dump(model.model_json_schema(), sort_keys=False, width=110, allow_unicode=True)
        with replacing(folder / f"{name}.schema.yaml", "YAML") as temporary:
            temporary.write_text(
                "# Written by `scvi-core validate --schemas` from scvi_core/config.py.\n" + text, "utf-8"
            )


def _give_up(message: str, code: int = 1) -> NoReturn:
    """Say why, in one line, and end: on standard output where a log on a full disk does not take it."""
    from scvi_core.why import loud

    line = loud(f"error: {one_line(message)}")
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        print(line, flush=True)
    sys.exit(code)


def _our_fault(error: Exception) -> NoReturn:
    """Of what nobody foresaw, say that it is our fault; the whole goes into the log, or a file of its own."""
    told = redacted("".join(traceback.format_exception(error)))
    where = "what stands above"
    if stat.S_ISREG(os.fstat(2).st_mode):  # the rule's log
        print(told, file=sys.stderr)
    else:
        with tempfile.NamedTemporaryFile("w", prefix="scvi-core-", suffix=".log", delete=False) as file:
            file.write(told)
            where = file.name
    fault = one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 300)
    _give_up(f"a fault of scvi-core's own, not yours ({fault}); please report it as CONTRIBUTING.md says, with {where}")


def main() -> None:
    """Entry point: whatever is raised becomes one line and an exit code; what was not foreseen is a fault of ours."""
    speak_utf8()
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    wanted = os.environ.get("SCVI_CORE_CODE")  # of the workflow's own
    if image and wanted and wanted != code_sha256():
        _give_up(f"{image}: holds other code than the workflow; make image, or name another by SCVI_CORE_IMAGE")
    try:
        app()
    except UserError as error:
        _give_up(str(error))
    except MemoryError:
        _give_up("out of memory; give the step more (resources: mem_mb) or choose fewer genes (genes.n_top)")
    except KeyboardInterrupt:
        _give_up("interrupted", 130)
    except FileNotFoundError as error:
        if error.filename is None:
            _our_fault(error)
        _give_up(f"{error.filename}: no such file; run the step before, or mend the path")
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has heard enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(0)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            _give_up(f"{error.filename or os.getcwd()}: no space left on the device; free some, then run again")
        if error.filename is None or error.strerror is None:
            _our_fault(error)
        _give_up(f"{error.filename}: {error.strerror}; mend the path or its permissions")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported here
            line = str(error).split(". ")[0]
            _give_up(f"the GPU ran out of memory ({line}); free it, lower genes.n_top or use device: cpu")
        _our_fault(error)
    except Exception as error:
        _our_fault(error)


if __name__ == "__main__":
    main()
