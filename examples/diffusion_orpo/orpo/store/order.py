"""Which pairs make up each global batch of an epoch, and who reads them: decided by numbers alone, before anything is opened.

The sequence of an epoch. Its shards are shuffled and laid end to end, and the pairs in them cut into L lanes of the same
length, to the pair. Each lane is read in sequence and shuffled in a buffer of its own. The epoch takes a pair from every
lane in turn. So slot t of an epoch is pair t // L of the lane that comes t mod L-th, whichever process reads it: seed, epoch, the
listing and the size of the buffer decide the sequence, and neither processes nor workers nor batch size are known here.
`pairs/order.py` makes batches of it, each of one bucket.

Who reads what. A step takes a batch for each process. Their pairs are one process's or another's as is convenient: the gradient
is the mean over all of them. So the step's pairs of a bucket are sorted by lane and cut into batches anew, and the
batches given out by lane. With one bucket a process needs pairs from few lanes: where the number of processes divides L,
from L / processes of them, which no other process reads. The lanes come in an order (reversed bits) in which pairs that
follow one another come from lanes far apart, so that this holds for the smallest batches, too, and nearly holds where the
number of processes does not divide L: neighbours then share a lane. With several buckets a process meets more lanes.

How many lanes. A process that reads URLs or commands holds the shards of its lanes open at the same time: a process alone
those of all L. More lanes would let more processes read without sharing, and make one process start more commands, whose
connections wait longer for their turn. L is a power of two, at most `MAX_LANES`, and at most the number of shards: beyond
it, lanes would share shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from ..pairs.order import BatchOrder, Key


MAX_LANES = 16

Batch = tuple[int, list[Key]]  # the number of its bucket; epoch and slot of each pair


def count_lanes(num_shards: int) -> int:
    """The largest power of two up to `MAX_LANES` and the number of shards that hold pairs."""
    return min(MAX_LANES, 1 << (max(1, num_shards).bit_length() - 1))


def lane_order(lanes: int) -> np.ndarray:
    """The order in which an epoch takes pairs from the lanes: their numbers with reversed bits."""
    order = np.zeros(1, dtype=int)
    while len(order) < lanes:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


@dataclass(frozen=True)
class EpochOrder:
    """The sequence of one epoch.

    Attributes:
        pairs: of each shard, the places of the pairs to train on.
        seed, epoch: decide the order, with `buffer_size`.
        buffer_size: pairs that all lanes together shuffle among.
    """

    pairs: list[np.ndarray]
    seed: int
    epoch: int
    buffer_size: int

    @cached_property
    def lanes(self) -> int:
        return count_lanes(sum(len(of_shard) > 0 for of_shard in self.pairs))

    @cached_property
    def places(self) -> np.ndarray:
        """Shard and place in it of all pairs (N, 2), laid end to end: each lane is a run of them, in which it is read."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.pairs))
        shards = np.repeat(order, [len(self.pairs[shard]) for shard in order])
        return np.stack([shards, np.concatenate([self.pairs[shard] for shard in order])], axis=1)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where the lanes begin and end among `places` (lanes + 1). The first ones in turn may have one more."""
        num_pairs, lengths = sum(map(len, self.pairs)), np.zeros(self.lanes, dtype=int)
        lengths[lane_order(self.lanes)] = (num_pairs + self.lanes - 1 - np.arange(self.lanes)) // self.lanes
        return np.concatenate([[0], np.cumsum(lengths)])

    @cached_property
    def slots(self) -> np.ndarray:
        """Which of the `places` is in each slot of the epoch (N,)."""
        slots = np.zeros(self.bounds[-1], dtype=int)
        for turn, lane in enumerate(lane_order(self.lanes)):
            begin, end = self.bounds[lane : lane + 2]
            rng = np.random.default_rng((self.seed, self.epoch, lane, self.lanes))
            slots[turn :: self.lanes] = begin + shuffled_order(
                end - begin, max(1, self.buffer_size // self.lanes), rng
            )
        return slots

    def lane_of(self, slot: int) -> int:
        return int(lane_order(self.lanes)[slot % self.lanes])


def shuffled_order(length: int, buffer_size: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a buffer of `buffer_size`, filled in sequence and emptied at random, gives `length` samples."""
    buffer = list(range(min(buffer_size, length)))
    order = []
    for arriving, place in zip(range(len(buffer), length), rng.integers(buffer_size, size=length)):
        order.append(buffer[place])
        buffer[place] = arriving
    return np.array(order + rng.permutation(buffer).tolist(), dtype=int)


def batches_of(order: BatchOrder, rank: int, world_size: int, lanes: int) -> Iterator[Batch]:
    """Endless batches of one process.

    Args:
        order: of the batches of all processes.
        rank, world_size: this process, and how many there are.
        lanes: of an epoch.
    """
    batches, size, in_turn = iter(order), order.batch_size, lane_order(lanes).tolist()
    while True:
        by_bucket: dict[int, list[Key]] = {}
        for bucket, keys in islice(batches, world_size):
            by_bucket.setdefault(bucket, []).extend(keys)
        step = []
        for bucket, keys in by_bucket.items():
            keys.sort(key=lambda key: (key[0], in_turn[key[1] % lanes]))
            step += [(bucket, keys[i : i + size]) for i in range(0, len(keys), size)]
        step.sort(key=lambda batch: sum(in_turn[slot % lanes] for _, slot in batch[1]))
        yield step[rank]
