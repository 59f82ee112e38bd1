"""Which of two images scores higher: the LoRA's or the base's, the chosen or the rejected one; with intervals over prompts."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL.Image import Image

from .scorers import load_scorer, score_images, scorer_label


RESAMPLES, AT_ONCE = 10_000, 1000
LOW, HIGH = 0.025, 0.975  # 95 %
PAIRS_AT_ONCE = 8


@dataclass(frozen=True)
class Comparison:
    """Scores of LoRA against base on the same prompts and seeds. Intervals are 95 %.

    Attributes:
        win_rate, win_rate_low, win_rate_high: share of images that score higher with the LoRA; a tie counts half.
        wins, ties, losses: images. A tie is the very same score.
        mean_base, mean_lora: mean scores.
        difference, difference_low, difference_high: mean of the paired differences, LoRA minus base. Without an interval (None)
            where all prompts differ by the same, as a single prompt does: nothing then says how far others may be from it.
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
    difference_low: float | None
    difference_high: float | None

    @property
    def verdict(self) -> str:
        """How the LoRA scores: "higher" or "lower" if the interval of the win rate excludes one half."""
        if self.win_rate_low > 0.5:
            return "higher"
        return "lower" if self.win_rate_high < 0.5 else "undecided"


def compare_scores(base: np.ndarray, lora: np.ndarray) -> Comparison:
    """Compares paired scores.

    Args:
        base, lora: scores (prompts, images per prompt), of the same prompts and seeds.
    """
    difference = lora - base
    won = _won(difference)
    prompts = np.repeat(np.arange(len(won)), won.shape[1])
    win_rate_low, win_rate_high = interval(won.ravel(), prompts, bounds=(0, 1))
    is_known = np.ptp(difference.mean(axis=1)) > 0
    difference_low, difference_high = interval(difference.ravel(), prompts) if is_known else (None, None)
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


class LabelAgreement:
    """How often scorers prefer the image that people chose.

    Args:
        names: of the scorers, as for `load_scorer`.

    Raises:
        ValueError: one can't be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scorers = {name: load_scorer(name, device) for name in names}

    def __call__(self, pairs: Iterable[tuple[Image, Image, str]]) -> dict:
        """
        Args:
            pairs: chosen image, rejected image and prompt; at least one.

        Returns:
            `pairs`, their number; `scorers`, with the share of pairs on which each agrees with the label (a tie counts
            half) and its 95 % interval; `all_agree` and `none_agrees`, the shares of pairs on which they do.

        Raises:
            ValueError: a scorer fails, or a score is not finite.
        """
        pairs, prompts, won = iter(pairs), [], []
        while batch := list(islice(pairs, PAIRS_AT_ONCE)):
            chosen, rejected, of_batch = zip(*batch)
            prompts += of_batch
            scores = [score_images(*scorer, chosen + rejected, of_batch * 2) for scorer in self.scorers.items()]
            won.append(_won(-np.diff(np.reshape(scores, (len(scores), 2, -1)), axis=1)[:, 0]))
        agree = np.concatenate(won, axis=1)  # (scorers, pairs): 1, 0, or 0.5 for a tie
        scorers = {}
        for name, row in zip(self.scorers, agree):
            low, high = interval(row, prompts, bounds=(0, 1))
            scorers[scorer_label(name)] = {"agree": float(row.mean()), "low": low, "high": high}
        return {
            "pairs": len(prompts),
            "scorers": scorers,
            "all_agree": float((agree == 1).all(axis=0).mean()),
            "none_agrees": float((agree == 0).all(axis=0).mean()),
        }


def _won(difference: np.ndarray) -> np.ndarray:
    """1 where the first scores higher, 0 where the second does, 0.5 for a tie."""
    return (np.sign(difference) + 1) / 2


def interval(
    values: np.ndarray, prompts: Sequence[Hashable], bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of values (images,), by the Bayesian bootstrap (Rubin 1981), always with the same numbers.

    Images of one prompt are not independent of each other, so prompts are weighted, each with all of its images.

    Args:
        values: one of each image.
        prompts: of the images.
        bounds: the least and the greatest that a value can be. One more prompt, at the worse of them, then takes part in either
            end (Gaffke 2005): the interval is no point where all prompts agree, nor where there is only one. For wins without
            a loss it is the exact binomial interval.
    """
    _, places = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    rng, ends = np.random.default_rng(0), ([], [])
    for _ in range(RESAMPLES // AT_ONCE):
        weights = rng.standard_exponential((AT_ONCE, len(counts)))
        unseen = counts.mean() * rng.standard_exponential(AT_ONCE) if bounds else np.zeros(AT_ONCE)
        for end, bound in zip(ends, bounds or (0, 0)):
            end.append((weights @ sums + unseen * bound) / (weights @ counts + unseen))
    return float(np.quantile(ends[0], LOW)), float(np.quantile(ends[1], HIGH))
