"""Why a build stopped: the steps that failed, each with its sample, its reason and what to do, from their own logs."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from scvi_core.log import one_line

SLACK = 60  # seconds by which the clock of a file server may be late
SHOWN = 8  # failed steps of which the end of a build tells; `scvi-core why` tells of all
_TAIL = 1 << 16  # bytes at a log's end that are read
STOPPED = ("interrupted", "KeyboardInterrupt", "stopped by signal")  # what a step says that a user or a system stopped


@dataclasses.dataclass(frozen=True)
class Failure:
    """A step whose last run did not end well.

    Attributes
    ----------
    step : the rule, which is the subcommand too.
    sample : the sample it was at; None for a step over all samples.
    log : the file that it wrote its messages into.
    reason : its error line, which ends with the remedy; without one, what its log says last.
    told : whether it gave an error line. A process that is killed, for its memory or its time, gives none.
    """

    step: str
    sample: str | None
    log: Path
    reason: str
    told: bool

    def __str__(self) -> str:
        name = self.step if self.sample is None else f"{self.step}, sample {self.sample}"
        if self.told:
            return f"{name}: {self.reason}"
        last = f"; its log ends with: {self.reason}" if self.reason else ""
        return f"{name}: ended without an error line, as a step does that is killed for its memory or its time{last}"


def failures(folder: Path, since: float = 0.0) -> list[Failure]:
    """The steps whose last run did not end well, the earliest first.

    Of a step that ended well, Snakemake writes the benchmark after the last line of its log.

    Parameters
    ----------
    folder : ``results/{atlas}``: ``logs/{rule}.log``, ``logs/{rule}.{sample}.log``, and benchmarks of the same names.
    since : seconds since 1970; logs that were last written before are left out.
    """
    found = []
    for log in folder.glob("logs/*.log"):
        benchmark = folder / "benchmarks" / f"{log.stem}.tsv"
        written = log.stat().st_mtime_ns
        if written < (since - SLACK) * 1e9 or (benchmark.exists() and benchmark.stat().st_mtime_ns >= written):
            continue
        step, _, sample = log.stem.partition(".")
        lines = _last_lines(log)
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        reason = (lines[-1] if lines else "") if error is None else error.removeprefix("error: ")
        found.append((written, Failure(step, sample or None, log, one_line(reason), error is not None)))
    return [failure for _, failure in sorted(found, key=lambda pair: pair[0])]


def _last_lines(log: Path) -> list[str]:
    with open(log, "rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL))
        text = handle.read().decode("utf-8", "replace")
    return [line.strip() for line in text.split("\n") if line.strip()]


def why(folder: Path, since: float = 0.0, most: int | None = None) -> str:
    """What failed: of each step its log, then the line that says why and what to do. "" where nothing did.

    Parameters
    ----------
    folder, since : as of :func:`failures`.
    most : steps that are told of; None: all.
    """
    found = failures(folder, since)
    if not found:
        return ""
    steps = "1 step" if len(found) == 1 else f"{len(found)} steps"
    lines = [f"{steps} did not end well. What others made is kept, and the same command goes on from there. The logs:"]
    lines += [f"  {failure.log}" for failure in found[:most]]
    if most is not None and len(found) > most:
        lines.append(f"  and {len(found) - most} more: scvi-core why {folder}")
    return "\n".join([*lines, *(loud(str(failure)) for failure in found[:most])])


def interrupted(folder: Path, since: float = 0.0) -> str:
    """Two lines after Ctrl-C: what was stopped, and how to go on."""
    found = failures(folder, since)
    faults = [one for one in found if one.told and not any(word in one.reason for word in STOPPED)]
    names = sorted({one.step for one in found if one not in faults})
    lines = [loud(str(one)) for one in faults]
    where = f"at {', '.join(names)}" if names else "between two steps"
    lines.append(loud(f"Interrupted {where}."))
    kept = "; training goes on from its checkpoint" if [*folder.glob(".checkpoints/*.safetensors")] else ""
    return "\n".join([*lines, f"What was made is kept, and the same command goes on from there{kept}."])


def loud(text: str) -> str:
    """A text as it is to be seen on a terminal's standard error: bold and red; elsewhere, and by NO_COLOR, as it is."""
    return f"\033[1;31m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text
