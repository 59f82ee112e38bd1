"""How often scorers prefer the image that people preferred."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from PIL.Image import Image

from .names import scorer_label
from .scorers import load_scorer, score_images
from .win_rate import AT_ONCE, HIGH, LOW, RESAMPLES


Pair = tuple[Image, Image, str]  # the preferred image, the other one, and their prompt
PAIRS_AT_ONCE = 8


class LabelJudge:
    """Scorers that compare their own preferences with labels.

    Args:
        names: of the scorers, as for `load_scorer`.

    Raises:
        ValueError: one can't be loaded.
    """

    def __init__(self, names: list[str]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scorers = {name: load_scorer(name, device) for name in names}

    def __call__(self, pairs: Iterable[Pair]) -> dict:
        """
        Args:
            pairs: at least one.

        Returns:
            `pairs`, their number; `scorers`, with the share of pairs on which each agrees with the label (a tie counts
            half) and its 95 % interval; `all_agree` and `none_agrees`, the shares of pairs on which they do.

        Raises:
            ValueError: a scorer fails, or a score is not finite.
        """
        prompts, won = [], []
        for batch in _batches(pairs):
            prompts += [prompt for _, _, prompt in batch]
            won.append([self._judge(name, batch) for name in self.scorers])
        agree = np.concatenate(won, axis=1)  # (scorers, pairs): 1, 0, or 0.5 for a tie
        scorers = {}
        for name, row in zip(self.scorers, agree):
            low, high = interval(row, prompts)
            scorers[scorer_label(name)] = {"agree": float(row.mean()), "low": low, "high": high}
        return {
            "pairs": len(prompts),
            "scorers": scorers,
            "all_agree": float((agree == 1).all(axis=0).mean()),
            "none_agrees": float((agree == 0).all(axis=0).mean()),
        }

    def _judge(self, name: str, batch: list[Pair]) -> np.ndarray:
        winners, losers, prompts = map(list, zip(*batch))
        scores = np.array(score_images(name, self.scorers[name], winners + losers, prompts * 2)).reshape(2, -1)
        return (np.sign(scores[0] - scores[1]) + 1) / 2


def interval(won: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    """95 % interval of the mean of `won` (pairs,), by resampling prompts, each with all of its pairs.

    Pairs of one prompt are not independent of each other.
    """
    _, places = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(places, won), np.bincount(places)
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES // AT_ONCE):
        draws = rng.integers(len(counts), size=(AT_ONCE, len(counts)))
        means.append(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [LOW, HIGH])
    # If all pairs agree, every resample looks the same: the exact binomial interval says what may have been missed.
    if (won == 1).all():
        low = LOW ** (1 / len(counts))
    if (won == 0).all():
        high = 1 - LOW ** (1 / len(counts))
    return float(low), float(high)


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    pairs = iter(pairs)
    while batch := list(islice(pairs, PAIRS_AT_ONCE)):
        yield batch
