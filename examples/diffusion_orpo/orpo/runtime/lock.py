"""One run at a time in an output folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator
from accelerate.logging import get_logger

from .processes import on_main_process


logger = get_logger(__name__)


@contextmanager
def lock(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """The main process holds the folder for the run; the system releases it when the process ends, however it ends.

    It is a POSIX record lock on `.lock`: over NFS it holds between machines, and data-loading workers that outlive a
    killed run for some seconds do not hold it. A file system without locks gives a warning only.

    Raises:
        ValueError: another run holds it; says which. On every process.
    """
    path = output_dir / ".lock"
    with open(path if accelerator.is_main_process else os.devnull, "a+") as file:
        on_main_process(accelerator, take, file, output_dir)
        yield


def take(file: TextIO, output_dir: Path) -> None:
    """Locks an open file and writes its owner into it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, says POSIX
        file.seek(0)
        raise ValueError(
            f"--output_dir={output_dir} is in use by another run: {file.read().strip()}."
            " Wait for it, stop it, or choose another folder."
        ) from error
    except OSError as error:
        logger.warning(f"{output_dir} can't be locked ({error}): nothing keeps a second run out of it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
