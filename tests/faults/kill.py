"""Kills training with SIGKILL, again and again, and demands the uninterrupted run's result bit for bit.

Every other kill hits a file-system call of checkpointing, rotation or final saving, each kind in turn; the others any
instant between start and end. Of two processes, both die, or one alone, and the other must end by itself. After each
kill every checkpoint must be whole, none may have been lost, and a LoRA in the output folder must be the right one.

With `elastic` a run from shards goes on, after each kill, on 1, 2 or 4 processes with 0 to 2 workers each, chosen at random, at
the same number of pairs a step. Sums are then added up in another order, and the result must be the uninterrupted run's
to float tolerance. LoRA dropout is off: it draws differently on other processes.
"""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from jobs import Configuration, Killed, newest_good, run, same_tensors
from safetensors.numpy import load_file


LORA = "pytorch_lora_weights.safetensors"
FORCED = (
    "write checkpoint",
    "remove outdated",
    "write output",
    "name checkpoint",
    "sync folder",
    "place output",
    "unname outdated",
    "begin checkpoint",
    "tidy output",
)


def divide(configuration: Configuration, processes: int, workers: int) -> tuple[Configuration, dict]:
    """The configuration on so many processes of so many workers, and the flags for 4 pairs a step."""
    division = {"train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
    return replace(configuration, processes=processes), division | {
        "dataloader_num_workers": workers,
        "lora_dropout": 0.0,
    }


def campaign(
    configuration: Configuration, kills: int, rng: random.Random, folder: Path, elastic: bool = False
) -> Counter:
    """Kills jobs of one configuration; returns how many kills of which kind they survived.

    Args:
        configuration: the job.
        kills: how many.
        rng: decides when, and, where `elastic`, on how many processes the job goes on.
        folder: has the inputs, and gets the outputs.
        elastic: whether processes and workers change with each kill.

    Raises:
        AssertionError: something was lost, doubled, or not as it would have been.
    """
    inputs, whole = folder / "inputs", folder / "whole"
    configuration, flags = divide(configuration, 1, 0) if elastic else (configuration, {})
    expected = run(configuration, inputs, whole, **flags)
    assert expected.statuses == [0] * configuration.processes, expected.output[-3000:]
    calls = Counter(expected.calls)
    assert all(calls[kind] for kind in FORCED), calls
    survived, interrupted, number = Counter(), folder / "interrupted", 0
    while survived.total() < kills:
        shutil.rmtree(interrupted, ignore_errors=True)
        newest, finished = 0, False
        while not finished:
            killed, after, kind = None, None, None
            if survived.total() < kills and number % 2 == 0:
                kind = FORCED[number // 2 % len(FORCED)]
                killed = Killed(kind, rng.randint(1, max(1, min(calls[kind] // 3, 10))))
                killed.alone = configuration.processes > 1 and rng.random() < 0.5
            elif survived.total() < kills:
                kind, after = "any instant", rng.uniform(0, expected.seconds)
            number += 1
            if elastic:
                configuration, flags = divide(configuration, rng.choice((1, 2, 4)), rng.randrange(3))
                if killed:
                    killed.alone = configuration.processes > 1 and rng.random() < 0.5
            outcome = run(configuration, inputs, interrupted, killed, after, **flags)
            newest = check_folder(interrupted, whole, newest, exact=not elastic)
            finished = outcome.statuses == [0] * configuration.processes
            assert finished or outcome.was_killed, outcome.output[-3000:]
            survived += Counter({kind: int(outcome.was_killed)})  # adding drops zeros
        check_result(interrupted, whole, exact=not elastic)
    return survived


def same_content(a: Path, b: Path, exact: bool) -> bool:
    """Whether two files of tensors, or of numbers by name, are equal; to float tolerance where not `exact`."""
    if a.suffix == ".json":
        a, b = (json.loads(path.read_text()) for path in (a, b))
        return a == b if exact else a.keys() == b.keys() and all(np.isclose(a[k], b[k], 1e-3, 1e-5) for k in a)
    if exact:
        return same_tensors(a, b)
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], rtol=0, atol=2e-5) for name in a)


def check_folder(output_dir: Path, whole: Path, newest_before: int, exact: bool = True) -> int:
    """What must hold at any instant; returns the newest checkpoint's step."""
    newest = newest_good(output_dir)
    assert newest >= newest_before, f"checkpoint-{newest_before} was lost: the newest is {newest}"
    if (output_dir / LORA).exists():
        for name in (LORA, "eval_results.json"):
            assert same_content(output_dir / name, whole / name, exact), name
    return newest


def check_result(output_dir: Path, whole: Path, logs: bool = True, exact: bool = True) -> None:
    """What must hold at the end: all that the uninterrupted run made, and no more. Logs are left out where not `logs`."""
    assert same_content(output_dir / LORA, whole / LORA, exact)
    names = [
        {path.name for path in folder.iterdir()} - (set() if logs else {"logs"}) for folder in (output_dir, whole)
    ]
    assert names[0] == names[1], names
    if logs:
        scalars = [logged_steps(folder) for folder in (output_dir, whole)]
        steps = [[step for step, _ in of_run] for of_run in scalars]
        tolerance = 0 if exact else 1e-3
        assert steps[0] == steps[1] and np.allclose(*scalars, rtol=tolerance, atol=0), f"the losses differ: {scalars}"


def logged_steps(output_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of each step that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(output_dir.glob("logs/*/"))))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]
