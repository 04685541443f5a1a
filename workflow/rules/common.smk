# The configuration, checked before anything runs, and what rules take from it.
import atexit
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from snakemake.settings.types import DeploymentMethod
from snakemake_interface_storage_plugins.registry import StoragePluginRegistry

from scvi_core.config import (
    ANNOTATED,
    ANNOTATION,
    SHEET,
    TRACKING_URI,
    carried,
    check_columns,
    load_config,
    load_samples,
    read_yaml,
)
from scvi_core.files import Claim, UserError, code_sha256, stamp, sweep
from scvi_core.leftovers import leftovers
from scvi_core.log import one_line, redacted
from scvi_core.times import times_table
from scvi_core.why import SHOWN, interrupted, loud, why


def stop(error):
    """End with the one line that says what to mend: after an exception Snakemake prints places in its own code."""
    print(loud(f"error: {one_line(str(error))}"), file=sys.stderr)
    raise SystemExit(1)


def no_file(row):
    return f"{CONFIG.samples}: sample '{row.sample}': no file {row.path}; mend the path"


os.environ.update(
    SCVI_CORE_CODE=code_sha256()
)  # an image that holds other code refuses

try:
    for file in workflow.configfiles:
        read_yaml(
            file
        )  # by stricter rules than Snakemake's own, which takes the last of two equal keys
    CONFIG = load_config(config, ", ".join(map(str, workflow.configfiles)) or "config")
    SAMPLES = {row.sample: row for row in load_samples(CONFIG.samples)}
    check_columns(CONFIG, list(SAMPLES.values()))
    # a vanished input is an error: Snakemake would go on in silence with what it gave earlier
    for row in SAMPLES.values():
        earlier = CONFIG.folder / "samples" / row.sample / "counts.h5ad"
        if row.plugin:
            if not StoragePluginRegistry().is_installed(row.plugin):
                raise UserError(
                    f"{CONFIG.samples}: sample '{row.sample}': {row.path} needs a storage plugin; "
                    f"pip install snakemake-storage-plugin-{row.plugin}"
                )
        elif not os.path.exists(row.path) and earlier.exists():
            raise UserError(no_file(row))
    if (
        DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
        and "://" not in IMAGE
    ):
        if not (shutil.which("apptainer") or shutil.which("singularity")):
            raise UserError(
                "apptainer: not found on PATH; install or load it, or leave out --sdm apptainer"
            )
        if not os.access(IMAGE, os.R_OK):
            raise UserError(
                f"{IMAGE}: no such image, or it cannot be read; make image, or name another by SCVI_CORE_IMAGE"
            )
except UserError as error:
    stop(error)

os.environ[TRACKING_URI], os.environ[SHEET] = CONFIG.tracking_uri, CONFIG.samples

ATLAS = CONFIG.folder.as_posix()
# a sample's input: its local path, or a file that Snakemake fetches from its URL
SOURCES = {
    name: getattr(storage, row.plugin)(row.path) if row.plugin else row.path
    for name, row in SAMPLES.items()
}


# a workflow around this one may make inputs, and a storage provider have them
MADE_ELSEWHERE = (
    workflow.modifier.namespace is not None
    or workflow.storage_settings.default_storage_provider
)


def source(wildcards):
    """A sample's input; where it is not there, the end, in a line that says so."""
    row = SAMPLES[wildcards.sample]
    if not row.plugin and not os.path.exists(row.path) and not MADE_ELSEWHERE:
        stop(no_file(row))
    return SOURCES[wildcards.sample]


def given(wildcards):
    """What a local input holds: Snakemake looks at its time alone, at a folder's own."""
    row = SAMPLES[wildcards.sample]
    return "" if row.plugin else stamp(row.path)


BEGAN = time.time()


onsuccess:
    for left in sweep(ATLAS):
        print(f"removed, as a killed process had left it: {left}")
    CLAIMED.pop().release()
    went = times_table(CONFIG.folder, BEGAN)
    if went:
        print(f"\nWhere the time went:\n{went}")
    if left := leftovers(CONFIG.folder, CONFIG, [*SAMPLES]):
        print(
            f"\n{len(left)} files of earlier builds are no part of this one, such as {left[0]}. "
            f"`scvi-core leftovers --config {' '.join(map(str, workflow.configfiles))}` lists them."
        )
    if went and (CONFIG.folder / "report.html").exists():
        print(f"\nThe page is {CONFIG.folder}/report.html; open it in a browser.\n")


# Ctrl-C as Snakemake's log has it: its hooks are told of nothing but a failure
CANCELLED = "Terminating processes on user request"


onerror:
    for claim in CLAIMED:
        claim.release()
    if any(CANCELLED in Path(file).read_text("utf-8", "replace") for file in log):
        told = interrupted(CONFIG.folder, BEGAN)
    else:
        told = why(CONFIG.folder, BEGAN, SHOWN, [Path(file) for file in log])
    # last, after all that Snakemake still has to say
    if told:
        atexit.register(print, f"\n{told}", file=sys.stderr)


# of this build on the folder, against another that would mix its own into it
CLAIMED = []


onstart:
    try:
        CLAIMED.append(Claim(ATLAS))
    except UserError as error:
        stop(error)
    # where a run was killed as it fetched, a part may lie, which Snakemake would take for the whole
    for name, row in SAMPLES.items():
        if row.plugin:
            shutil.rmtree(SOURCES[name], ignore_errors=True)
            Path(SOURCES[name]).unlink(missing_ok=True)
    # nor does it copy a folder over the copy that it made before it was killed
    copied = Path(".snakemake/backups", ATLAS.lstrip(os.sep), "figures")
    if ".." not in copied.parts:
        shutil.rmtree(copied, ignore_errors=True)


def part(*names, drop=()):
    """Sections or section.keys as JSON: a rule's `params`, so that it re-runs when just these change.

    It comes as a function, because Snakemake would take braces in a text (`/A{2}/`) for wildcards.
    """
    everything = CONFIG.model_dump(mode="json")
    chosen = {}
    for name in names:
        section, _, key = name.partition(".")
        if key:
            chosen.setdefault(section, {})[key] = everything[section][key]
        else:
            chosen[section] = everything[section]
    for name in drop:
        section, _, key = name.partition(".")
        del (chosen[section] if key else chosen)[key or section]
    text = redacted(
        json.dumps(chosen, sort_keys=True)
    )  # it is seen and kept in many places
    return lambda wildcards: text


def reading(wildcards):
    """How a sample is read, as JSON: the section `input`, but for what its row of the sheet says."""
    asked = SAMPLES[wildcards.sample].reads(CONFIG.input).model_dump(mode="json")
    del asked["genes"]
    return json.dumps({"input": asked}, sort_keys=True)


def cells_by(*columns):
    """The table of cells, whose time counts where a column is of the names; else clusters.parquet's, given beside it."""
    cells = f"{ATLAS}/cells.parquet"
    return cells if {ANNOTATION, *ANNOTATED} & {*columns} else ancient(cells)


# Only training asks for a GPU. By `device: cuda` the rules after it take one if there is one, as by `auto`.
NO_GPU = ["device"] if CONFIG.device == "cuda" else []
# Jobs on one machine take turns at its card: `card: 1` in the default profile. More by --resources card=2.
CARD = int(CONFIG.device != "cpu" and shutil.which("nvidia-smi") is not None)


# what jobs took when they were measured (benchmarks/million.py), and more: a margin, and the two Snakemakes of 180 MB each
# that Slurm's plugin starts around a job
MARGIN, AROUND = 1.25, 400


def folder_mb(paths):
    """Of the folders that inputs are or stand for: a sample's 10x or zarr folder, the store by its .zattrs."""
    folders = [
        os.path.dirname(path) if path.endswith(".zattrs") else path for path in paths
    ]
    inside = [
        os.path.join(at, name)
        for path in folders
        for at, _, names in os.walk(path)
        for name in names
    ]
    return sum(map(os.path.getsize, inside)) / 1e6


def megabytes(base, *terms, of=None):
    """Memory by size of input, more at each attempt.

    base: of a tiny input. terms: (megabytes a megabyte of input, and the most that they are). of: the one input that
    counts, a file; None: all.
    """

    def estimate(wildcards, input, attempt):
        if of is None:
            size = input.size_mb + folder_mb(input)
        else:
            size = (
                os.path.getsize(input[of]) / 1e6
            )  # not there yet: Snakemake asks again
        used = base + sum(min(rate * size, most) for rate, most in terms)
        return int(attempt * (AROUND + MARGIN * used))

    return estimate


def minutes(base, per_megabyte):
    """Time by size of input, some four times what two cores took, more at each attempt."""

    def estimate(wildcards, input, attempt):
        size = input.size_mb + folder_mb(input)
        return int(attempt * (base + per_megabyte * size))

    return estimate


# what a GPU's driver takes of the computer's memory: not measured yet
DRIVER = 0 if CONFIG.device == "cpu" else 3000
ANY = float("inf")
# criticism and report work by as many at a time, each with memory of its own
SIDE = min(CONFIG.threads, 4)
# beyond which packed counts are streamed
MOST = 1000 * CONFIG.train.memory_gb
