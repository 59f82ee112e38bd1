"""Datasets that are not parquet files: folders of images, tables of JSON or CSV, output of `save_to_disk`.

Their rows are written as a parquet file first, so that any node can read any of them.
"""

import logging
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..pairs.bad_pair import BadPair
from ..pairs.labels import PROBLEM
from ..pairs.table import PairTable
from ..runtime.durable import written_whole


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # in a row group; of large images 0.2 GB
SHOWN = 12  # missing images that a warning names


def copy_folder(output_dir: str, staging_dir: str | None) -> Path:
    """The folder for the copy: that of the shards, which a cluster's nodes share, unless it is on S3."""
    return Path(staging_dir or tempfile.gettempdir()) if output_dir.startswith("s3://") else Path(output_dir)


def write_copy(table: PairTable, folder: Path) -> Path:
    """Writes a table's pairs as parquet, whole or not at all. An image that can't be read is left empty, which makes a bad row.

    Returns:
        The file. The same rows give the same bytes.
    """
    file, missing = folder / f".{table.split}-rows.parquet", []
    prompts = table.dataset.data.column(table.columns.prompt)
    schema = pa.schema(
        [("jpg_0", pa.large_binary()), ("jpg_1", pa.large_binary()), ("label_0", pa.float64())]
        + [(name, pa.string()) for name in PROBLEM]
        + [(table.columns.prompt, prompts.type)]
    )
    with written_whole(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(table), ROWS_AT_ONCE):
            pairs = range(start, min(start + ROWS_AT_ONCE, len(table)))
            columns = {f"jpg_{side}": [_image(table, pair, side, missing) for pair in pairs] for side in (0, 1)} | {
                "label_0": table.labels[start : pairs.stop]
            }
            problems = [table.problems.get(pair) for pair in pairs]
            columns |= {name: [getattr(bad, name) if bad else None for bad in problems] for name in PROBLEM}
            columns[table.columns.prompt] = prompts.take(pa.array(table.images[start : pairs.stop, 0, 0]))
            writer.write_table(pa.table(columns, schema))
    if missing:
        more = f" And {len(missing) - SHOWN} more." if len(missing) > SHOWN else ""
        logger.warning(f"{table.name}: {len(missing)} images are missing: {'; '.join(missing[:SHOWN])}.{more}")
    return file


def _image(table: PairTable, pair: int, side: int, missing: list[str]) -> bytes | None:
    try:
        return table.image(pair, side)
    except BadPair as bad:
        missing.append(bad.summary)
        return None
