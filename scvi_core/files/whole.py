"""Files that are whole or absent: a temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scvi_core.files.errors import UserError
from scvi_core.files.locks import hold
from scvi_core.files.owned import check_output, kind_of
from scvi_core.log import log


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
        held = hold(holder)
        temporary = holder / path.name
        yield temporary
        for file in sorted(p for p in [temporary, *temporary.rglob("*")] if p.is_file()):
            file.chmod(0o666 & ~_umask())  # some libraries keep what they write from others
            _fsync(file)
        check_output(path, kind_of(temporary) if kind is None and temporary.is_file() else kind or "")
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
        if code in (5, 27, 116, 121) and getattr(error, "filename", None) in (None, str(path)):  # EIO, EFBIG, ESTALE
            raise UserError(
                f"{path}: could not be written ({os.strerror(code)}); see to the disk or file system, then run again"
            ) from error
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
    earlier = left / "earlier"
    if not earlier.exists() and _age(left) <= 60:  # one just made may not be held yet
        return
    handle = hold(left)
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


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
