"""JSON and Parquet: equal values give equal bytes, with their checksum, which readers compare."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvi_core.files.checksum import BLANK, damaged, seal, verify
from scvi_core.files.errors import UserError
from scvi_core.files.whole import replacing

if TYPE_CHECKING:
    import pandas as pd


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. What fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_json(path: str | Path, value: Any, checksum: bool = False) -> None:
    """Write `value` as indented JSON with sorted keys (so that equal values give equal bytes).

    Parameters
    ----------
    checksum : of a mapping that another step reads by :func:`read_json`: add its last key, ``checksum``.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with replacing(path, "JSON") as temporary:
        if checksum:
            text = f'{text.removesuffix("}").rstrip()}{"," if value else ""}\n  "checksum": "{BLANK}"\n}}'
        temporary.write_text(text + "\n", encoding="utf-8")
        if checksum:
            seal(temporary)


def read_json(path: str | Path, by: str) -> dict[str, Any]:
    """Read what :func:`write_json` wrote with its checksum, which is compared; `by` and errors as of :func:`verify`."""
    verify(path, by)
    try:
        value = json.loads(Path(path).read_bytes())
        del value["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError):  # its checksum was put there by somebody else
        raise damaged(path, by) from None
    return value


def write_parquet(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a pandas frame as Parquet: zstd, columns in the frame's order, no index, no metadata but its checksum."""
    import pyarrow as pa

    table = pa.Table.from_pandas(frame, preserve_index=False)
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table)


def read_parquet(path: str | Path, by: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table that :func:`write_parquet` wrote, or others: cells of the user's own.

    Parameters
    ----------
    by, and errors raised : as of :func:`verify`.
    columns : to read; None: all.

    Raises
    ------
    UserError
        Also for a table of others that is no table, or lacks a column.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    verify(path, by)
    try:
        about = pq.read_metadata(path)
        if about.num_rows * max(1, about.num_columns) > max(2**26, 5000 * Path(path).stat().st_size):
            raise ValueError(f"it declares {about.num_rows:,} rows, which its bytes cannot hold")
        absent = [name for name in columns or () if name not in pq.read_schema(path).names]
        if not absent:
            return pd.read_parquet(path, columns=columns if columns is None else list(columns))
    except Exception as error:  # of a table that others wrote or sealed, pyarrow and pandas raise every type
        raise UserError(f"{path}: not a Parquet table ({error}); name one that `scvi-core {by}` wrote") from error
    raise UserError(f"{path}: no column {absent[0]!r}; name a table that `scvi-core {by}` wrote")


@contextlib.contextmanager
def parquet_writer(path: str | Path, schema: Any) -> Iterator[Any]:
    """A pyarrow ``ParquetWriter``, for a table too large to hold: a row group a call.

    Parameters
    ----------
    schema : pyarrow.Schema of the columns.
    """
    import pyarrow.parquet as pq

    with replacing(path, "PARQUET") as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd", store_schema=False) as writer:
            yield writer
            writer.add_key_value_metadata({"checksum": BLANK})
        seal(temporary)
