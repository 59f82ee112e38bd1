"""From scores to pairs: which images of a prompt differ enough, according to all scorers or to their sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..drawing.images import Request, read_image
from ..scoring.names import scorer_label
from ..scoring.scorers import load_scorer, score_images


@dataclass(frozen=True)
class ScoredPair:
    """Two images of a prompt.

    Attributes:
        first, second: their places among the requests, in the order in which they were drawn.
        margin: by how much the first is better, in standard deviations; negative where the second is.
    """

    first: int
    second: int
    margin: float


def score(name: str, folder: Path, requests: Sequence[Request], batch_size: int) -> np.ndarray:
    """A scorer's scores of images (N,). All processes share the work, and get the result.

    Raises:
        ValueError: the scorer fails, or a score is not finite.
    """
    state = PartialState()
    scorer = load_scorer(name, state.device)
    mine = range(state.process_index, len(requests), state.num_processes)
    found: list[tuple[int, float]] = []
    with tqdm(
        total=len(mine), desc=f"Scoring: {scorer_label(name)}", unit="image", disable=not state.is_main_process
    ) as bar:
        for i in range(0, len(mine), batch_size):
            batch = mine[i : i + batch_size]
            images = [read_image(folder / requests[j].name) for j in batch]
            found += zip(batch, score_images(name, scorer, images, [requests[j].prompt for j in batch]))
            bar.update(len(batch))
    scores = np.empty(len(requests))
    for place, value in gather_object(found):
        scores[place] = value
    return scores


def margins(scores: np.ndarray, groups: np.ndarray, weights: Sequence[float] | None) -> list[ScoredPair]:
    """All pairs of images of a prompt that the scorers tell apart.

    Args:
        scores: (scorers, N).
        groups: (N,) the prompt of each image.
        weights: of the scorers, for their weighted mean; None for consensus: all prefer the same image, and the margin
            is their smallest.
    """
    spread = np.array([_spread_within(row, groups) for row in scores])
    relative = scores / np.where(spread > 0, spread, 1)[:, None]
    pairs = []
    for group in np.unique(groups):
        for first, second in combinations(np.flatnonzero(groups == group), 2):
            difference = relative[:, first] - relative[:, second]
            if weights is None:
                agree = np.all(difference > 0) or np.all(difference < 0)
                margin = difference[np.abs(difference).argmin()] if agree else 0.0
            else:
                margin = np.average(difference, weights=weights)
            if margin != 0:
                pairs.append(ScoredPair(int(first), int(second), float(margin)))
    return pairs


def choose(pairs: list[ScoredPair], groups: np.ndarray, min_margin: float, best_worst: bool) -> list[ScoredPair]:
    """Those with the margin; if wanted, only the one of each prompt that differs most."""
    enough = [pair for pair in pairs if abs(pair.margin) >= min_margin]
    if not best_worst:
        return enough
    best: dict[int, ScoredPair] = {}
    for pair in enough:
        group = int(groups[pair.first])
        if group not in best or abs(pair.margin) > abs(best[group].margin):
            best[group] = pair
    return list(best.values())


def _spread_within(scores: np.ndarray, groups: np.ndarray) -> float:
    """Standard deviation of scores around the mean of their prompt, so that easy and hard prompts count alike."""
    _, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(places, scores) / counts
    freedom = len(scores) - len(counts)
    return float(np.sqrt(((scores - means[places]) ** 2).sum() / freedom)) if freedom > 0 else 0.0
