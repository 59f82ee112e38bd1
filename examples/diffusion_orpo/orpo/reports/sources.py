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
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..pairs.pair import PreferencePair
from ..pairs.table import PairTable
from ..runtime.redaction import without_secrets
from ..store.index import Shards
from ..store.reader import read_samples
from ..store.sample import read_label, to_pair
from .inspection import InspectedPair, image_facts


ROWS_PER_TASK = 64
STOPS = "shard that stops the run"


@dataclass(frozen=True)
class RowSource:
    """The pairs of a dataset.

    Attributes:
        table: all of them.
        max_pairs: pairs that training uses, the first ones. None: all.
        decode: whether images are decoded; they need not be if they are known to be good.
    """

    table: PairTable
    max_pairs: int | None
    decode: bool

    @cached_property
    def rows(self) -> np.ndarray:
        """Numbers of the pairs to look at: all, or those up to the last one that training uses, and bad labels after it."""
        labels = self.table.labels
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
        return [self._inspect(int(row)) for row in rows]

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""
        number = key[1]
        images = [self.table.image(number, side) for side in self._sides(number)]
        agreement = self.table.agreement[number]
        return PreferencePair(*images, self.table.prompt(number), None if np.isnan(agreement) else float(agreement))

    def pairs(self, keys: list[tuple[int, int]]) -> Iterator[PreferencePair]:
        """Several good pairs."""
        return map(self.pair, keys)

    def where(self, key: tuple[int, int]) -> str:
        """Names the pair by its row and the file of its first image."""
        file = self.table.place_of_image(key[1], 0).rpartition(" (")
        return self.table.where(key[1]) + (f" ({file[2]}" if file[0] else "")

    def _sides(self, number: int) -> tuple[int, int]:
        return (1, 0) if self.table.labels[number] == 0 else (0, 1)

    def _inspect(self, number: int) -> InspectedPair:
        label = float(self.table.labels[number])
        if label in (TIE, LOW_AGREEMENT):
            return InspectedPair((0, number), label)
        problems, facts, prompt = [], [], None
        if bad := self.table.problems.get(number):
            label, problems = None, [bad.within(f"{self.table.where(number)}")]
        try:
            prompt = self.table.prompt(number)
        except BadPair as bad_prompt:
            problems.append(bad_prompt)
        for side in self._sides(number):
            try:
                encoded = self.table.image(number, side)
                facts.append(image_facts(encoded, self.table.place_of_image(number, side), self.decode))
            except BadPair as bad_image:
                problems.append(bad_image)
        if problems:
            return InspectedPair((0, number), label, prompt, problems=tuple(problems))
        return InspectedPair((0, number), label, prompt, *facts)


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
