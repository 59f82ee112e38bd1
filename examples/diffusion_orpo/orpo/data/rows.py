"""The rows of a data set that hold a preference: labels, ties, checking all of them, holding some out."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from networkx.utils import UnionFind

from .columns import TIE, Columns, place_of_image
from .image import DECODER, decode_image
from .pair import PreferencePair
from .table import Table


# Held-out pairs are the same in every run on a data set, whatever its seed, and so is the noise they are judged under.
HELD_OUT_SEED = 20240311

MANY = 1000  # rows worth starting processes for


@dataclass(frozen=True)
class CheckedImages:
    """What a look at all images has found.

    Attributes:
        hashes: of both images of each pair, in the row's order.
        sizes: their heights and widths, upright, in the same order (n, 2, 2).
    """

    hashes: list[tuple[bytes, bytes]]
    sizes: np.ndarray


@dataclass(frozen=True)
class PreferenceRows:
    """The rows of a data set that hold a preference.

    Attributes:
        table: all rows.
        rows: numbers of the rows that hold a preference.
        winner_is_0: for each of those, whether the first image is the preferred one.
        num_ties: rows without a preference, which were left out.
        digests: hashes of the winner's and the loser's image (n, 2), each 16 bytes; None before they are known.
        sizes: height and width of both, the winner first (n, 2, 2); None before they are known.
        buckets: number of each pair's shape (n,); None before they are assigned.
    """

    table: Table
    rows: np.ndarray
    winner_is_0: np.ndarray
    num_ties: int = 0
    digests: np.ndarray | None = None
    sizes: np.ndarray | None = None
    buckets: np.ndarray | None = None

    @classmethod
    def open(cls, table: Table) -> "PreferenceRows":
        """Reads the labels and drops ties.

        Raises:
            BadPair: a label is bad.
            ValueError: there are only ties.
        """
        columns, data = table.columns, table.dataset.data
        cells = zip(*(data.column(name) for name in columns.verdict)) if columns.verdict else [()] * len(table)
        labels = np.array(
            [
                columns.read_label(dict(zip(columns.verdict, row)), f"{table.name}, row {number}")
                for number, row in enumerate(cells)
            ]
        )
        rows = np.flatnonzero(labels != TIE)
        if len(rows) == 0:
            raise ValueError(f"{table.name}: no pairs left, all of the {len(labels)} rows are ties (label_0 = 0.5).")
        return cls(table, rows, labels[rows] == 1.0, num_ties=len(labels) - len(rows))

    @property
    def name(self) -> str:
        return self.table.name

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> "PreferenceRows":
        per_pair = {name: getattr(self, name) for name in ("rows", "winner_is_0", "digests", "sizes", "buckets")}
        return replace(self, **{name: value[indices] for name, value in per_pair.items() if value is not None})

    def with_images(self, images: "CheckedImages") -> "PreferenceRows":
        """The same, knowing what `check` said of the images."""
        digests = np.frombuffer(b"".join(hash for pair in images.hashes for hash in pair), dtype="V16").reshape(-1, 2)
        order = np.where(self.winner_is_0[:, None], [0, 1], [1, 0])  # of winner and loser
        pairs = np.arange(len(self))[:, None]
        return replace(self, digests=digests[pairs, order], sizes=images.sizes[pairs, order])

    def prompts(self) -> list[str]:
        column = self.table.columns.prompt
        return list(self.table.dataset.select_columns([column]).select(self.rows)[column])

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, row {self.rows[index]}"

    def __getitem__(self, index: int) -> PreferencePair:
        columns, where = self.table.columns, self.where(index)
        cells = self.table.cells(int(self.rows[index]), (*columns.images, columns.prompt))
        images = [columns.read_image(cells[name], name, where, self.table.follows_paths) for name in columns.images]
        winner, loser = images if self.winner_is_0[index] else images[::-1]
        return PreferencePair(winner, loser, columns.read_prompt(cells[columns.prompt], where))

    def check(self) -> "CheckedImages":
        """Looks at every prompt and decodes every image. datasets' cache remembers the images that passed.

        Raises:
            BadPair: names the first bad row.
        """
        columns, prompts = self.table.columns, self.table.dataset.data.column(self.table.columns.prompt)
        for index, row in enumerate(self.rows.tolist()):
            columns.read_prompt(prompts[row], self.where(index))
        images = list(columns.images)
        checked = (
            self.table.dataset.select_columns(images)
            .select(self.rows)
            .with_format("arrow")
            .map(
                partial(
                    _check_images,
                    rows=self.rows,
                    name=self.name,
                    columns=columns,
                    follows_paths=self.table.follows_paths,
                    decoder=DECODER,
                ),
                with_indices=True,
                remove_columns=images,
                num_proc=os.cpu_count() if len(self) >= MANY else None,
                desc=f"Checking {self.name}",
            )
            .with_format(None)
        )
        sizes = np.stack([np.array(checked[f"size_{i}"], dtype=np.int64).reshape(-1, 2) for i in (0, 1)], axis=1)
        return CheckedImages(list(zip(checked["hash_0"], checked["hash_1"])), sizes)

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels and captions."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.rows.tobytes(), self.winner_is_0.tobytes(), json.dumps(self.prompts()).encode()):
            digest.update(part)
        return digest.hexdigest()


def _check_images(
    images, index: int, rows: np.ndarray, name: str, columns: Columns, follows_paths: bool, decoder: str
) -> dict:
    """Decodes both images of a row, and hashes them. `decoder` is part of what the cache knows the result by."""
    where = f"{name}, row {rows[index]}"
    encoded = [columns.read_image(images[column][0], column, where, follows_paths) for column in columns.images]
    found = {}
    for i, (column, image) in enumerate(zip(columns.images, encoded)):
        width, height = decode_image(image, place_of_image(images[column][0].as_py(), column, where)).size
        found[f"hash_{i}"] = hashlib.blake2b(image, digest_size=16).digest()
        found[f"size_{i}"] = [height, width]
    return found


def hold_out(pairs: PreferenceRows, number: int) -> tuple[PreferenceRows, PreferenceRows | None]:
    """Splits off at most `number` pairs, such that no image of theirs is trained on.

    Where an image appears in several pairs, as in Pick-a-Pic, all of these pairs go to the same side.

    Args:
        pairs: all of them, with digests.
        number: of pairs to hold out.

    Returns:
        The pairs to train on, and those held out, or None where none are.

    Raises:
        ValueError: the pairs that share images form groups larger than `number`, so that none can be held out.
    """
    if number == 0:
        return pairs, None
    together = UnionFind()
    images = pairs.digests.tolist()
    for winner, loser in images:
        together.union(winner, loser)
    groups: dict[bytes, list[int]] = {}
    for index, (winner, _) in enumerate(images):
        groups.setdefault(together[winner], []).append(index)
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
