"""Writes preference pairs as parquet, in the columns that training reads."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..runtime.durable import written_whole


ROWS_AT_ONCE = 100  # a row group: a few hundred MB of large images at the most


def write_pairs(path: Path, rows: Iterable[dict], more_columns: dict[str, str] | None = None) -> int:
    """Writes a parquet file that is complete or absent.

    Args:
        path: of the file. One that exists is replaced.
        rows: with `jpg_0` and `jpg_1`, encoded images; `label_0`; `caption`; and the other columns. They are taken one
            after the other, so that not all need to fit into memory.
        more_columns: name to Arrow type, such as {"seed_0": "int64"}.

    Returns:
        The number of rows.
    """
    schema = pa.schema(
        [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string())]
        + [(name, pa.type_for_alias(kind)) for name, kind in (more_columns or {}).items()]
    )
    rows, count = iter(rows), 0
    with written_whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count
