"""What we ourselves have written, told from what is anybody else's: the latter is never replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path

from scvi_core.files.errors import UserError

# How each kind of file that we write begins.
_JSON = (b'{\n  "', b"{}\n", b"[\n  ", b"[]\n")
FILES = {
    "PARQUET": (b"PAR1",),
    "H5AD": (b"\x89HDF\r\n\x1a\n",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JSON": _JSON,
    "JSONL": (b'{"n_cells":', b'{"checksum":'),
    "HTML": (b"<!doctype html>",),
    "YAML": (b"# Written by `scvi-core",),
}
# What each kind of folder that we write may hold: paths in it, and what stands near the beginning of such a file. Some
# may be lost, as Snakemake and users delete outputs.
_MODEL = {r"model\.safetensors": b"", r"model\.json": _JSON[0], r"history\.parquet": b"PAR1"}
FOLDERS = {
    "MODEL": _MODEL,
    "LOOKUP": {r"lookup\.json": _JSON[0]} | {f"model/{name}": mark for name, mark in _MODEL.items()},
    "CRITICISM": {r"checks\.json": _JSON[0], r"(genes|cells|groups|de)\.parquet": b"PAR1"},
    # any AnnData in zarr has such files, but ours has their digest
    "STORE": {r"\.zattrs": b"content_sha256", r"\.zgroup": b"", r".+/(\.z(array|attrs|group)|\d+(\.\d+)*)": b""},
}
LITTER = (".snakemake_timestamp", ".DS_Store")  # what others leave in folders by themselves


def check_output(path: str | Path, kind: str) -> None:
    """Refuse to write where something else is than what we ourselves have written.

    Parameters
    ----------
    path : of the output. Nothing, an empty file and an empty folder are in nobody's way.
    kind : a key of :data:`FILES` or :data:`FOLDERS`.

    Raises
    ------
    UserError
        When a link, a file of another kind or a folder that holds anything else is there.
    """
    path, keep = Path(path), "it is left as it is; name another path, or move it away first"
    if os.path.islink(path):  # to replace it would lose the link, to follow it what is there
        raise UserError(f"{path}: a link to {os.path.realpath(path)}; {keep}")
    if not os.path.exists(path):
        return
    wanted = (
        f"scvi-core writes a {kind} {'folder' if kind in FOLDERS else 'file'} there" if kind else "a file goes there"
    )
    if kind in FOLDERS and path.is_dir():
        if (other := _other(path, FOLDERS[kind])) is not None:
            raise UserError(f"{path}: {wanted}, but {other} in it is no part of one; {keep}")
    elif kind in FOLDERS or not path.is_file():
        what = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither file nor folder"
        raise UserError(f"{path}: {wanted}, and this is {what}; {keep}")
    elif path.stat().st_size and kind_of(path) != kind:
        raise UserError(f"{path}: {wanted}, and what is there is not one that it wrote; {keep}")


def _other(folder: Path, holds: dict[str, bytes]) -> str | None:
    """The first path in a folder that is not of this kind of folder."""

    def fail(error: OSError) -> None:
        raise error

    for at, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        for name in sorted([*names, *links]):
            path = Path(at, name)
            relative = path.relative_to(folder).as_posix()
            mark = next((mark for pattern, mark in holds.items() if re.fullmatch(pattern, relative)), None)
            head = head_of(path) if mark is not None and path.is_file() and not path.is_symlink() else None
            if name not in LITTER and (head is None or (head and mark not in head)):
                return relative
    return None


def head_of(path: Path) -> bytes:
    """The first 4 KiB of a file."""
    with open(path, "rb") as handle:
        return handle.read(4096)


def kind_of(path: Path) -> str:
    """The kind of a file that we write, by how it begins and what tells ours from others'; "" for any other."""
    head = head_of(path)
    kind = next((kind for kind, heads in FILES.items() if head.startswith(heads)), "")
    return "" if {"PARQUET": others_parquet, "H5AD": _others_h5ad}.get(kind, lambda _: False)(path) else kind


def others_parquet(path: Path) -> bool:
    """Whether others wrote it: they add their own metadata. A damaged one may be ours, to be made anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return False
    theirs = {b"pandas", b"ARROW:schema"} & {*(about.metadata or {})}
    return bool(theirs) or not str(about.created_by).startswith("parquet-cpp-arrow")


def _others_h5ad(path: Path) -> bool:
    """Whether others wrote it: they note no digest of the content. A damaged one may be ours, to be made anew."""
    import h5py

    try:
        with h5py.File(path, locking=False) as file:
            return "uns/content_sha256" not in file
    except (OSError, RuntimeError):
        return False
