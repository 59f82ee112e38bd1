"""The earlier formula and its mended sign beside fine-tuning: 200 steps, six settings each, five seeds. Stored, and not run again."""

import json

import numpy as np

import paths
from bootstrap import Bootstrap, Estimate
from comparison import prompts_of


STEPS, SEEDS = 200, 5
NAMES = ("sft", "earlier", "mended")


class Earlier:
    """One world's runs on test images, each objective at the setting that was best on validation images."""

    def __init__(self, world: str):
        file = paths.HERE / "results" / "earlier" / f"{world}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        self.base_rewards = np.array(lines[0]["splits"]["test"]["rewards"])
        self.bootstrap = Bootstrap(SEEDS, prompts_of(world, len(self.base_rewards)))
        self.rewards = {
            name: np.array([x["evaluations"][str(STEPS)]["rewards"] for x in lines if x["objective"] == name])
            for name in NAMES
        }

    def gain(self, name: str) -> Estimate:
        """Mean reward above the base's."""
        return self.bootstrap.mean(self.rewards[name] - self.base_rewards)

    def lead(self, name: str) -> Estimate:
        """How much more reward than fine-tuning on the winners."""
        return self.bootstrap.mean(self.rewards[name] - self.rewards["sft"])
