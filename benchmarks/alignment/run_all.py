"""Runs the benchmark of alignment: every experiment of `plan.py` that has no stored result yet. Resumable.

    python benchmarks/alignment/run_all.py --work work
    python benchmarks/alignment/report.py

Each measurement is a line of `results/<task>.jsonl`. `work` keeps the pairs and where each run was left.
"""

import argparse
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import plan
from diffusers.utils.logging import disable_progress_bar
from experiment import Training, load_model, measure, run, save_aside
from objectives import OBJECTIVES
from settings import TASKS
from store import append, append_line, load_base, load_runs
from tasks import NUM_HELD_OUT, NUM_PAIRS, make_pairs, make_task


SAME_BASE = (
    0.05  # how far the mean reward of a base that was trained again may be from the stored one, relative to its spread
)


@lru_cache
def prepare(name: str, work: Path, num_pairs: int = NUM_PAIRS, num_held_out: int = NUM_HELD_OUT):
    """The task, its pairs and the held-out ones. They are generated once and kept in `work`."""
    task, file = make_task(name), work / f"{name}-pairs-{num_pairs}.pt"
    if not file.exists():
        save_aside((make_pairs(task, num_pairs), make_pairs(task, num_held_out, seed=1)), file)
    return task, *torch.load(file, weights_only=False)


def check_base(name: str, work: Path) -> None:
    """Stores what the base measures, or refuses to add to results of another one."""
    task, train, held_out = prepare(name, work)
    now, stored = (
        measure(task, load_model(task.base, seed=0), held_out),
        load_base(name),
    )  # a fresh LoRA changes nothing
    if stored is None:
        append_line(name, {"objective": "base", "measured": now | {"noise": round(train.noise, 4)}})
    elif abs(np.mean(now["rewards"]) - np.mean(stored["rewards"])) > SAME_BASE * np.std(stored["rewards"]):
        raise SystemExit(
            f"The base's mean reward on {name} is {np.mean(now['rewards']):.3f}, and {np.mean(stored['rewards']):.3f} in"
            f" results/{name}.jsonl, which is of another base. Take that one, or move the stored results away."
        )


def rehearse(name: str, work: Path) -> None:
    """Trains every objective for two steps, and measures once."""
    task, pairs, held_out = prepare(name, work, num_pairs=32, num_held_out=8)
    for objective in OBJECTIVES:
        setting = plan.SETTINGS[name][objective][0]
        training = Training(replace(plan.make(name, objective, setting, seed=0), steps=2), task, pairs)
        training.train_to(2)
    print(training.measure(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="Folder of the pairs, and of where runs were left.")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument(
        "--rehearse", action="store_true", help="Train each objective for two steps on few pairs; store nothing."
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    if args.rehearse:
        return rehearse(args.tasks[0], args.work)
    checked = set()
    for experiment in plan.experiments():
        name, marks = experiment.task, plan.MARKS[experiment.task]
        known = load_runs(name).get(experiment, {})
        if name not in args.tasks or set(marks) <= set(known):
            continue
        if name not in checked:
            check_base(name, args.work)
            checked.add(name)
        started = time.perf_counter()
        for step, measured in run(experiment, *prepare(name, args.work), marks, args.work):
            if step not in known:
                append(experiment, step, measured)
        print(time.strftime("%H:%M:%S"), experiment.name, f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
