"""The one rule by which every objective gets its strength, its learning rate and its number of steps.

Only validation images are looked at. Best is the highest reward among the settings and steps that keep to the prompt. The search
goes from a setting to the better of its four neighbours, until none is better: stronger, weaker, twice and half the rate.
"""

from dataclasses import dataclass, replace

import numpy as np

from experiment import Experiment
from objectives import OBJECTIVES
from store import Run


KEPT = 0.95  # of the base's prompt-following, by what is chosen
MARKS = (100, 200, 400, 600)  # steps at which a run of the search is measured
LEARNING_RATES = tuple(1e-3 * 2.0**i for i in range(-5, 6))
START = {  # strength and learning rate
    "smile": {
        "sft": (0.0, 4e-3),
        "orpo": (0.5, 2e-3),
        "scaled": (30.0, 2e-3),
        "mapo": (1.0, 2e-3),
        "dpo": (100.0, 2e-3),
    },
    "prompt": {
        "sft": (0.0, 2e-3),
        "orpo": (0.5, 2e-3),
        "scaled": (100.0, 2e-3),
        "mapo": (1.0, 2e-3),
        "dpo": (100.0, 2e-3),
    },
    "digits": {
        "sft": (0.0, 1e-3),
        "orpo": (0.05, 5e-4),
        "scaled": (10.0, 5e-4),
        "mapo": (0.1, 5e-4),
        "dpo": (100.0, 5e-4),
    },
}


@dataclass(frozen=True)
class Choice:
    """A setting, and the step at which it is best.

    Attributes:
        experiment: the run on validation images.
        step: where its reward is highest.
        reward: there.
    """

    experiment: Experiment
    step: int
    reward: float


def best_step(run: Run, needed: float) -> Choice | None:
    """Where a run has its highest reward while it follows the prompt often enough; None where it nowhere does."""
    kept = [step for step in run.evaluations if run.mean(step, "follows") >= needed]
    if not kept:
        return None
    step = max(kept, key=lambda step: run.mean(step, "rewards"))
    return Choice(run.experiment, step, run.mean(step, "rewards"))


def needed_following(base: dict) -> float:
    """The share of validation images that must show what was asked."""
    return KEPT * float(np.mean(base["splits"]["validation"]["follows"]))


def searched(runs: dict[Experiment, Run], world: str, objective: str) -> list[Run]:
    """The runs that are chosen from: on validation images, and measured at each of `MARKS`."""
    return [
        run
        for experiment, run in runs.items()
        if (experiment.world, experiment.objective, experiment.split) == (world, objective, "validation")
        and (experiment.flipped, experiment.votes) == (0.0, 1)
        and set(MARKS) <= set(run.evaluations)
    ]


def choose(runs: list[Run], needed: float, last: int | None = None) -> Choice | None:
    """The best of runs, looking at no step after the `last`; None where none keeps to the prompt."""
    cut = [Run(r.experiment, {s: e for s, e in r.evaluations.items() if last is None or s <= last}) for r in runs]
    choices = [choice for run in cut if (choice := best_step(run, needed))]
    return max(choices, key=lambda choice: choice.reward, default=None)


def neighbours(experiment: Experiment) -> list[Experiment]:
    """Stronger, weaker, and twice and half the learning rate, as far as the grid goes."""
    strengths = OBJECTIVES[experiment.objective].strengths
    found = []
    for field, grid in (("strength", strengths), ("learning_rate", LEARNING_RATES)):
        place = grid.index(getattr(experiment, field))
        found += [replace(experiment, **{field: grid[i]}) for i in (place - 1, place + 1) if 0 <= i < len(grid)]
    return found


def start(world: str, objective: str) -> Experiment:
    return Experiment(world, objective, *START[world][objective])


def missing(runs: dict[Experiment, Run], base: dict, world: str, objective: str) -> list[Experiment]:
    """What the search must run next; nothing once the best setting's neighbours are all worse."""
    done = searched(runs, world, objective)
    best = choose(done, needed_following(base), last=max(MARKS))
    around = best.experiment if best else start(world, objective)
    known = {run.experiment for run in done}
    return [experiment for experiment in (around, *neighbours(around)) if experiment not in known]
