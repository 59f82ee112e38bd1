"""Where shards are, and how one is opened: a file, a URL that `curl` or `aws` reads, or the output of a command."""

import glob
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import braceexpand
from webdataset.gopen import Pipe, gopen
from webdataset.utils import enforce_security

from ..runtime.redaction import without_secrets
from ..runtime.signals import SIGNALS


BUFFER_BYTES = 1 << 20
COMPRESSED = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")


def is_remote(url: str) -> bool:
    """Whether it is a URL or a command, not a path."""
    return re.match(r"[a-z0-9]+:", url) is not None


def shard_name(url: str) -> str:
    """`00000.tar` of a path, a URL, or a command that names it."""
    found = re.findall(r"[^/\s'\"=]+\.tar\b", url)
    if not found:
        raise ValueError(f"--dataset_path={without_secrets(url)} names no *.tar shard.")
    return found[-1]


def expand(pattern: str) -> list[str]:
    """The URLs of a folder, a path with braces or wildcards, a URL with braces, or a command; local ones must exist."""
    if is_remote(pattern):
        return list(braceexpand.braceexpand(pattern))
    pattern = os.path.expanduser(pattern)
    if Path(pattern).is_dir():
        return _files_of_folder(Path(pattern))
    paths = list(braceexpand.braceexpand(pattern))
    found = [path for one in paths for path in ([one] if Path(one).is_file() else sorted(glob.glob(one)) or [one])]
    missing = [path for path in found if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"--dataset_path={pattern}: there is no {missing[0]} ({len(missing)} of {len(found)} missing)."
        )
    _refuse_compressed(pattern, found)
    return found


def _files_of_folder(folder: Path) -> list[str]:
    found = sorted(str(path) for path in folder.iterdir() if path.suffix == ".tar")
    if not found:
        _refuse_compressed(str(folder), [str(path) for path in folder.iterdir()])
        raise ValueError(f"--dataset_path={folder} is a folder without *.tar files.")
    splits = {re.sub(r"-?\d*\.tar$", "", Path(path).name) for path in found}
    if len(splits) > 1:
        raise ValueError(
            f"--dataset_path={folder} holds shards of several splits, {', '.join(sorted(splits))}: name one, as in"
            f" '{folder / min(splits)}-*.tar'."
        )
    return found


def _refuse_compressed(pattern: str, paths: Iterable[str]) -> None:
    compressed = [path for path in paths if any(Path(path).match(kind) for kind in COMPRESSED)]
    if compressed:
        raise ValueError(
            f"--dataset_path={pattern} has compressed shards ({compressed[0]}), and shards are read as plain tar archives:"
            " unpack them with `gunzip`, `bunzip2`, `unxz` or `unzstd`. That costs little space, as images are"
            " compressed already."
        )


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO | Pipe]:
    """Opens a URL for reading. A command ends with the block.

    Raises:
        OSError: it can't be read, or the command fails.
        ValueError: nothing can read such a URL, or it is a command and WDS_SECURE forbids them.
    """
    if not is_remote(url):
        with open(url, "rb") as file:
            yield file
        return
    pipe = _start(url)
    try:
        yield pipe
    except OSError:  # webdataset's message is the whole command, which may carry a token
        raise OSError(f"{without_secrets(url)} can't be read: exit {pipe.status}. Try the command by hand.") from None
    finally:
        pipe.proc.kill()
        pipe.proc.wait()
        pipe.stream.close()


def _start(url: str) -> Pipe:
    """Starts the command that reads a URL. A signal to the whole process group does not reach it: the last step needs its data."""
    if url.startswith("pipe:") and enforce_security:
        raise ValueError(f"WDS_SECURE is set in the environment: refusing to run {without_secrets(url)}")
    if url.startswith("s3:") and "@" in urlsplit(url).netloc:
        raise ValueError(
            f"--dataset_path={without_secrets(url)} came with credentials: put them into AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY instead."
        )
    own_session = {"mode": "rb", "bufsize": BUFFER_BYTES, "start_new_session": True}
    if url.startswith("s3:"):
        return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], **own_session)
    if url.startswith("pipe:"):  # status 141: we closed it early
        return Pipe(url.removeprefix("pipe:"), shell=True, ignore_status=[141], **own_session)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which `curl`, unlike a shell, keeps
    try:
        pipe = gopen(url, "rb", bufsize=BUFFER_BYTES)
        if not isinstance(pipe, Pipe):
            raise ValueError("file: and the like")
        return pipe
    except ValueError:  # webdataset's own message has the whole URL in it
        raise ValueError(
            f"--dataset_path={without_secrets(url)} is not a URL that can be read. Name a path, or use `pipe:`."
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
