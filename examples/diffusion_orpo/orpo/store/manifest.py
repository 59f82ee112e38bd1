"""The manifest lists the content of a folder of shards, on this machine or on S3. And how files get there whole."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow.fs import FileType, LocalFileSystem, S3FileSystem, SubTreeFileSystem

from ..runtime import durable
from ..runtime.checksums import sha256_of
from ..runtime.messages import printable
from ..runtime.redaction import without_secrets


MANIFEST = "manifest.json"
VERSION = 1
CHUNK_BYTES = 1 << 22
DTYPES = ("float16", "bfloat16", "float32")  # of latents and embeddings


@dataclass(frozen=True)
class Source:
    """A run of rows of a parquet file: `rows` of them from `first_row` on, counted from 0."""

    file: str
    first_row: int
    rows: int


@dataclass(frozen=True)
class BadRow:
    """A row that could not become a pair, and why."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar file of pairs.

    Attributes:
        name: of the file, in the manifest's folder.
        samples: pairs in it.
        bytes, sha256: of the file.
        labels: good rows by who is preferred, `jpg_0`, `jpg_1` or `tie`; ties count here even where they were dropped;
            and `low_agreement`, where some were, which always are.
        source: the rows that it was made from, in order.
        bad_rows: those among them that `labels` does not count.
        ties: places of the ties among the samples; None in manifests of earlier versions, which don't record them.
        sizes: of the samples' images, as `pack_sizes` makes it; None in manifests of earlier versions.
    """

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    labels: dict[str, int]
    source: list[Source]
    bad_rows: list[BadRow]
    ties: list[int] | None = None
    sizes: list[str] | None = None

    @classmethod
    def from_dict(cls, entry: dict) -> "Shard":
        if not re.fullmatch(r"\w+-\d+\.tar", entry["name"]):
            raise ValueError(f"{entry['name']!r} is not the name of a shard")
        source = [Source(**run) for run in entry["source"]]
        return cls(**entry | {"source": source, "bad_rows": [BadRow(**row) for row in entry["bad_rows"]]})


@dataclass(frozen=True)
class Encoding:
    """Encoded content of a split's samples, in place of images and prompts.

    Attributes:
        identity: everything that they depend on: VAE, text encoders, resolution, precision.
        libraries: versions that made them.
        tensors: dtype and shape of each of a sample's tensors, by name.
        moments: shapes of its moments, one for each aspect-ratio bucket; empty where there is a square alone.
    """

    identity: dict[str, str]
    libraries: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    moments: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_dict(cls, entry: dict) -> "Encoding":
        for name in ("identity", "libraries"):
            if not all(isinstance(text, str) for item in entry[name].items() for text in item):
                raise ValueError(f"the encoding's {name} are no texts")
        tensors = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in entry["tensors"].items()}
        sizes = {"original_sizes": ("int64", (2, 2)), "crop_top_lefts": ("int64", (2, 2))}
        moments = {name: tensors.get("moments_0") for name in ("moments_0", "moments_1")}
        if not (sizes | moments).items() <= tensors.items():
            raise ValueError(f"the encoding is of {printable(repr(tensors))}")
        for name, (dtype, shape) in tensors.items():
            if dtype not in DTYPES and name not in sizes or not all(type(n) is int and n > 0 for n in shape):
                raise ValueError(f"the encoding's {printable(name)} is of {printable(repr((dtype, shape)))}")
        moments_of_buckets = tuple(tuple(shape) for shape in entry.get("moments", ()))
        if not all(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape) for shape in moments_of_buckets):
            raise ValueError(f"the encoding's moments are {printable(repr(moments_of_buckets))}")
        return cls(entry["identity"], entry["libraries"], tensors, moments_of_buckets)

    def tensors_of(self, bucket: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a sample of a bucket must hold."""
        if not self.moments:
            return self.tensors
        dtype = self.tensors["moments_0"][0]
        return self.tensors | dict.fromkeys(("moments_0", "moments_1"), (dtype, self.moments[bucket]))


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder.

    Attributes:
        shards: ordered by split and name.
        plans: the fingerprint of each split's plan, so that no two plans get mixed.
        encodings: of those splits that hold encoded samples.
    """

    shards: list[Shard] = field(default_factory=list)
    plans: dict[str, str] = field(default_factory=dict)
    encodings: dict[str, Encoding] = field(default_factory=dict)

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def with_split(self, split: str, plan: str, shards: list[Shard], encoding: Encoding | None = None) -> "Manifest":
        """The same with these shards in place of those that the split had."""
        others = [shard for shard in self.shards if shard.split != split]
        ordered = sorted(others + shards, key=lambda shard: (shard.split, shard.name))
        encodings = {name: value for name, value in self.encodings.items() if name != split}
        encodings |= {split: encoding} if encoding else {}
        return Manifest(ordered, dict(sorted((self.plans | {split: plan}).items())), dict(sorted(encodings.items())))


def open_folder(url: str) -> SubTreeFileSystem:
    """A file system whose root is a local folder, or s3://bucket/prefix by AWS_ENDPOINT_URL and the other AWS_* variables.

    Raises:
        ValueError: the URL carries credentials.
    """
    if not url.startswith("s3://"):
        return SubTreeFileSystem(str(Path(url).absolute()), LocalFileSystem())
    if "@" in urlsplit(url).netloc:
        raise ValueError(
            f"{without_secrets(url)} came with credentials: put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " instead."
        )
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    s3 = S3FileSystem(endpoint_override=endpoint.netloc or None, scheme=endpoint.scheme or "https")
    return SubTreeFileSystem(url.removeprefix("s3://").rstrip("/"), s3)


def is_local(folder: SubTreeFileSystem) -> bool:
    return isinstance(folder.base_fs, LocalFileSystem)


@contextmanager
def written_whole(folder: SubTreeFileSystem, name: str, work_dir: str | None = None) -> Iterator[Path]:
    """Yields a path to write to; when the block ends the folder has that file, complete. After an error it has not.

    Args:
        folder: from `open_folder`.
        name: of the file in the folder.
        work_dir: where files wait for their upload. Default: the system's temporary folder.
    """
    if is_local(folder):
        with durable.written_whole(Path(folder.base_path, name)) as partial:
            yield partial
        return
    partial = Path(work_dir or tempfile.gettempdir(), f".{folder.base_path}{name}.partial".replace("/", "-"))
    try:
        yield partial
        _upload(partial, folder, name)
    finally:
        partial.unlink(missing_ok=True)


def _upload(path: Path, folder: SubTreeFileSystem, name: str) -> None:
    """Copies a file to S3, where it appears when the upload is complete. After an error there is no such object."""
    with open(path, "rb") as source:
        target = folder.open_output_stream(name)
        try:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
            target.close()
        except BaseException:
            target.close()  # Arrow has no abort: closing publishes what there is
            folder.delete_file(name)
            raise


def read_manifest(url: str) -> Manifest:
    """Reads the manifest of a folder of shards.

    Args:
        url: local folder, or s3://bucket/prefix.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not a manifest, or of another version.
    """
    folder = open_folder(url)
    if folder.get_file_info(MANIFEST).type == FileType.NotFound:
        raise FileNotFoundError(f"{url} has no {MANIFEST}: run convert_to_webdataset.py to the end to make it.")
    with folder.open_input_stream(MANIFEST) as file:
        content = file.read()
    try:
        entries = json.loads(content)
        if entries["version"] != VERSION:
            raise ValueError(f"its version is {entries['version']!r} instead of {VERSION}")
        return Manifest(
            [Shard.from_dict(entry) for entry in entries["shards"]], entries.get("plans", {}), read_encodings(entries)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{url}/{MANIFEST} can't be read ({printable(repr(error))}): convert the data set again."
        ) from error


def read_encodings(entries: dict) -> dict[str, Encoding]:
    """The encodings in a manifest's entries, by split.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they are malformed.
    """
    return {split: Encoding.from_dict(entry) for split, entry in entries.get("encodings", {}).items()}


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all."""
    entries = {"version": VERSION, **asdict(manifest)}
    if not manifest.encodings:
        del entries["encodings"]
    with written_whole(open_folder(url), MANIFEST) as path:
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def find_damage(folder: SubTreeFileSystem, shard: Shard) -> str | None:
    """Reads a shard to its end and says what is wrong with it: missing, wrong size or wrong content; else None."""
    info = folder.get_file_info(shard.name)
    if info.type != FileType.File:
        return f"{shard.name} is missing"
    if info.size != shard.bytes:
        return f"{shard.name} has {info.size} bytes, the manifest says {shard.bytes}"
    with folder.open_input_stream(shard.name) as file:
        found = sha256_of(file)
    return None if found == shard.sha256 else f"{shard.name} has SHA-256 {found}, the manifest says {shard.sha256}"
