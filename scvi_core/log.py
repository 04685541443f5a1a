"""One logger for the package: plain lines on stderr, so that Snakemake's ``log:`` files read well."""

import logging
import sys

log = logging.getLogger("scvi_core")
log.setLevel(logging.INFO)
log.propagate = False


class _Stderr(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is now (tests and progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


if not log.handlers:
    log.addHandler(_Stderr())
    log.handlers[0].setFormatter(logging.Formatter("%(levelname)s %(message)s"))
