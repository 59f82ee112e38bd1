"""Held-out preference accuracy as a compass: how well it tells the reward, and what choosing by it alone costs."""

from dataclasses import dataclass

import numpy as np

from comparison import Comparison
from search import FINAL_MARKS
from store import Run


KEPT = 0  # in place of the step that a run's own accuracy chooses


@dataclass(frozen=True)
class Point:
    """A run at one of its steps."""

    objective: str
    accuracy: float
    gain: float
    follows: float


def points(c: Comparison, name: str) -> list[Point]:
    """All steps of an objective's runs in the search."""
    return [
        Point(name, evaluation["accuracy"], c.gain(run, step), run.mean(step, "follows"))
        for run in c.settings(name)
        for step, evaluation in run.evaluations.items()
    ]


def correlation(found: list[Point]) -> float:
    return float(np.corrcoef([p.accuracy for p in found], [p.gain for p in found])[0, 1])


def price(c: Comparison, name: str) -> tuple[Point, float] | None:
    """The setting and step with the highest accuracy, and the highest gain of any that keeps to the prompt."""
    found = points(c, name)
    kept = [p.gain for p in found if p.follows >= c.needed]
    return (max(found, key=lambda p: p.accuracy), max(kept)) if kept else None


def kept_step(run: Run) -> int:
    """The step that `--keep_best` keeps: the first with the highest held-out accuracy."""
    return max(FINAL_MARKS, key=lambda step: run.evaluations[step]["accuracy"])


def keep_best(runs: list[Run]) -> list[Run]:
    """Runs with the one evaluation that `--keep_best` keeps of each."""
    return [Run(run.experiment, {KEPT: run.evaluations[kept_step(run)]}) for run in runs]
