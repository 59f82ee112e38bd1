"""The cost of each objective: time of a training step and peak memory, relative to SFT in the same run.

    python benchmarks/alignment/cost.py

Steps of all objectives are timed in turn, and medians compared. Memory is what a process of its own needs beyond the
loaded model for the same steps, with 64 pairs. SFT is timed as a user would run it, on the winners alone: on as many images
as half the pairs have.
"""

import argparse
import json
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from orpo.training.optimizer import make_optimizer
from tqdm.auto import tqdm

import paths
from diffusers.utils.logging import disable_progress_bar
from experiment import PAIRS_PER_STEP, load_model, make_batch, train_step
from faces import ALL_KINDS
from objectives import ALL_OBJECTIVES, EARLIER_OBJECTIVES, OBJECTIVES
from worlds import Pairs


BASE = str(paths.REPOSITORY / "examples" / "demo" / "base")
MEMORY_PAIRS = 64
COMPARED = OBJECTIVES | EARLIER_OBJECTIVES


class Prompts:
    """The part of a world that a batch needs."""

    prompts = tuple(kind.prompt for kind in ALL_KINDS)


def setup(num_pairs: int):
    """A model, its optimizer and one batch of random latents."""
    torch.set_num_threads(1)
    disable_progress_bar()
    args, model = load_model(BASE, 1e-3, seed=0)
    parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
    latents_w, latents_l = torch.randn(2, num_pairs, 4, 8, 8)
    pairs = Pairs(latents_w, latents_l, torch.ones(num_pairs), np.arange(num_pairs) % len(ALL_KINDS), noise=0.0)
    batch = make_batch(Prompts, pairs, [(0, i) for i in range(num_pairs)], seed=0)
    return model, make_optimizer(args, parameters, num_pairs), parameters, batch


def pairs_of(name: str, num_pairs: int) -> int:
    """How many pairs have as many images as the objective must run for `num_pairs`: SFT, the winners alone."""
    return num_pairs // 2 if name == "sft" else num_pairs


def seconds_per_step(rounds: int) -> dict[str, float]:
    """Median seconds of a step, by objective."""
    model, optimizer, parameters, batch = setup(PAIRS_PER_STEP)
    *_, half = setup(pairs_of("sft", PAIRS_PER_STEP))
    seconds: dict[str, list[float]] = {name: [] for name in COMPARED}
    for _ in tqdm(range(rounds), desc="Timing"):
        for name, objective in COMPARED.items():
            started = time.perf_counter()
            train_step(
                model, half if name == "sft" else batch, objective, objective.strengths[0], optimizer, parameters
            )
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values[3:]) for name, values in seconds.items()}


def memory_kib(field: str) -> int:
    """A field of /proc/self/status: VmRSS is the memory held now, VmHWM the peak since the last `reset_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def reset_peak() -> None:
    """Resets the peak to the memory held now. That of `getrusage` can't be reset: a new process inherits its parent's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(name: str) -> float:
    """Peak MiB of some steps, beyond the memory held after loading."""
    model, optimizer, parameters, batch = setup(pairs_of(name, MEMORY_PAIRS))
    objective = ALL_OBJECTIVES[name]
    reset_peak()
    before = memory_kib("VmRSS")
    for _ in range(4):
        train_step(model, batch, objective, objective.strengths[0], optimizer, parameters)
    return (memory_kib("VmHWM") - before) / 1024


def relative(values: dict[str, float], names: tuple[str, str]) -> dict[str, dict[str, float]]:
    """Values by objective, and the same relative to SFT under another name."""
    unit, ratio = names
    return {
        objective: {unit: round(value, 4), ratio: round(value / values["sft"], 3)}
        for objective, value in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="Steps of each objective.")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=["time", "memory"],
        default=["time", "memory"],
        help="The rest stays as it is stored.",
    )
    args = parser.parse_args()
    file = paths.HERE / "results" / "cost.json"
    cost = json.loads(file.read_text()) if file.exists() else {name: {} for name in COMPARED}
    measured = []
    if "time" in args.what:
        measured.append(relative(seconds_per_step(args.rounds), ("seconds_per_step", "time")))
    if "memory" in args.what:
        memory = {}
        for name in COMPARED:
            with get_context("spawn").Pool(1) as pool:
                memory[name] = pool.apply(peak_memory, (name,))
        measured.append(relative(memory, ("memory_mib", "memory")))
    for values in measured:
        for name, value in values.items():
            cost[name] |= value
    text = json.dumps(cost, indent=2) + "\n"
    file.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
