"""From images and scores to preference pairs: which images are usable, and which of a prompt differ enough."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ..config import MakingConfig
from ..pairs.image import decode_image
from ..pairs.image_folder import METADATA, ListedImage, image_path
from ..pairs.table import write_pairs
from ..runtime.durable import write_text
from .images import Request, read_image


FLAT = 2.0  # standard deviation of all values, 0 to 255. A picture has ten times as much; rounding has less than one
COLUMNS = {"seed_0": "int64", "seed_1": "int64", "model_0": "string", "model_1": "string"}


def usable(folder: Path, requests: list[Request]) -> tuple[list[Request], Counter[str]]:
    """Skips images that can't be compared: black ones, those of one colour, and those that a prompt has twice.

    Args:
        folder: of the images.
        requests: all that were generated.

    Returns:
        Those to use, in order, and how many were skipped for each reason.

    Raises:
        ValueError: an image is broken.
    """
    kept, skipped, seen = [], Counter(), set()
    for request in requests:
        pixels = np.asarray(read_image(folder / request.name))
        key = (request.prompt, hashlib.blake2b(pixels.tobytes()).digest())
        if pixels.max() == 0:
            skipped["black"] += 1
        elif pixels.reshape(-1, 3).std(axis=0).max() < FLAT:
            skipped["flat"] += 1
        elif key in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(key)
            kept.append(request)
    return kept, skipped


@dataclass(frozen=True)
class ScoredPair:
    """Two images of a prompt.

    Attributes:
        first, second: their places among the requests, in the order in which they were generated.
        margin: by how much the first is better, in standard deviations; negative where the second is.
    """

    first: int
    second: int
    margin: float


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


def write_metadata(images: Path, requests: list[Request], model: str, scores: dict[str, np.ndarray]) -> None:
    """Lists the images as label_preferences.py, and datasets' imagefolder, read it."""
    lines = [
        {"file_name": request.name, "prompt": request.prompt, "seed": request.seed, "model": model}
        | {f"score_{name}": float(values[i]) for name, values in scores.items()}
        for i, request in enumerate(requests)
    ]
    write_text(images / METADATA, "".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class PairsFile:
    """Writes the pairs of a model's images; pairs of an earlier run are gone from the start.

    Attributes:
        path: of the file.
        images: folder of the images.
        model: its name, for the pairs' columns.
    """

    path: Path
    images: Path
    model: str

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)
        if self.path.parent.exists() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def write_ranked(self, requests: list[Request], scores: dict[str, np.ndarray], config: MakingConfig) -> str:
        """Writes the pairs that the scorers tell apart; returns a sentence about them.

        Raises:
            ValueError: there are none.
        """
        groups = np.array([request.group for request in requests])
        weights = (config.weights or [1.0] * len(scores)) if config.combine == "sum" else None
        pairs = choose(
            margins(np.array(list(scores.values())), groups, weights),
            groups,
            config.min_margin,
            best_worst=config.pairs == "best_worst",
        )
        if not pairs:
            raise ValueError(
                f"No pair of images differs by --min_margin={config.min_margin:g} according to {', '.join(scores)}. The images"
                f" are in {self.images}: start again with a smaller margin, fewer scorers, or more images per prompt."
            )
        columns = COLUMNS | {"margin": "float64"} | {f"score_{name}_{i}": "float64" for name in scores for i in (0, 1)}
        self.path.parent.mkdir(exist_ok=True)
        write_pairs(self.path, self._ranked_rows(requests, scores, pairs), columns)
        prompts = len({groups[pair.first] for pair in pairs})
        return (
            f"{len(pairs)} pairs of {prompts} prompts in {self.path.parent}; {len(set(groups)) - prompts} prompts have none"
            f" with the margin. Look at them: python check_preferences.py --dataset_name={self.path.parent}"
        )

    def _ranked_rows(
        self, requests: list[Request], scores: dict[str, np.ndarray], pairs: list[ScoredPair]
    ) -> Iterator[dict]:
        """Rows in which the order of generation decides which image comes first, so that chosen ones are on either side."""
        for pair in pairs:
            row = {
                "label_0": float(pair.margin > 0),
                "caption": requests[pair.first].prompt,
                "margin": abs(pair.margin),
            }
            for i, place in enumerate((pair.first, pair.second)):
                row |= {f"score_{name}_{i}": float(values[place]) for name, values in scores.items()}
                row |= self._image(i, requests[place])
            yield row

    def write_against(self, folder: Path, chosen: dict[int, ListedImage], requests: list[Request]) -> str:
        """Writes pairs in which a user's image is preferred to the model's of its caption; returns a sentence about them.

        Args:
            folder: of the user's images.
            chosen: the user's image of each group.
            requests: the model's usable images.

        Raises:
            ValueError: one of the user's images can't be decoded, or none of the model's is usable.
        """
        if not requests:
            raise ValueError(f"No image in {self.images} is usable: all are black, of one colour, or duplicates.")
        self.path.parent.mkdir(exist_ok=True)
        count = write_pairs(self.path, self._rows_against(folder, chosen, requests), COLUMNS)
        return f"{count} pairs with {len(chosen)} chosen images in {self.path.parent}."

    def _rows_against(self, folder: Path, chosen: dict[int, ListedImage], requests: list[Request]) -> Iterator[dict]:
        for request in requests:
            name = chosen[request.group].name
            encoded = image_path(folder, name).read_bytes()
            decode_image(encoded, name)
            users = {"jpg_0": encoded, "seed_0": None, "model_0": None}
            yield users | {"label_0": 1.0, "caption": request.prompt} | self._image(1, request)

    def _image(self, i: int, request: Request) -> dict:
        encoded = (self.images / request.name).read_bytes()
        return {f"jpg_{i}": encoded, f"seed_{i}": request.seed, f"model_{i}": self.model}
