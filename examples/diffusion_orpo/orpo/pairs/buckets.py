"""Aspect-ratio buckets: each pair is cropped to one of a few shapes, the one that cuts away least of its two images.

Winner and loser get the same shape, since they share their noise. An image is resized until it covers the shape, and what
stands out is cropped; so what is cut away depends on the aspect ratios alone: with r = (width / height of the image) /
(width / height of the shape), a share of 1 - min(r, 1 / r) of the image's area. A pair takes the shape at which
the image that loses more loses least, and among equal ones the one at which both together do: images of unlike shapes meet in
between, instead of one being kept whole at the other's cost. Of shapes with one aspect ratio it takes the largest that enlarges
neither image, or else the one that enlarges least.

diffusers' `find_nearest_bucket` compares |h W - w H| of one image, which favours small shapes and knows nothing of pairs.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..runtime.shapes import Shape, name_of


EQUAL = 1e-9  # shares of area that differ by less are the same


@dataclass(frozen=True)
class Assignment:
    """The buckets of N pairs.

    Attributes:
        buckets: number of each pair's shape (N,).
        cut: share of the area that is cut away of either image (N, 2).
        of_unlike_shapes: whether each image by itself would have taken another shape than the other (N,).
    """

    buckets: np.ndarray
    cut: np.ndarray
    of_unlike_shapes: np.ndarray


def assign(sizes: np.ndarray, shapes: tuple[Shape, ...]) -> Assignment:
    """Chooses each pair's shape.

    Args:
        sizes: height and width of both images of each pair (N, 2, 2), upright, in pixels.
        shapes: to choose from.
    """
    buckets = _nearest(sizes, shapes)
    alone = [_nearest(sizes[:, [side]], shapes) for side in (0, 1)]
    return Assignment(buckets, cut_away(sizes, np.array(shapes)[buckets]), alone[0] != alone[1])


def cut_away(sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Share of the area of images (N, K, 2) that is cut away by shapes (N, 2), or by one for all (2,): (N, K)."""
    shapes = np.asarray(shapes, dtype=float)[..., None, :]
    ratio = sizes[..., 1] * shapes[..., 0] / (sizes[..., 0] * shapes[..., 1])
    return 1 - np.minimum(ratio, 1 / ratio)


def _nearest(sizes: np.ndarray, shapes: tuple[Shape, ...]) -> np.ndarray:
    """Number of the shape that serves the K images of each row (N, K, 2) best (N,)."""
    best = np.zeros(len(sizes), dtype=int)
    best_cost = None
    for number, shape in enumerate(shapes):
        cost = _cost(sizes, shape)
        if best_cost is None:
            best_cost = cost
            continue
        is_better, is_equal = np.zeros(len(sizes), dtype=bool), np.ones(len(sizes), dtype=bool)
        for new, old in zip(cost.T, best_cost.T):
            is_better |= is_equal & (new < old - EQUAL)
            is_equal &= abs(new - old) <= EQUAL
        best[is_better], best_cost[is_better] = number, cost[is_better]
    return best


def _cost(sizes: np.ndarray, shape: Shape) -> np.ndarray:
    """The costs of a shape for the K images of each row, most important first (N, 4)."""
    cut = cut_away(sizes, np.array(shape))
    enlarged = np.maximum(1, (np.array(shape) / sizes).max(axis=2)).max(axis=1)
    smallness = np.full(len(sizes), -float(shape[0] * shape[1]))
    return np.stack([cut.max(axis=1), cut.sum(axis=1), enlarged, smallness], axis=1)


def describe(assignment: Assignment, shapes: tuple[Shape, ...], left_out: int, max_crop: float) -> str:
    """What the log says of the buckets; nothing where there is a square alone that leaves nothing out."""
    parts = []
    if len(shapes) > 1:
        counts = Counter(assignment.buckets.tolist()).most_common()
        parts.append("buckets " + ", ".join(f"{name_of(shapes[number])} ({count})" for number, count in counts))
        parts.append(f"{assignment.cut.mean():.1%} of the images' area cut away" if len(assignment.cut) else "")
        if unlike := int(assignment.of_unlike_shapes.sum()):
            parts.append(f"{unlike} pairs whose images differ in shape")
    if left_out:
        parts.append(f"{left_out} pairs left out, which would lose more than --max_crop={max_crop:g} of an image")
    return "; ".join(part for part in parts if part)
