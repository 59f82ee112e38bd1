"""`PROTOCOL.md` as code: which setting is run next, and which is chosen."""

from dataclasses import dataclass
from itertools import product

import numpy as np


TASKS = ("style", "adherence", "drawings")
RATES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)  # the inner two are the grid's
AXES = {  # strengths, of which the inner three are the grid's
    "even": (0.125, 0.25, 0.375, 0.45, 0.48),
    "dpo": (20.0, 100.0, 500.0, 2500.0, 12500.0),
    "sft": (0.0,),
    "orpo": (0.1, 0.5, 2.0, 8.0, 30.0),
    "mapo": (0.1, 0.5, 2.0, 8.0, 30.0),
    "scaled": (2.0, 10.0, 50.0, 250.0, 1250.0),
}
SFT_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # the inner six are the grid's
EXTRA = 3  # neighbours of the best
STEPS, LONG = 1000, 2000
TUNING_SEED, TEST_SEEDS = 1, (101, 102, 103, 104, 105)
KEPT = 0.9  # of the base's adherence


@dataclass(frozen=True)
class Setting:
    """What is trained. `strength` and `temperature` are those of `objectives.py`."""

    objective: str
    strength: float
    rate: float
    constant: bool = False
    pairs_per_step: int = 8
    temperature: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True)
class Run:
    """A setting trained with a seed on a draw of pairs and measured on subjects: "tuning" or "test"."""

    task: str
    split: str
    setting: Setting
    seed: int
    steps: int = STEPS

    @property
    def draw(self) -> int:
        return 1 if self.seed % 2 else 2


DEFAULTS = Setting("even", 0.375, 1e-4, constant=True, pairs_per_step=4)


def axes(objective: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return AXES[objective], SFT_RATES if objective == "sft" else RATES


def grid(objective: str) -> list[Setting]:
    strengths, rates = axes(objective)
    return [Setting(objective, *pair) for pair in product(strengths[1:-1] or strengths, rates[1:-1])]


def neighbours(setting: Setting) -> list[Setting]:
    """On each axis, the next lower and higher value."""
    strengths, rates = axes(setting.objective)
    s, r = strengths.index(setting.strength), rates.index(setting.rate)
    places = ((s - 1, r), (s + 1, r), (s, r - 1), (s, r + 1))
    return [
        Setting(setting.objective, strengths[i], rates[j])
        for i, j in places
        if 0 <= i < len(strengths) and 0 <= j < len(rates)
    ]


def gain_of(task: str) -> str:
    """The measure that the task's preference is about."""
    return "adherence" if task == "adherence" else "style"


def choose(task: str, done: dict[Setting, dict], base: dict) -> Setting:
    """The rule of choice: of an objective's settings and what they measured on the tuning subjects."""

    def mean(setting: Setting, name: str) -> float:
        return float(np.mean(done[setting][name]))

    keeping = [setting for setting in done if mean(setting, "adherence") >= KEPT * np.mean(base["adherence"])]
    if keeping:
        return max(keeping, key=lambda setting: mean(setting, gain_of(task)))
    return max(done, key=lambda setting: mean(setting, "adherence"))


def tuned(task: str, objective: str, results: dict[Run, dict]) -> dict[Setting, dict]:
    return {
        run.setting: measured
        for run, measured in results.items()
        if (run.task, run.split, run.setting.objective) == (task, "tuning", objective)
    }


def next_tuning(task: str, objective: str, results: dict[Run, dict], base: dict) -> Setting | None:
    """The next setting of an objective's tuning; None when it is finished."""
    done = tuned(task, objective, results)
    lacking = [setting for setting in grid(objective) if setting not in done]
    if lacking:
        return lacking[0]
    if len(done) == len(grid(objective)) + EXTRA:
        return None
    return next((each for each in neighbours(choose(task, done, base)) if each not in done), None)


def next_run(results: dict[Run, dict], bases: dict[str, dict], tasks: tuple[str, ...] = TASKS) -> Run | None:
    """The first run of the plan that lacks. `bases` holds what the base measures on the tuning subjects of each task."""
    for steps, task in product((STEPS, LONG), tasks):
        for objective in AXES:
            if setting := next_tuning(task, objective, results, bases[task]):
                return Run(task, "tuning", setting, TUNING_SEED)
        settings = [choose(task, tuned(task, each, results), bases[task]) for each in AXES]
        for seed, setting in product(TEST_SEEDS, [*settings, DEFAULTS]):
            if (run := Run(task, "test", setting, seed, steps)) not in results:
                return run
    return None
