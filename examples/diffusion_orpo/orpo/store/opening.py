"""Opens a shard: a file, a URL that `curl` or `aws` reads, or the output of a command."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlsplit

from webdataset.gopen import Pipe, gopen
from webdataset.utils import enforce_security

from ..runtime.redaction import without_secrets
from ..runtime.signals import SIGNALS


BUFFER_BYTES = 1 << 20


def is_remote(url: str) -> bool:
    """Whether it is a URL or a command, not a path."""
    return re.match(r"[a-z0-9]+:", url) is not None


def shard_name(url: str) -> str:
    """`00000.tar` of a path, a URL, or a command that names it."""
    found = re.findall(r"[^/\s'\"=]+\.tar\b", url)
    if not found:
        raise ValueError(f"--dataset_path={without_secrets(url)} names no *.tar shard.")
    return found[-1]


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


def read_to_end(pipe: Pipe) -> None:
    """Waits for a command to end: one that fails may have ended its output early, or after the archive.

    Raises:
        OSError: it failed.
    """
    while pipe.read(BUFFER_BYTES):
        pass
    pipe.wait_for_child()


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
    if url.startswith("pipe:"):
        return Pipe(
            url.removeprefix("pipe:"), shell=True, ignore_status=[141], **own_session
        )  # 141: we closed it early
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
