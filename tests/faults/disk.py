"""Fills the disk under training, at many sizes, and makes it read-only.

The output folder is a small tmpfs, which needs root or the right to make a user namespace. A run must stop with the
reason, all its processes too; its checkpoints must be whole, and nothing half-written may go on filling the disk. With
room again, the run goes on and ends as if nothing had happened.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jobs import Configuration, Outcome, run
from kill import check_folder, check_result


@contextmanager
def mounted(folder: Path, *options: object) -> Iterator[None]:
    """`mount` with these options, at a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *map(str, options), folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def campaign(configuration: Configuration, disks: int, rng: random.Random, folder: Path) -> Counter:
    """Runs jobs of one configuration on bad disks; returns after how many steps they stopped."""
    inputs, whole, output_dir = folder / "inputs", folder / "whole", folder / "bad"
    expected = run(configuration, inputs, whole)
    assert expected.statuses == [0] * configuration.processes, expected.output[-3000:]
    needed = int(subprocess.run(["du", "-sb", whole], capture_output=True, text=True, check=True).stdout.split()[0])
    stopped = Counter()
    for i in range(disks):
        if i % 3 == 2:
            newest, reason = read_only(configuration, inputs, output_dir, whole, rng.randint(1, 4))
        else:
            size = rng.randrange(needed // 20, int(0.9 * needed))
            newest, reason = full(configuration, inputs, output_dir, whole, size, 4 * needed)
        stopped[f"{reason}, {newest} steps saved"] += 1
    return stopped


def full(configuration, inputs: Path, output_dir: Path, whole: Path, size: int, enough: int) -> tuple[int, str]:
    """A run on a disk of `size` bytes, continued when it has `enough`; returns how many steps were saved, and the reason."""
    reason = "No space left on device"
    with mounted(output_dir, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        newest = check_failure(run(configuration, inputs, output_dir), reason, output_dir, whole)
        assert list(output_dir.glob(".*.partial")) == []
        subprocess.run(["mount", "-o", f"remount,size={enough}", output_dir], check=True)
        outcome = run(configuration, inputs, output_dir)
        assert outcome.statuses == [0] * configuration.processes, outcome.output[-3000:]
        check_result(output_dir, whole)
    return newest, reason


def read_only(configuration, inputs: Path, output_dir: Path, whole: Path, step: int) -> tuple[int, str]:
    """A run whose folder becomes read-only after a step: a mount laid over it, as the lock keeps a file in it open."""
    reason = "Read-only file system"
    with ExitStack() as stack:

        def strike(pids: list[int]) -> None:
            stack.enter_context(mounted(output_dir, "--bind", "-o", "ro", output_dir))

        ready = (output_dir / f"checkpoint-{step}").exists
        outcome = run(configuration, inputs, output_dir, None, ready, strike)
        newest = check_failure(outcome, reason, output_dir, whole)
    outcome = run(configuration, inputs, output_dir)
    assert outcome.statuses == [0] * configuration.processes, outcome.output[-3000:]
    check_result(output_dir, whole)
    shutil.rmtree(output_dir)
    return newest, reason


def check_failure(outcome: Outcome, reason: str, output_dir: Path, whole: Path) -> int:
    """All processes ended and said why and from where to go on; returns how many steps are saved."""
    assert set(outcome.statuses) == {1} and reason in outcome.output, (outcome.statuses, outcome.output[-3000:])
    newest = check_folder(output_dir, whole, 0)
    advice = f"last (good )?checkpoint is {output_dir}/checkpoint-{newest}\\b"
    assert newest == 0 or re.search(advice, outcome.output), outcome.output[-3000:]
    return newest


def become_root() -> None:
    """Starts this script again in a user namespace, in which it may mount, unless it may already."""
    if os.geteuid() != 0:
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
