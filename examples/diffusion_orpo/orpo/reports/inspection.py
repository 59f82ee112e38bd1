"""Inspection of preference pairs before training, in several processes."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

from PIL import ExifTags

from ..pairs.bad_pair import BadPair
from ..pairs.image import decode_image, open_image
from ..pairs.pair import PreferencePair


TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image: its file's hash (64 bits), its size when upright, its format."""

    digest: int
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class InspectedPair:
    """Facts about a row or sample.

    Attributes:
        key: shard (0 in a data set) and place in it.
        label: 1 where the first image is preferred, 0 where the second is, 0.5 for a tie, None where it is bad;
            or LOW_AGREEMENT.
        prompt: None where it is bad, and of ties.
        winner, loser: None where they are bad, and of ties, which training doesn't decode.
        problems: everything that is wrong.
    """

    key: tuple[int, int]
    label: float | None = None
    prompt: str | None = None
    winner: ImageFacts | None = None
    loser: ImageFacts | None = None
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


class PairSource(Protocol):
    """Rows or samples, in parts that several processes can look at."""

    def __len__(self) -> int: ...

    def tasks(self) -> Sequence:
        """Parts of the work, for `inspect`."""

    def inspect(self, task) -> list[InspectedPair]:
        """Looks at a part."""

    def pair(self, key: tuple[int, int]) -> PreferencePair:
        """A good pair, winner first."""

    def pairs(self, keys: list[tuple[int, int]]) -> Iterator[PreferencePair]:
        """Several good pairs, in the order of their keys."""

    def where(self, key: tuple[int, int]) -> str:
        """Names a pair in messages."""


def inspect_all(source: PairSource, num_workers: int) -> Iterator[InspectedPair]:
    """All rows or samples in order. Several processes inspect parts of them, and keep a few facts about each.

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
            raise RuntimeError(
                "A process that decodes images was killed, perhaps for memory: lower --num_workers."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _use_source(source: PairSource) -> None:
    global _source
    _source = source


def _inspect_task(task) -> list[InspectedPair]:
    return _source.inspect(task)
