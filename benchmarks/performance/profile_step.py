"""The parts of a step: the share of each part of `training.train` in its time.

    python benchmarks/performance/profile_step.py

A run of the loop with cached and not cached batches in turn, in which the functions that a step calls are timed. What the
U-Net, VAE, text encoders, backward and the optimizer take is the model's; the rest is the distance to bare modules. On CUDA the
clock waits for the device after each part, which takes their overlap away: there the parts say what is large, not how long a step is.
"""

import argparse
from collections import defaultdict
from contextlib import contextmanager
from functools import wraps


import measuring  # noqa: F401, isort: skip

import accelerate
from orpo.models.latent_diffusion import LatentDiffusion
from orpo.models.sdxl import StableDiffusionXL
from orpo.training import loop as training

from interleaved import Interleaved, Run, add_model_arguments, start
from measuring import clock, print_table, store


# What is timed, by the name it gets; each has no other of them inside.
PARTS = {
    "U-Net forward": [(StableDiffusionXL, "predict")],
    "backward": [(accelerate.Accelerator, "backward")],
    "VAE": [(LatentDiffusion, "encode_images")],
    "text encoders": [(StableDiffusionXL, "encode_prompts")],
    "optimizer": [
        (accelerate.optimizer.AcceleratedOptimizer, "step"),
        (accelerate.optimizer.AcceleratedOptimizer, "zero_grad"),
    ],
    "latents and noise": [(LatentDiffusion, "sample_latents"), (training, "draw_noise")],
    "loss and its metrics": [(training, "orpo_loss"), (training.Window, "add"), (training.Window, "reduce")],
    "gradient clipping": [(accelerate.Accelerator, "clip_grad_norm_")],
    "logging and progress bar": [(accelerate.Accelerator, "log"), (training, "show_progress")],
}
OF_THE_MODEL = ("U-Net forward", "backward", "VAE", "text encoders", "optimizer")


@contextmanager
def timed(seconds: dict[str, float]):
    """Adds the time in each part to `seconds`."""

    def wrap(name: str, function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            started = clock()
            result = function(*args, **kwargs)
            seconds[name] += clock() - started
            return result

        return wrapper

    places = [(name, owner, attribute) for name, parts in PARTS.items() for owner, attribute in parts]
    originals = [getattr(owner, attribute) for _, owner, attribute in places]
    for (name, owner, attribute), original in zip(places, originals):
        setattr(owner, attribute, wrap(name, original))
    yield
    for (_, owner, attribute), original in zip(places, originals):
        setattr(owner, attribute, original)


class TimedLoading:
    """A source whose batches are timed."""

    def __init__(self, source, seconds: dict[str, float]) -> None:
        self.source, self.seconds = source, seconds

    def training_batches(self, *args):
        batches = iter(self.source.training_batches(*args))
        while True:
            started = clock()
            batch = next(batches)
            self.seconds["loading"] += clock() - started
            yield batch


def profile(run: Run, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a mean step, for cached and not cached batches."""
    seconds: dict[str, float] = defaultdict(float)
    steps = {"cached": [], "not cached": []}

    def finish_step(name: str, batch: dict) -> None:
        steps[name].append(dict(seconds))
        seconds.clear()

    sources = {"cached": TimedLoading(run.cached, seconds), "not cached": TimedLoading(run.data, seconds)}
    with timed(seconds):
        times = run.train(Interleaved(sources, finish_step), rounds)
    result = {}
    for name, total in times.items():
        kept = steps[name][-len(total) :]
        parts = {part: sum(step.get(part, 0) for step in kept) for part in (*PARTS, "loading")}
        parts["the loop around them"] = sum(total) - sum(parts.values())
        result[name] = {part: round(1e3 * value / len(total), 3) for part, value in parts.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=8)
    args = parser.parse_args()
    with start(args) as run:
        result = profile(run, args.rounds)
    totals = {name: sum(parts.values()) for name, parts in result.items()}
    rows = [
        [part, *(f"{result[name][part]:.2f} ms, {result[name][part] / totals[name]:.2%}" for name in result)]
        for part in result["cached"]
    ]
    print_table(["part", *result], rows)
    store("profile_step", {"pairs": args.train_batch_size, "resolution": args.resolution, "milliseconds": result})


if __name__ == "__main__":
    main()
