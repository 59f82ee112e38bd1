"""Files and folders that are complete or absent, whatever ends the process or the machine.

New content is written under another name and forced to disk (`fsync`), then renamed, which POSIX does in one step; then
the folder with the new name is forced to disk too. Outdated content loses its name first, and is then removed.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Waits until an open file is on disk; not on drives that have no such operation, as some network drives have none."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def sync_all(folder: Path) -> None:
    """Waits until everything in a folder is on disk, at any depth."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def rename(source: Path, target: Path) -> None:
    """Renames within a folder, durably. A file called `target` is replaced in the same step."""
    os.replace(source, target)
    sync(target.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to. When the block ends, the file is complete under its name; after an error nothing changed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is complete or absent."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Removes a folder such that it is never seen half-empty under its own name."""
    removed = folder.with_name(f".{folder.name}.removed")
    rename(folder, removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> None:
    """Removes everything that a killed process had not finished writing or removing."""
    for path in folder.glob(".*"):
        if path.suffix in (".partial", ".removed") and path.is_dir():
            shutil.rmtree(path)


def make_readable(path: Path) -> None:
    """Gives a file the mode that new files have here (`umask`), where a library made it readable only for its owner."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()
