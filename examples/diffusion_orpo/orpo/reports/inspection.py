"""Looks at every pair of a dataset or of shards as training does, in several processes.

Training stops at the first bad pair of a dataset; here it is named, and the next one is looked at.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import numpy as np
from PIL import ExifTags

from ..pairs.bad_pair import BadPair
from ..pairs.image import decode_image, open_image
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..pairs.pair import PreferencePair
from ..pairs.table import PairTable
from ..runtime.redaction import without_secrets
from ..store.index import Shards
from ..store.reader import read_samples
from ..store.sample import read_label, to_pair


TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PAIRS_PER_TASK = 64
STOPS = "shard that stops the run"

Key = tuple[int, int]  # shard (0 in a dataset) and place in it


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image: its file's hash (64 bits), its size when upright, its format."""

    digest: int
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class InspectedPair:
    """Facts about a pair.

    Attributes:
        key: its place.
        label: 1 where the first image is preferred, 0 where the second is, 0.5 for a tie, None where it is bad;
            or LOW_AGREEMENT.
        prompt: None where it is bad, and of ties.
        chosen, rejected: None where a pair is bad, and of ties, which training doesn't decode.
        problems: everything that is wrong.
    """

    key: Key
    label: float | None = None
    prompt: str | None = None
    chosen: ImageFacts | None = None
    rejected: ImageFacts | None = None
    problems: tuple[BadPair, ...] = ()


def digest(content: bytes) -> int:
    """64 bits of a hash: the chance that two of 10 million files share it is 3 in a million."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def image_facts(encoded: bytes, where: str, decode: bool = True) -> ImageFacts:
    """Reads an image's header, and decodes it unless it's known to be good.

    Raises:
        BadPair: training would not take it.
    """
    image = open_image(encoded, where)
    if decode:
        width, height = decode_image(encoded, where).size
    else:
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        width, height = image.size[::-1] if turned else image.size
    return ImageFacts(digest(encoded), width, height, image.format)


@dataclass(frozen=True)
class TableSource:
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
    def numbers(self) -> np.ndarray:
        """The pairs to look at: all, or those up to the last one that training uses, and bad labels after it."""
        labels = self.table.labels
        is_pair = (labels != TIE) & (labels != LOW_AGREEMENT)
        used = np.cumsum(is_pair) <= (len(labels) if self.max_pairs is None else self.max_pairs)
        return np.flatnonzero(used | np.isnan(labels))

    @property
    def has_votes(self) -> bool:
        return self.table.columns.has_votes

    def __len__(self) -> int:
        return len(self.numbers)

    def tasks(self) -> list[np.ndarray]:
        return [self.numbers[i : i + PAIRS_PER_TASK] for i in range(0, len(self), PAIRS_PER_TASK)]

    def inspect(self, numbers: np.ndarray) -> list[InspectedPair]:
        return [self._inspect(int(number)) for number in numbers]

    def pairs(self, keys: list[Key]) -> Iterator[PreferencePair]:
        for _, number in keys:
            images = (self.table.image(number, side) for side in self._sides(number))
            agreement = float(self.table.agreement[number])
            yield PreferencePair(*images, self.table.prompt(number), None if np.isnan(agreement) else agreement)

    def where(self, key: Key) -> str:
        """Names a pair by its row and the file of its first image."""
        _, bracket, file = self.table.place_of_image(key[1], 0).rpartition(" (")
        return self.table.where(key[1]) + bracket + (file if bracket else "")

    def _sides(self, number: int) -> tuple[int, int]:
        return (1, 0) if self.table.labels[number] == 0 else (0, 1)

    def _inspect(self, number: int) -> InspectedPair:
        label = float(self.table.labels[number])
        if label in (TIE, LOW_AGREEMENT):
            return InspectedPair((0, number), label)
        problems, facts, prompt = [], [], None
        if bad := self.table.problems.get(number):
            problems.append(bad.within(self.table.where(number)))
        try:
            prompt = self.table.prompt(number)
        except BadPair as bad:
            problems.append(bad)
        for side in self._sides(number):
            try:
                encoded = self.table.image(number, side)
                facts.append(image_facts(encoded, self.table.place_of_image(number, side), self.decode))
            except BadPair as bad:
                problems.append(bad)
        if problems:
            return InspectedPair((0, number), None if np.isnan(label) else label, prompt, problems=tuple(problems))
        return InspectedPair((0, number), label, prompt, *facts)


@dataclass(frozen=True)
class ShardSource:
    """The samples of shards."""

    shards: Shards
    has_votes = False

    def __len__(self) -> int:
        return int(self.shards.counts.sum())

    def tasks(self) -> range:
        return range(len(self.shards.urls))

    def inspect(self, shard: int) -> list[InspectedPair]:
        count, found = int(self.shards.counts[shard]), []
        try:
            for ordinal, members in read_samples(self.shards.urls[shard], 0, count, count):
                found.append(self._inspect((shard, ordinal), members))
        except (ValueError, OSError) as error:
            return [*found, InspectedPair((shard, len(found)), problems=(BadPair(STOPS, str(error).rstrip(".")),))]
        for key in [(shard, ordinal) for ordinal in range(len(found), count)]:
            bad = BadPair("unreadable", "the shard ends or is cut off before it", self.where(key))
            found.append(InspectedPair(key, problems=(bad,)))
        return found

    def pairs(self, keys: list[Key]) -> Iterator[PreferencePair]:
        for shard, group in groupby(keys, key=itemgetter(0)):  # sorted, so each shard is read once
            wanted = {ordinal for _, ordinal in group}
            for ordinal, members in read_samples(self.shards.urls[shard], min(wanted), max(wanted) + 1):
                if ordinal in wanted:
                    yield to_pair(members)

    def where(self, key: Key) -> str:
        return self.shards.where(*key, None)

    def worst_shard(self, bad: list[Key]) -> tuple[str, float]:
        """The shard with the largest share of bad samples, and that share."""
        number = np.bincount([shard for shard, _ in bad], minlength=len(self.shards.urls))
        shares = number / np.maximum(1, self.shards.counts)
        return without_secrets(self.shards.urls[shares.argmax()]), float(shares.max())

    def _inspect(self, key: Key, members: dict) -> InspectedPair:
        where = self.shards.where(*key, members)
        try:
            pair = to_pair(members)
        except BadPair as bad:
            return InspectedPair(key, problems=(bad.within(where),))
        if pair is None:
            return InspectedPair(key, TIE)
        facts, problems = [], []
        for name, encoded in (("chosen", pair.winner), ("rejected", pair.loser)):
            try:
                facts.append(image_facts(encoded, f"{where}, {name}"))
            except BadPair as bad:
                problems.append(bad)
        label, _ = read_label(members, ())
        if problems:
            return InspectedPair(key, label, pair.prompt, problems=tuple(problems))
        return InspectedPair(key, label, pair.prompt, *facts)


# Both have: tasks(), parts of the work, and inspect(task), what is found there; pairs(keys), good pairs, whose keys are sorted;
# where(key), which names a pair in messages; and has_votes.
Source = TableSource | ShardSource


def inspect_all(source: Source, num_workers: int) -> Iterator[InspectedPair]:
    """All pairs in order.

    Args:
        source: what to look at.
        num_workers: processes. Up to 1: this one alone.
    """
    tasks = source.tasks()
    if min(num_workers, len(tasks)) <= 1:
        for task in tasks:
            yield from source.inspect(task)
        return
    with ProcessPoolExecutor(num_workers, initializer=_use_source, initargs=(source,)) as pool:
        try:
            for found in pool.map(_inspect_task, tasks):
                yield from found
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A process that decodes images was killed, perhaps for memory: lower --num_workers."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _use_source(source: Source) -> None:
    global _source
    _source = source


def _inspect_task(task) -> list[InspectedPair]:
    return _source.inspect(task)
