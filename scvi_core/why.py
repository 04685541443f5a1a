"""Why a build stopped: the steps that failed, each with its sample, its reason and what to do, from their own logs."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from scvi_core.log import one_line

SLACK = 60  # seconds by which the clock of a file server may be late
SHOWN = 8  # failed steps of which the end of a build tells; `scvi-core why` tells of all
_TAIL = 1 << 16  # bytes at a log's end that are read
# What the system that ran a job says of its end, in its log or in Snakemake's; what became of the job, and what to do.
# The first that is found counts: what is more telling comes first.
CAUSES = (
    (
        r"OUT_OF_MEMORY|oom[-_ ]?kill|exceeded .{0,40}memory",
        "ran out of memory{limit}",
        "give it more: --set-resources {step}:mem_mb=MEGABYTES (the same at every attempt; what is asked for without it"
        " grows), or choose fewer genes (genes.n_top)",
    ),
    (
        r"DUE TO TIME LIMIT|'(TIMEOUT|DEADLINE)'",
        "reached its time limit",
        "give it more: --set-resources {step}:runtime=MINUTES; training goes on from its checkpoint",
    ),
    (
        r"DUE TO NODE FAILURE|NODE_FAIL|BOOT_FAIL|'LOST'|Communication connection failure",
        "lost its node",
        "run the same command again; if it comes back, tell whoever runs the cluster",
    ),
    (r"DUE TO PREEMPTION|'PREEMPTED'", "was preempted", "run the same command again"),
    (
        r"[Cc]ould not open image|[Ff]ailed to (open|load|mount) image|[Uu]nable to (open|handle) image|no such image|"
        r"image .{0,200}(does not|doesn't) exist|(apptainer|singularity): (command )?not found",
        "cannot run the image",
        "make image, on a file system that compute nodes see, or name another by SCVI_CORE_IMAGE",
    ),
    (
        r"[Ii]nvalid (generic resource|gres)|[Rr]equested node configuration is not available|PyTorch sees n",
        "asks for a GPU, or a node, that the cluster does not have",
        "set device: cpu, or ask for less: --set-resources {step}:gpu=0; sinfo shows what there is",
    ),
    (
        r"[Ii]nvalid (partition|account|qos)|[Nn]o partition specified|Batch job submission failed",
        "could not be submitted",
        "name your site's: --default-resources slurm_partition=NAME slurm_account=NAME",
    ),
    (
        r"exit (status|code) (137|-9)\b|\b[Kk]illed\b",
        "was killed, as a step is that takes more memory than there is{limit}",
        "give it more: --set-resources {step}:mem_mb=MEGABYTES, run fewer at a time (--cores), or choose fewer genes "
        "(genes.n_top)",
    ),
    (r"CANCELLED", "was cancelled", "run the same command again"),
)
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
    system : what the system that ran it says of its end.
    """

    step: str
    sample: str | None
    log: Path
    reason: str
    told: bool
    system: str = ""

    def __str__(self) -> str:
        name = self.step if self.sample is None else f"{self.step}, sample {self.sample}"
        if self.told:
            return f"{name}: {self.reason}"
        for pattern, what, remedy in CAUSES:
            if re.search(pattern, f"{self.system}\n{self.reason}"):
                limit = re.search(r"begins .*, (\d+) MB", _tail(self.log)) if self.reason else None
                given = f" (it had {int(limit[1]):,} MB)" if limit else ""
                return f"{name}: {what.format(limit=given)}; {remedy.format(step=self.step)}"
        if not self.reason:
            says = one_line(self.system) or "nothing"
            return f"{name}: did not begin; what Snakemake or Slurm says: {says}"
        last = f"; its log ends with: {self.reason}" if self.reason else ""
        return f"{name}: ended without an error line, as a step does that is killed for its memory or its time{last}"


def failures(folder: Path, since: float = 0.0, logs: Sequence[Path] = ()) -> list[Failure]:
    """The steps whose last run did not end well, the earliest first.

    Of a step that ended well, Snakemake writes the benchmark after the last line of its log.

    Parameters
    ----------
    folder : ``results/{atlas}``: ``logs/{rule}.log``, ``logs/{rule}.{sample}.log``, and benchmarks of the same names.
    since : seconds since 1970; logs that were last written before are left out.
    logs : Snakemake's own, which say what became of jobs, and where the cluster's logs of them are.
    """
    found, ended = [], [end for log in logs for end in _ends(log)]
    for log in folder.glob("logs/*.log"):
        benchmark = folder / "benchmarks" / f"{log.stem}.tsv"
        written = log.stat().st_mtime_ns
        if written < (since - SLACK) * 1e9 or (benchmark.exists() and benchmark.stat().st_mtime_ns >= written):
            continue
        step, _, sample = log.stem.partition(".")
        lines = _last_lines(log)
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        reason = (lines[-1] if lines else "") if error is None else error.removeprefix("error: ")
        system = "\n".join(end.said for end in ended if log.as_posix() in end.logs)
        found.append((written, Failure(step, sample or None, log, one_line(reason), error is not None, system)))
    failed = [failure for _, failure in sorted(found, key=lambda pair: pair[0])]
    silent = {}  # jobs that wrote nothing, as they never began; the last attempt of each
    for end in ended:
        log = next((Path(path) for path in end.logs if path.startswith(f"{folder.as_posix()}/logs/")), None)
        if log is not None and log not in [failure.log for failure in failed]:
            benchmark = folder / "benchmarks" / f"{log.stem}.tsv"
            if not (benchmark.exists() and benchmark.stat().st_mtime >= end.since):  # nor ended well later
                silent[log] = Failure(end.step, _sample(log, end.step), log, "", False, end.said)
    return [*failed, *silent.values()]


def _sample(log: Path, step: str) -> str | None:
    return log.stem.removeprefix(step).removeprefix(".") or None


class End(NamedTuple):
    """Of a job that failed, by Snakemake's log: the rule, its logs, what the system says, when the build began."""

    step: str
    logs: list[str]
    said: str
    since: float


def _ends(log: Path) -> Iterator[End]:
    text = log.read_text("utf-8", "replace")
    named = re.match(r"\d{4}-\d\d-\d\dT\d{6}", log.name)
    since = datetime.strptime(named[0], "%Y-%m-%dT%H%M%S").timestamp() if named else 0.0
    pattern = r"^Error in rule (\w+):\n(.*?)(?=^\[|^Error in|^Logfile|^Cannot restore|^Shutting down|^Exiting|\Z)"
    for step, block in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        told = re.search(r"^ +log: (.*?)(?: \(check log file.*)?$", block, re.MULTILINE)
        paths = told[1].split(", ") if told else []
        number = re.search(r"external_jobid: (\S+)", block)
        about = rf"^.*SLURM-job '{re.escape(number[1])}'.*$" if number else r"(?!)"
        theirs = [_tail(Path(path)) for path in paths if "slurm_logs" in path and Path(path).is_file()]
        message = re.search(r"^ +message: (?!None$)(.*?)(?=^ +sbatch call:|^For further|^ +jobid:)", block, re.M | re.S)
        said = [*([message[1].strip()] if message else []), *re.findall(about, text, re.MULTILINE), *theirs]
        yield End(step, paths, "\n".join(said), since)


def _tail(log: Path) -> str:
    with open(log, "rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL))
        return handle.read().decode("utf-8", "replace")


def _last_lines(log: Path) -> list[str]:
    return [line.strip() for line in _tail(log).split("\n") if line.strip()]


def why(folder: Path, since: float = 0.0, most: int | None = None, logs: Sequence[Path] = ()) -> str:
    """What failed: of each step its log, then the line that says why and what to do. "" where nothing did.

    Parameters
    ----------
    folder, since, logs : as of :func:`failures`.
    most : steps that are told of; None: all.
    """
    found = failures(folder, since, logs)
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
