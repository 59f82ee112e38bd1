"""The stored results: one line for each measurement."""

import json
from dataclasses import asdict

import numpy as np

import paths
from settings import Experiment


RESULTS = paths.HERE / "results"
DEFAULTS = {name: field.default for name, field in Experiment.__dataclass_fields__.items()}
Runs = dict[Experiment, dict[int, dict]]  # step to what `measure` returned there


def load_lines(name: str) -> list[dict]:
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def load_runs(name: str) -> Runs:
    """The runs of a task; those of "constant_rate" are of all tasks, and their `steps` are 0 since their rate did not fall."""
    runs: Runs = {}
    for line in load_lines(name):
        if line["objective"] != "base":
            setting = {"task": name} | {key: value for key, value in line.items() if key not in ("step", "measured")}
            runs.setdefault(Experiment(**setting), {})[line["step"]] = line["measured"]
    return runs


def load_base(name: str, task: str | None = None) -> dict | None:
    """What the base of a task measures; in "constant_rate" the task is to be named."""
    bases = (line for line in load_lines(name) if line["objective"] == "base")
    return next((line["measured"] for line in bases if line.get("task") == task), None)


def append(experiment: Experiment, step: int, measured: dict) -> None:
    setting = {name: value for name, value in asdict(experiment).items() if value != DEFAULTS[name]}
    append_line(setting.pop("task"), setting | {"step": step, "measured": measured})


def append_line(task: str, line: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{task}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def values(runs: list[dict[int, dict]], step: int, name: str) -> np.ndarray:
    """What the runs measured at a step, one row each: by prompt, or by quarter of the noise levels."""
    return np.array([np.atleast_1d(run[step][name]) for run in runs], dtype=float)
