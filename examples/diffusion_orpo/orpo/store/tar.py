"""The samples of a tar archive, read as if its author were hostile: no link is followed, nothing is written to disk.

Members that follow one another and share a key, the name up to its first dot, are a sample. Folders, and files without a
key, such as those that macOS adds (`._name`, `.DS_Store`), belong to none. Case is ignored after the key.
"""

import hashlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import BinaryIO

import numpy as np
from webdataset.gopen import Pipe
from webdataset.tariterators import base_plus_ext

from ..pairs.image import MAX_FILE_BYTES
from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .locate import BUFFER_BYTES, open_url


logger = logging.getLogger(__name__)

# The members of a sample; others are skipped, and the first ones named.
WANTED = re.compile(r"(jpg_[01]\..+|original_prompt\.txt|label_[01]\.txt|encoded\.safetensors)", re.DOTALL)
OTHERS = "__others__"
OTHERS_NAMED = 32
REPEATED = "an earlier sample has the same key"

# First bytes of compressed files: their kind, and the program that unpacks them.
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}

# Headers that give the next member another name or size, or do so for all members.
EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)

MAX_HEADER_BYTES = 1 << 12  # of a long name, or of pax records: parsing them takes quadratic time
MAX_SIZE = 1 << 30  # of a skipped member: tarfile reads on past the end of a stream for as long as a header says
BLOCK_BYTES = 512


class StrictTarInfo(tarfile.TarInfo):
    """Raises ReadError for any fault of a header, or of the archive's end.

    tarfile takes a damaged header or a truncated archive for a regular end, and crafted headers make it raise other
    exceptions, loop endlessly or use gigabytes of memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        for number in (buf[124:136], buf[148:156]):  # size and checksum; Python's own reading takes 1_0 for 8
            if not re.fullmatch(rb" *[0-7]*[ \0]*|[\x80-\xff].*", number, re.DOTALL):
                raise tarfile.ReadError("a header whose numbers are not numbers")
        if not 0 <= header.size <= (MAX_HEADER_BYTES if header.type in EXTENSIONS else MAX_SIZE):
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(archive)
        except (tarfile.EOFHeaderError, tarfile.ReadError):  # the end marker; or read already
            raise
        except Exception as error:  # HeaderErrors; ValueError and RecursionError, among others, of crafted ones
            raise tarfile.ReadError(str(error)) from None
        if "\0" in member.name:
            raise tarfile.ReadError("a name with a zero byte")
        if {"path", "size"} & archive.pax_headers.keys():
            raise tarfile.ReadError("one name or size for all members")
        if member.isreg() and not member.issparse():
            content_end = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
            if not 0 <= member.size <= MAX_SIZE or archive.offset != content_end:  # a pax record gives another size
                raise tarfile.ReadError(f"a member of {member.size} bytes")
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """tarfile's hook for a header of any type. If a member has two extensions, programs differ in which one they apply."""
        is_extension = self.type in EXTENSIONS
        if is_extension and getattr(archive, "is_extended", False):
            raise tarfile.ReadError("two headers that describe one member")
        archive.is_extended = is_extension
        return super()._proc_member(archive)


class BrokenShard(ValueError):
    """A shard that is not a tar archive, or is truncated."""


def goes_on(url: str, count: int) -> ValueError:
    return ValueError(
        f"{without_secrets(url)} holds more than the {count} samples that its manifest, or an earlier look at it, says."
        " Convert the data again, or remove the manifest."
    )


class Hashed:
    """Counts and hashes what is read of a stream.

    Attributes:
        bytes: that were read.
        digest: SHA-256 of them.
    """

    def __init__(self) -> None:
        self.stream: BinaryIO | Pipe | None = None
        self.bytes, self.digest = 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.bytes += len(content)
        self.digest.update(content)
        return content


@contextmanager
def open_shard(url: str, hashed: Hashed | None = None) -> Iterator[tarfile.TarFile]:
    """Opens a shard for `walk_samples`.

    Args:
        url: of the shard.
        hashed: gets all bytes of the shard, where that is walked to its end.

    Raises:
        BrokenShard: on leaving, where the archive is damaged or truncated.
        OSError: the URL can't be read, or the command fails.
        ValueError: the shard is compressed.
    """
    with open_url(url) as stream:
        is_pipe = isinstance(stream, Pipe)
        _refuse_packed(url, (stream.stream if is_pipe else stream).peek(8))
        source = stream
        if hashed is not None:
            hashed.stream, source = stream, hashed
        try:
            with open_tar(source, "r:" if source is stream and not is_pipe else "r|") as tar:
                yield tar
        except (tarfile.TarError, EOFError) as error:
            if is_pipe:
                _read_to_end(stream)
                stream.wait_for_child()
            raise BrokenShard(
                f"{without_secrets(url)} can't be read to its end: {printable(str(error))}. Convert it again, or leave it"
                " out."
            ) from None
        if tar.was_walked:
            _read_to_end(source)
            if is_pipe:
                stream.wait_for_child()


def _read_to_end(stream: BinaryIO | Pipe | Hashed) -> None:
    """Of a command: one that fails may have ended its output early, or after the archive."""
    while stream.read(BUFFER_BYTES):
        pass


def _refuse_packed(url: str, head: bytes) -> None:
    for magic, (kind, unpack) in PACKED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{without_secrets(url)} is compressed ({kind}), and shards are read as plain tar archives: unpack it"
                f" with `{unpack}`, which costs little space, as images are compressed already."
            )


def open_tar(stream: BinaryIO | Pipe, mode: str) -> tarfile.TarFile:
    """Opens an archive, by tarfile's mode "r:" or, where the stream can't be sought in, "r|".

    Raises:
        tarfile.TarError: it is none. While it is walked too, and then EOFError as well.
    """
    tar = tarfile.open(fileobj=stream, mode=mode, tarinfo=StrictTarInfo)
    tar.was_walked = False
    return tar


def walk_samples(
    tar: tarfile.TarFile, first: int, last: int, wanted: re.Pattern = WANTED
) -> Iterator[tuple[int, dict]]:
    """Place and members of the samples before `last`; the members of those before `first` are skipped unread.

    Args:
        tar: from `open_tar`. Once it is through, its `was_walked` is true.
        first, last: places of samples.
        wanted: the members to read; others are skipped.

    Yields:
        A sample's place, and its members: extension to bytes; its `__key__`; where a member can't be accepted,
        `__error__`, which says why; and in `__others__` extensions of members that were skipped.
    """
    keys = set()
    for ordinal, (key, members) in enumerate(groupby(filter(_is_of_sample, tar), key=_key)):
        if ordinal >= last:
            return
        sample = _read_sample(tar, members, wanted) if ordinal >= first else {}
        if key in keys:
            sample["__error__"] = REPEATED
        keys.add(key)
        yield ordinal, sample | {"__key__": key}
    tar.was_walked = True


@dataclass(frozen=True)
class Layout:
    """Where the samples of a local shard are.

    Attributes:
        offsets: of each sample, as far as the archive is intact (n,).
        repeated: places of the samples whose key an earlier one has.
    """

    offsets: np.ndarray
    repeated: frozenset[int]


@lru_cache(maxsize=1 << 14)
def find_layout(path: str, size: int, modified_ns: int) -> Layout:
    """Finds the samples of a local shard by its headers alone. What is damaged is logged and left out.

    Args:
        path: of the file.
        size, modified_ns: of this version of it.
    """
    offsets, keys, repeated = [], set(), []
    try:
        with open_shard(path) as tar:
            for key, members in groupby(filter(_is_of_sample, tar), key=_key):
                offset = next(members).offset
                for _ in members:
                    pass
                repeated += [len(offsets)] if key in keys else []
                keys.add(key)
                offsets.append(offset)
    except BrokenShard as error:
        logger.warning(str(error))
    return Layout(np.array(offsets, dtype=np.int64), frozenset(repeated))


def read_at(path: str, ordinal: int, count: int | None = None) -> dict | None:
    """The members of one sample of a local shard, as `walk_samples` gives them; None where the shard ends before it.

    Raises:
        ValueError: the shard is compressed, or goes on after `count` samples.
    """
    status = os.stat(path)
    layout = find_layout(path, status.st_size, status.st_mtime_ns)
    if count is not None and len(layout.offsets) > count:
        raise goes_on(path, count)
    if ordinal >= len(layout.offsets):
        return None
    with open(path, "rb") as file:
        file.seek(int(layout.offsets[ordinal]))
        _, members = next(walk_samples(open_tar(file, "r:"), 0, 1))
    return members | ({"__error__": REPEATED} if ordinal in layout.repeated else {})


def _read_sample(tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo], wanted: re.Pattern) -> dict:
    sample, others = {}, []
    for member in members:
        extension = (base_plus_ext(member.name)[1] or "").lower()
        if not wanted.fullmatch(extension):
            others += [extension] if len(others) < OTHERS_NAMED else []
            continue
        if not member.isreg() or member.issparse():
            problem = "is a link, a sparse file or not a file"
        elif member.size > MAX_FILE_BYTES:
            problem = f"has {member.size} bytes, more than {MAX_FILE_BYTES}"
        elif _stem(extension) in map(_stem, sample):
            problem = "is there twice"
        else:
            sample[extension] = tar.extractfile(member).read()
            continue
        sample["__error__"] = f"{printable(extension)} {problem}"
    return sample | ({OTHERS: others} if others else {})


def _is_of_sample(member: tarfile.TarInfo) -> bool:
    """False for files without a key and for folders, except a folder in place of a member: it is seen, and refused."""
    key, extension = base_plus_ext(member.name)
    if member.isdir():
        return key is not None and WANTED.fullmatch(extension.lower()) is not None
    return key is not None or not member.isreg() or member.issparse()


def _key(member: tarfile.TarInfo) -> str:
    return base_plus_ext(member.name)[0] or member.name


def _stem(extension: str) -> str:
    return extension.partition(".")[0]


def add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Appends a sample. Neither time nor owner is recorded, so the same rows give the same bytes."""
    for extension, content in members.items():
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
