"""The rows of a data set that hold a preference: columns, labels, ties, checking all of them, holding some out."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, Value
from networkx.utils import UnionFind

from ..system.messages import printable
from .columns import PICK_A_PIC_COLUMNS, TRL_COLUMNS, parse_label
from .image import DECODER, decode_image
from .pair import PreferencePair


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
        num_ties: rows that were left out.
        digests: hashes of the winner's and the loser's image (n, 2), each 16 bytes; None before they are known.
    """

    dataset: Dataset
    name: str
    rows: np.ndarray
    winner_is_0: np.ndarray
    columns: tuple[str, str, str]
    num_ties: int = 0
    digests: np.ndarray | None = None

    @classmethod
    def open(cls, dataset: Dataset, name: str) -> "PreferenceRows":
        """Finds the columns, reads the labels and drops ties.

        Raises:
            ValueError: columns are missing or hold no images, a label is bad, or there are only ties.
        """
        found = dataset.column_names
        if set(PICK_A_PIC_COLUMNS) <= set(found):
            columns = ("jpg_0", "jpg_1", "caption")
            everywhere = np.arange(len(dataset))
            labels = [parse_label(v, f"{name}, row {i}") for i, v in _values(dataset, "label_0", everywhere, name)]
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
        digests = None if self.digests is None else self.digests[indices]
        return replace(self, rows=self.rows[indices], winner_is_0=self.winner_is_0[indices], digests=digests)

    def with_digests(self, images: list[tuple[bytes, bytes]]) -> "PreferenceRows":
        """The same, knowing what `check` said of the images."""
        digests = np.frombuffer(b"".join(hash for pair in images for hash in pair), dtype="V16").reshape(-1, 2)
        return replace(self, digests=np.where(self.winner_is_0[:, None], digests, digests[:, ::-1]))

    def prompts(self) -> list[str]:
        return list(self.dataset.select_columns([self.columns[2]]).select(self.rows)[self.columns[2]])

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, row {self.rows[index]}"

    def __getitem__(self, index: int) -> PreferencePair:
        row = self.dataset[int(self.rows[index])]
        images = [
            encoded_bytes(row[column], f"{self.where(index)}, {column}", self.has_files) for column in self.columns[:2]
        ]
        winner, loser = images if self.winner_is_0[index] else images[::-1]
        return PreferencePair(winner, loser, row[self.columns[2]])

    def check(self) -> list[tuple[bytes, bytes]]:
        """Looks at every caption and decodes every image. datasets' cache remembers the images that passed.

        Returns:
            A hash of either image of each pair.

        Raises:
            ValueError: names the first bad row.
        """
        caption, images = self.columns[2], list(self.columns[:2])
        for row, value in _values(self.dataset, caption, self.rows, self.name):
            if not isinstance(value, str):
                raise ValueError(f"{self.name}, row {row}: {caption} is {printable(repr(value))}, not text.")
        many = len(self) >= 1000  # worth starting processes for
        checked = (
            self.dataset.select_columns(images)
            .select(self.rows)
            .map(
                partial(_check_images, rows=self.rows, name=self.name, has_files=self.has_files, decoder=DECODER),
                with_indices=True,
                remove_columns=images,
                num_proc=os.cpu_count() if many else None,
                desc=f"Checking {self.name}",
            )
        )
        return list(zip(checked["hash_0"], checked["hash_1"]))

    @property
    def has_files(self) -> bool:
        """Whether images may be named by a path. In a table from elsewhere, a path could be any file of this machine."""
        return self.dataset.builder_name == "imagefolder"

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels and captions."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.rows.tobytes(), self.winner_is_0.tobytes(), json.dumps(self.prompts()).encode()):
            digest.update(part)
        return digest.hexdigest()


def _values(dataset: Dataset, column: str, rows: np.ndarray, name: str) -> Iterator[tuple[int, object]]:
    """The values of a column in these rows, each with its row's number, in rising order.

    Raises:
        ValueError: one can't be read, as text that is not UTF-8.
    """
    wanted = np.zeros(len(dataset), dtype=bool)
    wanted[rows] = True
    for row, (scalar, is_wanted) in enumerate(zip(dataset.data.column(column), wanted)):
        if is_wanted:
            try:
                value = scalar.as_py()
            except (ValueError, OverflowError) as error:  # a UnicodeDecodeError is a ValueError
                raise ValueError(f"{name}, row {row}: {column} can't be read: {error}. Replace this row.") from error
            yield row, value


def encoded_bytes(image: bytes | dict | None, where: str, has_files: bool) -> bytes:
    """The bytes of an image file, whether the column holds them, or a datasets Image that may only know its path.

    Raises:
        ValueError: there are none, or there is a path that can't be read or, without `has_files`, must not.
    """
    if isinstance(image, dict):
        path, image = image["path"], image["bytes"]
        if image is None and path is not None:
            if not has_files:
                raise ValueError(f"{where} holds a path and no image. Store the image's bytes.")
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise ValueError(f"{where}: {printable(str(error))}. Remove or replace this row.") from error
    if image is None:
        raise ValueError(f"{where} is empty. Remove this row.")
    return image


def _check_images(images: dict, index: int, rows: np.ndarray, name: str, has_files: bool, decoder: str) -> dict:
    """Decodes both images of a row, and hashes them. `decoder` is part of what the cache knows the result by."""
    hashes = []
    for column, image in images.items():
        where = f"{name}, row {rows[index]}, {column}"
        encoded = encoded_bytes(image, where, has_files)
        decode_image(encoded, where)
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
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
