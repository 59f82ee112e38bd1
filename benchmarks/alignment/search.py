"""The one rule by which every objective gets its strength, its learning rate and its number of steps.

The best setting and step is the one with the highest reward among those that keep to the prompt. The search, on the prompts of the
pairs, begins with every strength of the grid at one learning rate, and moves from the best setting to the best of its four neighbours
(stronger, weaker, twice the rate, half the rate) until none is better. One seed can be lucky, and what suits the prompts of the pairs
need not suit others. So the best three settings go to a final: three seeds, more steps, and prompts that no pair has, which are not
those of the test. Their mean decides.
"""

from dataclasses import dataclass, replace

import numpy as np

from experiment import Experiment
from objectives import OBJECTIVES
from store import Run


Task = tuple[Experiment, tuple[int, ...]]  # an experiment, and the steps at which it is measured

MIN_FOLLOWING = 0.95  # share of the base's prompt-following that a chosen setting must keep
SEEDS = (0, 6, 7)  # of training: the search takes the first, the final all three; the test has its own
FINALISTS = 3
MARKS = (100, 200, 400, 600)  # steps at which a run of the search is measured
FINAL_MARKS = (*MARKS, 1000)
FINAL_SPLIT = {"smile": "final", "prompt": "final", "digits": "validation"}  # every digit is in some pair
POOLED = ("rewards", "follows", "distance", "accuracy")
LEARNING_RATES = tuple(1e-3 * 2.0**i for i in range(-5, 6))
START_RATE = {"smile": 2e-3, "prompt": 2e-3, "digits": 5e-4}


@dataclass(frozen=True)
class Choice:
    """A setting, and the step at which it is best.

    Attributes:
        run: of the first seed on validation images, or of all seeds in the final.
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


def needed_following(base: dict, split: str = "validation") -> float:
    """The share of a split's images that must show what was asked."""
    return MIN_FOLLOWING * float(np.mean(base["splits"][split]["follows"]))


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


def final_of(setting: Experiment, split: str | None = None) -> list[Experiment]:
    """A setting with every seed of the final, on its images or on another split's."""
    return [replace(setting, seed=seed, split=split or FINAL_SPLIT[setting.world]) for seed in SEEDS]


def is_complete(runs: dict[Experiment, Run], experiment: Experiment) -> bool:
    return experiment in runs and set(FINAL_MARKS) <= set(runs[experiment].evaluations)


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
    wanted = [experiment for choice in best[:FINALISTS] for experiment in final_of(choice.experiment)]
    return [(experiment, FINAL_MARKS) for experiment in wanted if not is_complete(runs, experiment)]


def finalists(
    runs: dict[Experiment, Run], base: dict, world: str, objective: str, split: str | None = None
) -> list[Run]:
    """The best settings, each of all seeds; none before the search has ended.

    Args:
        runs, base, world, objective: as for `missing`.
        split: the images, instead of the final's; settings that were not run on them are left out.
    """
    if missing(runs, base, world, objective):
        return []
    best = rank(searched(runs, world, objective), needed_following(base), last=max(MARKS))[:FINALISTS]
    finals = [final_of(choice.experiment, split) for choice in best]
    return [pool([runs[e] for e in final]) for final in finals if all(is_complete(runs, e) for e in final)]


def chosen(runs: dict[Experiment, Run], base: dict, world: str, objective: str) -> Choice | None:
    """An objective's choice; None before the search has ended, or where no setting keeps to the prompt."""
    return choose(finalists(runs, base, world, objective), needed_following(base, FINAL_SPLIT[world]))
