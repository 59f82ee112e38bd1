"""Reads one shard in sequence: its samples, as far as the archive is intact."""

import logging
import re
import tarfile
from collections.abc import Iterator

from webdataset.gopen import Pipe

from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .opening import open_url, read_to_end
from .tar import WANTED, walk_samples


logger = logging.getLogger(__name__)

# First bytes of compressed files: their kind, and the program that unpacks them.
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}


class BrokenShard(ValueError):
    """A shard that is not a tar archive, or is truncated."""


def read_samples(url: str, first: int, last: int, count: int | None = None) -> Iterator[tuple[int, dict]]:
    """Reads samples `first` to `last` - 1 of a shard, as far as it can be read.

    Args:
        url: of the shard.
        first, last: places in it.
        count: samples that it should hold, if that is known.

    Yields:
        The sample's place in the shard, and its members, as `walk_samples` gives them.

    Raises:
        OSError: the URL can't be read, or the command fails.
        ValueError: the shard is compressed, or goes on after `count` samples.
    """
    try:
        for ordinal, members in walk_shard(url, first, last + 1 if last == count else last):
            if ordinal == count:
                raise ValueError(
                    f"{without_secrets(url)} holds more than the {count} samples that its manifest, or an earlier look"
                    " at it, says. Convert the data again, or remove the manifest."
                )
            if ordinal >= first:
                yield ordinal, members
    except BrokenShard as error:
        logger.warning(str(error))


def walk_shard(url: str, first: int, last: int, wanted: re.Pattern = WANTED) -> Iterator[tuple[int, dict]]:
    """Place and members of the samples before `last`, as `walk_samples` gives them.

    Raises:
        BrokenShard: the archive is damaged or truncated.
        OSError: the URL can't be read, or the command fails.
        ValueError: the shard is compressed.
    """
    broken, at_end = None, True
    with open_url(url) as stream:
        is_pipe = isinstance(stream, Pipe)
        _refuse_packed(url, (stream.stream if is_pipe else stream).peek(8))
        try:
            at_end = yield from walk_samples(stream, "r|" if is_pipe else "r:", first, last, wanted)
        except (tarfile.TarError, EOFError) as error:
            broken = error
        if at_end and is_pipe:
            read_to_end(stream)
    if broken:
        raise BrokenShard(
            f"{without_secrets(url)} can't be read to its end: {printable(str(broken))}. Convert it again, or leave it out."
        )


def _refuse_packed(url: str, head: bytes) -> None:
    for magic, (kind, unpack) in PACKED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{without_secrets(url)} is compressed ({kind}), and shards are read as plain tar archives: unpack it"
                f" with `{unpack}`, which costs little space, as images are compressed already."
            )
