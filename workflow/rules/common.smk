# The configuration, checked before anything runs, and what rules take from it.
import json
import re

from snakemake.exceptions import WorkflowError

from scvi_core.config import load_config, load_samples
from scvi_core.files import UserError

try:
    CONFIG = load_config(config)
    SAMPLES = {row.sample: row for row in load_samples(CONFIG.samples)}
except UserError as error:
    raise WorkflowError(str(error)) from None

ATLAS = CONFIG.folder.as_posix()


def part(*keys, drop=()):
    """The named parts of the configuration as JSON: a rule's `params`, so that it re-runs when just these change."""
    chosen = CONFIG.model_dump(mode="json", include=set(keys))
    for section, key in drop:
        del chosen[section][key]
    return json.dumps(chosen, sort_keys=True)


def registry():
    """What the registry rules read: where MLflow is, and what decides a model's name and weights."""
    return part("atlas", "results", "registry", "seed", "model", "train")


def megabytes(base, per_megabyte):
    """Memory by size of input, more at each attempt."""

    def estimate(wildcards, input, attempt):
        return int(attempt * (base + per_megabyte * input.size_mb))

    return estimate


def minutes(base, per_megabyte):
    """Time by size of input, more at each attempt."""
    return megabytes(base, per_megabyte)
