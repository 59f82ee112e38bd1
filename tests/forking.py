"""Copies of the test's own process: one that is killed in the middle of writing an image, and two that work together."""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image


SECONDS = 1800


def fork(function: Callable[[], object]) -> int:
    """Runs a function in a copy of this process, for half an hour at most; returns the copy's id."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def kill_while_saving(number: int, function: Callable[[], object]) -> None:
    """Runs a function in a copy of this process that gets SIGKILL in the middle of writing its `number`th image."""

    def run_and_die() -> None:
        save, calls = Image.Image.save, []

        def save_or_die(image, file, *args):
            calls.append(file)
            if len(calls) == number:
                Path(file).write_bytes(b"\x89PNG half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            save(image, file, *args)

        Image.Image.save = save_or_die
        function()

    _, status = os.waitpid(fork(run_and_die), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def fork_two_processes(function: Callable[[int], object]) -> None:
    """Runs a function of the rank in two copies of this process, which accelerate takes for the two of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run_as(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        function(rank)

    children = [fork(partial(run_as, rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
