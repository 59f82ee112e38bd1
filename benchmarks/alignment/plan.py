"""The runs, most important first: what `run_all.py` runs, decided before any of their results was seen. See `PROTOCOL.md`."""

from collections.abc import Iterator
from dataclasses import replace

from settings import Experiment


STEPS = {"digits": 2000, "prompt": 1000, "smile": 1000}
MARKS = {"digits": (400, 1000, 2000), "prompt": (400, 1000), "smile": (400, 1000)}
FIRST_SEEDS, MORE_SEEDS = (41, 42, 43), (44, 45)
MAIN, OTHER = ("even", "dpo", "orpo", "sft"), ("scaled", "mapo")
Setting = tuple[float, float, float]  # strength, learning rate, temperature

# Two settings for every objective in every task, from what earlier runs at constant rates had shown to be its best region.
SETTINGS: dict[str, dict[str, tuple[Setting, Setting]]] = {
    "digits": {
        "even": ((0.375, 1e-3, 1), (0.4, 1e-3, 4)),
        "dpo": ((1000, 2e-3, 1), (300, 2e-3, 1)),
        "orpo": ((5, 2.5e-4, 1), (0.5, 5e-4, 1)),
        "sft": ((0, 1e-3, 1), (0, 2.5e-4, 1)),
        "scaled": ((30, 5e-4, 1), (30, 2.5e-4, 1)),
        "mapo": ((30, 1e-3, 1), (1, 5e-4, 1)),
    },
    "prompt": {
        "even": ((0.4, 2e-3, 4), (0.475, 2e-3, 1)),
        "dpo": ((30, 2e-3, 1), (300, 2e-3, 1)),
        "orpo": ((15, 2e-3, 1), (0.5, 2e-3, 1)),
        "sft": ((0, 2e-3, 1), (0, 1e-3, 1)),
        "scaled": ((30, 2e-3, 1), (100, 2e-3, 1)),
        "mapo": ((10, 2e-3, 1), (1, 2e-3, 1)),
    },
    "smile": {
        "even": ((0.4, 2e-3, 4), (0.475, 2e-3, 1)),
        "dpo": ((1000, 4e-3, 1), (300, 4e-3, 1)),
        "orpo": ((1.5, 2e-3, 1), (0.5, 2e-3, 1)),
        "sft": ((0, 4e-3, 1), (0, 2e-3, 1)),
        "scaled": ((100, 4e-3, 1), (30, 4e-3, 1)),
        "mapo": ((1, 4e-3, 1), (3, 4e-3, 1)),
    },
}
# A second look at the digits with one seed: again two settings for each.
MORE_DIGITS: dict[str, tuple[Setting, Setting]] = {
    "even": ((0.375, 1e-3, 4), (0.3, 1e-3, 1)),
    "dpo": ((1000, 4e-3, 1), (300, 4e-3, 1)),
    "orpo": ((0.1, 1e-3, 1), (1.5, 2.5e-4, 1)),
}
ABLATIONS = ({"clip": 1e9}, {"ema": 0.995}, {"cap": 2.0})
FLIPPED = 0.3
FIRST = (  # with each of the first seeds: task, objectives, first or second setting
    ("digits", ("even", "dpo"), 0),
    ("prompt", ("even", "dpo", "orpo"), 0),
    ("digits", ("even", "dpo"), 1),
    ("digits", ("orpo",), 0),
    ("smile", ("even", "dpo", "orpo"), 0),
    ("prompt", ("even", "dpo"), 1),
    ("smile", ("even", "dpo"), 1),
    *((task, ("sft",), 0) for task in STEPS),
)


def experiments() -> Iterator[Experiment]:
    """Everything that is to be run, in order."""
    for seed in FIRST_SEEDS:
        for task, objectives, place in FIRST:
            yield from settings(task, objectives, seed, place)
        for e in settings("prompt", MAIN[:3], seed, 0):
            yield replace(e, flipped=FLIPPED)
    for task in STEPS:
        yield from (e for seed in FIRST_SEEDS for e in settings(task, MAIN[2:], seed, 1))
        yield from settings(task, OTHER, FIRST_SEEDS[0], 0)
        yield from settings(task, OTHER, FIRST_SEEDS[0], 1)
    for changes in ABLATIONS:
        yield replace(make("digits", "even", SETTINGS["digits"]["even"][0], FIRST_SEEDS[0]), **changes)
    yield from (make("digits", name, each, FIRST_SEEDS[0]) for name, both in MORE_DIGITS.items() for each in both)
    for task in STEPS:
        yield from (e for seed in FIRST_SEEDS[1:] for place in (0, 1) for e in settings(task, OTHER, seed, place))
    for task in STEPS:
        yield from (e for seed in MORE_SEEDS for place in (0, 1) for e in settings(task, MAIN, seed, place))


def settings(task: str, objectives: tuple[str, ...], seed: int, place: int) -> Iterator[Experiment]:
    """The first or the second setting of each objective."""
    yield from (make(task, name, SETTINGS[task][name][place], seed) for name in objectives)


def make(task: str, objective: str, setting: Setting, seed: int) -> Experiment:
    strength, learning_rate, temperature = setting
    return Experiment(task, objective, float(strength), learning_rate, STEPS[task], seed, float(temperature))
