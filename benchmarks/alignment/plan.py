"""The runs, most important first. Results decide what comes next, so the plan is made again after each run."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import search
from experiment import Experiment
from objectives import OBJECTIVES, VARIANTS, VOTES
from search import FINAL_MARKS, MARKS, Choice, Task, choose, needed_following
from store import Run


WORLDS = ("prompt", "smile", "digits")
ORDER = ("orpo", "dpo", "scaled", "mapo", "sft")
LONG_MARK = 2000
RECOMMENDED_BETA = 0.5  # in docs/choosing.md, for errors as these models have them
SEEDS = (1, 2, 3, 4, 5)
FLIPS = (0.3, 0.1)
BETAS = (0.05, 0.15, 0.5, 1.5, 5.0, 15.0)  # on test images
VOTE_COUNTS = (3, 10)
VOTED = {"strength": 5.0, "split": "validation"}  # ORPO's setting when the votes were compared

Runs = dict[str, dict[Experiment, Run]]  # by world


def chosen(runs: Runs, bases: dict[str, dict], world: str, objective: str) -> Choice | None:
    """An objective's choice in a world, see `search.chosen`."""
    return search.chosen(runs[world], bases[world], world, objective) if world in bases else None


def tasks(runs: Runs, bases: dict[str, dict], worlds: tuple[str, ...] = WORLDS) -> Iterator[Task]:
    """Everything that is to be run and can be now, done or not, in order."""
    faces = [world for world in worlds if world != "digits"]
    has_prompt = "prompt" in worlds
    yield from _search(runs, bases, worlds)
    yield from _compare(runs, bases, worlds)
    yield from _lengthen(runs, bases, faces)
    yield from _flatten(runs, bases, worlds)
    for flipped in FLIPS if has_prompt else ():
        yield from _flip(runs, bases, flipped)
    if has_prompt:
        yield from _vary(runs, bases)
    yield from _betas(runs, bases, faces, BETAS)
    if has_prompt:
        yield from _vote(runs, bases)


def _search(runs: Runs, bases: dict[str, dict], worlds: Iterable[str]) -> Iterator[Task]:
    """The search for each objective's setting."""
    for world in worlds:
        for objective in ORDER:
            yield from search.missing(runs[world], bases[world], world, objective)


def _compare(runs: Runs, bases: dict[str, dict], worlds: Iterable[str]) -> Iterator[Task]:
    """Each objective at its best, on test images, with fresh seeds."""
    for seed in SEEDS:
        for world in worlds:
            for objective in ORDER:
                if choice := chosen(runs, bases, world, objective):
                    yield replace(choice.experiment, split="test", seed=seed), FINAL_MARKS


def _flatten(runs: Runs, bases: dict[str, dict], worlds: Iterable[str]) -> Iterator[Task]:
    """ORPO with a flatter sigmoid, at ORPO's own setting."""
    for seed in SEEDS:
        for world in worlds:
            if choice := chosen(runs, bases, world, "orpo"):
                marks = FINAL_MARKS if world == "digits" else (*FINAL_MARKS, LONG_MARK)
                yield replace(choice.experiment, objective="flat", split="test", seed=seed), marks


def _vary(runs: Runs, bases: dict[str, dict]) -> Iterator[Task]:
    """Changes to ORPO's loss on prompt-following, at ORPO's learning rate."""
    if choice := chosen(runs, bases, "prompt", "orpo"):
        for seed in SEEDS:
            for name, variant in VARIANTS.items():
                for strength in variant.strengths:
                    setting = {"objective": name, "strength": strength, "split": "test", "seed": seed}
                    yield replace(choice.experiment, **setting), MARKS[:3]


def _flip(runs: Runs, bases: dict[str, dict], flipped: float) -> Iterator[Task]:
    """Wrong labels on prompt-following, for every objective, and for ORPO with a flatter sigmoid."""
    changes = [("orpo", {"objective": "flat", "flipped": flipped})]
    yield from _tune_and_test(runs, bases, [*changes, *((name, {"flipped": flipped}) for name in ORDER)])


def _vote(runs: Runs, bases: dict[str, dict]) -> Iterator[Task]:
    """Several votes on each pair of prompt-following, and what ORPO does with them."""
    for votes in VOTE_COUNTS:
        changes = [("orpo", VOTED | {"objective": name, "votes": votes}) for name in VOTES]
        yield from _tune_and_test(runs, bases, changes)


def _tune_and_test(runs: Runs, bases: dict[str, dict], changes: list[tuple[str, dict]]) -> Iterator[Task]:
    """With other data, what `candidates` has is chosen from again, on the final's images for wrong labels, then tested."""
    for name, changed in changes:
        yield from ((experiment, MARKS) for experiment in candidates(runs, bases, name, changed))
    for seed in SEEDS:
        for name, changed in changes:
            if choice := tuned(runs, bases, name, changed):
                yield replace(choice.experiment, split="test", seed=seed), MARKS


def candidates(runs: Runs, bases: dict[str, dict], objective: str, changed: dict) -> list[Experiment]:
    """The setting that an objective has on prompt-following, with something changed, at its rate, half and a quarter of it.

    Under wrong labels also every strength of the grid, at the best of these rates, once that is known.
    """
    choice = chosen(runs, bases, "prompt", objective)
    if choice is None:
        return []
    experiment = replace(choice.experiment, **changed)
    rates = [replace(experiment, learning_rate=experiment.learning_rate / divisor) for divisor in (1, 2, 4)]
    best = _best(runs, bases, rates) if "flipped" in changed else None
    strengths = [replace(best.experiment, strength=s) for s in OBJECTIVES[objective].strengths] if best else []
    return rates + [experiment for experiment in strengths if experiment not in rates]


def tuned(runs: Runs, bases: dict[str, dict], objective: str, changed: dict) -> Choice | None:
    """The best of the candidates, once all are run."""
    return _best(runs, bases, candidates(runs, bases, objective, changed))


def _best(runs: Runs, bases: dict[str, dict], wanted: list[Experiment]) -> Choice | None:
    """Of runs on prompt-following; None before all are done."""
    done = [run for e in wanted if (run := runs["prompt"].get(e)) and set(MARKS) <= set(run.evaluations)]
    if not wanted or len(done) < len(wanted):
        return None
    return choose(done, needed_following(bases["prompt"], wanted[0].split))


def _lengthen(runs: Runs, bases: dict[str, dict], worlds: Iterable[str]) -> Iterator[Task]:
    """Each objective at its own setting, and ORPO at the beta that is recommended."""
    for experiment, marks in (*_compare(runs, bases, worlds), *_betas(runs, bases, worlds, (RECOMMENDED_BETA,))):
        yield experiment, (*marks, LONG_MARK)


def _betas(runs: Runs, bases: dict[str, dict], worlds: Iterable[str], strengths: tuple[float, ...]) -> Iterator[Task]:
    """ORPO's strengths at its learning rate."""
    for seed in SEEDS:
        for world in worlds:
            if choice := chosen(runs, bases, world, "orpo"):
                for strength in strengths:
                    yield replace(choice.experiment, strength=strength, split="test", seed=seed), FINAL_MARKS
