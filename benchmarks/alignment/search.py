"""The one rule by which every objective gets its strength, its learning rate and its number of steps.

Only validation images count. The best setting and step is the one with the highest reward among those that keep to the prompt. The
search begins with every strength of the grid at one learning rate, and moves from the best setting to the best of its four neighbours
(stronger, weaker, twice the rate, half the rate) until none is better. One seed can be lucky, so the best three settings are then run
with two more seeds, and longer; the mean of the three seeds decides.
"""

from dataclasses import dataclass, replace

import numpy as np

from experiment import Experiment
from objectives import OBJECTIVES
from store import Run


Task = tuple[Experiment, tuple[int, ...]]  # an experiment, and the steps at which it is measured

MIN_FOLLOWING = 0.95  # share of the base's prompt-following that a chosen setting must keep
SEEDS = (0, 6, 7)  # of training: the first for every setting, all for the best; those of the test are others
FINALISTS = 3
MARKS = (100, 200, 400, 600)  # steps at which a run of the search is measured
FINAL_MARKS = (*MARKS, 1000)
POOLED = ("rewards", "follows", "distance", "accuracy")
LEARNING_RATES = tuple(1e-3 * 2.0**i for i in range(-5, 6))
START_RATE = {"smile": 2e-3, "prompt": 2e-3, "digits": 5e-4}


@dataclass(frozen=True)
class Choice:
    """A setting, and the step at which it is best.

    Attributes:
        run: on validation images, of the first seed or of all.
        step: where its reward is highest.
    """

    run: Run
    step: int

    @property
    def experiment(self) -> Experiment:
        return self.run.experiment

    @property
    def reward(self) -> float:
        return self.run.mean(self.step, "rewards")


def best_step(run: Run, needed: float) -> Choice | None:
    """Where a run has its highest reward while it follows the prompt often enough; None where it nowhere does."""
    kept = [step for step in run.evaluations if run.mean(step, "follows") >= needed]
    if not kept:
        return None
    return Choice(run, max(kept, key=lambda step: run.mean(step, "rewards")))


def needed_following(base: dict) -> float:
    """The share of validation images that must show what was asked."""
    return MIN_FOLLOWING * float(np.mean(base["splits"]["validation"]["follows"]))


def searched(runs: dict[Experiment, Run], world: str, objective: str) -> list[Run]:
    """Every setting that was tried, with the first seed: on validation images, and measured at each of `MARKS`."""
    return [
        run
        for experiment, run in runs.items()
        if experiment == Experiment(world, objective, experiment.strength, experiment.learning_rate, SEEDS[0])
        and set(MARKS) <= set(run.evaluations)
    ]


def rank(runs: list[Run], needed: float, last: int | None = None) -> list[Choice]:
    """Runs that keep to the prompt at their best step, the best first, looking at no step after the `last`."""
    cut = [Run(r.experiment, {s: e for s, e in r.evaluations.items() if last is None or s <= last}) for r in runs]
    choices = [choice for run in cut if (choice := best_step(run, needed))]
    return sorted(choices, key=lambda choice: -choice.reward)


def choose(runs: list[Run], needed: float) -> Choice | None:
    """The best of runs; None where none keeps to the prompt."""
    return next(iter(rank(runs, needed)), None)


def pool(runs: list[Run]) -> Run:
    """Runs of one setting with several seeds as one: all their images, at the steps that all were measured at."""
    shared = set.intersection(*(set(run.evaluations) for run in runs))
    evaluations = {
        step: {name: np.concatenate([np.atleast_1d(r.evaluations[step][name]) for r in runs]) for name in POOLED}
        for step in sorted(shared)
    }
    return Run(runs[0].experiment, evaluations)


def lacking_seeds(runs: dict[Experiment, Run], setting: Experiment) -> list[Experiment]:
    """What the final of a setting lacks: all seeds, measured at `FINAL_MARKS`."""
    wanted = [replace(setting, seed=seed) for seed in SEEDS]
    return [e for e in wanted if e not in runs or not set(FINAL_MARKS) <= set(runs[e].evaluations)]


def neighbours(experiment: Experiment) -> list[Experiment]:
    """Stronger, weaker, and twice and half the learning rate, as far as the grid goes."""
    strengths = OBJECTIVES[experiment.objective].strengths
    found = []
    for field, grid in (("strength", strengths), ("learning_rate", LEARNING_RATES)):
        place = grid.index(getattr(experiment, field))
        found += [replace(experiment, **{field: grid[i]}) for i in (place - 1, place + 1) if 0 <= i < len(grid)]
    return found


def starts(world: str, objective: str) -> list[Experiment]:
    """Every strength, at the first learning rate."""
    return [Experiment(world, objective, strength, START_RATE[world]) for strength in OBJECTIVES[objective].strengths]


def missing(runs: dict[Experiment, Run], base: dict, world: str, objective: str) -> list[Task]:
    """What the search must run next: nothing once the best setting's neighbours are all worse, and the best are run with all seeds."""
    done = searched(runs, world, objective)
    known = {run.experiment for run in done}
    best = rank(done, needed_following(base), last=max(MARKS))
    for wanted in (starts(world, objective), neighbours(best[0].experiment) if best else []):
        if untried := [experiment for experiment in wanted if experiment not in known]:
            return [(experiment, MARKS) for experiment in untried]
    return [(e, FINAL_MARKS) for choice in best[:FINALISTS] for e in lacking_seeds(runs, choice.experiment)]


def finalists(runs: dict[Experiment, Run], base: dict, world: str, objective: str) -> list[Run]:
    """The best settings, each of all seeds; none before the search has ended."""
    if missing(runs, base, world, objective):
        return []
    best = rank(searched(runs, world, objective), needed_following(base), last=max(MARKS))[:FINALISTS]
    return [pool([runs[replace(choice.experiment, seed=seed)] for seed in SEEDS]) for choice in best]


def chosen(runs: dict[Experiment, Run], base: dict, world: str, objective: str) -> Choice | None:
    """An objective's choice; None before the search has ended, or where no setting keeps to the prompt."""
    return choose(finalists(runs, base, world, objective), needed_following(base))
