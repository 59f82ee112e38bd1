"""Runs the benchmark of alignment: tunes each objective, then compares them at their best. Resumable.

    python benchmarks/alignment/digits_base.py --output_dir work/digits-base
    python benchmarks/alignment/noisy_base.py --output_dir work/noisy-base
    python benchmarks/alignment/run_all.py --work work
    python benchmarks/alignment/report.py

Each finished experiment is a line of `results/<world>.jsonl`; what is there already is not run again.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

import paths
from diffusers.utils.logging import disable_progress_bar
from experiment import Experiment, load_model, measure, run
from objectives import OBJECTIVES
from worlds import NUM_HELD_OUT, NUM_PAIRS, draw_pairs, make_world


WORLDS = ("smile", "prompt", "digits")
RESULTS = paths.HERE / "results"
STEPS = 200
CURVE = (20, 40, 66, 120, 200)
SEEDS = (1, 2, 3, 4, 5)
KEPT = 0.9  # of the base's prompt-following, by the setting that is chosen
BETA_WORLDS = ("smile", "prompt")
BETAS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0)


def learning_rates(world: str, objective: str) -> tuple[float, ...]:
    """Those to tune over. The digits' model breaks at rates that the faces' takes."""
    if objective == "sft":
        return (
            (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2) if world == "digits" else (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
        )
    return (5e-4, 2e-3) if world == "digits" else (2e-3, 6e-3)


def tuning(world: str) -> list[Experiment]:
    """Six settings for each objective, measured on validation images."""
    return [
        Experiment(world, name, strength, learning_rate)
        for name, objective in OBJECTIVES.items()
        for strength in objective.strengths
        for learning_rate in learning_rates(world, name)
    ]


def best_settings(world: str, results: list[dict]) -> dict[str, dict]:
    """For each objective the setting with the highest validation reward among those that keep to the prompt.

    That is, whose images follow it at least `KEPT` times as often as the base's; where none does, the one that does most.
    """
    base = next(result for result in results if result["objective"] == "base")
    needed = KEPT * np.mean(base["splits"]["validation"]["follows"])

    def rank(result: dict) -> tuple[float, float]:
        follows = final_mean(result, "follows")
        return min(follows, needed), final_mean(result, "rewards")

    tuned = [find(results, experiment) for experiment in tuning(world)]
    best = {name: max((r for r in tuned if r["objective"] == name), key=rank) for name in OBJECTIVES}
    return {
        name: {"strength": result["strength"], "learning_rate": result["learning_rate"]}
        for name, result in best.items()
    }


def comparisons(world: str, best: dict[str, dict]) -> list[Experiment]:
    """Everything that is reported, each objective at its best: by seed, ten times as long, with flipped labels, by beta."""
    vary = {"seed": SEEDS[0], "split": "test"}
    experiments = [
        Experiment(world, name, **best[name], seed=seed, split="test", evaluate_at=CURVE)
        for seed in SEEDS
        for name in OBJECTIVES
    ]
    if world in BETA_WORLDS:
        experiments += [Experiment(world, "orpo", beta, best["orpo"]["learning_rate"], **vary) for beta in BETAS]
    if world == "smile":
        experiments += [
            Experiment(world, name, **best[name], **vary, steps=10 * STEPS, evaluate_at=(200, 600, 1000, 1500, 2000))
            for name in OBJECTIVES
        ]
    if world == "prompt":
        experiments += [
            Experiment(world, name, **best[name], **vary, flipped=flipped)
            for flipped in (0.1, 0.3)
            for name in OBJECTIVES
        ]
    return experiments


def final_mean(result: dict, field: str) -> float:
    return float(np.mean(result["evaluations"][str(result["steps"])][field]))


def find(results: list[dict], experiment: Experiment) -> dict | None:
    wanted = json.loads(json.dumps(asdict(experiment)))
    return next((result for result in results if all(result.get(k) == v for k, v in wanted.items())), None)


def load_results(world: str) -> list[dict]:
    file = RESULTS / f"{world}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@lru_cache
def prepare(name: str, work: str):
    """The world and its pairs. The pairs are drawn once and kept in `work`."""
    torch.set_num_threads(1)
    disable_progress_bar()
    world, file = make_world(name, work), Path(work, f"{name}-pairs.pt")
    if not file.exists():
        torch.save((draw_pairs(world, NUM_PAIRS), draw_pairs(world, NUM_HELD_OUT, seed=1)), file)
    return world, *torch.load(file, weights_only=False)


def run_one(experiment: Experiment, work: str) -> dict:
    world, train, held_out = prepare(experiment.world, work)
    return run(experiment, world, train, held_out)


def measure_base(name: str, work: str) -> dict:
    """The base on both splits, and what is to be known about world and pairs."""
    world, train, held_out = prepare(name, work)
    _, model = load_model(world.base, 1e-3, seed=0)  # a fresh LoRA changes nothing
    return {
        "objective": "base",
        "noise": train.noise,
        "checks": world.checks,
        "splits": {split: measure(world, model, held_out, split) for split in ("validation", "test")},
    }


def append(world: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{world}.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def run_missing(world: str, experiments: list[Experiment], pool: ProcessPoolExecutor, work: str) -> None:
    done = load_results(world)
    missing = [experiment for experiment in dict.fromkeys(experiments) if find(done, experiment) is None]
    futures = [pool.submit(run_one, experiment, work) for experiment in missing]
    for future in tqdm(as_completed(futures), desc=world, total=len(futures)):
        append(world, future.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="Folder that holds the two bases; gets the pairs.")
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Experiments at once, a core each.")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for world in args.worlds:
            if not any(result["objective"] == "base" for result in load_results(world)):
                append(world, pool.submit(measure_base, world, args.work).result())
            run_missing(world, tuning(world), pool, args.work)
        for world in args.worlds:
            best = best_settings(world, load_results(world))
            run_missing(world, comparisons(world, best), pool, args.work)


if __name__ == "__main__":
    main()
