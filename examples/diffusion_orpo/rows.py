"""The rows of a data set that hold a preference: columns, labels, ties, checking all of them, holding some out."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from datasets import Dataset, Image, Value
from networkx.utils import UnionFind

from pairs import PreferencePair, decode_image
from schema import PICK_A_PIC_COLUMNS, TRL_COLUMNS, parse_label


# Held-out pairs are the same in every run on a data set, whatever its seed, and so is the noise they are judged under.
HELD_OUT_SEED = 20240311

BINARY = (Value("binary"), Value("large_binary"))


@dataclass(frozen=True)
class PreferenceRows:
    """The rows of a data set that hold a preference.

    Attributes:
        dataset: all rows, images undecoded.
        name: for messages.
        rows: numbers of the rows that hold a preference.
        winner_is_0: for each of those, whether the first image is the preferred one.
        columns: names of first image, second image and caption.
    """

    dataset: Dataset
    name: str
    rows: np.ndarray
    winner_is_0: np.ndarray
    columns: tuple[str, str, str]
    num_ties: int = 0

    @classmethod
    def open(cls, dataset: Dataset, name: str) -> "PreferenceRows":
        """Finds the columns, reads the labels and drops ties.

        Raises:
            ValueError: columns are missing or hold no images, a label is bad, or there are only ties.
        """
        found = dataset.column_names
        if set(PICK_A_PIC_COLUMNS) <= set(found):
            columns = ("jpg_0", "jpg_1", "caption")
            labels = [
                parse_label(v, f"{name}, row {i}") for i, v in enumerate(dataset.data.column("label_0").to_pylist())
            ]
        elif set(TRL_COLUMNS) <= set(found):
            columns = TRL_COLUMNS
            labels = [1.0] * len(dataset)
        else:
            raise ValueError(
                f"{name} has the columns {', '.join(found)}. Needed are {', '.join(PICK_A_PIC_COLUMNS)}, or"
                f" {', '.join(TRL_COLUMNS)}."
            )
        for column in columns[:2]:
            if not isinstance(dataset.features[column], Image) and dataset.features[column] not in BINARY:
                raise ValueError(
                    f"{name}: column {column} holds {dataset.features[column]}, not images or their encoded bytes."
                )
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        labels = np.array(labels)
        rows = np.flatnonzero(labels != 0.5)
        if len(rows) == 0:
            raise ValueError(f"{name}: no pairs left, all of the {len(labels)} rows are ties (label_0 = 0.5).")
        return cls(dataset, name, rows, labels[rows] == 1.0, columns, num_ties=len(labels) - len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> "PreferenceRows":
        return replace(self, rows=self.rows[indices], winner_is_0=self.winner_is_0[indices])

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, row {self.rows[index]}"

    def __getitem__(self, index: int) -> PreferencePair:
        row = self.dataset[int(self.rows[index])]
        images = [_encoded_bytes(row[column]) for column in self.columns[:2]]
        winner, loser = images if self.winner_is_0[index] else images[::-1]
        return PreferencePair(winner, loser, row[self.columns[2]])

    def check(self) -> list[tuple[bytes, bytes]]:
        """Decodes every image and looks at every caption.

        Returns:
            A hash of either image of each pair.

        Raises:
            ValueError: names the first bad row.
        """
        many = len(self) >= 1000  # worth starting processes for
        checked = (
            self.dataset.select_columns(list(self.columns))
            .select(self.rows)
            .map(
                partial(_check_row, rows=self.rows, columns=self.columns, name=self.name),
                with_indices=True,
                remove_columns=list(self.columns),
                num_proc=os.cpu_count() if many else None,
                desc=f"Checking {self.name}",
            )
        )
        return list(zip(checked["hash_0"], checked["hash_1"]))

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels and captions."""
        captions = self.dataset.select_columns([self.columns[2]]).select(self.rows)[self.columns[2]]
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.rows.tobytes(), self.winner_is_0.tobytes(), json.dumps(list(captions)).encode()):
            digest.update(part)
        return digest.hexdigest()


def _encoded_bytes(image: bytes | dict) -> bytes:
    """The bytes of an image file, whether the column holds them, or a datasets Image that may only know its path."""
    if isinstance(image, dict):
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()
    return image


def _check_row(row: dict, index: int, rows: np.ndarray, columns: tuple[str, str, str], name: str) -> dict:
    where, hashes = f"{name}, row {rows[index]}", []
    for column in columns[:2]:
        if row[column] is None:
            raise ValueError(f"{where}: {column} is empty. Remove this row.")
        encoded = _encoded_bytes(row[column])
        decode_image(encoded, f"{where}, {column}")
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
    if not isinstance(row[columns[2]], str):
        raise ValueError(f"{where}: {columns[2]} is {row[columns[2]]!r}, not text.")
    return {"hash_0": hashes[0], "hash_1": hashes[1]}


def hold_out(
    pairs: PreferenceRows, images: list[tuple[bytes, bytes]], number: int
) -> tuple[PreferenceRows, PreferenceRows | None]:
    """Splits off at most `number` pairs, such that no image of theirs is trained on.

    Where an image stands in several pairs, as in Pick-a-Pic, all of these pairs go to the same side.

    Args:
        pairs: all of them.
        images: a hash of either image of each pair.
        number: of pairs to hold out.

    Returns:
        The pairs to train on, and those held out, or None where none are.

    Raises:
        ValueError: more than `number` pairs hang together by their images, so that none can be held out.
    """
    if number == 0:
        return pairs, None
    together = UnionFind()
    for image_0, image_1 in images:
        together.union(image_0, image_1)
    groups: dict[bytes, list[int]] = {}
    for index, (image_0, _) in enumerate(images):
        groups.setdefault(together[image_0], []).append(index)
    held_out: list[int] = []
    groups_in_order = list(groups.values())
    for i in np.random.default_rng(HELD_OUT_SEED).permutation(len(groups_in_order)):
        if len(held_out) + len(groups_in_order[i]) <= number:
            held_out += groups_in_order[i]
    if not held_out:
        raise ValueError(
            f"--num_validation_pairs={number} is too small: all pairs of {pairs.name} share images with more others."
        )
    return pairs.select(np.setdiff1d(np.arange(len(pairs)), held_out)), pairs.select(np.sort(held_out))
