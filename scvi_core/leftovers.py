"""What earlier builds have left in an atlas' folder beside the present one: told, and removed only when asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from scvi_core.config import Config
from scvi_core.files import LITTER

STEPS = r"(decisions|logs|benchmarks)/{}\.(jsonl|log|tsv)"  # what each step writes besides its results
# what is made of each sample, and which part of the pattern is its name
OF_SAMPLE = {r"samples/([^/]+)/(counts\.h5ad|qc\.parquet|qc\.png)": 1, STEPS.format(r"(ingest|qc)\.(.+)"): 3}


def leftovers(folder: Path, config: Config, samples: Sequence[str]) -> list[Path]:
    """Files that scvi-core has written into an atlas' folder and that are no part of the build as it is configured.

    Of samples that the sheet no longer has, of steps that are switched off, and of a store without its root, as
    Snakemake leaves it when it deletes all outputs. Anybody else's files are never among them.

    Parameters
    ----------
    folder : ``results/{atlas}``.
    samples : the sheet's.
    """
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_left(path, folder, config, samples))


def _is_left(path: Path, folder: Path, config: Config, samples: Sequence[str]) -> bool:
    name = path.relative_to(folder).as_posix()
    if any(part.is_symlink() for part in (path, *path.parents) if part != folder and part.is_relative_to(folder)):
        return False
    for pattern, group in OF_SAMPLE.items():
        if found := re.fullmatch(pattern, name):
            return found[group] not in samples
    if any(re.fullmatch(pattern, name) for pattern in _switched_off(config)):
        return True
    store = folder / "counts.zarr"
    return path.is_relative_to(store) and path.name not in LITTER and not (store / ".zattrs").exists()


def _switched_off(config: Config) -> Iterator[str]:
    """Patterns of what steps write that the configuration does not ask for."""
    off = {
        "loadings": (config.model.decoder != "linear", r"loadings\.parquet"),
        "annotate": (config.annotate.label is None, r"(annotation|label_probabilities|labels)\.parquet"),
        "contrast": (not config.contrast.tests, r"(contrast|pseudobulk)\.parquet"),
        "criticism": (not config.criticism.enabled, r"criticism/(checks\.json|(genes|cells|groups|de)\.parquet)"),
        "export": (not config.export.h5ad, r"atlas\.h5ad"),
    }
    for step, (is_off, results) in off.items():
        if is_off:
            yield results
            yield STEPS.format(step)


def remove(paths: Sequence[Path], folder: Path) -> None:
    """Remove files, and folders below `folder` that are empty then."""
    for path in paths:
        path.unlink(missing_ok=True)
        for above in path.parents:
            if above == folder or any(left.name not in LITTER for left in above.iterdir()):
                break
            for litter in above.iterdir():
                litter.unlink()
            above.rmdir()
