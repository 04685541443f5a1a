"""Checksums: of the files between steps, in themselves; of inputs, of texts, of our own code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from scvi_core.files.errors import UserError
from scvi_core.files.owned import FILES, LITTER, head_of, others_parquet
from scvi_core.log import log

# The checksum of a file stands in the file itself, near its end, whatever its format: the SHA-256 of all its bytes,
# with zeros in the checksum's own place.
BLANK = "sha256:" + 64 * "0"
_TAIL = 1 << 20  # bytes at the end in which it is looked for: a Parquet footer has some more of each column after it


def seal(path: str | Path, append: bool = False) -> None:
    """Put a file's checksum where it last has :data:`BLANK`; `append`: which is to be added at its end."""
    if append:
        with open(path, "ab") as handle:
            handle.write(BLANK.encode())
    at, _, true = _checksum(path)
    with open(path, "r+b") as handle:
        handle.seek(at)
        handle.write(true)


def verify(path: str | Path, by: str) -> None:
    """Refuse a file that is not, to the bit, what was written. A Parquet table of others has no checksum, and passes.

    Parameters
    ----------
    by : the subcommand that writes it, which is the name of the rule too.

    Raises
    ------
    UserError
        When the file is missing, is none, cannot be read, or does not have its checksum.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; run `scvi-core {by}`")
    if not path.is_file():  # what waits for others to write is never opened
        raise UserError(f"{path}: not a file; name one that `scvi-core {by}` wrote")
    try:
        at, told, true = _checksum(path)
        others = at < 0 and head_of(path).startswith(FILES["PARQUET"]) and others_parquet(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that, then run again") from error
    if others:
        log.warning("%s: not a table of scvi-core's, so that nothing tells whether it is as it was written", path)
    elif told != true or not told:
        raise damaged(path, by)


def damaged(path: str | Path, by: str) -> UserError:
    """What is said of a file or folder that does not have its checksum."""
    what = "damaged, or written by an earlier version of scvi-core: it does not have its checksum"
    return UserError(f"{path}: {what}; remove it and run again: `scvi-core {by}` makes it anew")


def _checksum(path: str | Path) -> tuple[int, bytes, bytes]:
    """Where a file has its checksum (-1: nowhere), what it says there, and what it should."""
    with open(path, "rb") as handle:
        start = max(0, handle.seek(0, os.SEEK_END) - _TAIL)
        handle.seek(start)
        tail = handle.read()
        found = [*re.finditer(rb"sha256:[0-9a-f]{64}", tail)]
        if not found:
            return -1, b"", b""
        at, end = found[-1].span()
        digest = hashlib.sha256()
        handle.seek(0)
        for size in [_TAIL] * (start // _TAIL) + [start % _TAIL]:
            digest.update(handle.read(size))
        digest.update(tail[:at] + BLANK.encode() + tail[end:])
    return start + at, tail[at:end], b"sha256:" + digest.hexdigest().encode()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


SMALL = 1 << 20  # bytes of a whole input that is known by its content
_PIECES, _PIECE = 16, 1 << 16


def stamp(path: str | Path) -> str:
    """What tells whether an input, a file or a folder, is still the one it was, also where its time got older.

    SHA-256 of its files' names and sizes, and of all their bytes where these are 1 MiB or less; else of their times of
    change (in nanoseconds) and of 16 pieces of 64 KiB, evenly spaced over them all. "" where there is no file.
    """
    path, files = Path(path), []
    folders = [(path.parent, [], [path.name])] if path.is_file() else os.walk(path)
    for at, _, names in folders:
        for name in names:
            file = Path(at, name)
            if name not in LITTER and file.is_file():  # nothing else is ever opened
                files.append((file.relative_to(path).as_posix(), file, file.stat()))
    files.sort()
    size = sum(about.st_size for *_, about in files)
    ends = [size * (k + 1) // _PIECES for k in range(_PIECES)]  # of the pieces: compressed files end with a checksum
    digest, start = hashlib.sha256(), 0
    for name, file, about in files:
        changed = about.st_mtime_ns if size > SMALL else ""
        digest.update(f"{len(name)} {name} {about.st_size} {changed}\n".encode("utf-8", "surrogateescape"))
        parts = [(max(0, end - start - _PIECE), end - start) for end in ends if start < end <= start + about.st_size]
        if size <= SMALL:
            parts = [(0, about.st_size)]
        with contextlib.suppress(OSError), open(file, "rb", buffering=0) as handle:  # ingest says what cannot be read
            for first, last in parts:
                handle.seek(first)
                digest.update(handle.read(last - first))
        start += about.st_size
    return digest.hexdigest() if files else ""


def code_sha256() -> str:
    """SHA-256 of this package's own sources, by which a workflow knows that an image holds the same."""
    here = Path(__file__).parents[1]
    files = sorted(p for p in here.rglob("*") if p.suffix in (".py", ".c", ".j2"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
