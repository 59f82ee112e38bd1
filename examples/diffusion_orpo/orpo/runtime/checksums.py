"""A folder's `SHA256SUMS`, as `sha256sum --check SHA256SUMS` reads it: shows whether any file has changed since."""

import hashlib
import re
from pathlib import Path


SUMS_FILE = "SHA256SUMS"
BLOCK_BYTES = 1 << 20


class Damaged(ValueError):
    """A folder is not what was written; the message names the file."""


def write_checksums(folder: Path) -> None:
    """Lists every file of a folder, at any depth, with its checksum."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(listed_files(folder))]
    (folder / SUMS_FILE).write_text("".join(lines))


def verify_checksums(folder: Path) -> None:
    """Compares every file with its checksum.

    Raises:
        Damaged: a file is missing, was changed, was added or can't be read.
    """
    try:
        expected = read_checksums(folder)
        for name, digest in expected.items():
            if sha256(folder / name) != digest:
                raise Damaged(f"{folder / name} is damaged: its checksum is not the one in {SUMS_FILE}.")
    except OSError as error:
        raise Damaged(f"{error.filename or folder} can't be read: {error.strerror or error}.") from error
    added = listed_files(folder) - expected.keys()
    if added:
        raise Damaged(
            f"{folder / min(added)} is not listed in {SUMS_FILE}: it was added later, or the list is damaged."
        )


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by name of file."""
    checksums = {}
    for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines(keepends=True):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^\s].*)\n", line)
        if match is None:
            raise Damaged(f"{folder / SUMS_FILE} is damaged.")
        checksums[match[2]] = match[1]
    return checksums


def listed_files(folder: Path) -> set[str]:
    """Names, relative to the folder, of the files that the list covers: all but itself."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return names - {SUMS_FILE}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file) -> str:
    """Hex digest of an open binary file, read in blocks."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
