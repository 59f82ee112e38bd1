"""The stored results of one world: the chosen settings, and how they did on test images."""

from dataclasses import dataclass, replace

import numpy as np

import plan
import search
from bootstrap import Bootstrap, Estimate
from experiment import Experiment
from objectives import OBJECTIVES
from plan import SEEDS
from search import FINAL_MARKS, MARKS, MIN_FOLLOWING, Choice, choose, needed_following, searched
from store import Run, load_base, load_runs
from worlds import FINAL_PROMPTS, UNSEEN


TITLES = {"prompt": "prompt-following", "smile": "smile", "digits": "digits"}


def prompts_of(world: str, count: int) -> np.ndarray:
    """Prompt of each test image: the prompts take turns."""
    return np.arange(count) % (10 if world == "digits" else UNSEEN)


@dataclass(frozen=True)
class Leads:
    """How far ORPO is ahead of another objective on test images, each at its own choice.

    Attributes:
        gain: in reward.
        follows: in images that show what was asked.
        best_step: where the other's gain is highest on these very images, among the steps that keep to the prompt there.
        over_best: ORPO's lead in reward over that step.
    """

    gain: Estimate
    follows: Estimate
    best_step: int
    over_best: Estimate


class Comparison:
    """One world's results, complete or not.

    Attributes:
        choices: by objective, what was chosen, or as long as its search goes on the best so far; None where nothing that was
            tried keeps to the prompt.
        finished: by objective, whether the search has ended.
        tested: which images of the test count: those whose prompt was not in the final.
        signed: the format of a reward; those of the digits are small.
    """

    def __init__(self, world: str):
        self.world, self.runs, self.base = world, load_runs(world), load_base(world)
        self.signed = "+.3f" if world == "digits" else "+.2f"
        self.needed = needed_following(self.base)
        self.prompts = prompts_of(world, len(self.base_rewards("test")))
        self.tested = np.full(len(self.prompts), True) if world == "digits" else ~np.isin(self.prompts, FINAL_PROMPTS)
        self.finished = {
            name: bool(self.settings(name)) and not search.missing(self.runs, self.base, world, name)
            for name in OBJECTIVES
        }
        self.choices: dict[str, Choice | None] = {
            name: search.chosen(self.runs, self.base, world, name) or choose(self.settings(name), self.needed)
            for name in OBJECTIVES
        }

    def settings(self, name: str) -> list[Run]:
        """All settings of the search, with its first seed."""
        return searched(self.runs, self.world, name)

    def base_rewards(self, split: str) -> np.ndarray:
        return np.array(self.base["splits"][split]["rewards"])

    def gain(self, run: Run, step: int) -> float:
        """Mean reward above the base's, on the run's own split."""
        return run.mean(step, "rewards") - float(self.base_rewards(run.experiment.split).mean())

    def tests(self, name: str, marks: tuple[int, ...] = FINAL_MARKS, **changes) -> list[Run]:
        """The runs on test images at an objective's chosen setting, by seed, that are measured at all marks.

        Args:
            name: of the objective.
            marks: steps.
            changes: to the chosen setting, such as another strength.
        """
        choice = self.choices[name]
        if choice is None or not self.finished[name]:
            return []
        return self.tests_of(replace(choice.experiment, **changes), marks)

    def tests_of(self, setting: Experiment, marks: tuple[int, ...]) -> list[Run]:
        """A setting's runs on test images, by seed, that are measured at all marks."""
        wanted = [replace(setting, split="test", seed=seed) for seed in SEEDS]
        found = [self.runs[experiment] for experiment in wanted if experiment in self.runs]
        return [run for run in found if set(marks) <= set(run.evaluations)]

    def bootstrap(self, num_seeds: int) -> Bootstrap:
        return Bootstrap(num_seeds, self.prompts[self.tested])

    def values(self, runs: list[Run], step: int, field: str) -> np.ndarray:
        """Of the test images that count (runs, images)."""
        return np.array([run.evaluations[step][field] for run in runs], dtype=float)[:, self.tested]

    def estimate(self, runs: list[Run], step: int, field: str = "rewards") -> Estimate:
        """Mean over seeds and prompts at a step; rewards are above the base's."""
        values = self.values(runs, step, field)
        if field == "rewards":
            values = values - self.base_rewards("test")[self.tested]
        return self.bootstrap(len(runs)).mean(values)

    def lead(self, ours: list[Run], step: int, theirs: list[Run], their_step: int, field: str = "rewards") -> Estimate:
        """How far we are ahead, over the seeds that both have."""
        both = {run.experiment.seed for run in ours} & {run.experiment.seed for run in theirs}
        ours, theirs = ([run for run in runs if run.experiment.seed in both] for runs in (ours, theirs))
        difference = self.values(ours, step, field) - self.values(theirs, their_step, field)
        return self.bootstrap(len(both)).mean(difference)

    def leads(self, name: str) -> Leads:
        """ORPO's, over another objective."""
        (ours, step), (theirs, chosen) = ((self.tests(n), self.choices[n].step) for n in ("orpo", name))
        kept = [s for s in FINAL_MARKS if s == chosen or not self.keeps_less(self.estimate(theirs, s, "follows"))]
        best = max(kept, key=lambda s: self.estimate(theirs, s).mean)
        gain, follows = (self.lead(ours, step, theirs, chosen, field) for field in ("rewards", "follows"))
        return Leads(gain, follows, best, self.lead(ours, step, theirs, best))

    def keeps_less(self, follows: Estimate) -> bool:
        """Whether fewer images show what was asked than the rule wants."""
        return follows.mean < MIN_FOLLOWING * self.base_follows()

    def tests_with(self, name: str, changed: dict) -> tuple[Choice, list[Run]] | None:
        """With other data, what was chosen (see `plan.tuned`) and its runs on test images; None before there are any."""
        choice = plan.tuned({"prompt": self.runs}, {"prompt": self.base}, name, changed)
        runs = self.tests_of(choice.experiment, MARKS) if choice else []
        return (choice, runs) if runs else None

    def base_follows(self) -> float:
        """Share of the test images that count which show what was asked, drawn by the base."""
        return float(np.array(self.base["splits"]["test"]["follows"], dtype=float)[self.tested].mean())
