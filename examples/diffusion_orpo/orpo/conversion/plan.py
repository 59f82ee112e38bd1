"""Which rows make which shard, decided from the footers of the parquet files before any row is read."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from ..shards.manifest import Source
from .parquet import list_files, open_dataset, read_footer


@dataclass(frozen=True)
class Unit:
    """The rows that make one shard, and its name."""

    name: str
    source: list[Source]

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.source)


@dataclass(frozen=True)
class EncodingJob:
    """How samples are encoded: the flags that say so, as a training script takes them, and what they come down to."""

    flags: list[str]
    identity: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A planned conversion of one split: all that a task needs to know.

    Attributes:
        files: of the split, in order; a file's place here is part of its rows' keys.
        units: one a shard.
        plan: fingerprint of what decides the shards' bytes: rows, their files' footers, keep_ties, and the encoding.
        encoding: None where images pass through as they are.
    """

    dataset_path: str
    output_dir: str
    cache_dir: str | None
    split: str
    keep_ties: bool
    files: list[str]
    units: list[Unit]
    plan: str
    encoding: EncodingJob | None = None

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def plan_job(args, encoding: EncodingJob | None = None) -> Job:
    """Divides the rows of the split into shards. The same files and flags give the same plan, on any machine.

    Args:
        args: the flags.
        encoding: how samples are encoded, if they are.

    Raises:
        ValueError: files, split or columns are not there, or there are no rows.
    """
    split, files = list_files(args.dataset_path, args.split)
    folder = open_dataset(args.dataset_path)

    with ThreadPoolExecutor(8) as pool:
        footers = list(pool.map(lambda file: read_footer(folder, file), files))
    pieces = [
        (Source(file, first_row, rows), size)
        for file, footer in zip(files, footers)
        for first_row, rows, size in cut_row_groups(footer.groups, args.shard_size_mb * 1e6)
    ]
    if not pieces:
        raise ValueError(f"{args.dataset_path}: the {len(files)} parquet files of split {split} have no rows.")
    sources = gather(pieces, args.shard_size_mb * 1e6)
    units = [Unit(f"{split}-{number:05d}.tar", source) for number, source in enumerate(sources)]
    decisive = [args.keep_ties, [asdict(unit) for unit in units], [footer.sha256 for footer in footers]]
    if encoding is not None:
        decisive.append(encoding.identity)
    plan = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return Job(args.dataset_path, args.output_dir, args.cache_dir, split, args.keep_ties, files, units, plan, encoding)


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
