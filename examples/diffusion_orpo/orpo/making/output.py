"""The output of make_preferences.py: the images' listing, and the pairs as parquet."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import MakingConfig
from ..drawing.images import Request
from ..pairs.image import decode_image
from ..pairs.listing import METADATA, ListedImage, image_path
from ..pairs.writing import write_pairs
from ..runtime.durable import write_text
from .judging import ScoredPair, choose, margins


ABOUT = {"seed_0": "int64", "seed_1": "int64", "model_0": "string", "model_1": "string"}


def write_metadata(images: Path, requests: list[Request], model: str, scores: dict[str, np.ndarray]) -> None:
    """Lists the images as label_preferences.py, and datasets' imagefolder, read it."""
    lines = [
        {"file_name": request.name, "prompt": request.prompt, "seed": request.seed, "model": model}
        | {f"score_{name}": float(values[i]) for name, values in scores.items()}
        for i, request in enumerate(requests)
    ]
    write_text(images / METADATA, "".join(json.dumps(line) + "\n" for line in lines))


def write_judged(
    config: MakingConfig, images: Path, requests: list[Request], model: str, scores: dict[str, np.ndarray]
) -> str:
    """Writes the pairs that the scorers tell apart; returns a sentence about them.

    Raises:
        ValueError: there are none.
    """
    groups = np.array([request.group for request in requests])
    values = np.array(list(scores.values()))
    weights = (config.weights or [1.0] * len(scores)) if config.combine == "sum" else None
    pairs = choose(margins(values, groups, weights), groups, config.min_margin, config.pairs == "best_worst")
    if not pairs:
        raise ValueError(
            f"No pair of images differs by --min_margin={config.min_margin:g} according to {', '.join(scores)}. The"
            f" images are in {images}: start again with a smaller margin, fewer scorers, or more images per prompt."
        )
    more = ABOUT | {"margin": "float64"} | {f"score_{name}_{i}": "float64" for name in scores for i in (0, 1)}
    path = _pairs_file(config.output_dir)
    write_pairs(path, _judged_rows(images, requests, model, scores, pairs), more)
    prompts = len({groups[pair.first] for pair in pairs})
    undecided = len(set(groups)) - prompts
    return (
        f"{len(pairs)} pairs of {prompts} prompts in {path.parent}; {undecided} prompts have none with the margin."
        f" Look at them: python check_preferences.py --dataset_name={path.parent}"
    )


def _judged_rows(
    images: Path, requests: list[Request], model: str, scores: dict[str, np.ndarray], pairs: list[ScoredPair]
) -> Iterator[dict]:
    """Rows in which the order of drawing decides which image comes first, so that winners stand on either side."""
    for pair in pairs:
        sides = pair.first, pair.second
        row = {"label_0": float(pair.margin > 0), "caption": requests[pair.first].prompt, "margin": abs(pair.margin)}
        for i, place in enumerate(sides):
            row |= {
                f"jpg_{i}": (images / requests[place].name).read_bytes(),
                f"seed_{i}": requests[place].seed,
                f"model_{i}": model,
                **{f"score_{name}_{i}": float(values[place]) for name, values in scores.items()},
            }
        yield row


def write_against_winners(
    folder: Path, winners: list[ListedImage], images: Path, requests: list[Request], model: str
) -> str:
    """Writes pairs in which the first image is the user's and wins; returns a sentence about them.

    Raises:
        ValueError: one of the user's images can't be decoded, or none of the model's images is left.
    """
    if not requests:
        raise ValueError(f"No image in {images} is usable: all are black, of one colour, or drawn twice.")
    path = _pairs_file(images.parent)
    count = write_pairs(path, _winner_rows(folder, winners, images, requests, model), ABOUT)
    return f"{count} pairs of {len(winners)} winners in {path.parent}."


def _winner_rows(
    folder: Path, winners: list[ListedImage], images: Path, requests: list[Request], model: str
) -> Iterator[dict]:
    for request in requests:
        winner = winners[request.group]
        encoded = image_path(folder, winner.name).read_bytes()
        decode_image(encoded, winner.name)
        yield {
            "jpg_0": encoded,
            "jpg_1": (images / request.name).read_bytes(),
            "label_0": 1.0,
            "caption": request.prompt,
            "seed_0": None,
            "seed_1": request.seed,
            "model_0": None,
            "model_1": model,
        }


def _pairs_file(output_dir: str | Path) -> Path:
    path = Path(output_dir) / "pairs" / "train.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
