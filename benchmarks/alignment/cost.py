"""The cost of each objective: time of a training step and peak memory, relative to SFT in the same run.

    python benchmarks/alignment/cost.py

Steps of all objectives are timed in turn, and medians compared. Memory is what a process of its own needs beyond the
loaded model for the same steps, with 64 pairs. SFT is timed as a user would run it, on the winners alone: on as many images
as half the pairs have.
"""

import argparse
import json
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

import paths
from diffusers.utils.logging import disable_progress_bar
from experiment import (
    PAIRS_PER_STEP,
    load_model,
    make_batch,
    reference_errors,
    train_step,
    trained_parameters,
)
from faces import ALL_KINDS
from objectives import OBJECTIVES
from settings import Experiment
from tasks import Pairs


BASE = str(paths.REPOSITORY / "examples" / "demo" / "base")
MEMORY_PAIRS = 64


class Steps:
    """A model that is trained on one batch of random latents.

    Args:
        name: of the objective.
        num_pairs: of the batch; SFT has half as many, since it runs the winners alone.
    """

    def __init__(self, name: str, num_pairs: int, model=None) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        count = num_pairs // 2 if name == "sft" else num_pairs
        self.objective, self.setting = OBJECTIVES[name], Experiment("smile", name, 0.4, 1e-3, steps=1, seed=0)
        self.model = model or load_model(BASE, seed=0)
        self.optimizer = torch.optim.AdamW(trained_parameters(self.model), lr=1e-3)
        pairs = Pairs(*torch.randn(2, count, 4, 8, 8), np.arange(count) % len(ALL_KINDS), noise=0.0)
        task = SimpleNamespace(prompts=[kind.prompt for kind in ALL_KINDS])
        self.batch = make_batch(task, pairs, np.arange(count), seeds=list(range(count)))

    def __call__(self) -> None:
        reference = reference_errors(self.model, self.batch) if self.objective.has_reference else None
        loss = partial(self.objective.loss, setting=self.setting)
        train_step(self.model, self.batch, loss, self.optimizer, reference=reference)


def seconds_per_step(rounds: int) -> dict[str, float]:
    """Median seconds of a step, by objective."""
    model = load_model(BASE, seed=0)
    steps = {name: Steps(name, PAIRS_PER_STEP, model) for name in OBJECTIVES}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in seconds.items()}


def memory_kib(field: str) -> int:
    """A field of /proc/self/status: VmRSS is the memory held now, VmHWM the peak since the last `reset_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def reset_peak() -> None:
    """Resets the peak to the memory held now. That of `getrusage` can't be reset: a new process inherits its parent's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(name: str) -> float:
    """Peak MiB of some steps, beyond the memory held after loading."""
    step = Steps(name, MEMORY_PAIRS)
    reset_peak()
    before = memory_kib("VmRSS")
    for _ in range(4):
        step()
    return (memory_kib("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="Steps of each objective.")
    parser.add_argument("--output_file", type=Path, default=paths.HERE / "results" / "cost.json")
    args = parser.parse_args()
    memory = {}
    for name in OBJECTIVES:
        with get_context("fork").Pool(
            1
        ) as pool:  # a process each, from one that holds no model: freed memory stays in a heap
            memory[name] = pool.apply(peak_memory, (name,))
    seconds = seconds_per_step(args.rounds)
    cost = {
        name: {
            "seconds_per_step": round(seconds[name], 4),
            "time": round(seconds[name] / seconds["sft"], 3),
            "memory_mib": round(memory[name], 1),
            "memory": round(memory[name] / memory["sft"], 3),
        }
        for name in OBJECTIVES
    }
    args.output_file.write_text(json.dumps(cost, indent=2) + "\n")
    print(args.output_file.read_text())


if __name__ == "__main__":
    main()
