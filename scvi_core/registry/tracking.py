"""The way to MLflow: one quiet, pickle-free client, and an SQLite store that several processes may use at once.

An SQLite store is made whole or not at all (built under a temporary name, then renamed), so that whoever finds the
file finds a complete one; who makes it or registers in it holds a lock file beside it. Artifacts lie in
``mlartifacts/`` beside the database. MLflow can only store their absolute place, so :func:`connect` rewrites it when
the folder has been moved or copied: a copy of ``results/`` stands alone and never writes into the original.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from scvi_core.files import UserError, replacing
from scvi_core.log import log, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
ARTIFACTS = "mlartifacts"
LOCK_SECONDS = 600
# read by mlflow when it is imported or when it acts; what the user has set stays
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # or the lock file of whatever folder we run in goes into the model
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute, in which a server may start again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
# every column in which MLflow keeps the absolute place of an artifact
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def connect(tracking_uri: str) -> MlflowClient:
    """Open a tracking store and registry, making an SQLite one that is not there yet.

    Parameters
    ----------
    tracking_uri : ``sqlite:///relative/mlflow.db``, ``sqlite:////absolute/mlflow.db``, or ``http(s)://host:port``.

    Raises
    ------
    UserError
        For another kind of URI, a server out of reach, and a folder or file that cannot be read or written.
    """
    database = sqlite_path(tracking_uri)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with errors(tracking_uri):
        import mlflow

        if database is None:
            _reach(tracking_uri)
            return mlflow.MlflowClient(tracking_uri, registry_uri=tracking_uri)
        if not _is_made(database):
            with exclusive(tracking_uri):
                if not _is_made(database):
                    _make(database)
        _follow(tracking_uri, database)
        return mlflow.MlflowClient(f"sqlite:///{database}", registry_uri=f"sqlite:///{database}")


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file of an SQLite URI, absolute; None for a server.

    Raises
    ------
    UserError
        For a URI that is neither.
    """
    if re.search(r"[\x00-\x1f]", tracking_uri):
        pass  # no address
    elif tracking_uri.startswith("sqlite:///"):
        path = tracking_uri.removeprefix("sqlite:///")
        if path and path != ":memory:" and "?" not in os.path.realpath(path):
            return Path(os.path.realpath(path))
    elif re.match(r"https?://[^/\s]+", tracking_uri):
        return None
    raise UserError(
        f"registry.tracking_uri: '{redacted(tracking_uri)}' cannot be used; give sqlite:///path/to/mlflow.db "
        "or the http(s):// address of an MLflow server (unset, it is that of the environment's MLFLOW_TRACKING_URI)"
    )


def artifact_root(database: Path) -> str:
    """URI of the folder beside the database that holds its artifacts."""
    return (database.parent / ARTIFACTS).as_uri()


def place(tracking_uri: str, location: str) -> str:
    """Where an artifact location recorded in the store is now (it differs only in a moved, read-only store)."""
    database = sqlite_path(tracking_uri)
    moved = _moved(database) if database else None
    return location.replace(*moved, 1) if moved and location.startswith(moved[0] + "/") else location


@contextlib.contextmanager
def exclusive(tracking_uri: str) -> Iterator[None]:
    """Hold an SQLite store for oneself, among all processes on machines that share its folder; no-op for a server."""
    database = sqlite_path(tracking_uri)
    if database is None:
        yield
        return
    import fcntl

    with errors(tracking_uri):
        database.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    log.warning("%s: this file system has no locks; register from one process at a time", database)
                    break
            if time.monotonic() > deadline:
                raise UserError(
                    f"{database}: another process has held {database.name}.lock for {LOCK_SECONDS} s; "
                    "end it, or wait, then run again"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def retried(act: Callable[[], T]) -> T:
    """Do what another process may do at the same moment.

    Where both make the same row of a server's database, one is told that it exists, or that it is locked; nothing is
    written then, and at the next try the row is found.
    """
    from mlflow.exceptions import MlflowException

    told = r"unique constraint|integrityerror|duplicate|deadlock|is locked|could not serialize|giving up after"
    for pause in (0.1, 0.4, 1.6, 6.4):
        try:
            return act()
        except MlflowException as error:
            if not re.search(told, str(error), re.IGNORECASE):
                raise
            time.sleep(pause * (0.5 + random.random()))
    return act()


@contextlib.contextmanager
def errors(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow, the database and the network raise into one line; faults of our own pass through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        raise UserError(f"{redacted(tracking_uri)}: {message}") from error


def _explain(error: Exception) -> str | None:
    text = str(error)
    known = {
        r"no space left|disk is full|disk quota": "no space left on the device; free some, then run again",
        r"readonly database|read-only file system|permission denied|unable to open database": (
            "cannot be opened for writing; check the folder's permissions, or choose another registry.tracking_uri"
        ),
        r"database is locked": "another process is writing; run again when it has finished",
        r"out-of-date database schema|can't locate revision": (
            "made by another MLflow version; back it up and run `mlflow db upgrade` on it, or use that version"
        ),
        r"not a database|malformed": "not an SQLite database, or a damaged one; restore it or move it away",
        r"max retries exceeded|connection ?error|connection refused|timed? ?out|failed to (resolve|establish)": (
            "the tracking server cannot be reached; start it or mend registry.tracking_uri, then run again"
        ),
        r"\b401\b|\b403\b|invalid host header|permission_denied": (
            "the tracking server refuses us; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or name this address in its --allowed-hosts"
        ),
        r"error code 404|endpoint .* not found": "answers, but not as an MLflow server; mend registry.tracking_uri",
    }
    ours = isinstance(error, OSError | sqlite3.Error) or type(error).__module__.split(".")[0] in (
        "mlflow",
        "sqlalchemy",
        "requests",
        "urllib3",
    )
    if not ours:
        return None
    for pattern, message in known.items():
        if re.search(pattern, text, re.IGNORECASE):
            return message
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"a file is in the way of a folder ({error.filename}); choose another registry.tracking_uri"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}; check that path and registry.tracking_uri"
    return f"MLflow says: {' '.join(text.split())[:300]}"


def _is_made(database: Path) -> bool:
    return database.is_file() and database.stat().st_size > 0


def _make(database: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    (database.parent / ARTIFACTS).mkdir(exist_ok=True)
    with replacing(database) as temporary:
        # the store object lets us say where artifacts go; a client would write ./mlruns into the default experiment
        SqlAlchemyStore(f"sqlite:///{temporary}", artifact_root(database)).engine.dispose()


def _reach(tracking_uri: str) -> None:
    """Ask the server for a sign of life, once and briefly, instead of MLflow's minutes of retries."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    # any answer will do: a server behind a proxy may have no /health
    http_request(get_default_host_creds(tracking_uri), "/health", "GET", max_retries=0, timeout=10, retry_codes=())


def _moved(database: Path) -> tuple[str, str] | None:
    """(former, present) artifact root of a store of ours that lies elsewhere than where it was last used."""
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
        row = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
    present = artifact_root(database)
    if not row or not (row[0] or "").endswith(f"/{ARTIFACTS}/0") or row[0] == f"{present}/0":
        return None
    if not (database.parent / ARTIFACTS).is_dir():  # the database alone was moved: its artifacts are where they were
        return None
    return row[0].removesuffix("/0"), present


def _follow(tracking_uri: str, database: Path) -> None:
    """Point a moved or copied store at the artifacts that came along with it."""
    if _moved(database) is None:
        return
    try:
        with exclusive(tracking_uri):
            moved = _moved(database)
            if moved is None:
                return
            former, present = moved
            with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection, connection:
                for table, column in PLACES:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (present, len(former) + 1, len(former) + 1, former + "/"),
                    )
        log.info("%s: was at %s; its artifact locations follow", database, former.removesuffix(f"/{ARTIFACTS}"))
    except (UserError, sqlite3.OperationalError) as error:
        # a read-only store still serves reads: see `place`
        log.info("%s: moved, and its artifact locations cannot be rewritten (%s)", database, error)
