"""One process at a time in an output folder or a file of votes."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .messages import printable


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@contextmanager
def lock(output_dir: Path, accelerator: "Accelerator") -> Iterator[None]:
    """The main process holds the folder for the run; the system releases it when the process ends, however it ends.

    Raises:
        ValueError: another run holds it; says which. On every process.
    """
    from .processes import on_main_process

    busy = f"--output_dir={output_dir} is in use by another run: {{holder}}. Wait for it, stop it, or choose another folder."
    path = output_dir / ".lock"
    with open(path if accelerator.is_main_process else os.devnull, "a+") as file:
        on_main_process(accelerator, take, file, busy)
        yield


def take(file: TextIO, busy: str) -> None:
    """Locks an open file until it is closed, and writes its owner into it.

    It is a POSIX record lock: over NFS it holds between machines, and data-loading workers that outlive a killed run for some
    seconds do not hold it. Where there are no locks, as on some network drives, there is a warning only.

    Args:
        file: opened with "a+".
        busy: the error's message, with a place for the {holder}.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl  # which Windows lacks: there `begin` says that it is not supported

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, says POSIX
        file.seek(0)
        raise ValueError(busy.replace("{holder}", printable(file.read().strip()))) from error
    except OSError as error:
        logger.warning(f"{file.name} can't be locked ({error}): nothing keeps a second process out")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
