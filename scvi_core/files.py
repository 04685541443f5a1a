"""Files that are whole or absent, hashes, and the record of decisions.

Everything that scvi-core writes goes through :func:`replacing`: a temporary name in the same folder,
fsync, rename. A reader never meets half a file, and a failed run leaves earlier results as they were.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import json
import locale
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class UserError(Exception):
    """Something the user can mend: one line naming file, field, value and remedy. Shown without traceback."""


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
    elif path.stat().st_size and _kind(path) != kind:
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
            head = _head(path) if mark is not None and path.is_file() and not path.is_symlink() else None
            if name not in LITTER and (head is None or (head and mark not in head)):
                return relative
    return None


def _head(path: Path) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(4096)


def _kind(path: Path) -> str:
    """The kind of a file that we write, by how it begins and what tells ours from others'; "" for any other."""
    head = _head(path)
    kind = next((kind for kind, heads in FILES.items() if head.startswith(heads)), "")
    return "" if {"PARQUET": _others_parquet, "H5AD": _others_h5ad}.get(kind, lambda _: False)(path) else kind


def _others_parquet(path: Path) -> bool:
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


@contextlib.contextmanager
def replacing(path: str | Path, kind: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`.

    On an exception `path` is left as it was; so is what :func:`check_output` refuses. What a killed process of this
    machine has left beside `path` is removed, or put back where it was on the way to replace a folder.

    Parameters
    ----------
    path : of a file or a folder.
    kind : a key of :data:`FOLDERS` where the block makes a folder, which replaces an earlier one only once it is
        complete; a key of :data:`FILES`, or None for a file that replaces one of its own kind, whichever that is.

    Raises
    ------
    UserError
        When the disk is full, the folder cannot be written, or something else than an earlier output is there.
    """
    path = Path(path)
    if path.name in ("", ".."):  # a relative one that ends in a name has a folder to put the temporary into
        path = Path(os.path.abspath(path))
    temporary = held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # locks on folders are the machine's own, also where the file system is shared
        prefix = f".{path.name}.{platform.node()}."
        for left in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
            _clear(left, path)
        if kind is not None:
            check_output(path, kind)
        elif path.is_symlink() or (path.exists() and not path.is_file()):
            check_output(path, "")
        holder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
        held = _hold(holder)
        temporary = holder / path.name
        yield temporary
        for file in sorted(p for p in [temporary, *temporary.rglob("*")] if p.is_file()):
            file.chmod(0o666 & ~_umask())  # some libraries keep what they write from others
            _fsync(file)
        check_output(path, _kind(temporary) if kind is None and temporary.is_file() else kind or "")
        if not (path.is_dir() and _exchange(temporary, path)):
            if path.is_dir():
                os.rename(path, holder / "earlier")
            os.rename(temporary, path)
        _fsync(path.parent)
    except UserError:
        raise
    except Exception as error:  # not all libraries raise OSError for what the system tells them
        code = getattr(error, "errno", None)
        if code in (28, 122) or "No space left on device" in str(error):  # ENOSPC, EDQUOT
            raise UserError(f"{path}: no space left on the device; free some, then run again") from error
        if code in (13, 30):  # EACCES, EROFS
            raise UserError(f"{path}: cannot be written ({error.strerror}); check the folder's permissions") from error
        if temporary is None and code is not None:  # below a file, too long a name
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another path") from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        if held is not None:
            os.close(held)


def _clear(left: Path, path: Path) -> None:
    """Remove what a killed process has left beside `path`; put back what it had moved away and not yet replaced."""
    from scvi_core.log import log

    earlier = left / "earlier"
    if not earlier.exists() and _age(left) <= 60:  # one just made may not be held yet
        return
    handle = _hold(left)
    if handle is None:
        return
    if earlier.exists() and not os.path.lexists(path):
        os.rename(earlier, path)
        log.warning("%s: put back; a process was killed as it replaced it", path)
    shutil.rmtree(left, ignore_errors=True)
    os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at one stroke; False where the system or the file system has none."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def sweep(folder: str | Path) -> list[Path]:
    """Remove what killed processes have left beside their outputs below a folder; say what it was.

    What another process of this machine is at stays, and so does what another machine has touched within a day: its
    locks are not seen from here.
    """
    swept, here = [], f".{platform.node()}."
    for left in sorted(Path(folder).rglob(".*.tmp")):
        found = re.fullmatch(r"\.(.+?)\.[^/]*\.[a-z0-9_]{8}\.tmp", left.name)
        if found is None or left.is_symlink() or not left.is_dir():
            continue
        name, ours, _ = left.name[1:].partition(here)
        if ours:
            _clear(left, left.with_name(name))
        elif _age(left) > 86_400:
            shutil.rmtree(left, ignore_errors=True)
        if not left.exists():
            swept.append(left)
    return swept


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _age(path: Path) -> float:
    """Seconds since something was made in a folder; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _hold(folder: Path) -> int | None:
    """A lock on a folder, by the handle that keeps it; None where another process has it, or nothing can be locked."""
    import fcntl

    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    if handle is not None:
        os.close(handle)
    return None


class Claim:
    """A folder of results that one build holds, from the first to the last of its steps.

    The lock is the file ``.lock`` in it, which says who holds it; it ends with the process.

    Raises
    ------
    UserError
        When another build holds the folder.
    """

    def __init__(self, folder: str | Path):
        import fcntl
        import getpass

        from scvi_core.log import log

        self.path = Path(folder, ".lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self.handle, 500).decode("utf-8", "replace").strip() or "it does not say who"
                os.close(self.handle)
                raise UserError(
                    f"{folder}: another build is writing into it ({holder}); wait for it, or name another folder by "
                    "`results:`"
                ) from None
            except OSError as error:
                log.warning("%s: cannot be locked (%s); let one build at a time write there", folder, error.strerror)
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.handle), self.path.stat()):
                    break
            os.close(self.handle)  # the one that held it has removed it
        with contextlib.suppress(KeyError, OSError):  # a user without a name
            user = getpass.getuser()
            text = f"{user} on {platform.node()}, process {os.getpid()} in {os.getcwd()}, since {time.ctime()}"
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, text.encode("utf-8", "surrogateescape"), 0)

    def release(self) -> None:
        """Let others build."""
        self.path.unlink(missing_ok=True)
        os.close(self.handle)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, which is removed at the end, among processes on all machines that share its folder.

    Yields
    ------
    bool
        Whether another process held it and was waited for.
    """
    import fcntl

    from scvi_core.log import log

    waited = False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process is at the same; waiting for it", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
            waited = True
        except OSError as error:
            log.warning("%s: cannot be locked (%s); do not run the same twice at a time", path, error.strerror)
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)  # the one that held it has removed it
    try:
        yield waited
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. What fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_json(path: str | Path, value: Any, checksum: bool = False) -> None:
    """Write `value` as indented JSON with sorted keys (so that equal values give equal bytes).

    Parameters
    ----------
    checksum : of a mapping that another step reads by :func:`read_json`: add its last key, ``checksum``.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with replacing(path, "JSON") as temporary:
        if checksum:
            text = f'{text.removesuffix("}").rstrip()}{"," if value else ""}\n  "checksum": "{BLANK}"\n}}'
        temporary.write_text(text + "\n", encoding="utf-8")
        if checksum:
            seal(temporary)


def read_json(path: str | Path, by: str) -> dict[str, Any]:
    """Read what :func:`write_json` wrote with its checksum, which is compared; `by` and errors as of :func:`verify`."""
    verify(path, by)
    value = json.loads(Path(path).read_bytes())
    del value["checksum"]
    return value


def write_parquet(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a pandas frame as Parquet: zstd, columns in the frame's order, no index, no metadata but its checksum."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False)
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table)


def read_parquet(path: str | Path, by: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table that :func:`write_parquet` wrote, or others: cells of the user's own.

    Parameters
    ----------
    by, and errors raised : as of :func:`verify`.
    columns : to read; None: all.

    Raises
    ------
    UserError
        Also for a table of others that is no table, or lacks a column.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    verify(path, by)
    try:
        absent = [name for name in columns or () if name not in pq.read_schema(path).names]
        if not absent:
            return pd.read_parquet(path, columns=columns if columns is None else list(columns))
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"{path}: not a Parquet table ({error}); name one that `scvi-core {by}` wrote") from error
    raise UserError(f"{path}: no column {absent[0]!r}; name a table that `scvi-core {by}` wrote")


@contextlib.contextmanager
def parquet_writer(path: str | Path, schema: Any) -> Iterator[Any]:
    """A pyarrow ``ParquetWriter``, for a table too large to hold: a row group a call.

    Parameters
    ----------
    schema : pyarrow.Schema of the columns.
    """
    import pyarrow.parquet as pq

    with replacing(path, "PARQUET") as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd", store_schema=False) as writer:
            yield writer
            writer.add_key_value_metadata({"checksum": BLANK})
        seal(temporary)


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
    from scvi_core.log import log

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; run `scvi-core {by}`")
    if not path.is_file():  # what waits for others to write is never opened
        raise UserError(f"{path}: not a file; name one that `scvi-core {by}` wrote")
    try:
        at, told, true = _checksum(path)
        others = at < 0 and _head(path).startswith(FILES["PARQUET"]) and _others_parquet(path)
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
    here = Path(__file__).parent
    files = sorted(p for p in here.rglob("*") if p.suffix in (".py", ".c", ".j2"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def speak_utf8() -> None:
    """Where the locale is of another encoding, start this program again in UTF-8 mode, which its children share.

    Names in sheets and files are UTF-8; as arguments and in paths they would be something else, or nothing.
    """
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice made on the user's behalf, and why. A line of ``decisions.jsonl``.

    Attributes
    ----------
    step : subcommand that decided, such as ``"qc"``.
    what : what was decided, such as ``"max_pct_mito"``.
    value : the outcome (number, text, list).
    reason : one sentence.
    sample : the sample concerned, or None for all.
    n_cells, n_genes : how many cells or genes it dropped, merged or changed, where that applies.
    warning : whether the user should look at it.
    """

    step: str
    what: str
    value: Any
    reason: str
    sample: str | None = None
    n_cells: int | None = None
    n_genes: int | None = None
    warning: bool = False


class Decisions(list[Decision]):
    """The decisions of one step, logged as they are made and written as JSON lines at its end."""

    def __init__(self, step: str, sample: str | None = None):
        super().__init__()
        self.step, self.sample = step, sample

    def add(
        self,
        what: str,
        value: Any,
        reason: str,
        n_cells: int | None = None,
        n_genes: int | None = None,
        sample: str | None = None,
        warn: bool = False,
    ) -> None:
        """Record one decision and log it; `sample` where a step over all samples speaks of one; `warn`: look at it."""
        from scvi_core.log import log

        sample = sample or self.sample
        self.append(Decision(self.step, what, value, reason, sample, n_cells, n_genes, warn))
        (log.warning if warn else log.info)("%s%s = %s: %s", f"{sample}: " if sample else "", what, value, reason)

    def write(self, path: str | Path) -> None:
        """Write the decisions, one JSON object a line; the last has the checksum, alone where there is no decision."""
        text = "\n".join(canonical_json(dataclasses.asdict(d)) for d in self)
        with replacing(path, "JSONL") as temporary:
            temporary.write_text(f'{f"{text[:-1]}," if text else "{"}"checksum":"{BLANK}"}}\n', encoding="utf-8")
            seal(temporary)


def decided(made: Decision | dict[str, Any], key: str) -> Any:
    """One field of a decision, whether just made or as :func:`read_decisions` gives it."""
    return made[key] if isinstance(made, dict) else getattr(made, key)


def read_decisions(path: str | Path, by: str) -> list[dict[str, Any]]:
    """Read a file that :meth:`Decisions.write` wrote; `by` and errors as of :func:`verify`."""
    verify(path, by)
    made = [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]  # other ends of lines are text
    del made[-1]["checksum"]
    return [decision for decision in made if decision]
