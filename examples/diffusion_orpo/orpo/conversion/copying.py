"""Data sets that are not parquet files: folders of images, tables of JSON or CSV, what `save_to_disk` wrote.

Their rows are written as a parquet file first, so that any node can read any of them.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from ..data.bad_pair import BadPair
from ..data.table import Table
from ..system.durable import written_whole


ROWS_AT_ONCE = 64  # in a row group; of large images 0.2 GB


def copy_folder(output_dir: str, cache_dir: str | None) -> Path:
    """Where the copy lies: in the folder of the shards, which a cluster's nodes share, unless that is on S3."""
    return Path(cache_dir or tempfile.gettempdir()) if output_dir.startswith("s3://") else Path(output_dir)


def write_copy(table: Table, folder: Path) -> Path:
    """Writes a table's pairs as parquet, whole or not at all. An image that can't be read is left empty, and so a bad row.

    Returns:
        The file. The same rows give the same bytes.
    """
    file = folder / f".{table.split}-rows.parquet"
    columns = table.columns
    kept = {name: table.dataset.features[name] for name in (*columns.verdict, columns.prompt)}
    schema = Features(dict.fromkeys(columns.images, Value("large_binary")) | kept).arrow_schema
    with written_whole(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in _batches(table):
            writer.write_table(batch.cast(schema))
    return file


def _batches(table: Table) -> Iterator[pa.Table]:
    columns, data = table.columns, table.dataset.data
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(table)))
        images = {
            name: pa.array([_image(table, row, name) for row in rows], pa.large_binary()) for name in columns.images
        }
        rest = {name: data.column(name).slice(start, len(rows)) for name in (*columns.verdict, columns.prompt)}
        yield pa.table(images | rest)


def _image(table: Table, row: int, column: str) -> bytes | None:
    cell = table.cells(row, (column,))[column]
    try:
        return table.columns.read_image(cell, column, follows_paths=table.follows_paths)
    except BadPair:
        return None
