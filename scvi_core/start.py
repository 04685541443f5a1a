"""A first configuration: the matrices in a folder, what they seem to be, and a sheet and a file to begin with."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import yaml

from scvi_core.config import PLAIN, RESERVED, InputConfig
from scvi_core.files import Decisions, UserError, replacing
from scvi_core.io import HDF5_NAMES, TEXT_NAMES, open_input
from scvi_core.io.blocks import Scratch
from scvi_core.io.identity import plain
from scvi_core.io.text import matrices
from scvi_core.log import progress
from scvi_core.look import Look, look, quiet

HEAD = "# Begun by `scvi-core init`. config/README.md lists all keys; those that are not here have defaults.\n"
DEEPEST, MOST = 8, 2000  # folders below the given one, and matrices, that are looked at
# what pipelines call their files and folders, which names no sample
GENERIC = re.compile(
    r"outs?|count|counts|per_sample_outs|(?:sample_)?(?:raw|filtered)?_?(?:feature|gene)_bc_matri(?:x|ces)(?:_h5)?|matri(?:x|ces)"
    r"|raw|filtered|unfiltered|solo\.out|gene|genefull\w*|velocyto|grch3[78]\w*|hg19|hg38|mm10|mm39|grcm3[89]\w*"
    r"|mtx|h5|h5ad|data|expression|dge|all-sample|counts_unfiltered|counts_filtered",
    re.IGNORECASE,
)
AROUND = re.compile(
    r"[_.-]*(?:sample_)?(?:raw|filtered|unfiltered)?[_.-]*(?:feature|gene)_bc_matrix(?:_h5)?$"
    r"|[_.-]+(?:raw|filtered|unfiltered|matrix|counts?|umi|expression|dge|cellbender)$",
    re.IGNORECASE,
)
KEPT = re.compile(r"[_.-]?(?:(?:un)?filtered|(?<![a-z])raw(?![a-z]))", re.IGNORECASE)
# columns of cell tables, as `plain` writes them, best first
SAMPLES = ("sample", "sample_id", "sampleid", "sample_name", "orig_ident", "library", "library_id", "gsm", "channel")
BATCHES = (
    "batch", "batch_id", "donor", "donor_id", "patient", "patient_id", "individual", "subject", "run", "protocol",
)  # fmt: skip
LABELS = ("cell_type", "celltype", "cell_ontology_class", "cell_type_ontology_term_id", "annotation", "label", "labels")
CARRIED = (*LABELS, "condition", "disease", "treatment", "stim", "tissue", "sex", "age", "donor", "donor_id", "patient")


@dataclasses.dataclass(frozen=True)
class Found:
    """A matrix in the folder: where, what it is, what its sample will be called, and columns that tell cells apart."""

    path: Path
    look: Look
    sample: str
    sample_column: str | None
    batch_column: str | None
    carried: tuple[str, ...]


def begin(folder: Path, out: Path) -> list[str]:
    """Write ``samples.tsv`` and ``config.yaml`` for the matrices below a folder.

    Parameters
    ----------
    folder : is searched for all formats that ingest reads; or one such file.
    out : folder for the two files, neither of which may be there.

    Returns
    -------
    list of str
        Lines that say what was found, what was guessed and why, and what to run next.

    Raises
    ------
    UserError
        When there is no matrix, or one of the two files is there.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; name the one that has your matrices")
    sheet, config = out / "samples.tsv", out / "config.yaml"
    for path in (sheet, config):
        if path.exists():
            raise UserError(f"{path}: is there already, and is left as it is; name another folder by --out")
    taken, passed = choose(list(candidates(folder)) if folder.is_dir() else [folder])
    found, faults = [], []
    names = sample_names(taken, folder if folder.is_dir() else folder.parent)
    for path, name in progress([*zip(taken, names, strict=True)], "init: files looked at", len(taken)):
        try:
            found.append(_examined(path, name))
        except UserError as error:
            faults.append(str(error))
    said = [f"left out: {path}; {why}" for path, why in passed] + [f"left out: {fault}" for fault in faults]
    if not found:
        raise UserError("; ".join([f"{folder}: no count matrix that can be read in it", *said[:3]]))
    called = out.name if out.name not in ("", ".", "..", "config") else stem(folder)
    atlas = re.sub(r"[^A-Za-z0-9_-]+", "_", called).strip("_-")[:64] or "atlas"
    settings, why = _settings(found, atlas, sheet)
    with replacing(sheet) as temporary:
        temporary.write_text(_sheet(found), "utf-8")
    with replacing(config) as temporary:
        temporary.write_text(settings, "utf-8")
    command = f"--config {shlex.quote(str(config))}"
    return [
        *said,
        *why,
        f"wrote {sheet} and {config}: look at them, add columns such as condition or donor to the sheet; then",
        f"  scvi-core validate {command}",
        f"  scvi-core run {command}",
    ]


def stem(path: Path) -> str:
    """What a file or folder is called, without what says its format."""
    return re.sub(
        r"\.(?:h5|h5ad|h5mu|hdf5?|loom|mtx|csv|tsv|txt|tab|zarr)$", "", path.resolve().name.removesuffix(".gz")
    )


def candidates(folder: Path) -> Iterator[Path]:
    """Files and folders that may be matrices, by what they are called."""
    n = 0
    for at, folders, names in os.walk(folder):
        here = Path(at)
        depth = len(here.relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and depth < DEEPEST)
        found: list[Path] = []
        if {"zarr.json", ".zgroup", ".zattrs"} & set(names):
            folders[:], found = [], [here]
        else:
            beside = matrices(here)
            found = [here] if len(beside) == 1 and here != folder else list(beside)
            for name in sorted(names):
                suffix = Path(name.lower().removesuffix(".gz")).suffix
                table = suffix in TEXT_NAMES and suffix != ".mtx" and not beside
                if not name.startswith(".") and (suffix in (*HDF5_NAMES, ".h5mu") or table):
                    found.append(here / name)
        yield from found
        n += len(found)
        if n > MOST:
            raise UserError(
                f"{folder}: over {MOST:,} files that may be matrices; name a folder with those of one atlas"
            )


def choose(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Of several forms of one matrix take one: what was filtered, and a file before a folder. The rest, and why not."""
    forms: dict[str, list[Path]] = {}
    for path in paths:
        bare = re.sub(r"\.(?:h5|h5ad|mtx|loom)(?:\.gz)?$", "", str(path)).split(os.sep)
        bare[-3:] = [KEPT.sub("", part) if _tells(part, last=i == 2) else part for i, part in enumerate(bare[-3:])]
        forms.setdefault(os.sep.join(bare).rstrip("_.-"), []).append(path)
    taken, passed = [], []
    for same in forms.values():
        best, *rest = sorted(same, key=lambda path: (_is_raw(path), not _is_filtered(path), path.is_dir()))
        taken.append(best)
        for path in rest:
            raw = _is_raw(path) and not _is_raw(best)
            passed.append((path, f"all droplets; {best} has the cells" if raw else f"taken for another form of {best}"))
    return [path for path in paths if path in taken], passed


def _tells(part: str, last: bool) -> bool:
    """Whether a part of a path says that a matrix is raw or filtered: the last, or a folder by a pipeline's name."""
    return bool(KEPT.search(part)) and (last or bool(GENERIC.fullmatch(part)))


def _said(path: Path) -> str:
    parts = path.parts[-3:]
    return "/".join(part for i, part in enumerate(parts) if _tells(part, last=i == len(parts) - 1)).lower()


def _is_raw(path: Path) -> bool:
    return bool(re.search(r"unfiltered|(?<![a-z])raw(?![a-z])", _said(path)))


def _is_filtered(path: Path) -> bool:
    return "filtered" in _said(path) and not _is_raw(path)


def sample_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """A name a matrix: of its path the last part that no pipeline gives, with parts above it where that repeats."""
    parts = []
    for path in paths:
        inside = [*path.relative_to(folder).parts]
        if inside:
            inside[-1] = stem(path)
        inside = [AROUND.sub("", AROUND.sub("", part)) for part in inside if not GENERIC.fullmatch(part)]
        own = [re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("._-").replace("..", "_") for part in inside]
        own = [part for part in own if part and not GENERIC.fullmatch(part)]
        parts.append(own or [re.sub(r"[^A-Za-z0-9_-]+", "_", folder.resolve().name).strip("_-") or "sample"])
    names = [part[-1][:64] for part in parts]
    for depth in range(2, DEEPEST):
        twice = {name.casefold() for name in names if [n.casefold() for n in names].count(name.casefold()) > 1}
        names = [
            "_".join(p[-depth:])[-64:].lstrip("._-") if n.casefold() in twice else n
            for n, p in zip(names, parts, strict=True)
        ]
    seen: dict[str, int] = {}
    out = []
    for name in names:
        key = name.casefold()
        seen[key] = seen.get(key, 0) + 1
        out.append(name if seen[key] == 1 else f"{name[:58]}_{seen[key]}")
    return out


def _examined(path: Path, name: str) -> Found:
    if not re.fullmatch(PLAIN, str(path)):
        raise UserError(f"{path}: a path with braces, control characters or '-' at its start; rename it")
    seen = look(path, name, InputConfig())
    known = {plain(column): column for column in reversed(seen.columns)}
    wanted = tuple(dict.fromkeys(known[key] for key in (*SAMPLES, *BATCHES, *CARRIED) if key in known))
    levels = _levels(path, wanted) if wanted else {}
    apart = {name for name, n in levels.items() if 2 <= n <= max(2, seen.n_cells // 20)}

    def first(names: Sequence[str]) -> str | None:
        return next((known[key] for key in names if known.get(key) in apart), None)

    sample = first(SAMPLES)
    batch = first(BATCHES) or sample
    own = [known[key] for key in CARRIED if levels.get(known.get(key, ""), 0) in range(1, 201)]
    carried = [name for name in dict.fromkeys(own) if name not in RESERVED and plain(name) != "sample"]
    return Found(path, seen, name, sample, batch, tuple(carried))


def _levels(path: Path, columns: tuple[str, ...]) -> dict[str, int]:
    """How many different values there are in columns of an input's own cell table."""
    with quiet(), Scratch(most=1) as scratch:
        try:
            _, read = open_input(path, InputConfig(metadata=columns), Decisions("ingest"), scratch)
        except UserError:
            return {}  # a column that cannot be read; the sheet may do without
        return {name: int(pd.Series(read.obs[name]).nunique()) for name in columns}


def _sheet(found: Sequence[Found]) -> str:
    several = len(found) > 1
    own = several and any(one.sample_column or one.batch_column for one in found)
    rows = [["sample", "path", "batch", *(["sample_column", "batch_column"] if own else [])]]
    for one in found:
        columns = [one.sample_column or "", one.batch_column or ""] if own else []
        rows.append([one.sample, str(one.path), one.sample, *columns])
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _settings(found: Sequence[Found], atlas: str, sheet: Path) -> tuple[str, list[str]]:
    """The configuration, and lines that say what in it was guessed."""
    formats = pd.Series([one.look.format for one in found]).value_counts()
    organisms = sorted({one.look.organism for one in found})
    n_cells = sum(one.look.n_cells for one in found)
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(formats.items()))
    n = "1 matrix" if len(found) == 1 else f"{len(found)} matrices"
    said = [f"found {n} ({kinds}), {n_cells:,} cells; {' and '.join(organisms)}, by their genes"]
    if len({*organisms} - {"unknown"}) > 1:
        said.append("look: several organisms; give each an atlas of its own (take the others' rows out of the sheet)")
    for one in found:
        said += [f"look: {one.sample}: {remark}" for remark in one.look.remarks]
    first, reads = found[0], {}
    if len(found) == 1 and (first.sample_column or first.batch_column):
        reads = {"sample_column": first.sample_column, "batch_column": first.batch_column}
        named = {"samples": first.sample_column, "batches": first.batch_column}
        by = " and ".join(f"{what} by the column '{column}'" for what, column in named.items() if column)
        said.append(f"{by}, as one file holds them all")
    elif any(one.batch_column for one in found):
        said.append("the sheet's sample_column and batch_column name the columns that tell a file's own samples apart")
    else:
        said.append(
            "batch: each sample its own, as is right where conditions are compared (config/README.md says when not)"
        )
    carried = [name for name in first.carried if all(name in one.look.columns for one in found)]
    used = {first.sample_column, first.batch_column}
    carried = [name for name in carried if name not in used]
    if carried:
        reads["metadata"] = carried
        said.append(f"columns carried along: {', '.join(carried)}")
    labels = [name for name in carried if plain(name) in LABELS]
    reads = {key: value for key, value in reads.items() if value}
    settings = {"atlas": atlas, "samples": str(sheet)} | ({"input": reads} if reads else {})
    settings |= {"report": {"labels": labels}} if labels else {}
    return HEAD + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), said
