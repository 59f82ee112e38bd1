"""The samples of a tar archive, read as if its author were hostile: no link is followed, nothing is written to disk.

Members that follow one another and share a key, the name up to its first dot, are a sample. Folders, and files without a
key, such as those that macOS adds (`._name`, `.DS_Store`), belong to none. Case is ignored after the key.
"""

import re
import tarfile
from collections.abc import Generator, Iterator
from itertools import groupby
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from ..pairs.image import MAX_FILE_BYTES
from ..runtime.messages import printable


# The members of a sample; others are skipped, and the first ones named.
WANTED = re.compile(r"(jpg_[01]\..+|original_prompt\.txt|label_[01]\.txt|encoded\.safetensors)", re.DOTALL)
OTHERS = "__others__"
OTHERS_NAMED = 32

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


def walk_samples(
    stream: BinaryIO, mode: str, first: int, last: int, wanted: re.Pattern = WANTED
) -> Generator[tuple[int, dict], None, bool]:
    """Place and members of the samples before `last`; the members of those before `first` are skipped unread.

    Args:
        stream: the archive.
        mode: tarfile's, "r:" or, where the stream can't be sought in, "r|".
        first, last: places of samples.
        wanted: the members to read; others are skipped.

    Yields:
        A sample's place, and its members: extension to bytes; its `__key__`; where a member can't be accepted,
        `__error__`, which says why; and in `__others__` extensions of members that were skipped.

    Returns:
        Whether the archive was read to its end.

    Raises:
        tarfile.TarError, EOFError: the archive is damaged or truncated.
    """
    keys = set()
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=StrictTarInfo) as tar:
        for ordinal, (key, members) in enumerate(groupby(filter(_is_of_sample, tar), key=_key)):
            if ordinal >= last:
                return False
            sample = _read_sample(tar, members, wanted) if ordinal >= first else {}
            if key in keys:
                sample["__error__"] = "an earlier sample has the same key"
            keys.add(key)
            yield ordinal, sample | {"__key__": key}
    return True


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
