"""Votes as a preference data set: a row for every two images that were judged, with the votes for each."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..data.listing import ListedImage, image_path
from ..data.writing import write_pairs
from .votes import Vote


@dataclass
class JudgedPair:
    """Two images in the order of the listing, and the judges' votes.

    Attributes:
        images: both.
        votes: how many said "0" or "1" for one of the images, "tie", or "bad".
    """

    images: tuple[ListedImage, ListedImage]
    votes: Counter[str] = field(default_factory=Counter)

    @property
    def label(self) -> float:
        """1.0 where most prefer the first image, 0.0 where most prefer the second, 0.5 otherwise."""
        neither = self.votes["tie"] + self.votes["bad"]
        for_0, for_1 = self.votes["0"], self.votes["1"]
        if for_0 == for_1 or neither >= max(for_0, for_1):
            return 0.5
        return float(for_0 > for_1)


def judged_pairs(images: list[ListedImage], votes: dict[str, dict[str, Vote]]) -> tuple[list[JudgedPair], int, int]:
    """Counts the votes.

    The best and the worst image of a ranking make a pair. A ranking without a best image makes none.

    Args:
        images: the listing.
        votes: judge to question to vote.

    Returns:
        The pairs, in the order of the listing; the number of rankings that make none; and the number of votes on images
        that are no longer listed.
    """
    place = {image.name: i for i, image in enumerate(images)}
    pairs: dict[tuple[int, int], JudgedPair] = {}
    without_pair = outdated = 0
    for given in votes.values():
        for vote in given.values():
            if not set(vote.shown) <= place.keys():
                outdated += 1
                continue
            names = (vote.best, vote.worst) if vote.choice == "best" else vote.shown
            if len(names) != 2:
                without_pair += 1
                continue
            key = tuple(sorted(place[name] for name in names))
            pair = pairs.setdefault(key, JudgedPair(tuple(images[i] for i in key)))
            pair.votes["01"[place[vote.best] == key[1]] if vote.choice == "best" else vote.choice] += 1
    return [pairs[key] for key in sorted(pairs)], without_pair, outdated


def export(folder: Path, pairs: list[JudgedPair], output_dir: Path, card: str) -> None:
    """Writes `train.parquet`, and a README.md that says where it comes from.

    Args:
        folder: the one with the images.
        pairs: at least one.
        output_dir: a new folder, or one that this function wrote.
        card: text of the README.md.

    Raises:
        ValueError: the folder holds something else.
    """
    readme = output_dir / "README.md"
    if output_dir.exists() and any(output_dir.iterdir()) and not _is_ours(readme):
        raise ValueError(f"--export={output_dir} holds other files. Name a new folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    readme.write_text(f"{MARK}\n\n{card}", encoding="utf-8")
    write_pairs(output_dir / "train.parquet", _rows(folder, pairs), EXTRA_COLUMNS)


# datasets looks for the block at the top of a README.md.
MARK = "---\ntags:\n- preference\n---\n# Preferences judged with label_preferences.py"

EXTRA_COLUMNS = {
    "votes_0": "int64",
    "votes_1": "int64",
    "votes_tie": "int64",
    "votes_bad": "int64",
    "file_0": "string",
    "file_1": "string",
    "details_0": "string",
    "details_1": "string",
}


def _is_ours(readme: Path) -> bool:
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(MARK)


def _rows(folder: Path, pairs: list[JudgedPair]) -> Iterator[dict]:
    for pair in pairs:
        first, second = pair.images
        yield {
            "jpg_0": image_path(folder, first.name).read_bytes(),
            "jpg_1": image_path(folder, second.name).read_bytes(),
            "label_0": pair.label,
            "caption": first.prompt,
            **{f"votes_{answer}": pair.votes[answer] for answer in ("0", "1", "tie", "bad")},
            "file_0": first.name,
            "file_1": second.name,
            "details_0": json.dumps(first.details),
            "details_1": json.dumps(second.details),
        }
