"""How often scorers prefer the image that people preferred."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from PIL.Image import Image

from .names import scorer_label
from .scorers import load_scorer, score_images
from .win_rate import interval


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
            low, high = interval(row, prompts, bounds=(0, 1))
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


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    pairs = iter(pairs)
    while batch := list(islice(pairs, PAIRS_AT_ONCE)):
        yield batch
