"""Are pairs that the trained model draws itself worth more than the base's? Three rounds against one long one.

    python benchmarks/alignment/rounds.py --work work     # resumable

All arms train ORPO for the same steps, begin a new optimizer at each third, and take images from the same seeds. Only the pairs
of each third differ.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from orpo.training.optimizer import make_optimizer

from experiment import PAIRS_PER_STEP, Experiment, Training, measure
from run_all import prepare
from store import RESULTS
from worlds import Pairs, World, draw_pairs


WORLD = "smile"  # the demo's
BETA, LEARNING_RATE = 0.5, 2e-3
ROUNDS, STEPS, NUM_PAIRS = 3, 100, 240  # steps and pairs of each round
SEEDS = (1, 2, 3, 4, 5)
FILE = RESULTS / "rounds.jsonl"


@dataclass(frozen=True)
class Drawer:
    """Draws the pairs of a round, with the base or with the model as it is trained so far."""

    world: World
    seed: int
    training: Training

    def own(self, number: int) -> Pairs:
        self.training.model.denoiser.eval()
        pairs = draw_pairs(self.world, NUM_PAIRS, self._seed(number), pipeline=self.training.model.pipeline)
        self.training.model.denoiser.train()
        return pairs

    def base(self, number: int) -> Pairs:
        return draw_pairs(self.world, NUM_PAIRS, self._seed(number))

    def _seed(self, number: int) -> int:
        return 100 + 10 * self.seed + number


@dataclass(frozen=True)
class Arm:
    """What is trained on in each round.

    Attributes:
        label: for the table.
        pairs: (drawer, round, pairs of the round before) -> pairs.
        labels: how many people would have to give.
    """

    label: str
    pairs: Callable[[Drawer, int, Pairs | None], Pairs]
    labels: int = ROUNDS * NUM_PAIRS


def join(*parts: Pairs) -> Pairs:
    tensors = (torch.cat([getattr(p, name) for p in parts]) for name in ("latents_w", "latents_l", "shares"))
    return Pairs(*tensors, np.concatenate([p.classes for p in parts]), float(np.mean([p.noise for p in parts])))


ARMS = {
    "rounds": Arm("new pairs each round, drawn by the model so far", lambda draw, number, _: draw.own(number)),
    "kept": Arm(
        "the same, with the earlier rounds' pairs kept",
        lambda draw, number, before: join(*filter(None, [before, draw.own(number)])),
    ),
    "base": Arm(
        "as many pairs, all drawn by the base",
        lambda draw, _, before: before or join(*(draw.base(number) for number in range(ROUNDS))),
    ),
    "first": Arm("the first round's pairs only", lambda draw, _, before: before or draw.base(0), labels=NUM_PAIRS),
}


def run(arm: str, seed: int, work: Path) -> dict:
    """Trains one arm, and measures it after each round on test images."""
    world, _, held_out = prepare(WORLD, work)
    experiment = Experiment(WORLD, "orpo", BETA, LEARNING_RATE, seed, "test")
    training, evaluations, pairs = Training(experiment, world, held_out), {}, None
    drawer = Drawer(world, seed, training)
    for number in range(ROUNDS):
        training.pairs = pairs = ARMS[arm].pairs(drawer, number, pairs)
        training.optimizer = make_optimizer(training.args, training.parameters, PAIRS_PER_STEP)
        *_, step = training.train_to((number + 1) * STEPS)
        evaluations[step] = measure(world, training.model, held_out, "test")
    return {"arm": arm, "seed": seed, "evaluations": evaluations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="Folder of the drawn pairs: that of run_all.py.")
    work = parser.parse_args().work
    known = {(line["arm"], line["seed"]) for line in load_rounds()}
    for seed in SEEDS:
        for arm in ARMS:
            if (arm, seed) not in known:
                with open(FILE, "a") as file:
                    file.write(json.dumps(run(arm, seed, work)) + "\n")
                print(arm, seed, flush=True)


def load_rounds() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


if __name__ == "__main__":
    main()
