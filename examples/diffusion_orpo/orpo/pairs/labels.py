"""Reads which of two images is preferred from the columns of each kind of table.

A verdict is read from the cells of the columns that a convention names in `verdict` and `hints`, by name.
"""

import json
import math
from typing import NamedTuple

from ..runtime.messages import printable
from .bad_pair import BadPair


TIE = 0.5
LOW_AGREEMENT = -1.0  # in place of a label: an image is preferred, but by too few of those who voted

CLOSE = 1e-6  # shares that differ by less are the same one


class Verdict(NamedTuple):
    """A row's verdict on its two images.

    Attributes:
        label: 1.0 where the first is preferred, 0.0 where the second is, 0.5 for a tie.
        agreement: share of the votes that are for the preferred one; None if the row has no votes.
    """

    label: float
    agreement: float | None = None


def parse_label(label, where: str, name: str = "label_0") -> float:
    """Reads `label_0`: 1.0 where image 0 is preferred, 0.0 where image 1 is, 0.5 for a tie.

    Args:
        label: a number, or text that holds one (as `.txt` members of shards do).
        where: names the row in the error.
        name: of what is read, for the error.

    Raises:
        BadPair: it is anything else.
    """
    value = _number(label)
    if value not in (0.0, 0.5, 1.0):
        raise BadPair("bad label", f"{name} is {printable(repr(label))}", where)
    return value


def by_label(row: dict[str, object], shares: bool, name: str = "label_0") -> Verdict:
    """A column that holds 1, 0 or 0.5; or, where shares are allowed, the share of the votes for the first image."""
    if not shares:
        try:
            return Verdict(parse_label(row[name], "", name))
        except BadPair as bad:
            if 0 < _number(row[name]) < 1:
                bad.advice += " If it is a share of votes, say so: --soft_labels."
            raise
    share = _number(row[name])
    if not 0 <= share <= 1:
        raise BadPair("bad label", f"{name} is {printable(repr(row[name]))}", advice=SHARE_ADVICE)
    return _majority(share, 1 - share)


SHARE_ADVICE = "Write the share of the votes that are for the first image, from 0 to 1, or remove the pair."


def pick_a_pic(row: dict[str, object], shares: bool) -> Verdict:
    """`label_0`, unless another column says that there is no preference; one that says something else is an error."""
    if _flag(row, "has_label") is False or _flag(row, "are_different") is False:
        return Verdict(TIE)
    verdict = by_label(row, shares)
    if row.get("label_1") is not None:
        by_label(row, shares, "label_1")
        if abs(_number(row["label_1"]) + _number(row["label_0"]) - 1) > CLOSE:
            raise _contradiction(f"label_0 is {row['label_0']} and label_1 is {row['label_1']}")
    best, uids = row.get("best_image_uid"), [row.get("image_0_uid"), row.get("image_1_uid")]
    if best is not None and None not in uids and uids[0] != uids[1]:
        says = {uids[0]: 1.0, uids[1]: 0.0}.get(best, TIE)
        if says != verdict.label:
            found = f"best_image_uid is {best!r}, image_0_uid {uids[0]!r} and image_1_uid {uids[1]!r}"
            raise _contradiction(f"label_0 is {verdict.label:g}, and {found}")
    votes = {name: _number(row[name]) for name in VOTES if row.get(name) is not None}
    total = sum(votes.values())
    if verdict.label == TIE or not total > 0:
        return verdict
    return Verdict(verdict.label, votes.get("votes_0" if verdict.label else "votes_1", 0) / total)


# label_preferences.py writes them beside its label, which follows from them.
VOTES = ("votes_0", "votes_1", "votes_tie", "votes_bad")


def first_preferred(row: dict[str, object], shares: bool) -> Verdict:
    """The first image is preferred, by the name of its column; labels beside it must agree."""
    for name, expected in (("label_0", 1.0), ("label_1", 0.0)):
        if row.get(name) is not None and parse_label(row[name], "", name) != expected:
            raise _contradiction(f"{name} is {row[name]!r}, and the first image is in the column of preferred ones")
    return Verdict(1.0)


def hpd_v3(row: dict[str, object], shares: bool) -> Verdict:
    """The first image is preferred; `choice_dist`, where it is known, holds the votes for either."""
    votes = row.get("choice_dist")
    if votes is None:
        return first_preferred(row, shares)
    try:
        first, second = map(_number, json.loads(votes) if isinstance(votes, str) else votes)
    except (TypeError, ValueError):
        first = second = math.nan
    verdict = _votes(first, second, f"choice_dist is {votes!r}")
    if verdict.label == 0:
        raise _contradiction(f"choice_dist is {votes!r}, and the first image is in the column of preferred ones")
    first_preferred(row, shares)
    return verdict


def by_votes(row: dict[str, object], shares: bool, names: tuple[str, str]) -> Verdict:
    """Two columns with the number or the weight of the votes for each image."""
    said = " and ".join(f"{name} is {row[name]!r}" for name in names)
    return _votes(*(_number(row[name]) for name in names), said)


def by_order(first: float, second: float, name: str, lower_is_better: bool, yes_or_no: bool = False) -> Verdict:
    """Ranks or scores of both images; or whether each is preferred, 1 or 0."""
    if yes_or_no and not {first, second} <= {0.0, 1.0}:
        raise BadPair(
            "bad label", f"{name} is {first:g} and {second:g}", advice="Write 1 for the preferred image, else 0."
        )
    return Verdict(_prefer(second, first) if lower_is_better else _prefer(first, second))


PROBLEM = ("kind", "problem", "advice")  # of a bad pair


def stored(row: dict[str, object], shares: bool) -> Verdict:
    """What a pair was found to be before it was written to a file."""
    if row["kind"] is not None:
        raise BadPair(str(row["kind"]), str(row["problem"]), advice=str(row["advice"]))
    return Verdict(row["label_0"])


def _votes(first: float, second: float, said: str) -> Verdict:
    if not (0 <= first < math.inf and 0 <= second < math.inf):
        raise BadPair("bad label", printable(said), advice="Write the votes for each image, or remove the pair.")
    return _majority(first, second)


def _majority(first: float, second: float) -> Verdict:
    """No votes, or equally many for both, make a tie."""
    if abs(first - second) < CLOSE * (first + second) or first == second:
        return Verdict(TIE)
    return Verdict(_prefer(first, second), max(first, second) / (first + second))


def _prefer(first: float, second: float) -> float:
    return TIE if first == second else float(first > second)


def _number(value: object) -> float:
    """The value as a number; NaN if it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _flag(row: dict[str, object], name: str) -> bool | None:
    """The value of a boolean column; None where it is empty."""
    value = row.get(name)
    if value is None:
        return None
    flags = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (said := str(value).strip().lower()) not in flags:
        raise BadPair("bad label", f"{name} is {printable(repr(value))}", advice="Write true or false.")
    return flags[said]


def _contradiction(what: str) -> BadPair:
    return BadPair("contradicting columns", f"{printable(what)}: they contradict each other")
