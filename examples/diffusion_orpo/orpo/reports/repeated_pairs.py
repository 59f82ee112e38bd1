"""Pairs that appear more than once in a data set, those that contradict each other, and images that appear in many."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RepeatedPairs:
    """Repetitions, with each pair given by its place in the arrays.

    Attributes:
        duplicates: pairs that repeat an earlier one (same images, prompt and winner), with the earlier one.
        contradictions: groups of pairs with the same images and prompt, but different winners.
        identical: pairs of an image with itself.
        num_images: different images.
        most_used: the images in most pairs: how many pairs, and the first of them.
    """

    duplicates: list[tuple[int, int]]
    contradictions: list[list[int]]
    identical: list[int]
    num_images: int
    most_used: list[tuple[int, int]]


def find_repeated(winners: np.ndarray, losers: np.ndarray, prompts: np.ndarray) -> RepeatedPairs:
    """Compares pairs by hashes.

    Args:
        winners, losers, prompts: uint64 (N,), a hash of each pair's images and prompt.
    """
    identical = winners == losers
    duplicates = [(group[0], index) for group in _groups(winners, losers, prompts) for index in group[1:]]
    first_image, second_image = np.minimum(winners, losers), np.maximum(winners, losers)
    contradictions = [
        group for group in _groups(first_image, second_image, prompts) if len(np.unique(winners[group])) > 1
    ]
    images, first, counts = np.unique(
        np.concatenate([winners, losers[~identical]]), return_index=True, return_counts=True
    )
    pair_of = np.concatenate([np.arange(len(winners)), np.flatnonzero(~identical)])
    most = np.argsort(-counts, kind="stable")[:5]
    return RepeatedPairs(
        sorted(duplicates, key=lambda pair: pair[1]),
        sorted(contradictions),
        np.flatnonzero(identical).tolist(),
        len(images),
        [(int(counts[i]), int(pair_of[first[i]])) for i in most],
    )


def _groups(*columns: np.ndarray) -> list[list[int]]:
    """Groups of two or more rows that are alike in all columns, each in order."""
    order = np.lexsort(columns)  # stable, so a group's rows stay in order
    rows = np.stack(columns, axis=1)[order]
    starts = np.flatnonzero(np.append(True, (rows[1:] != rows[:-1]).any(axis=1)))[: len(rows)]
    ends = np.append(starts[1:], len(rows))
    return [order[start:end].tolist() for start, end in zip(starts, ends) if end - start > 1]
