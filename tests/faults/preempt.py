"""Sends SIGTERM and SIGINT, as SLURM, spot instances and keyboards do, at any instant and to some or all processes.

A run that trains must end with the documented status on all processes, after a checkpoint of the step it was in. A run
that does not train yet ends at once, one that has trained ends with its result. What follows must equal the run that
nobody disturbed. Data are read by workers, who get the signals too.
"""

import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

from jobs import Configuration, newest_good, run
from kill import check_folder, check_result, logged_steps
from orpo.runtime.signals import EXIT_STATUS


WORKERS = {"dataloader_num_workers": 1}


def campaign(configuration: Configuration, signals: int, rng: random.Random, folder: Path) -> Counter:
    """Interrupts jobs of one configuration; returns how many ended in which way.

    Raises:
        AssertionError: a job ended in no documented way, or what followed is not as it would have been.
    """
    inputs, whole, interrupted = folder / "inputs", folder / "whole", folder / "interrupted"
    expected = run(configuration, inputs, whole, **WORKERS)
    assert expected.statuses == [0] * configuration.processes, expected.output[-3000:]
    ended, newest, sent = Counter(), 0, 0
    while sent < signals:
        number, to_all = rng.choice((signal.SIGTERM, signal.SIGINT)), rng.random() < 0.5
        rank = rng.randrange(configuration.processes)
        step = newest + 1

        def strike(pids: list[int]) -> None:
            os.killpg(pids[0], number) if to_all else os.kill(pids[rank], number)

        # Two of three signals meet a run that trains: they follow a checkpoint.
        after = (interrupted / f"checkpoint-{step}").exists if sent % 3 < 2 else rng.uniform(0, expected.seconds)
        outcome = run(configuration, inputs, interrupted, None, after, strike, **WORKERS)
        sent += 1
        newest = check_folder(interrupted, whole, newest)
        ended[ending(outcome.statuses, outcome.output, number)] += 1
        if EXIT_STATUS in outcome.statuses:
            assert newest == logged_steps(interrupted)[-1][0] == newest_good(interrupted)
            assert "Traceback" not in outcome.output, outcome.output[-3000:]
        if 0 in outcome.statuses:
            check_result(interrupted, whole)
            shutil.rmtree(interrupted)
            newest = 0
    outcome = run(configuration, inputs, interrupted, **WORKERS)
    assert outcome.statuses == [0] * configuration.processes, outcome.output[-3000:]
    check_result(interrupted, whole)
    return ended


def ending(statuses: list[int], output: str, number: int) -> str:
    """How a job ended, in the words of the documentation."""
    if set(statuses) == {EXIT_STATUS}:
        return f"checkpoint and status {EXIT_STATUS}"
    if 0 in statuses:  # the signal may still have met a process that had nothing left to do
        return "finished"
    at_once = -number in statuses or number == signal.SIGINT and "KeyboardInterrupt" in output
    assert at_once and EXIT_STATUS not in statuses, (statuses, number, output[-3000:])
    return "ended at once, before training"
