"""The processes of a run fail together, and none waits forever for another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


# The first process may take this long to read a large dataset. All other waits are shorter.
READING_TIMEOUT = timedelta(hours=6)


def on_main_process(accelerator: Accelerator, function: Callable, *args):
    """Runs a function on the main process. Its result, or its exception, becomes that of every process."""
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        vars(problem)["is_shared"] = True  # every process raises it, and one says so: see `cli.run`
        raise problem
    return result


def on_all_processes(accelerator: Accelerator, function: Callable, *args) -> None:
    """Runs a function on every process, and waits for all.

    Raises:
        OSError: on every process, if it failed on some; says on which, and why.
    """
    problems, cause = [], None
    try:
        function(*args)
    except Exception as error:
        problems, cause = [f"process {accelerator.process_index}: {type(error).__name__}: {error}"], error
    problems = gather_object(problems)
    if problems:
        raise OSError("; ".join(problems)) from cause


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The others enter the block when the main process has left it; they wait as `wait_for_reading` does."""
    if not accelerator.is_main_process:
        wait_for_reading(accelerator)
    yield
    if accelerator.is_main_process:
        wait_for_reading(accelerator)


def wait_for_reading(accelerator: Accelerator) -> None:
    """Waits for all processes, of which one may be reading a large dataset.

    The wait has its own process group with a timeout of `READING_TIMEOUT`. It uses Gloo, which notices at once if a
    process dies.
    """
    if accelerator.num_processes > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=READING_TIMEOUT)
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another process of the run went away or did not answer in time."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
