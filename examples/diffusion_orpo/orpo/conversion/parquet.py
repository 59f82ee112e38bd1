"""Parquet files of preference rows: finding a split's, on a disk, on S3 or on the Hub, and reading a few rows at a time."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem
from pyarrow.fs import FileSelector, FileType, FSSpecHandler, PyFileSystem, SubTreeFileSystem

from ..data.columns import PICK_A_PIC_COLUMNS, TRL_COLUMNS
from ..shards.manifest import Source, open_folder
from ..system.messages import printable
from ..system.redaction import without_secrets


# Column of the data set by member of a pair. With TRL's names the first image is the preferred one.
PICK_A_PIC = dict(zip(PICK_A_PIC_COLUMNS, PICK_A_PIC_COLUMNS))
TRL = dict(zip(("jpg_0", "jpg_1", "caption"), TRL_COLUMNS))

SPLIT_OF_HUB_FILE = re.compile(r"(\w+?)-\d+-of-\d+(-\w+)?\.parquet")
SPLIT_NAME = r"(?:^|[^a-zA-Z])({})(?:[^a-zA-Z]|$)"
USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")

BATCH_ROWS = 8  # in memory at a time, next to what Parquet buffers
READ_BYTES = 4 << 20  # at a time and column
MAX_GROUP_BYTES = 1 << 40


def open_dataset(path: str) -> SubTreeFileSystem:
    """A file system whose root is the data set: a folder, s3://bucket/prefix, or what the Hub has under that name."""
    if path.startswith("s3://") or os.path.isdir(path):
        return open_folder(path)
    return SubTreeFileSystem(f"datasets/{path}", PyFileSystem(FSSpecHandler(HfFileSystem())))


def split_of(file: str, split: str | None) -> str:
    """The split of a file by its name, else by its nearest folder; "train" where neither names one.

    Args:
        file: path within the data set.
        split: the one asked for, which may have any name; others are known as `train-00000-of-00644.parquet`, or by
            the usual names.
    """
    names = "|".join([split, *USUAL_SPLITS] if split else USUAL_SPLITS)
    for part in reversed(file.split("/")):
        if match := SPLIT_OF_HUB_FILE.fullmatch(part) or re.search(SPLIT_NAME.format(names), part):
            return match[1]
    return "train"


def list_files(path: str, split: str | None) -> tuple[str, list[str]]:
    """Finds the parquet files of a split.

    Returns:
        The split's name, and its files in order, as paths within the data set.

    Raises:
        ValueError: the data set can't be opened, has no parquet files, or no such split; lists those there are.
    """
    if re.match(r"(?!s3:)[a-z0-9+.-]+://", path):
        raise ValueError(
            f"--dataset_path={without_secrets(path)} is a URL: name a folder, s3://bucket/prefix, or a data set of the Hub."
        )
    dataset = open_dataset(path)
    try:
        entries = dataset.get_file_info(FileSelector("", recursive=True))
    except Exception as error:  # the Hub's client passes on those of its HTTP library
        raise ValueError(f"--dataset_path={path} is no folder here, and can't be had from the Hub: {error}") from error
    splits = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.path):
        hidden = any(part.startswith(".") for part in entry.path.split("/"))
        if entry.type == FileType.File and entry.extension == "parquet" and not hidden:
            splits[split_of(entry.path, split)].append(entry.path)
    if not splits:
        raise ValueError(f"--dataset_path={path} has no parquet files, neither itself nor in sub-folders.")
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if chosen not in splits:
        asked = f"no split {chosen!r}" if split else "several splits and none called train"
        raise ValueError(f"{path} has {asked}: choose --split among {', '.join(splits)}.")
    return chosen, splits[chosen]


def find_columns(schema: pa.Schema, where: str) -> dict[str, str]:
    """Which column holds which member of a pair: PICK_A_PIC or TRL.

    Raises:
        ValueError: columns are missing, or hold no encoded images; names what was found and what is needed.
    """
    for columns in (PICK_A_PIC, TRL):
        if set(columns.values()) <= set(schema.names):
            for column in (columns["jpg_0"], columns["jpg_1"]):
                kind = schema.field(column).type
                if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                    kind = kind.field("bytes").type
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise ValueError(f"{where}: column {column} holds {kind}, not encoded images.")
            return columns
    raise ValueError(
        f"{where} has the columns {', '.join(schema.names)}. Needed are {', '.join(PICK_A_PIC.values())}, or"
        f" {', '.join(TRL.values())}."
    )


@dataclass(frozen=True)
class Footer:
    """What a file's footer says.

    Attributes:
        columns: of `find_columns`.
        groups: rows and uncompressed bytes, of all columns, of each row group.
        sha256: of the footer itself.
    """

    columns: dict[str, str]
    groups: list[tuple[int, int]]
    sha256: str


def read_footer(folder: SubTreeFileSystem, file: str) -> Footer:
    """Reads a file's footer. What it says of columns is left alone: where that is damaged, Arrow ends the process.

    Raises:
        ValueError: it can't be read, contradicts itself, or the columns are others; names the file.
    """
    with open_parquet(folder, file) as parquet:
        columns, metadata = find_columns(parquet.schema_arrow, file), parquet.metadata
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
    return Footer(columns, groups, digest)


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


def read_rows(dataset_path: str, source: Source) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
    """Yields a run of rows, each with its number in the file, a few in memory at a time."""
    number, end = 0, source.first_row + source.rows
    with open_parquet(open_dataset(dataset_path), source.file) as parquet:
        columns = find_columns(parquet.schema_arrow, source.file)
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if number + rows <= source.first_row:
                number += rows
                continue
            for batch in parquet.iter_batches(BATCH_ROWS, [group], list(columns.values()), use_threads=False):
                for i in range(batch.num_rows):
                    if number == end:
                        return
                    if number >= source.first_row:
                        yield number, {name: batch.column(column)[i] for name, column in columns.items()}
                    number += 1
