"""Does one model's images score higher than another's? Win rate and mean difference, with intervals over prompts."""

from dataclasses import dataclass

import numpy as np


RESAMPLES, AT_ONCE = 10_000, 1000
LOW, HIGH = 0.025, 0.975  # 95 %


@dataclass(frozen=True)
class Comparison:
    """Scores of LoRA against base on the same prompts and seeds. Intervals are 95 %.

    Attributes:
        win_rate, win_rate_low, win_rate_high: share of images that score higher with the LoRA; a tie counts half.
        wins, ties, losses: images. A tie is the very same score.
        mean_base, mean_lora: mean scores.
        difference, difference_low, difference_high: mean of the paired differences, LoRA minus base.
    """

    win_rate: float
    win_rate_low: float
    win_rate_high: float
    wins: int
    ties: int
    losses: int
    mean_base: float
    mean_lora: float
    difference: float
    difference_low: float
    difference_high: float

    @property
    def verdict(self) -> str:
        """How the LoRA scores: "higher" or "lower" if the interval of the win rate excludes one half."""
        if self.win_rate_low > 0.5:
            return "higher"
        return "lower" if self.win_rate_high < 0.5 else "undecided"


def compare_scores(base: np.ndarray, lora: np.ndarray) -> Comparison:
    """Compares paired scores.

    Images of one prompt are not independent of each other, so the intervals come from resampling prompts, each with
    all of its images (percentile bootstrap, always with the same random numbers).

    Args:
        base, lora: scores (prompts, images per prompt), of the same prompts and seeds.
    """
    difference = lora - base
    won = (np.sign(difference) + 1) / 2
    wins_per_prompt = won.mean(axis=1)
    win_rate_low, win_rate_high = bootstrap_interval(wins_per_prompt)
    # If all prompts agree, every resample looks the same: the exact binomial interval allows for what they may miss.
    if (won == 1).all():
        win_rate_low = LOW ** (1 / len(won))
    if (won == 0).all():
        win_rate_high = 1 - LOW ** (1 / len(won))
    difference_low, difference_high = bootstrap_interval(difference.mean(axis=1))
    return Comparison(
        win_rate=float(won.mean()),
        win_rate_low=win_rate_low,
        win_rate_high=win_rate_high,
        wins=int((won == 1).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won == 0).sum()),
        mean_base=float(base.mean()),
        mean_lora=float(lora.mean()),
        difference=float(difference.mean()),
        difference_low=difference_low,
        difference_high=difference_high,
    )


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` (prompts,)."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(values), size=(AT_ONCE, len(values))) for _ in range(RESAMPLES // AT_ONCE))
    low, high = np.quantile([values[draw].mean(axis=1) for draw in draws], [LOW, HIGH])
    return float(low), float(high)
