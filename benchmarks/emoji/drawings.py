"""The drawings: subjects that three artists all drew, and which subjects serve for what."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image


HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "alignment"), str(HERE.parents[1] / "examples" / "demo")]  # after our own
DATA = HERE / "emoji.parquet"
ARTISTS = ("noto", "twemoji", "fluent")
SIZE = 64  # pixels


@dataclass
class Emoji:
    """All drawings.

    Attributes:
        names, captions: of the subjects.
        images: uint8 (subjects, artists, 3, SIZE, SIZE), on white.
        split: "pairs" (a half), "tuning" or "test" (a quarter each) -> indices of its subjects.
    """

    names: list[str]
    captions: list[str]
    images: torch.Tensor
    split: dict[str, np.ndarray]


def load_emoji(file: Path = DATA) -> Emoji:
    table = pq.read_table(file)
    images = np.stack([np.stack([decode(value) for value in table[artist].to_pylist()]) for artist in ARTISTS], axis=1)
    order = np.random.default_rng(0).permutation(len(images))
    half, quarter = len(order) // 2, len(order) // 4
    parts = np.split(order, [half, half + quarter])
    return Emoji(
        table["name"].to_pylist(),
        table["caption"].to_pylist(),
        torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous(),
        {name: np.sort(part) for name, part in zip(("pairs", "tuning", "test"), parts)},
    )


def decode(value: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(value["bytes"])))
