"""Rows and columns as Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from sparse_expansion.store import write_file


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows with equal keys, turned into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_table(columns: dict[str, list[Any]], path: str) -> None:
    """Write the columns as a Parquet file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    stream = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    write_file(path, stream.getvalue())
