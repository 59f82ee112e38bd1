"""The columns of a preference row, and what its label says. Needs no library, so that every tool can read it."""

import math

from ..system.messages import printable


# The columns of kashif/pickascore and yuvalkirstain/pickapic_v2, and those that trl uses, where the label is in the name.
PICK_A_PIC_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
TRL_COLUMNS = ("chosen", "rejected", "prompt")


def parse_label(label, where: str) -> float:
    """Reads `label_0`: 1.0 where image 0 is preferred, 0.0 where image 1 is, 0.5 for a tie.

    Args:
        label: a number, or text that holds one (as `.txt` members of shards do).
        where: names the row in the error.

    Raises:
        ValueError: it is anything else.
    """
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if value not in (0.0, 0.5, 1.0):
        raise ValueError(
            f"{where}: label_0 is {printable(repr(label))}. It must be 1 (jpg_0 is preferred), 0 (jpg_1 is) or 0.5 (a tie)."
        )
    return value
