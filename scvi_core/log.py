"""One logger for the package: plain lines on stderr, so that Snakemake's ``log:`` files read well."""

from __future__ import annotations

import codecs
import locale
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 30  # seconds between two lines that say how far a step is

log = logging.getLogger("scvi_core")
log.setLevel(logging.INFO)
log.propagate = False


class _Stderr(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is now (tests and progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def redacted(text: str) -> str:
    """A text without the user names, passwords and tokens of the addresses in it, for messages and files."""
    user, odd = r"[^/\s'\"<>]*", r"[^/\s:@]+:(?!\d+/)[^\s'\"<>]*"  # a password may have a slash that should be %2F
    text = re.sub(rf"([a-zA-Z][a-zA-Z0-9+.-]*://)(?:{user}|{odd})@", r"\1***@", text)
    secret = "token|passw|pwd|secret|key|sig|auth|credential"
    return re.sub(rf"([?&;][^=&;\s]*(?:{secret})[^=&;\s]*=)[^&;\s'\"]*", r"\1***", text, flags=re.IGNORECASE)


def one_line(text: str, most: int = 1000) -> str:
    """A text for a terminal: redacted, without line ends and orders to the terminal, of `most` characters at most."""
    if len(text) > most:
        text = f"{text[: 2 * most // 3]} ... {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in redacted(text))


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


if not log.handlers:
    log.addHandler(_Stderr())
    log.handlers[0].setFormatter(_OneLine("%(levelname)s %(message)s"))


def progress(items: Iterable[T], what: str, total: int, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The items, saying meanwhile how far they are: a bar with an estimate on a terminal, else a line now and then.

    Parameters
    ----------
    what : such as ``"qc: cells read"``.
    total : of all items' sizes.
    size : of an item, such as its number of cells.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task, size(item))
        return
    done, began = 0, time.monotonic()
    told = began
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - told > EVERY and done < total:
            left = (now - began) * (total - done) / done
            log.info("%s: %s of %s, about %s left", what, f"{done:,}", f"{total:,}", duration(left))
            told = now


def duration(seconds: float) -> str:
    """Seconds as one reads them: 42 s, 5 min, 1.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def speak_utf8() -> None:
    """Where the locale is of another encoding, start this program again in UTF-8 mode, which its children share.

    Names in sheets and files are UTF-8; as arguments and in paths they would be something else, or nothing.
    """
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
