#!/usr/bin/env python
"""Converts a preference data set of parquet files to shards for WebDataset, on Ray Data.

    python convert_to_webdataset.py --dataset_path pickapic --output_dir shards
    python convert_to_webdataset.py --output_dir shards --verify

Images pass through as they are. With --encode, samples hold what VAE and text encoders say of images and prompt instead,
and the shards train without either:

    python convert_to_webdataset.py --dataset_path pickapic --output_dir encoded --encode --mixed_precision fp16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

A conversion that was stopped continues where it was when started again.
"""

import argparse
import io
import json
import logging
import os
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import orpo
import pyarrow as pa
import ray
import ray.data
from orpo.conversion.parquet import read_rows
from orpo.conversion.plan import EncodingJob, Job, Unit, plan_job
from orpo.data.columns import parse_label
from orpo.data.image import open_image
from orpo.shards.manifest import (
    CHUNK_BYTES,
    MANIFEST,
    BadRow,
    Encoding,
    Manifest,
    Shard,
    find_damage,
    open_folder,
    read_manifest,
    sha256,
    write_manifest,
    written_whole,
)
from orpo.system.messages import printable
from pyarrow.fs import FileSelector
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}  # others: Pillow's name of the format
LABELS = {1.0: "jpg_0", 0.0: "jpg_1", 0.5: "tie"}

# The training scripts' flags that decide an encoding; those scripts read them.
ENCODING_FLAGS = {
    "pretrained_model_name_or_path": "Model whose VAE and text encoders encode: a folder, or a name on the Hub.",
    "pretrained_vae_model_name_or_path": "Folder or name of a VAE to use instead of the model's own.",
    "revision": "Revision of the model.",
    "variant": "Variant of the model's files, e.g. fp16.",
    "resolution": "Pixels a side of the crops. Default: as in training, 1024 for SDXL.",
    "max_sequence_length": "Tokens of a prompt that T5 reads. Default: as in training.",
    "mixed_precision": "no, fp16 or bf16: what the training will run in. Default: no.",
    "vae_encode_batch_size": "Images that the VAE encodes at once. Default: 8.",
}

OBJECT_STORE_BYTES = 200 << 20  # no image goes through it


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_path",
        help="Folder of parquet files (searched with its sub-folders, also s3://bucket/prefix), or identifier of a "
        "data set of parquet on the Hub. Columns: jpg_0, jpg_1, label_0, caption; or chosen, rejected, prompt.",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="Folder for the shards, or s3://bucket/prefix. On a cluster a folder that all nodes share.",
    )
    parser.add_argument("--split", help="Split to convert. Default: the only one, else train.")
    parser.add_argument("--shard_size_mb", type=float, default=500, help="Size of a shard, about. In 10^6 bytes.")
    parser.add_argument("--keep_ties", action="store_true", help="Write pairs with label 0.5, too.")
    parser.add_argument("--ray_address", help="Ray cluster to run on. Default: this machine, all its cores.")
    parser.add_argument(
        "--cache_dir", help="Folder where shards wait for their upload to S3. Default: the system's temporary one."
    )
    parser.add_argument(
        "--verify", action="store_true", help="Convert nothing; compare the shards in --output_dir with the manifest."
    )
    group = parser.add_argument_group("encoding")
    group.add_argument(
        "--encode",
        action="store_true",
        help="Write latents of both images, cropped at the centre, and the prompt's embeddings. On all GPUs that Ray "
        "knows of, else on this machine's cores.",
    )
    for name, text in ENCODING_FLAGS.items():
        group.add_argument(f"--{name}", help=text)
    args = parser.parse_args(input_args)
    given = [name for name in ENCODING_FLAGS if getattr(args, name) is not None]
    if given and not args.encode:
        parser.error(f"--{given[0]} means nothing without --encode.")
    if args.encode and args.pretrained_model_name_or_path is None:
        parser.error("--encode needs --pretrained_model_name_or_path.")
    if args.dataset_path is None and not args.verify:
        parser.error("--dataset_path is needed, except with --verify.")
    if args.split is not None and not re.fullmatch(r"\w+", args.split):
        parser.error(f"--split={args.split} is not the name of a split: letters, digits and _ only.")
    if args.shard_size_mb <= 0:
        parser.error(f"--shard_size_mb={args.shard_size_mb:g} must be above 0.")
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if args.verify:
        verify(args.output_dir)
        return
    start = time.perf_counter()
    if not args.output_dir.startswith("s3://"):
        args.output_dir = os.path.abspath(args.output_dir)  # tasks run elsewhere
        os.makedirs(args.output_dir, exist_ok=True)
    if os.path.isdir(args.dataset_path):
        args.dataset_path = os.path.abspath(args.dataset_path)
    job = plan_job(args, plan_encoding(args) if args.encode else None)
    finished, in_manifest = find_finished(job)
    if in_manifest and len(finished) == len(job.units):
        print(f"{args.output_dir} already holds all {len(finished)} shards of split {job.split}: nothing to do.")
        return
    new = {shard.name: shard for shard in run(job, finished, args.ray_address)}
    shards = [(finished | new)[unit.name] for unit in job.units]
    summary = check_totals(job, shards)
    finish(job, shards)
    seconds = time.perf_counter() - start
    samples = sum(shard.samples for shard in new.values())
    print(f"{samples} pairs in {len(new)} shards, {seconds:.1f} s, {samples / seconds:.1f} pairs/s. {summary}")


def plan_encoding(args) -> EncodingJob:
    """What the flags of the encoding come down to.

    Raises:
        ValueError, OSError: the model is of no family that is known, or not there.
    """
    from orpo.conversion.encoder import identify

    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        if os.path.isdir(getattr(args, name) or ""):
            setattr(args, name, os.path.abspath(getattr(args, name)))  # actors run elsewhere
    flags = [f"--{name}={getattr(args, name)}" for name in ENCODING_FLAGS if getattr(args, name) is not None]
    return EncodingJob(flags, identify(flags))


def find_finished(job: Job) -> tuple[dict[str, Shard], bool]:
    """The shards of this plan that former runs completed, and whether the manifest lists the split.

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


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Ray on a cluster, else on this machine with little memory; or the one that already runs in this process."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for module in (orpo, sys.modules[convert_unit.__module__]):  # so that a cluster's nodes need not have these files
        ray.cloudpickle.register_pickle_by_value(module)
    if ray.is_initialized():
        yield
        return
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **({} if address else local))
    try:
        yield
    finally:
        ray.shutdown()


def run(job: Job, finished: dict[str, Shard], ray_address: str | None) -> Iterator[Shard]:
    """Converts the units that are not finished, one Ray task each, and yields their shards as they appear."""
    todo = [number for number, unit in enumerate(job.units) if unit.name not in finished]
    if not todo:
        return
    rows_done = sum(unit.rows for unit in job.units if unit.name in finished)
    with ray_session(ray_address), tqdm(total=job.rows, initial=rows_done, unit=" rows", desc=job.split) as bar:
        units = ray.data.from_items(todo, override_num_blocks=len(todo))
        if job.encoding is None:
            tasks = units.map(convert_unit, fn_kwargs={"job": job})
        else:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            actors = {"concurrency": min(gpus, len(todo)), "num_gpus": 1} if gpus else {"concurrency": 1}
            scripts = os.path.dirname(os.path.abspath(__file__))
            tasks = units.map(UnitEncoder, fn_constructor_kwargs={"job": job, "scripts": scripts}, **actors)
        for row in tasks.iter_rows():
            shard = Shard.from_dict(json.loads(row["shard"]))
            if bad := shard.bad_rows:
                logger.warning(f"{shard.name}: {len(bad)} bad rows were left out. The first: {bad[0].reason}")
            bar.update(sum(run.rows for run in shard.source))
            yield shard


def convert_unit(row: dict, job: Job, encoder=None) -> dict[str, str]:
    """Reads the rows of a unit and writes its shard, then what the shard holds, for a run that continues this one.

    Args:
        row: `item`, the unit's number.
        job: the conversion.
        encoder: a `RowEncoder`, where samples are encoded.

    Returns:
        `shard`: the manifest's entry, as JSON.
    """
    unit, folder = job.units[row["item"]], open_folder(job.output_dir)
    labels, bad_rows, ties, samples = Counter(jpg_0=0, jpg_1=0, tie=0), [], [], 0
    with written_whole(folder, unit.name, job.cache_dir) as path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, copybufsize=CHUNK_BYTES) as tar:
            for file, number, result in convert_rows(unit, job, encoder):
                if isinstance(result, ValueError):
                    bad_rows.append(BadRow(file, number, str(result)))
                    continue
                label, members = result
                labels[LABELS[label]] += 1
                if is_sample(result, job):
                    ties += [samples] if label == 0.5 else []
                    add_sample(tar, f"{job.split}-{job.files.index(file):05d}-{number:08d}", members)
                    samples += 1
        with open(path, "rb") as file:
            digest, size = sha256(file), file.tell()
    shard = Shard(unit.name, job.split, samples, size, digest, dict(labels), unit.source, bad_rows, ties)
    with written_whole(folder, f".{unit.name[:-4]}.json", job.cache_dir) as path:
        path.write_text(json.dumps({"plan": job.plan, "shard": asdict(shard)}), encoding="utf-8")
    return {"shard": json.dumps(asdict(shard))}


class UnitEncoder:
    """An actor: loads VAE and text encoders once, and converts one unit after the other.

    Args:
        job: the conversion.
        scripts: folder of this file. It must be there on the actor's node, too.
    """

    def __init__(self, job: Job, scripts: str) -> None:
        sys.path.append(scripts)
        from orpo.conversion.encoder import RowEncoder

        self.job, self.encoder = job, RowEncoder(job.encoding.flags)

    def __call__(self, row: dict) -> dict[str, str]:
        return convert_unit(row, self.job, self.encoder)


def convert_rows(
    unit: Unit, job: Job, encoder
) -> Iterator[tuple[str, int, tuple[float, dict[str, bytes]] | ValueError]]:
    """Yields each row's file and number, and its label and the sample's members, or what is wrong with it."""
    rows = ((source.file, *row) for source in unit.source for row in read_rows(job.dataset_path, source))
    while batch := list(islice(rows, encoder.batch_rows if encoder else 1)):
        places = [(file, number) for file, number, _ in batch]
        results = [_attempt(read_pair, values, f"{file}, row {number}") for file, number, values in batch]
        if encoder is not None:
            wanted = [i for i, result in enumerate(results) if is_sample(result, job)]
            named = [("{}, row {}".format(*places[i]), results[i][1]) for i in wanted]
            for i, members in zip(wanted, encoder.encode(named)):
                results[i] = members if isinstance(members, ValueError) else (results[i][0], members)
        for place, result in zip(places, results):
            yield *place, result


def is_sample(result: tuple | ValueError, job: Job) -> bool:
    """Whether a row is to be written: it is good, and no tie unless these are kept."""
    return not isinstance(result, ValueError) and (result[0] != 0.5 or job.keep_ties)


def _attempt(function: Callable, *args):
    """The result, or the ValueError that was raised."""
    try:
        return function(*args)
    except ValueError as error:
        return error


def read_pair(values: dict[str, pa.Scalar], where: str) -> tuple[float, dict[str, bytes]]:
    """Checks a row.

    Returns:
        The label, and the sample's members by extension: images as they are, labels and prompt as text.

    Raises:
        ValueError: label, image or caption is bad; says which and why.
    """
    row = {}
    for name, value in values.items():
        try:
            row[name] = value.as_py()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, for one
            raise ValueError(f"{where}: {name} can't be read: {error}.") from error
    label = parse_label(row.get("label_0", 1.0), where)
    if not isinstance(row["caption"], str):
        raise ValueError(f"{where}: the caption is {printable(repr(row['caption']))}, not text.")
    members = {"original_prompt.txt": row["caption"].encode()}
    for name in ("jpg_0", "jpg_1"):
        image = row[name]["bytes"] if isinstance(row[name], dict) else row[name]
        if not image:
            raise ValueError(f"{where}: {name} is empty.")
        format = open_image(image, f"{where}: {name}").format
        members[f"{name}.{IMAGE_EXTENSIONS.get(format, format.lower())}"] = image
    members["label_0.txt"] = str(label).encode()
    members["label_1.txt"] = str(1 - label).encode()
    return label, members


def add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Appends a sample. Neither time nor owner is recorded, so the same rows give the same bytes."""
    for extension, content in members.items():
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def check_totals(job: Job, shards: list[Shard]) -> str:
    """Accounts for every row of the parquet files, and says what became of them.

    Raises:
        ValueError: rows went missing, or no pairs are left.
    """
    bad_rows = [bad for shard in shards for bad in shard.bad_rows]
    samples = sum(shard.samples for shard in shards)
    ties = sum(shard.labels["tie"] for shard in shards)
    summary = (
        f"{job.dataset_path}, {job.split}: {job.rows} rows, of which {samples} became pairs, {ties} are ties"
        f" ({'kept' if job.keep_ties else 'dropped'}), and {len(bad_rows)} are bad."
    )
    if samples + len(bad_rows) + (0 if job.keep_ties else ties) != job.rows:
        raise ValueError(f"{summary} That does not add up: did the files change? Empty {job.output_dir}, start again.")
    if samples == 0:
        first = f" The first bad one: {bad_rows[0].reason}" if bad_rows else ""
        raise ValueError(f"{summary} So there is nothing to train on.{first}")
    return summary


def finish(job: Job, shards: list[Shard]) -> None:
    """Writes the manifest, then removes what only a run that continues would need."""
    folder = open_folder(job.output_dir)
    names = [entry.path for entry in folder.get_file_info(FileSelector(""))]
    old = read_manifest(job.output_dir) if MANIFEST in names else Manifest()
    encoding = describe_encoding(job, shards) if job.encoding else None
    write_manifest(job.output_dir, old.with_split(job.split, job.plan, shards, encoding))
    for name in filter(re.compile(rf"\.+{job.split}-\d+\.(json|tar\.partial|json\.partial)").fullmatch, names):
        folder.delete_file(name)


def describe_encoding(job: Job, shards: list[Shard]) -> Encoding:
    """The manifest's entry for the encoding: what the first sample of all holds, every other one must hold, too."""
    from orpo.conversion.encoder import describe
    from orpo.shards.tar import walk_samples

    first = next(shard for shard in shards if shard.samples)
    with open_folder(job.output_dir).open_input_stream(first.name) as file:
        _, members = next(walk_samples(file, "r|", 0, 1))
    return describe(job.encoding.flags, members["encoded.safetensors"])


def verify(output_dir: str) -> None:
    """Compares every shard with the manifest and prints what is wrong with them; exit status 1 if anything is."""
    shards = read_manifest(output_dir).shards
    folder = open_folder(output_dir)
    damage = list(filter(None, (find_damage(folder, shard) for shard in tqdm(shards, desc="Verifying"))))
    if damage:
        print(*damage, sep="\n")
        sys.exit(f"{len(damage)} of {len(shards)} shards in {output_dir} are damaged: delete and convert them again.")
    print(f"All {len(shards)} shards in {output_dir} are good.")


if __name__ == "__main__":
    main()
