"""Means over training seeds and prompts with t intervals, both taken as random and crossed; Holm's correction."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and the two-sided p-value of the mean being 0."""

    mean: float
    low: float
    high: float
    p: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def estimate(values: np.ndarray) -> Estimate:
    """Mean of values (seeds, prompts), with the variance of a two-way random model and Satterthwaite's degrees of freedom.

    With one seed the interval is over prompts alone.
    """
    num_seeds, num_prompts = values.shape
    mean = values.mean()
    by_seed, by_prompt = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    prompts, df_prompts = num_seeds * (by_prompt**2).sum() / (num_prompts - 1), num_prompts - 1
    if num_seeds == 1:
        square, df = prompts, df_prompts
    else:
        df_seeds = num_seeds - 1
        rest = values - mean - by_seed[:, None] - by_prompt
        seeds = num_prompts * (by_seed**2).sum() / df_seeds
        noise, df_noise = (rest**2).sum() / (df_seeds * df_prompts), df_seeds * df_prompts
        square = max(seeds + prompts - noise, seeds, prompts)  # an estimate of variance can be negative
        parts = seeds**2 / df_seeds + prompts**2 / df_prompts + noise**2 / df_noise
        df = max(square**2 / parts, 1) if parts else df_prompts
    error = np.sqrt(square / values.size)
    if error == 0:
        return Estimate(float(mean), float(mean), float(mean), float(mean == 0))
    reach = student.ppf(0.975, df) * error
    return Estimate(
        float(mean), float(mean - reach), float(mean + reach), float(2 * student.sf(abs(mean) / error, df))
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
