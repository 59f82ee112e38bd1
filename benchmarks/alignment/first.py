"""The first comparison: 200 steps, six settings for each objective, five seeds. Its flaws are on the page; it stays until replaced."""

import json

import numpy as np

from bootstrap import Bootstrap, Estimate
from comparison import prompts_of
from store import FIRST


STEPS = 200
SEEDS = 5
NAMES = ("sft", "earlier", "mended", "scaled", "orpo", "mapo", "dpo")


class First:
    """Its final runs in one world: each objective at the setting that it had chosen, on test images."""

    def __init__(self, world: str):
        lines = [json.loads(line) for line in (FIRST / f"{world}.jsonl").read_text().splitlines()]
        base = next(line for line in lines if line["objective"] == "base")["splits"]["test"]
        self.base_rewards = np.array(base["rewards"])
        self.base_follows, self.base_distance = float(np.mean(base["follows"])), base["distance"]
        self.bootstrap = Bootstrap(SEEDS, prompts_of(world, len(self.base_rewards)))
        self.finals = {name: self._finals(lines, name) for name in NAMES}

    @staticmethod
    def _finals(lines: list[dict], name: str) -> list[dict]:
        """Those with a curve: the side experiments were measured at the end only."""
        kept = [
            line
            for line in lines
            if (line["objective"], line.get("split"), line.get("steps"), line.get("flipped"))
            == (name, "test", STEPS, 0.0)
            and len(line["evaluations"]) > 1
        ]
        return sorted(kept, key=lambda line: line["seed"])

    def values(self, name: str, field: str) -> np.ndarray:
        return np.array([line["evaluations"][str(STEPS)][field] for line in self.finals[name]], dtype=float)

    def gain(self, name: str) -> Estimate:
        return self.bootstrap.mean(self.values(name, "rewards") - self.base_rewards)

    def lead(self, ours: str, theirs: str) -> Estimate:
        """How much more reward the one has than the other."""
        return self.bootstrap.mean(self.values(ours, "rewards") - self.values(theirs, "rewards"))

    def follows(self, name: str) -> float:
        return float(self.values(name, "follows").mean())

    def distance(self, name: str) -> float:
        return float(self.values(name, "distance").mean())
