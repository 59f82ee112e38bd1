"""Inspects every pair of a data set or of shards as training does.

Training stops at the first bad row; here it is named, and the next one is inspected.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import numpy as np

from ..pairs.bad_pair import BadPair
from ..pairs.image_files import place_of_image
from ..pairs.pair import PreferencePair
from ..pairs.table import Table
from ..pairs.verdicts import LOW_AGREEMENT, TIE
from ..runtime.redaction import without_secrets
from ..store.listing import Shards
from ..store.sample import read_label, to_pair
from ..store.shard import read_samples
from .inspection import InspectedPair, image_facts


ROWS_PER_TASK = 64
STOPS = "shard that stops the run"


@dataclass(frozen=True)
class RowSource:
    """The rows of a data set.

    Attributes:
        table: all rows.
        max_pairs: pairs that training uses, the first ones. None: all.
        decode: whether images are decoded; they need not be if they are known to be good.
    """

    table: Table
    max_pairs: int | None
    decode: bool

    @cached_property
    def rows(self) -> np.ndarray:
        """Numbers of the rows to look at: all, or those up to the last pair that training uses, and bad labels after it."""
        labels = np.array([np.nan if isinstance(label, BadPair) else label for label in self.table.labels()])
        is_pair = (labels != TIE) & (labels != LOW_AGREEMENT)
        used = np.cumsum(is_pair) <= (len(labels) if self.max_pairs is None else self.max_pairs)
        return np.flatnonzero(used | np.isnan(labels))

    @property
    def has_votes(self) -> bool:
        return self.table.columns.has_votes

    def __len__(self) -> int:
        return len(self.rows)

    def tasks(self) -> list[np.ndarray]:
        """Parts of the work, for `inspect`."""
        return [self.rows[i : i + ROWS_PER_TASK] for i in range(0, len(self.rows), ROWS_PER_TASK)]

    def inspect(self, rows: np.ndarray) -> list[InspectedPair]:
        return [self._inspect_row(int(row)) for row in rows]

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""
        row = self._read(key[1])
        return PreferencePair(*(row.images if row.label == 1 else row.images[::-1]), row.prompt, row.agreement)

    def pairs(self, keys: list[tuple[int, int]]) -> Iterator[PreferencePair]:
        """Several good pairs."""
        return map(self.pair, keys)

    def where(self, key: tuple[int, int]) -> str:
        column = self.table.columns.images[0]
        image = self.table.cells(key[1], (column,))[column].as_py()
        return f"{self.table.where(key[1])}{place_of_image(image, column, '').removeprefix(column)}"

    def _read(self, row: int):
        columns = self.table.columns
        return columns.read(self.table.cells(row, columns.used), self.table.where(row), self.table.files)

    def _inspect_row(self, row: int) -> InspectedPair:
        found = self._read(row)
        if found.label in (TIE, LOW_AGREEMENT):
            return InspectedPair((0, row), found.label)
        facts, problems = [], list(found.problems)
        for column, encoded in zip(self.table.columns.images, found.images):
            if encoded is None:
                continue
            image = self.table.cells(row, (column,))[column].as_py()
            try:
                facts.append(image_facts(encoded, place_of_image(image, column, self.table.where(row)), self.decode))
            except BadPair as bad:
                problems.append(bad)
        if problems:
            return InspectedPair((0, row), found.label, found.prompt, problems=tuple(problems))
        return InspectedPair((0, row), found.label, found.prompt, *(facts if found.label == 1 else facts[::-1]))


@dataclass(frozen=True)
class ShardSource:
    """The samples of shards.

    Attributes:
        shards: all of them.
    """

    shards: Shards
    has_votes = False

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
            return [*found, InspectedPair((shard, len(found)), problems=(BadPair(STOPS, str(error).rstrip(".")),))]
        for ordinal in range(len(found), count):
            bad = BadPair(
                "unreadable", "the shard ends or is cut off before it", self.shards.where(shard, ordinal, None)
            )
            found.append(InspectedPair((shard, ordinal), problems=(bad,)))
        return found

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""
        shard, ordinal = key
        return to_pair(next(members for _, members in read_samples(self.shards.urls[shard], ordinal, ordinal + 1)))

    def pairs(self, keys: list[tuple[int, int]]) -> Iterator[PreferencePair]:
        """Several good pairs, which are sorted: each shard is read once."""
        for shard, group in groupby(keys, key=itemgetter(0)):
            wanted = {ordinal for _, ordinal in group}
            for ordinal, members in read_samples(self.shards.urls[shard], min(wanted), max(wanted) + 1):
                if ordinal in wanted:
                    yield to_pair(members)

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
            return InspectedPair(key, problems=(bad.within(where),))
        if pair is None:
            return InspectedPair(key, TIE)
        facts, problems = [], []
        for name, encoded in (("winner", pair.winner), ("loser", pair.loser)):
            try:
                facts.append(image_facts(encoded, f"{where}, {name}"))
            except BadPair as bad:
                problems.append(bad)
        label, _ = read_label(members, ())
        if problems:
            return InspectedPair(key, label, pair.prompt, problems=tuple(problems))
        return InspectedPair(key, label, pair.prompt, *facts)
