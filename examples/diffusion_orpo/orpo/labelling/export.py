"""Votes as a preference dataset: a row for every two images that were compared, with the votes for each."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..pairs.image_folder import ListedImage, image_path
from ..pairs.table import write_pairs
from ..runtime.durable import write_text
from .questions import digest_images
from .votes import Vote


@dataclass
class LabelledPair:
    """Two images in the order of the listing, and the annotators' votes.

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


def labelled_pairs(
    folder: Path, images: list[ListedImage], votes: dict[str, dict[str, Vote]]
) -> tuple[list[LabelledPair], Counter[str]]:
    """Counts the votes.

    The best and the worst image of a ranking make a pair. A vote counts if the folder still holds the very images that were shown,
    under whatever names, with the prompt that was shown.

    Args:
        folder: of the images.
        images: the listing.
        votes: annotator to question to vote.

    Returns:
        The pairs, in the order of the listing, and how many votes make none, by reason.
    """
    digests = digest_images(folder, images)
    place = {(images[i].prompt, digests[images[i].name]): i for i in reversed(range(len(images)))}
    pairs: dict[tuple[int, int], LabelledPair] = {}
    skipped: Counter[str] = Counter()
    for given in votes.values():
        for vote in given.values():
            keys = {name: (vote.prompt, digest) for name, digest in zip(vote.shown, vote.digests)}
            if not set(keys.values()) <= place.keys():
                skipped["votes on images or prompts that have changed since, or are gone"] += 1
                continue
            names = (vote.best, vote.worst) if vote.choice == "best" else vote.shown
            if len(names) != 2:
                skipped["rankings without a best image"] += 1
                continue
            key = tuple(sorted(place[keys[name]] for name in names))
            if key[0] == key[1]:
                skipped["votes on two copies of an image"] += 1
                continue
            pair = pairs.setdefault(key, LabelledPair(tuple(images[i] for i in key)))
            pair.votes["01"[place[keys[vote.best]] == key[1]] if vote.choice == "best" else vote.choice] += 1
    return [pairs[key] for key in sorted(pairs)], skipped


def export(folder: Path, pairs: list[LabelledPair], output_dir: Path, card: str) -> None:
    """Writes `train.parquet`, and a README.md that says where it comes from.

    Args:
        folder: the one with the images.
        pairs: at least one.
        output_dir: a new folder, or one that this function wrote.
        card: text of the README.md.

    Raises:
        ValueError: the folder holds something else, or can't be written.
    """
    readme = output_dir / "README.md"
    if output_dir.exists() and any(output_dir.iterdir()) and not _is_ours(readme):
        raise ValueError(f"--export={output_dir} holds other files. Name a new folder.")
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(readme, f"{MARK}\n\n{card}")
        write_pairs(output_dir / "train.parquet", _rows(folder, pairs), EXTRA_COLUMNS)
    except OSError as error:
        if is_new:
            shutil.rmtree(output_dir, ignore_errors=True)
        raise ValueError(
            f"--export={output_dir} can't be written: {error.strerror or error}. Name another folder."
        ) from error


# datasets looks for the block at the top of a README.md.
MARK = "---\ntags:\n- preference\n---\n# Preferences labelled with label_preferences.py"

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


def _rows(folder: Path, pairs: list[LabelledPair]) -> Iterator[dict]:
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
