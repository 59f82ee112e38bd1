"""Which drawn images are usable: not black or of one colour, and not drawn twice."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from ..drawing.images import Request, read_image


FLAT = 2.0  # standard deviation of all values, 0 to 255. A picture has ten times as much; rounding has less than one


def usable(folder: Path, requests: list[Request]) -> tuple[list[Request], Counter[str]]:
    """Leaves out images that can't be compared.

    Args:
        folder: of the images.
        requests: all that were drawn.

    Returns:
        Those to use, in order, and how many were left out for each reason.

    Raises:
        ValueError: an image is broken.
    """
    kept, left_out, seen = [], Counter(), set()
    for request in requests:
        pixels = np.asarray(read_image(folder / request.name))
        key = (request.prompt, hashlib.blake2b(pixels.tobytes()).digest())
        if pixels.max() == 0:
            left_out["black"] += 1
        elif pixels.reshape(-1, 3).std(axis=0).max() < FLAT:
            left_out["flat"] += 1
        elif key in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(key)
            kept.append(request)
    return kept, left_out
