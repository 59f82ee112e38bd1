"""How large the images of a shard are: as its manifest says, or else by reading the shard once and keeping the answer.

Sizes must be known before training: they decide which pairs make up a batch, and all processes must agree.
"""

import re
from itertools import groupby

import numpy as np

from ..pairs.bad_pair import BadPair
from ..pairs.image import open_image, upright_size
from .kept_answer import KeptAnswer
from .shard import BrokenShard, walk_shard


IMAGES = re.compile(r"jpg_[01]\.\w+")
UNKNOWN = (1, 1)  # of an image that can't be read: training meets it, names it and counts it


def pack_sizes(sizes: list[tuple[int, ...]]) -> list[str]:
    """Heights and widths of jpg_0 and jpg_1 of samples, upright, as "3 * 512 768 512 512" for three in a row."""
    return [f"{len(list(run))} * {' '.join(map(str, size))}" for size, run in groupby(sizes)]


def unpack_sizes(samples: int, runs: list[str]) -> np.ndarray:
    """The sizes that were packed (samples, 4).

    Raises:
        ValueError: they are not sizes, or not of so many samples.
    """
    sizes, counts = [], []
    for run in runs:
        match = re.fullmatch(r"(\d{1,9}) \* (\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,9})", run)
        numbers = [int(number) for number in match.groups()] if match else [0]
        if 0 in numbers:
            raise ValueError(f"{run!r} is not a number of samples and their images' sizes")
        counts.append(numbers[0])
        sizes.append(numbers[1:])
    if sum(counts) != samples:  # before memory is taken for them
        raise ValueError(f"sizes of {sum(counts)} samples, not of {samples}")
    return np.repeat(np.array(sizes, dtype=np.int64).reshape(-1, 4), counts, axis=0)


def find_sizes(url: str, count: int, cache_dir: str | None) -> np.ndarray:
    """Heights and widths of both images of each sample (count, 4).

    Args:
        url: of the shard.
        count: samples in it.
        cache_dir: where answers are kept; None for the folder of `datasets`.

    Raises:
        OSError: the URL can't be read.
        ValueError: the shard is compressed.
    """
    kept = KeptAnswer.of(url, "shard-sizes", cache_dir)
    known = kept.read(unpack_sizes)
    if known is not None and len(known) == count:
        return known
    sizes = np.tile(np.array(UNKNOWN * 2, dtype=np.int64), (count, 1))
    try:
        for ordinal, members in walk_shard(url, 0, count, IMAGES):
            sizes[ordinal] = [side for number in (0, 1) for side in _size(members, f"jpg_{number}.")]
    except BrokenShard:
        return sizes
    kept.write([count, pack_sizes(list(map(tuple, sizes.tolist())))])
    return sizes


def _size(members: dict, name: str) -> tuple[int, int]:
    encoded = next((content for member, content in members.items() if member.startswith(name)), None)
    try:
        return upright_size(open_image(encoded, name)) if encoded else UNKNOWN
    except BadPair:
        return UNKNOWN
