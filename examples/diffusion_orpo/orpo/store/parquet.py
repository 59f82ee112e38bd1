"""Parquet files of preference rows: finds those of a split, on disk, on S3 or on the Hub, and reads a few rows at a time.

Datasets in another form, such as folders of images, JSON or CSV, or ranked images, are written as a parquet file first, so that
any node can read any of their rows, and only then converted.
"""

import hashlib
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import HfFileSystem
from pyarrow.fs import FileSelector, FileType, FSSpecHandler, PyFileSystem, SubTreeFileSystem

from ..pairs.bad_pair import BadPair
from ..pairs.columns import Columns, Reading
from ..pairs.folders import is_pair_folders
from ..pairs.image import ImageFiles, names_files
from ..pairs.labels import PROBLEM
from ..pairs.sources import as_given, find_builder, is_saved, open_table, pick_split, split_names
from ..pairs.table import PairTable
from ..runtime.durable import written_whole
from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .folder import open_folder
from .index import Source


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # in a row group; of large images 0.2 GB
SHOWN = 12  # missing images that a warning names
SPLIT_OF_HUB_FILE = re.compile(r"(\w+?)-\d+-of-\d+(-\w+)?\.parquet")
SPLIT_NAME = r"(?:^|[^a-zA-Z])({})(?:[^a-zA-Z]|$)"
USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")

BATCH_ROWS = 8  # in memory at a time, next to what Parquet buffers
READ_BYTES = 4 << 20  # at a time, per column
MAX_GROUP_BYTES = 1 << 40


@dataclass(frozen=True)
class Listing:
    """The parquet files of a split.

    Attributes:
        root: the argument for `open_dataset`.
        split: its name.
        files: in order, as paths below the root.
        classes: names of the classes of ClassLabel columns, if they are in the dataset's card and not in the files.
        columns: those of all files, if they are known; otherwise each file's footer names them.
    """

    root: str
    split: str
    files: list[str]
    classes: dict[str, list[str]] = field(default_factory=dict)
    columns: Columns | None = None


def open_dataset(path: str) -> SubTreeFileSystem:
    """A file system whose root is the dataset: a folder, s3://bucket/prefix, or a dataset of the Hub."""
    if path.startswith("s3://") or os.path.isdir(path):
        return open_folder(path)
    return SubTreeFileSystem(f"datasets/{path}", PyFileSystem(FSSpecHandler(HfFileSystem())))


def list_files(
    path: str,
    config: str | None,
    split: str | None,
    cache_dir: str | None = None,
    reading: Reading = Reading(),
) -> Listing | PairTable:
    """Finds the parquet files of a split, the same ones that training reads.

    Args:
        path: a folder or file, s3://bucket/prefix, or a dataset of the Hub.
        config: of a dataset that has several.
        split: Default: the only one, else train.
        cache_dir: of datasets; None for the default.
        reading: how the flags say that rows are read.

    Returns:
        The files; or the pairs of a dataset in another form, such as one whose rows name image files or rank images.

    Raises:
        ValueError: the dataset can't be read, holds no pairs, or has no such split; lists those there are.
    """
    if re.match(r"(?!s3:|file:)[a-z0-9+.-]+://", path):
        raise ValueError(
            f"--dataset_path={without_secrets(path)} is a URL: name a folder, s3://bucket/prefix, or a dataset of the Hub."
        )
    if path.startswith("s3://") and reading.image_root is not None:
        raise ValueError("--image_root has no effect with s3://: images there must be in the parquet files.")
    if path.startswith("s3://"):
        return _list_on_s3(path, split)
    path = as_given(path)
    if is_pair_folders(path) or is_saved(path) or os.path.isfile(path) and not path.endswith(".parquet"):
        return open_table(path, config, split, cache_dir, reading)
    if os.path.isfile(path):
        listing = Listing(os.path.dirname(os.path.abspath(path)), split or "train", [os.path.basename(path)])
        return listing if _holds_pairs(listing, reading) else open_table(path, config, split, cache_dir, reading)
    builder = find_builder(path, config, cache_dir)
    split = pick_split(split_names(builder), split, path, "--dataset_split_name")
    files = [str(file) for file in builder.config.data_files[split]]
    if not all(file.endswith(".parquet") for file in files):
        return open_table(path, config, split, cache_dir, reading)
    classes = class_names(builder.info.features or {})
    if files[0].startswith("hf://"):
        root = re.match(r"hf://datasets/([^@]+@[^/]+)/", files[0])
        listing = Listing(root[1], split, [file[len(root[0]) :] for file in files], classes)
    else:
        folder = Path(path).resolve()
        listing = Listing(str(folder), split, [os.path.relpath(file, folder) for file in files], classes)
    return listing if _holds_pairs(listing, reading) else open_table(path, config, split, cache_dir, reading)


def _holds_pairs(listing: Listing, reading: Reading) -> bool:
    """Whether each row holds two encoded images. Also true if it holds no pairs: `read_footer` says so."""
    with open_parquet(open_dataset(listing.root), listing.files[0]) as parquet:
        schema = parquet.schema_arrow
    try:
        columns = reading.find_columns(schema, listing.files[0], files=ImageFiles(root=Path()))
    except ValueError:
        return True
    return not columns.convention.is_ranked and not any(
        names_files(schema.field(name).type) for name in columns.images
    )


def class_names(features) -> dict[str, list[str]]:
    """Names of the classes of each ClassLabel column."""
    return {name: list(feature.names) for name, feature in features.items() if hasattr(feature, "names")}


def _list_on_s3(url: str, split: str | None) -> Listing:
    """datasets does not list S3: here files are known by names such as `train-00000-of-00644.parquet`, or by folders."""
    try:
        entries = open_dataset(url).get_file_info(FileSelector("", recursive=True))
    except OSError as error:
        raise ValueError(f"--dataset_path={url} can't be read: {printable(str(error))}.") from error
    splits = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.path):
        hidden = any(part.startswith(".") for part in entry.path.split("/"))
        if entry.type == FileType.File and entry.extension == "parquet" and not hidden:
            splits[_split_of(entry.path, split)].append(entry.path)
    if not splits:
        raise ValueError(f"--dataset_path={url} has no parquet files, neither itself nor in sub-folders.")
    nameless = splits.pop(None, [])
    if nameless and splits:
        raise ValueError(
            f"{url}: the names of {', '.join(nameless[:3])} ({len(nameless)} files) don't name a split, those of the others do"
            f" ({', '.join(splits)}). Put all files of a split into a folder of its name."
        )
    splits = splits or {"train": nameless}
    chosen = pick_split(splits, split, url, "--dataset_split_name")
    return Listing(url, chosen, splits[chosen])


def _split_of(file: str, split: str | None) -> str | None:
    """The split of a file by its name, else by its nearest folder; None where neither names one.

    Args:
        file: path within the dataset.
        split: the one asked for, which may have any name.
    """
    names = "|".join([split, *USUAL_SPLITS] if split else USUAL_SPLITS)
    for part in reversed(file.split("/")):
        if match := SPLIT_OF_HUB_FILE.fullmatch(part) or re.search(SPLIT_NAME.format(names), part):
            return match[1]
    return None


@dataclass(frozen=True)
class Footer:
    """A file's footer.

    Attributes:
        columns: those that hold pairs.
        names: of all columns.
        groups: rows and uncompressed bytes, of all columns, of each row group.
        sha256: of the footer itself.
    """

    columns: Columns
    names: list[str]
    groups: list[tuple[int, int]]
    sha256: str


def read_footer(folder: SubTreeFileSystem, file: str, listing: Listing, reading: Reading = Reading()) -> Footer:
    """Reads a file's footer, but not its statistics of columns: if those are damaged, Arrow ends the process.

    Raises:
        ValueError: it can't be read, contradicts itself, or has other columns; names the file.
    """
    with open_parquet(folder, file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        columns = listing.columns or reading.find_columns(
            schema, file, _classes_in_file(schema, file) | listing.classes
        )
        if columns.convention.is_ranked:
            raise ValueError(f"{file} ranks images: name a folder of this machine or a dataset of the Hub.")
        found = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        groups = [(group.num_rows, group.total_byte_size) for group in found]
        with folder.open_input_file(file) as opened:
            opened.seek(opened.size() - metadata.serialized_size - 8)
            digest = hashlib.sha256(opened.read()).hexdigest()
    sane = all(rows >= 0 and 0 <= size <= MAX_GROUP_BYTES for rows, size in groups)
    if not sane or sum(rows for rows, _ in groups) != metadata.num_rows:
        raise ValueError(
            f"{file} can't be read: the row groups of its footer contradict each other. Replace the file."
        )
    return Footer(columns, schema.names, groups, digest)


def _classes_in_file(schema: pa.Schema, file: str) -> dict[str, list[str]]:
    """Names of the classes of ClassLabel columns, as datasets writes them into a file's metadata."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return class_names(Features.from_arrow_schema(schema))
    except Exception as error:  # datasets raises many kinds, depending on the JSON
        raise ValueError(f"{file} can't be read: its metadata of datasets is broken ({error!r}).") from error


@contextmanager
def open_parquet(folder: SubTreeFileSystem, file: str) -> Iterator[pq.ParquetFile]:
    """Opens a file to be read in small portions.

    Raises:
        ValueError: opening or reading fails; names the file.
    """
    try:
        with folder.open_input_file(file) as opened:
            yield pq.ParquetFile(opened, buffer_size=READ_BYTES, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can't be read: {printable(str(error), 500)}. Replace the file.") from error


def read_rows(dataset_path: str, source: Source, columns: Columns) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
    """Yields a run of rows, each with its number in the file, a few in memory at a time."""
    number, end = 0, source.first_row + source.rows
    with open_parquet(open_dataset(dataset_path), source.file) as parquet:
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if number + rows <= source.first_row:
                number += rows
                continue
            for batch in parquet.iter_batches(BATCH_ROWS, [group], list(columns.used), use_threads=False):
                for i in range(batch.num_rows):
                    if number == end:
                        return
                    if number >= source.first_row:
                        yield number, {name: batch.column(name)[i] for name in columns.used}
                    number += 1


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
