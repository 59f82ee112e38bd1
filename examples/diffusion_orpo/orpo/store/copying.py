"""Data sets that are not parquet files: folders of images, tables of JSON or CSV, output of `save_to_disk`.

Their rows are written as a parquet file first, so that any node can read any of them.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from ..pairs.bad_pair import BadPair
from ..pairs.image_files import read_image
from ..pairs.table import Table
from ..runtime.durable import written_whole


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # in a row group; of large images 0.2 GB
SHOWN = 12  # missing images that a warning names


def copy_folder(output_dir: str, staging_dir: str | None) -> Path:
    """The folder for the copy: that of the shards, which a cluster's nodes share, unless it is on S3."""
    return Path(staging_dir or tempfile.gettempdir()) if output_dir.startswith("s3://") else Path(output_dir)


def write_copy(table: Table, folder: Path) -> Path:
    """Writes a table's pairs as parquet, whole or not at all. An image that can't be read is left empty, which makes a bad row.

    Returns:
        The file. The same rows give the same bytes.
    """
    file = folder / f".{table.split}-rows.parquet"
    schema, missing = _schema(table), []
    with written_whole(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in _batches(table, missing):
            writer.write_table(batch.cast(schema))
    if missing:
        more = f" And {len(missing) - SHOWN} more." if len(missing) > SHOWN else ""
        logger.warning(f"{table.name}: {len(missing)} images are missing: {'; '.join(missing[:SHOWN])}.{more}")
    return file


def _schema(table: Table) -> pa.Schema:
    columns, features = table.columns, table.dataset.features
    made = {name: Value(pa_type) for name, pa_type in zip(columns.verdict, MADE_OF_RANKS)} if table.ranked else {}
    kept = {name: made.get(name) or features[name] for name in (*columns.verdict, columns.prompt)}
    return Features(dict.fromkeys(columns.images, Value("large_binary")) | kept).arrow_schema


MADE_OF_RANKS = ("float64", "float64", "string")  # order_0, order_1, problem


def _batches(table: Table, missing: list[str]) -> Iterator[pa.Table]:
    columns = table.columns
    for start in range(0, len(table), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(table)))
        images = {
            name: pa.array([_image(table, row, name, missing) for row in rows], pa.large_binary())
            for name in columns.images
        }
        rest = {name: table.column(name, start, rows.stop) for name in (*columns.verdict, columns.prompt)}
        yield pa.table(images | rest)


def _image(table: Table, row: int, column: str, missing: list[str]) -> bytes | None:
    cell = table.cells(row, (column,))[column]
    try:
        return read_image(cell, column, table.where(row), table.files)
    except BadPair as bad:
        missing.append(bad.summary)
        return None
