"""One run of the emoji benchmark, and where its results are kept."""

import argparse
import hashlib
import json
from pathlib import Path


import drawings  # noqa: F401, isort: skip

import numpy as np
import torch

import instruments
import make_base
import preferences
from drawings import HERE, Emoji, load_emoji
from experiment import load_model, make_batch, noise_seed, reference_errors, save_aside, train_step, trained_parameters
from objectives import OBJECTIVES
from protocol import TUNING_SEED, Run, Setting


RESULTS = HERE / "results"


def train(emoji: Emoji, pairs: preferences.Pairs, setting: Setting, seed: int, steps: int):
    """The base with a LoRA that was trained on the pairs."""
    model, objective = load_model(str(make_base.BASE), seed), OBJECTIVES[setting.objective]
    model.denoiser.train()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=setting.rate)
    task = argparse.Namespace(prompts=emoji.captions)
    per_epoch = len(pairs.classes) // setting.pairs_per_step
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(pairs.classes))
        chosen = order[place * setting.pairs_per_step : (place + 1) * setting.pairs_per_step]
        batch = make_batch(task, pairs, chosen, [noise_seed(seed, epoch, index) for index in chosen])
        reference = reference_errors(model, batch) if objective.has_reference else None
        optimizer.param_groups[0]["lr"] = setting.rate * (1 if setting.constant else 1 - step / steps)
        train_step(model, batch, lambda errors: objective.loss(errors, setting), optimizer, reference=reference)
    model.denoiser.eval()
    return model.pipeline


def checksum() -> str:
    """Of the base and the instruments: results of others don't belong to these.

    Raises:
        SystemExit: they have not been trained yet.
    """
    files = [*sorted(make_base.BASE.glob("*/*.safetensors")), instruments.WEIGHTS]
    if len(files) == 1 or not instruments.WEIGHTS.exists():
        raise SystemExit(
            f"{make_base.BASE} or {instruments.WEIGHTS} is missing: train them with make_base.py and instruments.py first."
        )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load_results(task: str, folder: Path = RESULTS) -> tuple[dict[Run, dict], dict[str, dict]]:
    """What is stored of a task: of each run, and of the base on each split.

    Raises:
        SystemExit: the results are of another base or of other instruments.
    """
    file, runs, bases = folder / f"{task}.jsonl", {}, {}
    for line in file.read_text().splitlines() if file.exists() else ():
        line = json.loads(line)
        if line["of"] != checksum():
            raise SystemExit(
                f"{file} holds results of another base or of other instruments than the ones here: move it away, or take those."
            )
        if "base" in line:
            bases[line["base"]] = line["measured"]
        else:
            run = line["run"]
            runs[Run(**run | {"setting": Setting(**run["setting"])})] = line["measured"]
    return runs, bases


def append(task: str, line: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{task}.jsonl", "a") as file:
        file.write(json.dumps({"of": checksum()} | line, separators=(",", ":")) + "\n")


class Benchmark:
    """Drawings, instruments and pairs, each made once."""

    def __init__(self, work: Path) -> None:
        checksum()  # says what is missing
        self.work, self.emoji = work, load_emoji()
        self.instruments = instruments.load_instruments(self.emoji)

    def pairs(self, task: str, draw: int, count: int | None = None) -> preferences.Pairs:
        file = self.work / f"{task}-{draw}-{count or 'all'}-{checksum()}.pt"
        if not file.exists():
            save_aside(preferences.make_pairs(task, self.emoji, self.instruments, draw, count), file)
        return torch.load(file, weights_only=False)

    def measure(self, task: str, pipeline, split: str, count: int | None = None) -> dict:
        subjects = preferences.subjects_of(self.emoji, split)[:count]
        images = preferences.generate(pipeline, self.emoji, subjects, preferences.SEEDS[split])
        return preferences.measure(task, self.emoji, self.instruments, images, subjects)

    def base(self, task: str, split: str, bases: dict[str, dict]) -> dict:
        if split not in bases:
            bases[split] = self.measure(task, make_base.load_base(), split)
            append(task, {"base": split, "measured": bases[split], "noise": self.pairs(task, TUNING_SEED).noise})
        return bases[split]
