"""Which pairs make up each batch: decided by seed, epoch and the pairs' buckets, for any number of processes.

The sequence. Each epoch is a permutation of the pairs, and epochs are laid end to end. The pairs of one bucket, in that
sequence, are cut into batches. A batch comes when its last pair does, and at the latest when the epoch of its first pair
ends; what it then lacks, it takes from the next epoch's pairs of its bucket, which won't come again there. So no batch is short
or mixed, no pair is dropped or repeated, and no epoch leaves pairs behind. With one bucket, this is the sequence itself.

Processes take the batches in turn. How many pairs of each bucket were given is all that a resumed run needs to know, however
many processes it has, and whatever its batch size.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from ..runtime.shapes import Shape, name_of


Key = tuple[int, int]  # epoch, and place in its sequence


class BatchOrder:
    """Endless batches of places in the sequence, each from one bucket.

    Args:
        buckets_of: epoch -> number of the bucket at each place of its sequence (num_pairs,).
        num_buckets: how many there are; some may be empty.
        batch_size: pairs in a batch.
        given: pairs of each bucket that were given before; None for the start.
    """

    def __init__(
        self,
        buckets_of: Callable[[int], np.ndarray],
        num_buckets: int,
        batch_size: int,
        given: list[int] | None = None,
    ) -> None:
        self.batch_size, self.num_buckets = batch_size, num_buckets
        self.given = list(given or [0] * num_buckets)
        self._buckets_of, self._places = buckets_of, lru_cache(maxsize=3)(self._find_places)
        self._sizes = [len(places) for places in self._places(0)]
        self._due = [self._when(bucket) for bucket in range(num_buckets)]

    def __iter__(self) -> Iterator[tuple[int, list[Key]]]:
        """Gives a bucket's number and the batch's keys, for ever."""
        while True:
            bucket = min(range(self.num_buckets), key=self._due.__getitem__)
            keys = [self._key(bucket, self.given[bucket] + i) for i in range(self.batch_size)]
            self.given[bucket] += self.batch_size
            self._due[bucket] = self._when(bucket)
            yield bucket, keys

    def skip(self, batches: int) -> None:
        """Takes batches as given."""
        for _ in islice(self, batches):
            pass

    def pairs_of(self, epochs: int) -> int:
        """Pairs given once all pairs of the first so many epochs are, those given before included."""
        if self.num_buckets == 1:  # what fills the last batch belongs to the next epoch
            return epochs * self._sizes[0]
        lacking = [max(0, epochs * size - given) for size, given in zip(self._sizes, self.given)]
        return sum(self.given) + sum(-(-pairs // self.batch_size) * self.batch_size for pairs in lacking)

    def _find_places(self, epoch: int) -> list[np.ndarray]:
        """Each bucket's places in an epoch, rising."""
        buckets = self._buckets_of(epoch)
        return [np.flatnonzero(buckets == bucket) for bucket in range(self.num_buckets)]

    def _key(self, bucket: int, number: int) -> Key:
        """Where the bucket's pair of this number is."""
        epoch, place = divmod(number, self._sizes[bucket])
        return epoch, int(self._places(epoch)[bucket][place])

    def _when(self, bucket: int) -> float:
        """After how many pairs of the sequence the bucket's next batch comes."""
        if self._sizes[bucket] == 0:
            return float("inf")
        first, last = self.given[bucket], self.given[bucket] + self.batch_size - 1
        epoch, num_pairs = first // self._sizes[bucket], sum(self._sizes)
        if last // self._sizes[bucket] > epoch:
            return (epoch + 1) * num_pairs - 0.5  # before any batch of the next epoch
        return epoch * num_pairs + self._key(bucket, last)[1]


def in_one_bucket(num_pairs: int, batch_size: int, given: int = 0) -> BatchOrder:
    """The order where all pairs have one shape."""
    buckets = np.zeros(num_pairs, dtype=int)
    return BatchOrder(lambda epoch: buckets, 1, batch_size, [given])


def permutation(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    """The pairs in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def position_of(given: list[int], shapes: tuple[Shape, ...]) -> dict:
    """Where a run is: pairs that all processes together have been given, and of which buckets, where there are several."""
    buckets = {name_of(shape): number for shape, number in zip(shapes, given)}
    return {"pairs_seen": sum(given)} | ({"buckets": buckets} if len(shapes) > 1 else {})


def given_of(position: dict | None, shapes: tuple[Shape, ...]) -> list[int] | None:
    """Pairs of each bucket that were given; None at the start.

    Raises:
        ValueError: the position is that of a run without buckets.
    """
    if position is None:
        return None
    if len(shapes) == 1:
        return [position["pairs_seen"]]
    if "buckets" not in position:
        raise ValueError("Cannot resume in aspect-ratio buckets: the checkpoint is of a run without them.")
    return [position["buckets"][name_of(shape)] for shape in shapes]
