"""A sample of a shard: two images, a prompt, and a label that says which image people preferred.

Its members are `original_prompt.txt`, `jpg_0.*`, `jpg_1.*`, `label_0.txt` and, optionally, `label_1.txt`. In shards that
are encoded, `encoded.safetensors` takes the place of the images: see `encoded_sample.py`.
"""

import re

from ..pairs.bad_pair import BadPair
from ..pairs.labels import parse_label
from ..pairs.pair import PreferencePair
from ..runtime.messages import printable
from .tar import OTHERS, WANTED


PROMPT, LABEL, SECOND = "original_prompt.txt", "label_0.txt", "label_1.txt"
IMAGES = ("jpg_0.*", "jpg_1.*")
SHOWN_MEMBERS = 6


def to_pair(members: dict[str, bytes]) -> PreferencePair | None:
    """Reads a sample's label and puts the winner first; None for a tie.

    Args:
        members: as `walk_samples` gives them.

    Raises:
        BadPair: a member is missing or not a plain file, or label or prompt can't be read.
    """
    label, prompt = read_label(members, IMAGES)
    if label == 0.5:
        return None
    images = [next(data for name, data in members.items() if name.startswith(f"{i}.")) for i in ("jpg_0", "jpg_1")]
    winner, loser = images if label == 1 else images[::-1]
    return PreferencePair(winner, loser, prompt)


def read_label(members: dict[str, bytes], others: tuple[str, ...]) -> tuple[float, str]:
    """Reads a sample's label and prompt.

    Args:
        members: as `walk_samples` gives them.
        others: names of the members that the sample must have, too; `jpg_0.*` stands for any format.

    Raises:
        BadPair: a member is missing or not a plain file, or label or prompt can't be read.
    """
    if "__error__" in members:
        raise BadPair("bad member", members["__error__"])
    needed = (PROMPT, *others, LABEL)
    if missing_members([name for name in members if not name.startswith("__")], needed):
        raise BadPair("missing member", *what_is_missing(members, needed))
    try:
        label = parse_label(members[LABEL].decode(), "", LABEL)
        other = parse_label(members[SECOND].decode(), "", SECOND) if SECOND in members else 1 - label
        prompt = members[PROMPT].decode()
    except UnicodeDecodeError as error:
        raise BadPair("not UTF-8", str(error)) from error
    if label + other != 1:
        raise BadPair("bad label", f"label_0 {label} and label_1 {other} contradict each other")
    return label, prompt


def missing_members(names: list[str], needed: tuple[str, ...]) -> list[str]:
    """The needed members that are not among the names."""
    return [need for need in needed if not any(_is(name, need) for name in names)]


def what_is_missing(members: dict, needed: tuple[str, ...]) -> tuple[str, str, str]:
    """Returns what a sample holds and lacks; an empty place, which the caller knows; and what to do about it."""
    names = member_names(members)
    held = ", ".join(printable(name, 40) for name in names[:SHOWN_MEMBERS]) or "nothing"
    more = ", ..." if len(names) > SHOWN_MEMBERS else ""
    problem = f"has only {held}{more}; a sample needs {', '.join(needed)}"
    if any(re.search(rf"\.{WANTED.pattern}$", name, WANTED.flags) for name in names):
        return problem, "", "A key ends at the first dot of a file's name: rename the files so that keys hold no dot."
    if all(WANTED.fullmatch(name) for name in names):
        return problem, "", "A sample's files must follow one another in the archive: pack with `tar --sort=name`."
    return problem, "", "Rename the members, or make the shards with convert_to_webdataset.py."


def member_names(members: dict) -> list[str]:
    """Names of all members of a sample, including those that were skipped."""
    return [name for name in members if not name.startswith("__")] + members.get(OTHERS, [])


def _is(name: str, need: str) -> bool:
    """Whether a member is the one that is needed; `jpg_0.*` stands for any format."""
    return name.startswith(need[:-1]) if need.endswith(".*") else name == need
