"""The plan of a conversion: which rows make which shard. And its end: what earlier runs have finished, whether all rows are accounted for.

The plan comes from the footers of the parquet files, before any row is read.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pyarrow.fs import FileSelector
from tqdm.auto import tqdm

from ..pairs.columns import CONVENTIONS, Columns, Reading, stored_columns
from ..pairs.table import PairTable
from ..runtime.messages import printable
from .folder import find_damage, open_folder, read_manifest, write_manifest
from .index import MANIFEST, Manifest, Shard, Source
from .parquet import Footer, Listing, copy_folder, list_files, open_dataset, read_footer, write_copy
from .sample import ENCODED, Encoding
from .tar import open_tar, walk_samples


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


def find_finished(job: Job) -> tuple[dict[str, Shard], bool]:
    """The shards of this plan that earlier runs completed, and whether the manifest lists the split.

    Raises:
        ValueError: the folder has shards of the split that follow another plan.
    """
    folder = open_folder(job.output_dir)
    listing = folder.get_file_info(FileSelector("", allow_not_found=True))
    sizes = {entry.path: entry.size for entry in listing}
    known = []
    if MANIFEST in sizes:
        listed = read_manifest(job.output_dir)
        known += [(shard, listed.plans.get(job.split)) for shard in listed.of_split(job.split)]
    in_manifest = bool(known)
    for name in filter(re.compile(rf"\.{job.split}-\d+\.json").fullmatch, sizes):
        with folder.open_input_stream(name) as file:
            statistics = json.loads(file.read())
        known.append((Shard.from_dict(statistics["shard"]), statistics["plan"]))
    planned = {unit.name for unit in job.units}
    strangers = {shard.name for shard, plan in known if plan != job.plan}
    strangers |= {name for name in sizes if re.fullmatch(rf"{job.split}-\d+\.tar", name)} - planned
    if strangers:
        raise ValueError(
            f"{job.output_dir} has shards of split {job.split} ({min(strangers)} for one) from other files or rows,"
            " or made with another --shard_size_mb, --keep_ties or encoding. Choose another --output_dir, or empty this"
            " one."
        )
    return {shard.name: shard for shard, _ in known if sizes.get(shard.name) == shard.bytes}, in_manifest


def check_totals(job: Job, shards: list[Shard]) -> str:
    """Accounts for every row of the parquet files; returns a summary.

    Raises:
        ValueError: rows went missing, or no pairs are left.
    """
    bad_rows = [bad for shard in shards for bad in shard.bad_rows]
    samples = sum(shard.samples for shard in shards)
    ties = sum(shard.labels["tie"] for shard in shards)
    unclear = sum(shard.labels.get("low_agreement", 0) for shard in shards)
    low = f", {unclear} of low agreement (dropped)" if unclear else ""
    summary = (
        f"{job.dataset_path}, {job.split}: {job.rows} rows, of which {samples} became pairs, {ties} are ties"
        f" ({'kept' if job.keep_ties else 'dropped'}){low}, and {len(bad_rows)} are bad."
    )
    if samples + len(bad_rows) + unclear + (0 if job.keep_ties else ties) != job.rows:
        raise ValueError(
            f"{summary} That does not add up: did the files change? Empty {job.output_dir} and start again."
        )
    if samples == 0:
        first = f" The first bad one: {bad_rows[0].reason}" if bad_rows else ""
        raise ValueError(f"{summary} So there is nothing to train on.{first}")
    return summary


def finish(job: Job, shards: list[Shard]) -> None:
    """Writes the manifest, then removes files that only a continued run would need."""
    folder = open_folder(job.output_dir)
    names = [entry.path for entry in folder.get_file_info(FileSelector(""))]
    old = read_manifest(job.output_dir) if MANIFEST in names else Manifest()
    encoding = describe_encoding(job, shards) if job.encoding else None
    write_manifest(job.output_dir, old.with_split(job.split, job.plan, shards, encoding))
    for name in filter(re.compile(rf"\.+{job.split}-\d+\.(json|tar\.partial|json\.partial)").fullmatch, names):
        folder.delete_file(name)


def describe_encoding(job: Job, shards: list[Shard]) -> Encoding:
    """The manifest's entry for the encoding: every sample must hold the same as the very first."""
    from .encode import describe

    first = next(shard for shard in shards if shard.samples)
    with open_folder(job.output_dir).open_input_stream(first.name) as file:
        _, members = next(walk_samples(open_tar(file, "r|"), 0, 1))
    return describe(job.encoding, members[ENCODED])


def verify(output_dir: str) -> None:
    """Compares every shard with the manifest and prints what is damaged; exit status 1 if anything is."""
    shards = read_manifest(output_dir).shards
    folder = open_folder(output_dir)
    damage = list(filter(None, (find_damage(folder, shard) for shard in tqdm(shards, desc="Verifying"))))
    if damage:
        print(*damage, sep="\n")
        sys.exit(f"{len(damage)} of {len(shards)} shards in {output_dir} are damaged: delete and convert them again.")
    print(f"All {len(shards)} shards in {output_dir} are good.")
