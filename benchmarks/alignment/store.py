"""The stored results: one file for each world, one line for each stretch of a training run."""

import json
from dataclasses import asdict, dataclass, field, fields

import numpy as np

import paths
from experiment import Experiment


RESULTS = paths.HERE / "results"


@dataclass
class Run:
    """What is known of an experiment.

    Attributes:
        experiment: what was trained.
        evaluations: step to what `measure` returned there.
    """

    experiment: Experiment
    evaluations: dict[int, dict] = field(default_factory=dict)

    def mean(self, step: int, name: str) -> float:
        return float(np.mean(self.evaluations[step][name]))


def load_lines(world: str) -> list[dict]:
    file = RESULTS / f"{world}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def load_runs(world: str) -> dict[Experiment, Run]:
    """All runs; a run that was taken up again is one."""
    names, runs = [f.name for f in fields(Experiment)], {}
    for line in load_lines(world):
        if line["objective"] != "base":
            experiment = Experiment(**{name: line[name] for name in names if name in line})
            evaluations = {int(step): e for step, e in line["evaluations"].items()}
            runs.setdefault(experiment, Run(experiment)).evaluations |= evaluations
    return {experiment: Run(experiment, dict(sorted(run.evaluations.items()))) for experiment, run in runs.items()}


def load_base(world: str) -> dict | None:
    """What the base model draws on every split, and what is to be known about world and pairs."""
    return next((line for line in load_lines(world) if line["objective"] == "base"), None)


def append(world: str, line: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{world}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def as_line(experiment: Experiment, evaluations: dict[int, dict]) -> dict:
    return asdict(experiment) | {"evaluations": evaluations}
