"""All pairs of a dataset in one form, whatever form it came in; checking those that are trained on; holding some out."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from datasets.fingerprint import Hasher
from networkx.utils import UnionFind

from ..runtime.cores import num_cores
from ..runtime.durable import written_whole
from ..runtime.messages import printable
from .bad_pair import BadPair
from .columns import Columns, Reading, plain_type
from .image import DECODER, ImageFiles, decode_image, is_list, is_text, names_files, place_of_image, read_image
from .labels import LOW_AGREEMENT, TIE
from .pair import PreferencePair
from .ranked import ranked_pairs


# Held-out pairs are the same in every run on a dataset, whatever its seed, and so is the noise they are judged under.
HELD_OUT_SEED = 20240311

MANY = 1000  # rows worth starting processes for
SHOWN = 12  # missing files that an error names
ROWS_AT_ONCE = 100  # a row group: a few hundred MB of large images at the most


@dataclass(frozen=True)
class PairTable:
    """All pairs of a dataset, unchecked, with what is wrong with those that say nothing.

    Attributes:
        dataset: its rows, images undecoded.
        name: for messages.
        columns: what its columns mean.
        images: int64 (pairs, 2, 2): row and place of the first and of the second image. The place is that in the row's
            list of images, or the number of the column.
        labels: (pairs,): 1.0 where the first image is preferred, 0.0 where the second is, TIE or LOW_AGREEMENT; NaN where
            it is bad.
        agreement: (pairs,): share of the votes that are for the preferred image; NaN if it is unknown.
        problems: the pairs whose label is bad.
        alone: number of images that have no other one to be compared with.
        split: that the rows are from; "train" where there are none.
        files: the image files that cells may name.
        results: folder for what is found out about the rows. None: beside them, in the cache of datasets.
    """

    dataset: Dataset
    name: str
    columns: Columns
    images: np.ndarray
    labels: np.ndarray
    agreement: np.ndarray
    problems: dict[int, BadPair]
    alone: int = 0
    split: str = "train"
    files: ImageFiles = ImageFiles()
    results: Path | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        name: str,
        split: str = "train",
        files: ImageFiles = ImageFiles(),
        reading: Reading = Reading(),
    ) -> "PairTable":
        """
        Raises:
            ValueError: columns are missing, ambiguous, or hold no images; or there are no two images to compare.
        """
        classes = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
        schema = pa.schema([(field.name, plain_type(field.type)) for field in dataset.data.schema])
        columns = reading.find_columns(schema, name, classes, files)
        for column in columns.used:
            if schema.field(column).type != dataset.data.schema.field(column).type:
                feature = Features.from_arrow_schema(pa.schema([schema.field(column)]))[column]
                dataset = dataset.cast_column(column, feature)
            elif isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        if columns.convention.is_ranked:
            images, verdicts, alone = ranked_pairs(dataset, columns.convention, reading.pairs_per_group)
            if not len(images):
                raise ValueError(f"{name}: no two images of a prompt are ranked, so there are no pairs.")
        else:
            rows, alone = np.arange(len(dataset)), 0
            images = np.stack([np.stack([rows, np.full_like(rows, side)], axis=1) for side in (0, 1)], axis=1)
            verdicts = columns.read_verdicts([dataset.data.column(name) for name in columns.verdict], len(dataset))
        labels, agreement = np.full(len(images), np.nan), np.full(len(images), np.nan)
        problems = {}
        for pair, verdict in enumerate(verdicts):
            if isinstance(verdict, BadPair):
                problems[pair] = verdict
            else:
                labels[pair], agreement[pair] = verdict.label, verdict.agreement if verdict.agreement else math.nan
        return cls(dataset, name, columns, images, labels, agreement, problems, alone, split, files)

    def __len__(self) -> int:
        return len(self.images)

    def where(self, pair: int) -> str:
        """Names a pair in messages."""
        (row, place), (other_row, other_place) = self.images[pair].tolist()
        if row != other_row:
            return f"rows {row} and {other_row}"
        return f"row {row}, images {place} and {other_place}" if self.columns.lists_images else f"row {row}"

    def cell(self, row: int, place: int) -> tuple[pa.Scalar, str]:
        """The cell of an image, and its name in messages."""
        return cell_of_image(
            [self.dataset.data.column(name)[row] for name in self.columns.images], self.columns.images, place
        )

    def image(self, pair: int, side: int) -> bytes:
        """The file of the first or the second image of a pair.

        Raises:
            BadPair: there is none.
        """
        cell, column = self.cell(*self.images[pair, side].tolist())
        return read_image(cell, column, self.where(pair), self.files)

    def place_of_image(self, pair: int, side: int) -> str:
        """Names an image in messages: its pair, column and file."""
        cell, column = self.cell(*self.images[pair, side].tolist())
        return place_of_image(cell.as_py(), column, self.where(pair))

    def prompt(self, pair: int) -> str:
        """
        Raises:
            BadPair: it is not text.
        """
        cell = self.dataset.data.column(self.columns.prompt)[int(self.images[pair, 0, 0])]
        return self.columns.read_prompt(cell, self.where(pair))

    def result_file(self, rows: Dataset, *decisive: object) -> str | None:
        """Where the result of a look at some rows is kept; None leaves that to datasets.

        Args:
            rows: those that are looked at.
            decisive: what else the result depends on.
        """
        if self.results is None:
            return None
        self.results.mkdir(parents=True, exist_ok=True)
        return str(self.results / f"{Hasher.hash([rows._fingerprint, *decisive])}.arrow")


def cell_of_image(cells: list[pa.Scalar], names: tuple[str, ...], place: int) -> tuple[pa.Scalar, str]:
    """The cell of an image among those of its row, and its name in messages."""
    if len(cells) > 1:
        return cells[place], names[place]
    if not is_list(cells[0].type):
        return cells[0], names[0]
    return cells[0].values[place] if cells[0].values else pa.scalar(None, pa.string()), f"{names[0]} {place}"


@dataclass(frozen=True)
class PreferencePairs:
    """The pairs of a table that hold a preference.

    Attributes:
        table: all pairs.
        numbers: of those that hold a preference (n,).
        num_ties: pairs without a preference, which were skipped.
        num_unclear: pairs on which too few voters agree; they were skipped too.
        digests: hashes of the winner's and the loser's image (n, 2), each 16 bytes; None before they are known.
        sizes: height and width of both, the winner first (n, 2, 2); None before they are known.
        buckets: number of each pair's shape (n,); None before they are assigned.
    """

    table: PairTable
    numbers: np.ndarray
    num_ties: int = 0
    num_unclear: int = 0
    digests: np.ndarray | None = None
    sizes: np.ndarray | None = None
    buckets: np.ndarray | None = None

    @classmethod
    def of(cls, table: PairTable) -> "PreferencePairs":
        """Skips ties.

        Raises:
            BadPair: a label is bad.
            ValueError: there are only ties.
        """
        for pair, bad in table.problems.items():
            raise bad.within(f"{table.name}, {table.where(pair)}")
        labels = table.labels
        numbers = np.flatnonzero((labels != TIE) & (labels != LOW_AGREEMENT))
        num_ties = int((labels == TIE).sum())
        if len(numbers) == 0:
            rest = f", all others have less than --min_agreement={table.columns.min_agreement}"
            raise ValueError(
                f"{table.name}: no pairs left, {'all' if num_ties == len(labels) else num_ties} of the {len(labels)} rows are"
                f" ties (label_0 = 0.5){rest if num_ties < len(labels) else ''}."
            )
        return cls(table, numbers, num_ties, len(labels) - len(numbers) - num_ties)

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def skipped(self) -> str:
        """For messages."""
        unclear = f", {self.num_unclear} of low agreement skipped" if self.num_unclear else ""
        return f"{self.num_ties} ties skipped{unclear}"

    @property
    def sides(self) -> np.ndarray:
        """Of each pair, which image is the winner's and which the loser's (n, 2)."""
        return np.where(self.table.labels[self.numbers, None] == 1.0, [0, 1], [1, 0])

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, indices: np.ndarray) -> "PreferencePairs":
        per_pair = {name: getattr(self, name) for name in ("numbers", "digests", "sizes", "buckets")}
        return replace(self, **{name: value[indices] for name, value in per_pair.items() if value is not None})

    def prompts(self) -> list[str]:
        columns, rows = self.table.columns, self.table.images[self.numbers, 0, 0]
        cells = self.table.dataset.data.column(columns.prompt).take(pa.array(rows))
        return [columns.read_prompt(cell, self.where(index)) for index, cell in enumerate(cells)]

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, {self.table.where(self.numbers[index])}"

    def __getitem__(self, index: int) -> PreferencePair:
        number = int(self.numbers[index])
        sides = (0, 1) if self.table.labels[number] == 1 else (1, 0)
        try:
            return PreferencePair(*(self.table.image(number, side) for side in sides), self.table.prompt(number))
        except BadPair as bad:
            raise bad.within(self.name) from bad.__cause__

    def checked(self) -> "PreferencePairs":
        """The same with digests and sizes: looks at every prompt and decodes every image.

        datasets' cache remembers the images that passed.

        Raises:
            BadPair: names the first bad row.
            ValueError: files of images are missing; names them.
        """
        self.prompts()
        places = self.table.images[self.numbers[:, None], self.sides]  # (n, 2, 2), the winner first
        used: dict[int, list[int]] = {}
        for row, place in np.unique(places.reshape(-1, 2), axis=0).tolist():
            used.setdefault(row, []).append(place)
        columns, versions = self.table.columns.images, self._versions_of_files(used)
        rows = self.table.dataset.select_columns(list(columns)).select(list(used)).with_format("arrow")
        check = partial(
            _check_images,
            rows=list(used),
            used=list(used.values()),
            name=self.name,
            files=self.table.files,
            decoder=DECODER,
            versions=versions,
        )
        checked = rows.map(
            check,
            with_indices=True,
            remove_columns=list(columns),
            num_proc=num_cores() if len(self) >= MANY else None,
            cache_file_name=self.table.result_file(rows, list(used.values()), DECODER, versions),
            desc=f"Checking {self.name}",
        ).with_format(None)
        found = {
            (row, place): (hash, size)
            for (row, places_of_row), hashes, sizes in zip(used.items(), checked["hashes"], checked["sizes"])
            for place, hash, size in zip(places_of_row, hashes, sizes)
        }
        images = [found[row, place] for row, place in places.reshape(-1, 2).tolist()]
        digests = np.frombuffer(b"".join(hash for hash, _ in images), dtype="V16").reshape(-1, 2)
        return replace(self, digests=digests, sizes=np.array([size for _, size in images]).reshape(-1, 2, 2))

    def _versions_of_files(self, used: dict[int, list[int]]) -> str | None:
        """A hash that changes with the files that the table names by path; None if it holds the images.

        Raises:
            ValueError: files are missing; names them.
        """
        if not any(names_files(self.table.dataset.data.column(name).type) for name in self.table.columns.images):
            return None
        digest, missing, seen = hashlib.blake2b(digest_size=16), {}, set()
        for cell, _ in (self.table.cell(row, place) for row, places in used.items() for place in places):
            path = cell.as_py() if is_text(cell.type) else None
            if not path or path in seen:
                continue
            seen.add(path)
            try:
                stat = self.table.files.find(path).stat()
                digest.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\0".encode())
            except (OSError, ValueError) as error:
                missing[path] = getattr(error, "strerror", None) or str(error)
        if missing:
            raise ValueError(_tell_missing(self.name, missing, self.table.files.root))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels, captions and images."""
        digest = hashlib.blake2b(digest_size=16)
        images = b"" if self.digests is None else self.digests.tobytes()
        for part in (self.numbers.tobytes(), self.sides.tobytes(), json.dumps(self.prompts()).encode(), images):
            digest.update(part)
        return digest.hexdigest()


def _tell_missing(name: str, missing: dict[str, str], root: Path | None) -> str:
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


def hold_out(pairs: PreferencePairs, number: int) -> tuple[PreferencePairs, PreferencePairs | None]:
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


def write_pairs(path: Path, rows: Iterable[dict], more_columns: dict[str, str] | None = None) -> int:
    """Writes pairs as a parquet file that is complete or absent, in the columns that training reads.

    Args:
        path: of the file. One that exists is replaced.
        rows: with `jpg_0` and `jpg_1`, encoded images; `label_0`; `caption`; and the other columns. They are taken one
            after the other, so that not all need to fit into memory.
        more_columns: name to Arrow type, such as {"seed_0": "int64"}.

    Returns:
        The number of rows.
    """
    schema = pa.schema(
        [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string())]
        + [(name, pa.type_for_alias(kind)) for name, kind in (more_columns or {}).items()]
    )
    rows, count = iter(rows), 0
    with written_whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count
