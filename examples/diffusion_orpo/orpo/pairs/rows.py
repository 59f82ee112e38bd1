"""The rows of a data set that hold a preference: labels, ties, checking all of them, holding some out."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from networkx.utils import UnionFind

from ..runtime.cores import num_cores
from ..runtime.messages import printable
from .bad_pair import BadPair
from .image import DECODER, decode_image
from .image_files import ImageFiles, is_text, names_files, place_of_image, read_image
from .pair import PreferencePair
from .table import PlacedImages, Table, cell_of_image
from .verdicts import LOW_AGREEMENT, TIE


# Held-out pairs are the same in every run on a data set, whatever its seed, and so is the noise they are judged under.
HELD_OUT_SEED = 20240311

MANY = 1000  # rows worth starting processes for
SHOWN = 12  # missing files that an error names


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
        num_unclear: rows on which too few voters agree; they were left out too.
        digests: hashes of the winner's and the loser's image (n, 2), each 16 bytes; None before they are known.
        sizes: height and width of both, the winner first (n, 2, 2); None before they are known.
        buckets: number of each pair's shape (n,); None before they are assigned.
    """

    table: Table
    rows: np.ndarray
    winner_is_0: np.ndarray
    num_ties: int = 0
    num_unclear: int = 0
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
        labels = np.empty(len(table))
        for number, label in enumerate(table.labels()):
            if isinstance(label, BadPair):
                raise label.within(f"{table.name}, {table.where(number)}")
            labels[number] = label
        rows = np.flatnonzero((labels != TIE) & (labels != LOW_AGREEMENT))
        num_ties = int((labels == TIE).sum())
        if len(rows) == 0:
            rest = f", all others have less than --min_agreement={table.columns.min_agreement}"
            raise ValueError(
                f"{table.name}: no pairs left, {'all' if num_ties == len(labels) else num_ties} of the {len(labels)} rows are"
                f" ties (label_0 = 0.5){rest if num_ties < len(labels) else ''}."
            )
        return cls(table, rows, labels[rows] == 1.0, num_ties, num_unclear=len(labels) - len(rows) - num_ties)

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def left_out(self) -> str:
        """What was left out, for messages."""
        unclear = f", {self.num_unclear} of low agreement left out" if self.num_unclear else ""
        return f"{self.num_ties} ties dropped{unclear}"

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
        return [self.table.columns.read_prompt(cell, self.where(i)) for i, cell in enumerate(self._prompt_cells())]

    def _prompt_cells(self) -> pa.ChunkedArray:
        return self.table.column(self.table.columns.prompt, 0, len(self.table)).take(pa.array(self.rows))

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, {self.table.where(self.rows[index])}"

    def __getitem__(self, index: int) -> PreferencePair:
        columns, where = self.table.columns, self.where(index)
        cells = self.table.cells(int(self.rows[index]), (*columns.images, columns.prompt))
        images = [read_image(cells[name], name, where, self.table.files) for name in columns.images]
        winner, loser = images if self.winner_is_0[index] else images[::-1]
        return PreferencePair(winner, loser, columns.read_prompt(cells[columns.prompt], where))

    def check(self) -> "CheckedImages":
        """Looks at every prompt and decodes every image. datasets' cache remembers the images that passed.

        Raises:
            BadPair: names the first bad row.
            ValueError: files of images are missing; names them.
        """
        self.prompts()
        images = self.table.images_of(self.rows)
        rows, used = list(images.by_row), list(images.by_row.values())
        versions = self._versions_of_files(images)
        chosen = self.table.dataset.select_columns(list(images.columns)).select(rows).with_format("arrow")
        checked = chosen.map(
            partial(
                _check_images,
                rows=rows,
                used=used,
                name=self.name,
                files=self.table.files,
                decoder=DECODER,
                versions=versions,
            ),
            with_indices=True,
            remove_columns=list(images.columns),
            num_proc=num_cores() if len(self) >= MANY else None,
            cache_file_name=self.table.result_file(chosen, used, DECODER, versions),
            desc=f"Checking {self.name}",
        ).with_format(None)
        found = {
            (row, place): (hash, size)
            for (row, places), hashes, sizes in zip(images.by_row.items(), checked["hashes"], checked["sizes"])
            for place, hash, size in zip(places, hashes, sizes)
        }
        pairs = [[found[tuple(place)] for place in pair] for pair in images.places.tolist()]
        hashes = [(first[0], second[0]) for first, second in pairs]
        return CheckedImages(hashes, np.array([[size for _, size in pair] for pair in pairs]).reshape(-1, 2, 2))

    def _versions_of_files(self, images: PlacedImages) -> str | None:
        """A hash that changes with the files that the table names by path; None if it holds the images.

        Raises:
            ValueError: files are missing; names them.
        """
        data, files = self.table.dataset.data, self.table.files
        columns = [data.column(name) for name in images.columns]
        if not any(names_files(column.type) for column in columns):
            return None
        digest, missing, seen = hashlib.blake2b(digest_size=16), {}, set()
        for row, places in images.by_row.items():
            for place in places:
                cell, _ = cell_of_image([column[row] for column in columns], images.columns, place)
                path = cell.as_py() if is_text(cell.type) else None
                if not path or path in seen:
                    continue
                seen.add(path)
                try:
                    stat = files.find(path).stat()
                    digest.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
                except (OSError, ValueError) as error:
                    missing[path] = getattr(error, "strerror", None) or str(error)
        if missing:
            raise ValueError(_tell_missing(self.name, missing, files.root))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels, captions and images."""
        digest = hashlib.blake2b(digest_size=16)
        images = b"" if self.digests is None else self.digests.tobytes()
        for part in (self.rows.tobytes(), self.winner_is_0.tobytes(), json.dumps(self.prompts()).encode(), images):
            digest.update(part)
        return digest.hexdigest()


def _tell_missing(name: str, missing: dict[str, str], root: Path) -> str:
    shown = ", ".join(f"{printable(path)} ({printable(why)})" for path, why in list(missing.items())[:SHOWN])
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return (
        f"{name}: {len(missing)} image files can't be read: {shown}{more}. Paths start from {root}: put the files there, or"
        " name another folder by --image_root; or let check_preferences.py --filter write a copy without these pairs."
    )


def _check_images(
    images,
    index: int,
    rows: list[int],
    used: list[list[int]],
    name: str,
    files: ImageFiles,
    decoder: str,
    versions: str | None,
) -> dict:
    """Decodes the images of a row that are used: their hashes, and heights and widths.

    `decoder` and `versions` are part of what the cache knows the result by.
    """
    hashes, sizes, names = [], [], tuple(images.column_names)
    for place in used[index]:
        cell, column = cell_of_image([images[name][0] for name in names], names, place)
        encoded = read_image(cell, column, f"{name}, row {rows[index]}", files)
        image = decode_image(encoded, place_of_image(cell.as_py(), column, f"{name}, row {rows[index]}"))
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
        sizes.append([image.height, image.width])
    return {"hashes": hashes, "sizes": sizes}


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
