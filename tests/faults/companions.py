"""Processes that get in each other's way: one of two that stops answering, and a second run in the same folder.

The process that goes on must end when its patience does, the second run at once, both with a message; the first run must not
notice the second.
"""

import os
import random
import signal
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from unittest import mock

from jobs import Configuration, command_line, finish, run, same_tensors, start
from kill import LORA


PATIENCE = 5  # seconds, in place of half an hour
TWO = Configuration("map", 2)


def stop_one_of_two(inputs: Path, output_dir: Path, stopped: int) -> float:
    """Halts a process (SIGSTOP) amid training, as a broken device would; returns the seconds until the other ended."""
    line = command_line(TWO, inputs, output_dir, max_train_steps=1000, checkpointing_steps=5)
    with mock.patch("orpo.training.run.TIMEOUT", timedelta(seconds=PATIENCE)):  # jobs are forks of this process
        pids = start(TWO, line, output_dir)
    while not (output_dir / "checkpoint-5").exists():
        time.sleep(0.01)
    os.kill(pids[stopped], signal.SIGSTOP)
    began = time.monotonic()
    other = finish([pids[1 - stopped]], output_dir)
    os.kill(pids[stopped], signal.SIGKILL)
    os.waitpid(pids[stopped], 0)
    assert other.statuses == [1], other
    message = f"Process {1 - stopped} ends because another one died, or did not answer within 0:00:0{PATIENCE}"
    assert message in other.output and "--resume_from_checkpoint=latest" in other.output, other.output[-3000:]
    return time.monotonic() - began


def run_twice_in_one_folder(inputs: Path, folder: Path) -> None:
    """Starts a second run while a first trains; then kills the first, after which the folder is free at once."""
    one, whole, output_dir = Configuration("map", 1), folder / "whole", folder / "shared"
    assert run(one, inputs, whole).statuses == [0]
    line = command_line(one, inputs, output_dir, dataloader_num_workers=1)
    first = start(one, line, output_dir)
    while not (output_dir / "checkpoint-1").exists():
        time.sleep(0.01)
    second = finish(start(one, line, output_dir), output_dir)
    assert second.statuses == [1], second.output[-3000:]
    assert f"is in use by another run: process {first[0]} on" in second.output, second.output[-3000:]
    assert finish(first, output_dir).statuses == [0]
    assert same_tensors(output_dir / LORA, whole / LORA)

    output_dir = folder / "killed"
    line = command_line(one, inputs, output_dir, dataloader_num_workers=1)
    first = start(one, line, output_dir)
    while not (output_dir / "checkpoint-1").exists():
        time.sleep(0.01)
    os.kill(first[0], signal.SIGKILL)  # its data-loading worker lives on for some seconds
    os.waitpid(first[0], 0)
    assert finish(start(one, line, output_dir), output_dir).statuses == [0]
    assert same_tensors(output_dir / LORA, whole / LORA)


def campaign(configuration: Configuration, count: int, rng: random.Random, folder: Path) -> Counter:
    """Both faults, `count` times, on two processes and on one."""
    found = Counter()
    for i in range(count):
        for rank in (0, 1):
            seconds = stop_one_of_two(folder / "inputs", folder / f"stopped-{i}-{rank}", rank)
            found[f"stopped, the other ended after {seconds:.1f} s at a limit of {PATIENCE} s"] += 1
        run_twice_in_one_folder(folder / "inputs", folder / str(i))
        found["second run in the folder refused"] += 1
    return found
