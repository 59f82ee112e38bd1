"""Every pair of a data set or of shards, looked at as training does.

Training stops at the first bad row; here it's named and the next one is looked at.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..data.bad_pair import BadPair
from ..data.columns import PICK_A_PIC_COLUMNS, parse_label
from ..data.pair import PreferencePair
from ..data.rows import PreferenceRows, encoded_bytes
from ..shards.listing import Shards
from ..shards.sample import to_pair
from ..shards.shard import read_samples
from ..system.messages import printable
from ..system.redaction import without_secrets
from .inspection import ImageFacts, InspectedPair, image_facts


ROWS_PER_TASK = 64
STOPS = "shard that stops the run"


@dataclass(frozen=True)
class RowSource:
    """The rows of a data set.

    Attributes:
        dataset: as it came.
        pairs: all its rows, also ties and bad ones.
        labels: of each row, NaN where it is bad.
        rows: those to look at.
        decode: whether images are decoded, or known to be good.
    """

    dataset: Dataset
    pairs: PreferenceRows
    labels: np.ndarray
    rows: np.ndarray
    decode: bool

    @classmethod
    def open(cls, dataset: Dataset, name: str, max_pairs: int | None, decode: bool) -> "RowSource":
        """Finds columns by training's own rules, as if all labels were good.

        Args:
            dataset, name: as `dataset.open_rows` gives them.
            max_pairs: pairs that training uses, the first ones. None: all.
            decode: whether to decode images.

        Raises:
            ValueError: columns are missing or hold no images, or there are no rows.
        """
        labels, relabelled = np.ones(len(dataset)), dataset
        if set(PICK_A_PIC_COLUMNS) <= set(dataset.column_names):
            labels = np.array([_label_or_nan(scalar) for scalar in dataset.data.column("label_0")])
            relabelled = dataset.remove_columns("label_0").add_column("label_0", np.ones(len(dataset)))
        pairs = replace(PreferenceRows.open(relabelled, name), winner_is_0=labels == 1.0)
        used = np.cumsum(labels != 0.5) <= (len(labels) if max_pairs is None else max_pairs)
        return cls(dataset, pairs, labels, np.flatnonzero(used | np.isnan(labels)), decode)

    def __len__(self) -> int:
        return len(self.rows)

    def tasks(self) -> list[np.ndarray]:
        """Parts of the work, for `inspect`."""
        return [self.rows[i : i + ROWS_PER_TASK] for i in range(0, len(self.rows), ROWS_PER_TASK)]

    def inspect(self, rows: np.ndarray) -> list[InspectedPair]:
        return [self._inspect_row(int(row)) for row in rows]

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""
        return self.pairs[key[1]]

    def where(self, key: tuple[int, int]) -> str:
        image = self._images[key[1]][self.pairs.columns[0]]
        file = f" ({printable(Path(image['path']).name)})" if isinstance(image, dict) and image["path"] else ""
        return f"row {key[1]}{file}"

    def _inspect_row(self, row: int) -> InspectedPair:
        label, problems = self.labels[row], []
        if label == 0.5:
            return InspectedPair((0, row), 0.5)
        if np.isnan(label):
            try:
                _read_label(self.dataset.data.column("label_0")[row], f"row {row}")
            except ValueError as error:
                problems.append(("bad label", str(error)))
        prompt = self._caption(row, problems)
        facts = [self._image(row, column, problems) for column in self.pairs.columns[:2]]
        if problems:
            return InspectedPair((0, row), None if np.isnan(label) else label, prompt, problems=tuple(problems))
        return InspectedPair((0, row), label, prompt, *(facts if label == 1 else facts[::-1]))

    def _caption(self, row: int, problems: list) -> str | None:
        column = self.pairs.columns[2]
        try:
            value = self.dataset.data.column(column)[row].as_py()
        except ValueError as error:
            problems.append(("bad caption", f"row {row}: {column} can't be read: {error}. Replace this row."))
            return None
        if not isinstance(value, str):
            problems.append(("bad caption", f"row {row}: {column} is {printable(repr(value))}, not text."))
            return None
        return value

    def _image(self, row: int, column: str, problems: list) -> ImageFacts | None:
        where, image = f"row {row}, {column}", self._images[row][column]
        file = f" The file is {printable(image['path'])}." if isinstance(image, dict) and image["path"] else ""
        try:
            encoded = encoded_bytes(image, where, self.pairs.has_files)
        except ValueError as error:
            problems.append(("missing image", f"{error}{file}"))
            return None
        try:
            return image_facts(encoded, where, self.decode)
        except ValueError as error:
            problems.append(("undecodable image", f"{error}{file}"))
            return None

    @cached_property
    def _images(self) -> Dataset:
        """The columns of images alone: what is wrong with a caption must not keep them from being read."""
        return self.pairs.dataset.select_columns(list(self.pairs.columns[:2]))


def _read_label(scalar, where: str) -> float:
    """A row's label.

    Raises:
        ValueError: it is bad.
    """
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: label_0 can't be read: {error}. Replace this row.") from error
    return parse_label(value, where)


def _label_or_nan(scalar) -> float:
    try:
        return _read_label(scalar, "")
    except ValueError:
        return np.nan


@dataclass(frozen=True)
class ShardSource:
    """The samples of shards.

    Attributes:
        shards: all of them.
    """

    shards: Shards

    def __len__(self) -> int:
        return int(self.shards.counts.sum())

    def tasks(self) -> range:
        """Parts of the work, for `inspect`: the shards."""
        return range(len(self.shards.urls))

    def inspect(self, shard: int) -> list[InspectedPair]:
        count, found = int(self.shards.counts[shard]), []
        try:
            for ordinal, members in read_samples(self.shards.urls[shard], 0, count, count):
                found.append(self._inspect_sample((shard, ordinal), members))
        except (ValueError, OSError) as error:
            return [*found, InspectedPair((shard, len(found)), problems=((STOPS, str(error)),))]
        for ordinal in range(len(found), count):
            message = f"{self.shards.where(shard, ordinal, None)}: the shard ends or breaks off before it"
            found.append(InspectedPair((shard, ordinal), problems=(("unreadable", message),)))
        return found

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""
        shard, ordinal = key
        return to_pair(next(members for _, members in read_samples(self.shards.urls[shard], ordinal, ordinal + 1)))

    def where(self, key: tuple[int, int]) -> str:
        return self.shards.where(*key, None)

    def index(self, key: tuple[int, int]) -> int:
        """Place in the listing of all shards."""
        return int(self.shards.counts[: key[0]].sum()) + key[1]

    def worst_shard(self, bad: list[tuple[int, int]]) -> tuple[str, float]:
        """The shard with the largest share of bad samples, and that share."""
        number = np.bincount([shard for shard, _ in bad], minlength=len(self.shards.urls))
        shares = number / np.maximum(1, self.shards.counts)
        return without_secrets(self.shards.urls[shares.argmax()]), float(shares.max())

    def _inspect_sample(self, key: tuple[int, int], members: dict) -> InspectedPair:
        where = self.shards.where(*key, members)
        try:
            pair = to_pair(members)
        except BadPair as bad:
            return InspectedPair(key, problems=((bad.kind, f"{where}: {bad}"),))
        if pair is None:
            return InspectedPair(key, 0.5)
        facts, problems = [], []
        for name, encoded in (("winner", pair.winner), ("loser", pair.loser)):
            try:
                facts.append(image_facts(encoded, f"{where}, {name}"))
            except ValueError as error:
                problems.append(("undecodable image", str(error)))
        label = parse_label(members["label_0.txt"].decode(), where)
        if problems:
            return InspectedPair(key, label, pair.prompt, problems=tuple(problems))
        return InspectedPair(key, label, pair.prompt, *facts)
