"""Finds the ties of a shard that no manifest lists: the shard is read once, and the answer kept.

Ties must be known before training: they are not part of an epoch, and all processes must agree on what is. Only labels
are read. In a file, images are skipped; from a URL or a command, the whole shard is read.
"""

import re

import numpy as np

from ..pairs.labels import parse_label
from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .kept_answer import KeptAnswer
from .sample import member_names, missing_members, what_is_missing
from .shard import BrokenShard, walk_shard


LABEL = re.compile(r"label_0\.txt")
EVERYTHING = 1 << 40


def find_ties(url: str, count: int | None, needed: tuple[str, ...], cache_dir: str | None) -> tuple[int, np.ndarray]:
    """Samples in a shard, and the places of the ties among them.

    Args:
        url: of the shard.
        count: samples in it, if its manifest says so; then a truncated shard is accepted, and missing samples are not ties.
        needed: members that a sample must have.
        cache_dir: where answers are kept; None for the folder of `datasets`.

    Raises:
        ValueError: it can't be read to its end and `count` is unknown, it has more than `count`, or not one sample has
            the members that are needed.
        OSError: the URL can't be read.
    """
    kept = KeptAnswer.of(url, "shard-labels", cache_dir)
    known = kept.read(lambda samples, ties: (int(samples), np.array(ties, dtype=int)))
    if known is not None and count in (None, known[0]):
        return known
    ties, samples, complete, first = [], 0, 0, None
    try:
        for ordinal, members in walk_shard(url, 0, EVERYTHING, LABEL):
            first, samples = first or members, ordinal + 1
            complete += not missing_members(member_names(members), needed)
            ties += [ordinal] if _is_tie(members) else []
    except BrokenShard:
        if count is None:
            raise
        return count, np.array(ties, dtype=int)
    if samples and not complete:
        problem, _, advice = what_is_missing(first, needed)
        raise ValueError(
            f"--dataset_path={without_secrets(url)}: none of its {samples} samples is complete. The first,"
            f" {printable(first['__key__'])}, {problem}. {advice}"
        )
    if count is not None and samples != count:
        if samples > count:
            raise ValueError(
                f"{without_secrets(url)} holds {samples} samples, more than the {count} that its manifest says: they do"
                " not belong together. Convert the data again, or remove the manifest."
            )
        return count, np.array(ties, dtype=int)
    kept.write([samples, ties])
    return samples, np.array(ties, dtype=int)


def _is_tie(members: dict) -> bool:
    """A label that can't be read is not a tie but a bad sample, which training names and counts."""
    try:
        return parse_label(members["label_0.txt"].decode(), "") == 0.5
    except (KeyError, ValueError):
        return False
