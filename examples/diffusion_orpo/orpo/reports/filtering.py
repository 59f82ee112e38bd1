"""Copies a data set without the pairs that the check complains about."""

from collections.abc import Iterator
from pathlib import Path

from ..pairs.labels import LOW_AGREEMENT, TIE
from ..pairs.table import write_pairs
from .inspection import PairSource
from .report import PreferenceReport


FILE = "train.parquet"
VOTES = ("votes_0", "votes_1")


def write_filtered(folder: Path, source: PairSource, counts: PreferenceReport) -> dict:
    """Writes the good pairs that neither contradict nor repeat another one, each with its place in the data set.

    Args:
        folder: gets `train.parquet`, with the preferred image as jpg_0, and the votes as shares, where there are any.
        source: the pairs.
        counts: the findings about them.

    Returns:
        For the report: the file, how many pairs are in it, and how many were left out for which reason.
    """
    repeated, keys = counts.repeated_pairs(), counts.good_keys
    reasons = {
        "contradicting": {index for group in repeated.contradictions for index in group},
        "of an image with itself": set(repeated.identical),
        "duplicates": {index for _, index in repeated.duplicates},
    }
    left_out = {
        "ties": counts.labels[TIE],
        "of low agreement": counts.labels[LOW_AGREEMENT],
        "bad": len(counts.bad_keys),
    }
    out: set[int] = set()
    for reason, indices in reasons.items():
        left_out[reason] = len(indices - out)
        out |= indices
    kept = [key for index, key in enumerate(keys) if index not in out]
    folder.mkdir(parents=True, exist_ok=True)
    votes = dict.fromkeys(VOTES, "float64") if source.has_votes else {}
    number = write_pairs(folder / FILE, _rows(source, kept), {"source": "string"} | votes)
    return {"file": str(folder / FILE), "pairs": number, "left_out": left_out}


def _rows(source: PairSource, keys: list[tuple[int, int]]) -> Iterator[dict]:
    for key, pair in zip(keys, source.pairs(keys), strict=True):
        images = {"jpg_0": pair.winner, "jpg_1": pair.loser}
        row = images | {"label_0": 1.0, "caption": pair.prompt, "source": source.where(key)}
        if source.has_votes:
            known = pair.agreement is not None
            row |= dict(zip(VOTES, (pair.agreement, 1 - pair.agreement) if known else (None, None)))
        yield row
