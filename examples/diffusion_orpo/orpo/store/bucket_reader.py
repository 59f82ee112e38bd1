"""Reads one process's batches where pairs are in aspect-ratio buckets, undecoded.

The sequence of an epoch is that of `order.py`, whatever the buckets. `data/order.py` makes batches of one shape of it, by
numbers alone, which processes take in turn. So the pairs of a process come from all lanes: each process opens every shard and
reads what it needs, in sequence. In a file, what others need is skipped; a URL or a command is read whole by every process.

A pair that has been read waits until its batch is complete: of each bucket less than a batch. The few pairs that a batch at an
epoch's end takes from the next one are read each by itself.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import numpy as np

from ..pairs.order import BatchOrder, Key
from .listing import Shards
from .order import EpochOrder, Run
from .reader import Arrival, read_run, read_slots


class BucketReader:
    """The batches of a process.

    Args:
        shards: all of them.
        pairs: of each shard, the places of the pairs to train on.
        buckets: of each shard, the numbers of its samples' shapes.
        seed, buffer_size: decide the sequence.
    """

    def __init__(
        self, shards: Shards, pairs: list[np.ndarray], buckets: list[np.ndarray], seed: int, buffer_size: int
    ) -> None:
        self.shards, self.buckets = shards, np.concatenate(buckets)
        self.starts = np.cumsum([0, *map(len, buckets)])
        self.sequence = lru_cache(maxsize=3)(lambda epoch: EpochOrder(pairs, seed, epoch, buffer_size))
        self.places = lru_cache(maxsize=3)(lambda epoch: self.sequence(epoch).places())

    def buckets_of(self, epoch: int) -> np.ndarray:
        """The bucket in each slot of an epoch."""
        shards, ordinals = self.places(epoch).T
        return self.buckets[self.starts[shards] + ordinals]

    def batches(self, order: BatchOrder, rank: int, world_size: int) -> Iterator[list[Arrival]]:
        """Endless batches of a process.

        Args:
            order: of the batches of all processes.
            rank, world_size: this process, and how many there are.
        """
        numbered = ((number, bucket, keys) for number, (bucket, keys) in enumerate(order))
        for epoch, batches in groupby(numbered, key=lambda batch: batch[2][0][0]):
            own = [(bucket, keys) for number, bucket, keys in batches if number % world_size == rank]
            yield from self._read_epoch(epoch, own)

    def _read_epoch(self, epoch: int, batches: list[tuple[int, list[Key]]]) -> Iterator[list[Arrival]]:
        """The batches that begin in an epoch."""
        slots = np.array(sorted(slot for _, keys in batches for at, slot in keys if at == epoch), dtype=int)
        arriving = zip(slots.tolist(), read_slots(self.shards, self.sequence(epoch), slots))
        waiting: dict[int, Arrival] = {}
        for bucket, keys in batches:
            while not all(slot in waiting for key_epoch, slot in keys if key_epoch == epoch):
                slot, arrival = next(arriving)
                waiting[slot] = arrival
            found = [waiting.pop(key[1]) if key[0] == epoch else self._read_one(key) for key in keys]
            yield [replace(arrival, bucket=bucket) for arrival in found]

    def _read_one(self, key: Key) -> Arrival:
        epoch, slot = key
        shard, ordinal = self.places(epoch)[slot].tolist()
        return next(read_run(self.shards, epoch, Run(shard, np.array([ordinal]))))
