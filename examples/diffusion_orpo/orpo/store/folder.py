"""A folder of shards on this machine or on S3: how files get there complete, its manifest, and what is damaged."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow.fs import FileType, LocalFileSystem, S3FileSystem, SubTreeFileSystem

from ..runtime import durable
from ..runtime.checksums import sha256_of
from ..runtime.redaction import without_secrets
from .index import MANIFEST, Manifest, Shard


CHUNK_BYTES = 1 << 22


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
        return Manifest.parse(file.read(), f"{url}/{MANIFEST}")


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all."""
    with written_whole(open_folder(url), MANIFEST) as path:
        path.write_text(manifest.to_json(), encoding="utf-8")


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
