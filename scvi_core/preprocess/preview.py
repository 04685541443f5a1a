"""What each limit takes of a sample's cells: for a trial before anything is built, and for the page after it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from scvi_core.config import Config, Sample
from scvi_core.files import UserError, decided
from scvi_core.preprocess.qc import FLAGS, labels_table, qc
from scvi_core.preprocess.samples import read_tables

LIMIT = re.compile(rf"({'|'.join(FLAGS)})\.\w+")  # what such a decision is called


def limits_table(frame: pd.DataFrame, decisions: Iterable[Any]) -> pd.DataFrame:
    """A row a limit: ``sample``, ``limit``, ``value``, ``cells`` beyond it, and ``alone``, those with no other flag.

    Parameters
    ----------
    frame : as :func:`scvi_core.preprocess.qc.qc` gives, or ``qc.parquet``.
    decisions : of the qc step, as objects or as read from a file.
    """
    rows = []
    texts = {name: of["flags"].value_counts() for name, of in frame.groupby("sample", sort=False, observed=True)}
    for made in decisions:
        what, value, sample, n_cells = (decided(made, key) for key in ("what", "value", "sample", "n_cells"))
        if (match := LIMIT.fullmatch(str(what))) and n_cells is not None and sample in texts:
            rows.append([sample, what, value, n_cells, min(n_cells, int(texts[sample].get(match[1], 0)))])
    return pd.DataFrame(rows, columns=["sample", "limit", "value", "cells", "alone"])


def preview(samples: Iterable[tuple[Path, Sample]], config: Config, by: list[str]) -> Iterator[str]:
    """Yield a text a sample: what each limit would take, and of which labels; nothing is kept.

    Parameters
    ----------
    samples : files with counts in any format, or counts.h5ad, with their rows of the sheet.
    by : columns of the cells to count what is dropped by, besides those that the configuration carries along.
    """
    from scvi_core.io import ingest

    drop = [flag for flag in FLAGS if flag in config.qc.drop]
    for path, sample in samples:
        with tempfile.TemporaryDirectory() as scratch:
            columns = tuple(dict.fromkeys([*config.input.metadata, *by]))
            try:
                obs = read_tables(path, columns)[0]
            except UserError:
                reading = sample.reads(config.input)
                columns = tuple(dict.fromkeys([*reading.metadata, *by]))
                path, given = Path(scratch) / "counts.h5ad", path
                ingest(given, path, sample, reading.model_copy(update={"metadata": columns}))
                obs = read_tables(path, columns)[0]
            frame, decisions = qc(path, config.qc, config.seed)
        n_empty = int(frame["flags"].str.startswith("empty").sum())  # the first of the flags
        what = f"barcodes, {n_empty:,} of them empty droplets," if n_empty else "cells"
        yield f"{sample.sample}: {int(frame['keep'].sum()):,} of {len(frame):,} {what} would be kept; " + (
            f"qc.drop: {', '.join(drop)}" if drop else "qc.drop names no flag"
        )
        table = limits_table(frame, decisions)
        table["drops"] = table["limit"].map(lambda limit: "yes" if limit.partition(".")[0] in drop else "")
        yield table.drop(columns="sample" if table["sample"].nunique() == 1 else []).to_string(index=False)
        for column in columns:
            if not pd.api.types.is_numeric_dtype(obs[column]):
                yield f"by {column}:\n{labels_table(frame, obs[column].to_numpy()).to_string()}"
