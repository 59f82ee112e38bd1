"""Runs the benchmark of alignment: finds each objective's best setting, then compares them there. Resumable.

    python benchmarks/alignment/run_all.py --work work      # once for each core, all with the same folder
    python benchmarks/alignment/report.py

Each finished stretch of training is a line of `results/<world>.jsonl`; what is there already is not run again. `work` also keeps
where each run was left, from which it is continued.
"""

import argparse
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import plan
from diffusers.utils.logging import disable_progress_bar
from experiment import Experiment, load_model, measure, run, save_aside
from plan import WORLDS
from store import append, load_base, load_runs
from worlds import NUM_HELD_OUT, NUM_PAIRS, draw_pairs, make_world


SAME_BASE = 0.05  # of the spread of rewards: how far a base that was trained again may be from the stored results'


@lru_cache
def world_of(name: str):
    torch.set_num_threads(1)
    disable_progress_bar()
    return make_world(name)


@lru_cache
def prepare(name: str, work: Path, votes: int = 1):
    """The world and its pairs. The pairs are drawn once and kept in `work`; those held out have one vote."""
    world, file = world_of(name), work / f"{name}-pairs-{votes}.pt"
    if not file.exists():
        pairs = draw_pairs(world, NUM_PAIRS, votes=votes), draw_pairs(world, NUM_HELD_OUT, seed=1)
        save_aside(pairs, file)
    return world, *torch.load(file, weights_only=False)


def measure_base(name: str, work: Path) -> dict:
    """The base on every split, and what is to be known about world and pairs."""
    world, train, held_out = prepare(name, work)
    _, model = load_model(world.base, 1e-3, seed=0)  # a fresh LoRA changes nothing
    return {
        "objective": "base",
        "noise": train.noise,
        "checks": world.checks,
        "splits": {split: measure(world, model, held_out, split) for split in world.classes},
    }


def check_base(name: str, work: Path) -> None:
    """Stores the base, or refuses to add to results of another one."""
    now, stored = measure_base(name, work), load_base(name)
    if stored is None:
        append(name, now)
        return
    before, after = (np.array(line["splits"]["test"]["rewards"]) for line in (stored, now))
    if abs(before.mean() - after.mean()) > SAME_BASE * before.std():
        raise SystemExit(
            f"The base's mean reward on {name} is {after.mean():.3f}, and {before.mean():.3f} in results/{name}.jsonl, which is of"
            " another base. Take that one, or move the stored results away."
        )


def claim(experiment: Experiment, work: Path) -> Path | None:
    """Takes an experiment for this process; None where another process has it."""
    file = work / "claims" / experiment.name
    file.parent.mkdir(exist_ok=True)
    try:
        with open(file, "x") as opened:
            opened.write(str(os.getpid()))
        return file
    except FileExistsError:
        if not is_alive(int(file.read_text() or os.getpid())):
            file.unlink()  # of a process that was killed
            return claim(experiment, work)
        return None


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def lacking(experiment: Experiment, marks: tuple[int, ...], runs: dict) -> list[int]:
    """The steps at which an experiment is not measured yet."""
    known = runs.get(experiment)
    return [step for step in marks if known is None or step not in known.evaluations]


def next_task(worlds: tuple[str, ...], work: Path) -> tuple[Experiment, list[int], Path] | None:
    """The first experiment of the plan that is not done and that nobody runs, the steps that it lacks, and its claim."""
    runs = {world: load_runs(world) for world in worlds}
    bases = {world: load_base(world) for world in worlds}
    for experiment, marks in plan.tasks(runs, bases, worlds):
        if lacking(experiment, marks, runs[experiment.world]) and (claimed := claim(experiment, work)):
            if steps := lacking(experiment, marks, load_runs(experiment.world)):
                return experiment, steps, claimed
            claimed.unlink()  # it was finished in between
    return None


def wait_for_quiet(max_load: float | None) -> None:
    while max_load is not None and os.getloadavg()[0] > max_load:
        time.sleep(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", required=True, type=Path, help="Folder of the drawn pairs, and of where runs were left."
    )
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    parser.add_argument(
        "--max_load", type=float, help="Starts an experiment only while the machine's load is below this."
    )
    args = parser.parse_args()
    worlds = tuple(world for world in WORLDS if world in args.worlds)
    for world in worlds:
        check_base(world, args.work)
    while task := (wait_for_quiet(args.max_load), next_task(worlds, args.work))[1]:
        experiment, marks, claimed = task
        pairs = prepare(experiment.world, args.work, experiment.votes)
        result = run(experiment, *pairs, marks, args.work / "states")
        append(experiment.world, result)
        claimed.unlink()
        print(time.strftime("%H:%M:%S"), experiment.name, experiment.split, marks, result["seconds"], flush=True)


if __name__ == "__main__":
    main()
