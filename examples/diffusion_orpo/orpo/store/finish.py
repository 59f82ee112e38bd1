"""The results of earlier runs of a conversion, the manifest at its end, and whether everything is complete."""

import json
import re
import sys

from pyarrow.fs import FileSelector
from tqdm.auto import tqdm

from .folder import find_damage, open_folder, read_manifest, write_manifest
from .index import MANIFEST, Manifest, Shard
from .plan import Job
from .sample import ENCODED, Encoding
from .tar import open_tar, walk_samples


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
