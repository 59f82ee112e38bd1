"""The conversion on Ray: one task per shard reads its rows and writes it."""

import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pyarrow as pa
import ray
import ray.data
from tqdm.auto import tqdm

from ..pairs.bad_pair import BadPair
from ..pairs.columns import Columns
from ..pairs.image import MIN_SIDE, decode_at_least, open_image, place_of_image, upright_size
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..runtime.checksums import sha256_of
from ..runtime.cores import num_cores
from ..runtime.messages import printable
from .folder import CHUNK_BYTES, open_folder, written_whole
from .index import BadRow, Shard, pack_sizes
from .parquet import read_rows
from .plan import Job, Unit
from .tar import add_sample


logger = logging.getLogger(__name__)

LABELS = {1.0: "jpg_0", 0.0: "jpg_1", TIE: "tie", LOW_AGREEMENT: "low_agreement"}
IMAGE_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}  # others: Pillow's name of the format
OBJECT_STORE_BYTES = 200 << 20  # no image goes through it


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Ray on a cluster, else on this machine with little memory; or the one that already runs in this process.

    Raises:
        ConnectionError: the cluster can't be reached.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    package = Path(__file__).parents[1]  # a cluster's nodes may not have it: Ray sends it to them
    options = {"runtime_env": {"py_modules": [str(package)]}, "logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address or "local", **options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        where = f"--ray_address={address}" if address else "Ray on this machine"
        raise ConnectionError(
            f"{where} can't be used: {printable(str(error), 500)}. A cluster that requires a token takes it from the"
            " environment of this program and of every node: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or"
            " RAY_AUTH_TOKEN_PATH (on the head node it is in ~/.ray/auth_token)."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run(job: Job, finished: dict[str, Shard]) -> Iterator[Shard]:
    """Converts the units that are not finished, one Ray task each, and yields their shards as they appear."""
    todo = [number for number, unit in enumerate(job.units) if unit.name not in finished]
    if not todo:
        return
    rows_done = sum(unit.rows for unit in job.units if unit.name in finished)
    with tqdm(total=job.rows, initial=rows_done, unit=" rows", desc=job.split) as bar:
        units = ray.data.from_items(todo, override_num_blocks=len(todo))
        if job.encoding is None:
            tasks = units.map(convert_unit, fn_kwargs={"job": job})
        else:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            actors = {"concurrency": min(gpus, len(todo)), "num_gpus": 1} if gpus else {"concurrency": 1}
            tasks = units.map(UnitEncoder, fn_constructor_kwargs={"job": job}, **actors)
        for row in tasks.iter_rows():
            shard = Shard.from_dict(json.loads(row["shard"]))
            if bad := shard.bad_rows:
                logger.warning(f"{shard.name}: {len(bad)} bad rows were left out. The first: {bad[0].reason}")
            bar.update(sum(run.rows for run in shard.source))
            yield shard


def convert_unit(row: dict, job: Job, encoder=None) -> dict[str, str]:
    """Reads the rows of a unit and writes its shard, then a summary of it, for a run that continues this one.

    Args:
        row: `item`, the unit's number.
        job: the conversion.
        encoder: a `PairEncoder`, where samples are encoded.

    Returns:
        `shard`: the manifest's entry, as JSON.
    """
    unit, folder = job.units[row["item"]], open_folder(job.output_dir)
    if encoder is not None:
        encoder.start_shard()
    labels, bad_rows, ties, sizes = Counter(jpg_0=0, jpg_1=0, tie=0), [], [], []
    with written_whole(folder, unit.name, job.staging_dir) as path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, copybufsize=CHUNK_BYTES) as tar:
            for file, number, result, sizes_of_row in convert_rows(unit, job, encoder):
                if isinstance(result, BadPair):
                    bad_rows.append(BadRow(file, number, str(result)))
                    continue
                label, members = result
                labels[LABELS[label]] += 1
                if is_sample(result, job):
                    ties += [len(sizes)] if label == TIE else []
                    add_sample(tar, f"{job.split}-{job.files.index(file):05d}-{number:08d}", members)
                    sizes.append(sizes_of_row)
        with open(path, "rb") as file:
            digest, size = sha256_of(file), file.tell()
    shard = Shard(
        unit.name, len(sizes), size, digest, ties, pack_sizes(sizes), job.split, dict(labels), unit.source, bad_rows
    )
    with written_whole(folder, f".{unit.name[:-4]}.json", job.staging_dir) as path:
        path.write_text(json.dumps({"plan": job.plan, "shard": asdict(shard)}), encoding="utf-8")
    return {"shard": json.dumps(asdict(shard))}


class UnitEncoder:
    """An actor: loads VAE and text encoders once, and converts one unit after the other.

    Args:
        job: the conversion.
    """

    def __init__(self, job: Job) -> None:
        import torch

        from .encode import PairEncoder

        torch.set_num_threads(num_cores())  # Ray sets it to 1
        self.job, self.encoder = job, PairEncoder(job.encoding)

    def __call__(self, row: dict) -> dict[str, str]:
        return convert_unit(row, self.job, self.encoder)


def convert_rows(
    unit: Unit, job: Job, encoder
) -> Iterator[tuple[str, int, tuple[float, dict[str, bytes]] | BadPair, tuple[int, ...]]]:
    """Yields each row's file and number, its label and the sample's members, or its problem; and its images' sizes."""
    rows = (
        (source.file, *row)
        for source in unit.source
        for row in read_rows(job.dataset_path, source, job.columns[source.file])
    )
    while batch := list(islice(rows, encoder.batch_rows if encoder else 1)):
        places = [(file, number) for file, number, _ in batch]
        results = [
            attempt(read_pair, job.columns[file], cells, f"{file}, row {number}", job.keep_ties)
            for file, number, cells in batch
        ]
        sizes = [sizes_of(result[1]) if is_sample(result, job) else () for result in results]
        if encoder is not None:
            wanted = [i for i, result in enumerate(results) if is_sample(result, job)]
            named = [("{}, row {}".format(*places[i]), results[i][1]) for i in wanted]
            for i, members in zip(wanted, encoder.encode(named)):
                results[i] = members if isinstance(members, BadPair) else (results[i][0], members)
        for place, result, sizes_of_row in zip(places, results, sizes):
            yield *place, result, sizes_of_row


def is_sample(result: tuple | BadPair, job: Job) -> bool:
    """Whether a row is written: it is good, enough votes agree, and it is not a tie unless these are kept."""
    return not isinstance(result, BadPair) and result[0] != LOW_AGREEMENT and (result[0] != TIE or job.keep_ties)


def read_pair(
    columns: Columns, cells: Mapping[str, pa.Scalar], where: str, keep_ties: bool = False
) -> tuple[float, dict[str, bytes]]:
    """Checks a row as training does; images are decoded at a small scale, to see whether they can be.

    Args:
        columns: of the table.
        cells: of the columns that are used.
        where: names the row in errors.
        keep_ties: whether a tie becomes a sample, too. Else it has no members, as a pair of low agreement has none, and
            is not looked at.

    Returns:
        The label, and the sample's members by extension: images as they are, labels and prompt as text.

    Raises:
        BadPair: label, image or prompt is bad; says which and why.
    """
    row = columns.read(cells, where, ties_too=keep_ties)
    if row.problems:
        raise row.problems[0]
    if row.label == LOW_AGREEMENT or row.label == TIE and not keep_ties:
        return row.label, {}
    members = {"original_prompt.txt": row.prompt.encode()}
    for name, column, image in zip(("jpg_0", "jpg_1"), columns.images, row.images):
        place = place_of_image(cells[column].as_py(), column, where)
        decode_at_least(image, place, (MIN_SIDE, MIN_SIDE))
        format = open_image(image, place).format
        members[f"{name}.{IMAGE_EXTENSIONS.get(format, format.lower())}"] = image
    members["label_0.txt"] = str(row.label).encode()
    members["label_1.txt"] = str(1 - row.label).encode()
    return row.label, members


def sizes_of(members: dict[str, bytes]) -> tuple[int, ...]:
    """Heights and widths of a sample's images, upright."""
    images = [members[name] for name in sorted(members) if name.startswith("jpg_")]
    return tuple(side for image in images for side in upright_size(open_image(image, "")))


def attempt(function, *args):
    """The result, or the BadPair that was raised."""
    try:
        return function(*args)
    except BadPair as bad:
        return bad
