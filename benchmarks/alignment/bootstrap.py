"""Means over seeds and prompts, with bootstrap intervals over both."""

from dataclasses import dataclass

import numpy as np


RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __neg__(self) -> "Estimate":
        return Estimate(-self.mean, -self.high, -self.low)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


class Bootstrap:
    """Resamples training seeds and prompts together, the same draws for every quantity: differences are paired.

    Args:
        num_seeds: rows of the values.
        classes: prompt of each column; the images of a prompt are drawn or left out together.
    """

    def __init__(self, num_seeds: int, classes: np.ndarray):
        rng = np.random.default_rng(0)
        _, column_class = np.unique(classes, return_inverse=True)
        num_classes = column_class.max() + 1
        self.seed_counts = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES)
        class_counts = rng.multinomial(num_classes, np.full(num_classes, 1 / num_classes), RESAMPLES)
        self.image_counts = class_counts[:, column_class]

    def resample(self, values: np.ndarray) -> np.ndarray:
        """Mean of values (seeds, images) in each resample (RESAMPLES,)."""
        sums = np.einsum("bs,si,bi->b", self.seed_counts, values, self.image_counts, optimize=True)
        return sums / (self.seed_counts.sum(axis=1) * self.image_counts.sum(axis=1))

    def mean(self, values: np.ndarray) -> Estimate:
        return interval(values.mean(), self.resample(values))


def interval(point: float, resampled: np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(point), float(low), float(high))
