"""Assigns rows to shards, from the footers of the parquet files, before any row is read."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..pairs.columns import CONVENTIONS, Columns, Reading, stored_columns
from ..pairs.table import PairTable
from ..runtime.messages import printable
from .copying import copy_folder, write_copy
from .index import Source
from .parquet import Footer, Listing, list_files, open_dataset, read_footer


@dataclass(frozen=True)
class Unit:
    """The rows that make one shard, and its name."""

    name: str
    source: list[Source]

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.source)


@dataclass(frozen=True)
class Job:
    """A planned conversion of one split: everything that a task needs to know.

    Attributes:
        files: of the split, in order; a file's place here is part of its rows' keys.
        columns: of each file.
        units: one per shard.
        plan: fingerprint of everything that the shards' bytes depend on: rows, their files' footers, keep_ties, encoding.
        encoding: None where images pass through as they are.
        copy: the rows as parquet, if the dataset holds them in another form.
    """

    dataset_path: str
    output_dir: str
    staging_dir: str | None
    split: str
    keep_ties: bool
    files: list[str]
    columns: dict[str, Columns]
    units: list[Unit]
    plan: str
    encoding: "EncodingJob | None" = None  # noqa: F821
    copy: Path | None = None

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def plan_job(
    dataset_path: str,
    output_dir: str,
    *,
    dataset_config_name: str | None = None,
    split: str | None = None,
    shard_size_mb: float = 500,
    keep_ties: bool = False,
    cache_dir: str | None = None,
    staging_dir: str | None = None,
    encoding: "EncodingJob | None" = None,  # noqa: F821
    reading: Reading = Reading(),
) -> Job:
    """Divides the rows of the split into shards. The same files and settings give the same plan, on any machine.

    Args:
        dataset_path, dataset_config_name, split: as for `list_files`.
        output_dir: gets the shards.
        shard_size_mb: approximate size of a shard, in 10^6 bytes.
        keep_ties: whether rows without a preference are written too.
        cache_dir: of datasets; None for the default.
        staging_dir: where shards wait for their upload to S3; None for the system's temporary folder.
        encoding: how samples are encoded, if they are.
        reading: how the flags say that rows are read.

    Raises:
        ValueError: files, split or columns are missing, the files' columns differ, or there are no rows.
    """
    listing = list_files(dataset_path, dataset_config_name, split, cache_dir, reading)
    copy = None
    if isinstance(listing, PairTable):
        table, copy = listing, write_copy(listing, copy_folder(output_dir, staging_dir))
        listing = Listing(str(copy.parent), table.split, [copy.name], columns=stored_columns(table.columns))
    folder, files, split = open_dataset(listing.root), listing.files, listing.split

    with ThreadPoolExecutor(8) as pool:
        footers = list(pool.map(lambda file: read_footer(folder, file, listing, reading), files))
    _check_alike(files, footers)
    pieces = [
        (Source(file, first_row, rows), size)
        for file, footer in zip(files, footers)
        for first_row, rows, size in cut_row_groups(footer.groups, shard_size_mb * 1e6)
    ]
    if not pieces:
        raise ValueError(f"{dataset_path}: the {len(files)} files of split {split} have no rows.")
    sources = gather(pieces, shard_size_mb * 1e6)
    units = [Unit(f"{split}-{number:05d}.tar", source) for number, source in enumerate(sources)]
    decisive = [keep_ties, [asdict(unit) for unit in units], [footer.sha256 for footer in footers]]
    if encoding is not None:
        decisive.append(encoding.identity)
    columns = footers[0].columns
    votes = columns.soft_labels, columns.min_agreement
    if votes != (False, None) or columns.convention not in CONVENTIONS:
        decisive.append([columns.used, *votes])
    plan = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    columns = {file: footer.columns for file, footer in zip(files, footers)}
    return Job(listing.root, output_dir, staging_dir, split, keep_ties, files, columns, units, plan, encoding, copy)


def _check_alike(files: list[str], footers: list[Footer]) -> None:
    """
    Raises:
        ValueError: a file has other columns than the first one, which training refuses, or holds pairs in another way.
    """
    for file, footer in zip(files, footers):
        more = [name for name in footer.names if name not in footers[0].names]
        if more or footer.columns.convention != footers[0].columns.convention:
            raise ValueError(
                f"{file} has the columns {printable(', '.join(footer.names))}, and {files[0]}"
                f" {printable(', '.join(footers[0].names))}. The files of a split must have the same."
            )


def cut_row_groups(groups: list[tuple[int, int]], size: float) -> Iterator[tuple[int, int, float]]:
    """Yields (first row, rows, bytes) of a file's row groups; those much larger than `size` bytes in equal parts.

    Where row groups are smaller, no two tasks read the same one.
    """
    first_row = 0
    for rows, group_bytes in groups:
        parts = min(rows, max(1, round(group_bytes / size)))
        bounds = [rows * i // parts for i in range(parts + 1)] if parts else []
        for start, stop in zip(bounds, bounds[1:]):
            yield first_row + start, stop - start, group_bytes / parts
        first_row += rows


def gather(pieces: list[tuple[Source, float]], size: float) -> list[list[Source]]:
    """Joins consecutive pieces to shards of about `size` bytes; neighbours within a file become one run of rows."""
    shards, filled = [], 0.0
    for piece, piece_bytes in pieces:
        if not shards or filled + piece_bytes / 2 > size:
            shards.append([])
            filled = 0
        shard = shards[-1]
        if shard and shard[-1].file == piece.file:
            shard[-1] = Source(piece.file, shard[-1].first_row, shard[-1].rows + piece.rows)
        else:
            shard.append(piece)
        filled += piece_bytes
    return shards
