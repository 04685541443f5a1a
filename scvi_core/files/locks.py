"""Locks: on the folder of results that one build holds, on a fit that two jobs might make, on temporary folders."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from scvi_core.files.errors import UserError
from scvi_core.log import log


def hold(folder: Path) -> int | None:
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
