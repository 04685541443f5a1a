"""The record of the choices made on the user's behalf, and why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from scvi_core.files.checksum import BLANK, damaged, seal, verify
from scvi_core.files.formats import canonical_json
from scvi_core.files.whole import replacing
from scvi_core.log import log


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
        sample = sample or self.sample
        self.append(Decision(self.step, what, value, reason, sample, n_cells, n_genes, warn))
        (log.warning if warn else log.info)("%s%s = %s: %s", f"{sample}: " if sample else "", what, value, reason)

    def write(self, path: str | Path | None) -> None:
        """Write the decisions, one JSON object a line; the last has the checksum, alone where there is no decision.

        Parameters
        ----------
        path : None: nowhere.
        """
        if path is None:
            return
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
    try:
        made = [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]  # other ends are text
        del made[-1]["checksum"]
    except (ValueError, LookupError, TypeError, RecursionError):  # its checksum was put there by somebody else
        raise damaged(path, by) from None
    if not all(isinstance(decision, dict) for decision in made):
        raise damaged(path, by)
    return [decision for decision in made if decision]
