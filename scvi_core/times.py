"""Where the time of a build went: Snakemake's benchmarks of its rules, summed."""

from __future__ import annotations

import csv
from pathlib import Path

from scvi_core.log import duration

SLACK = 60  # seconds by which the clock of a file server may be late


def times_table(folder: Path, since: float = 0.0) -> str:
    """A line a rule, the longest first: jobs, their time in sum and the longest one's, the most memory of one.

    Empty where nothing was measured.

    Parameters
    ----------
    folder : ``results/{atlas}``, whose ``benchmarks/{rule}.tsv`` and ``benchmarks/{rule}.{sample}.tsv`` are read.
    since : seconds since 1970; jobs that ended before are left out.
    """
    rules: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.glob("benchmarks/*.tsv")):
        if path.stat().st_mtime < since - SLACK:
            continue
        with path.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle, delimiter="\t"):
                memory = row.get("max_rss", "NA")  # not measured where a job ends within a second
                used = 0.0 if memory in ("NA", "-") else float(memory)
                if row.get("s", "NA") not in ("NA", "-"):
                    rules.setdefault(path.stem.partition(".")[0], []).append((float(row["s"]), used))
    rows = sorted(((sum(s for s, _ in jobs), rule, jobs) for rule, jobs in rules.items()), reverse=True)
    if not rows:
        return ""
    lines = [f"{'rule':<12}{'jobs':>6}{'time':>10}{'longest':>10}{'memory':>10}"]
    for total, rule, jobs in rows:
        longest, memory = max(s for s, _ in jobs), max(m for _, m in jobs)
        lines.append(f"{rule:<12}{len(jobs):>6}{duration(total):>10}{duration(longest):>10}{memory / 1000:>7.1f} GB")
    return "\n".join(lines)
