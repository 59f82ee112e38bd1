"""Which pairs make up each global batch of an epoch, and who reads them: decided by numbers alone, before anything is opened.

The sequence of an epoch. Its shards are shuffled and laid end to end, and the pairs in them cut into L lanes of the same
length, to the pair. Each lane is read in sequence and shuffled in a buffer of its own. The epoch takes a pair from every
lane in turn. So slot t of an epoch is pair t // L of the lane that comes t mod L-th, whoever reads it: seed, epoch, the
listing and the size of the buffer decide the sequence, and neither processes nor workers nor batch size are known here.
Epochs are laid end to end, and the run takes its global batches from them in sequence: how many pairs were seen is all that a
resumed run needs to know.

Who reads what. One process's part of a global batch is its own choice: the gradient is the mean over all pairs. Each
global batch is sorted by lane and cut into equal parts, one a process, so that a process needs pairs from few lanes: where
the number of processes divides L, from L / processes of them, which no other process reads. The lanes come in an order
(reversed bits) in which pairs that follow one another come from lanes far apart, so that this holds for the
smallest batches, too, and nearly holds where the number of processes does not divide L: neighbours then share a lane.

How many lanes. A process holds the shards of its lanes open at the same time: a process alone those of all L. More lanes would
let more processes read without sharing, and make one process open more files or start more commands, whose connections
wait longer for their turn. L is a power of two, at most `MAX_LANES`, and at most the number of shards: beyond it, lanes would
share shards.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


MAX_LANES = 16
ORDER_VERSION = 1  # changes whenever the same pairs would come in another order


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
class Run:
    """Pairs of a lane that stand in one shard: their places in it, rising."""

    shard: int
    ordinals: np.ndarray


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
    def _bounds(self) -> np.ndarray:
        """Where the lanes begin and end in the sequence of all pairs (lanes + 1). The first ones in turn may have one more."""
        num_pairs, lengths = sum(map(len, self.pairs)), np.zeros(self.lanes, dtype=int)
        lengths[lane_order(self.lanes)] = (num_pairs + self.lanes - 1 - np.arange(self.lanes)) // self.lanes
        return np.concatenate([[0], np.cumsum(lengths)])

    @cached_property
    def _shards(self) -> tuple[np.ndarray, np.ndarray]:
        """The shards in order, and where each ends in the sequence of all pairs."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.pairs))
        return order, np.cumsum([len(self.pairs[shard]) for shard in order])

    def runs(self, lane: int) -> list[Run]:
        """The runs that a lane reads, in sequence."""
        (begin, end), (order, ends) = self._bounds[lane : lane + 2], self._shards
        found = []
        for place in range(np.searchsorted(ends, begin, side="right"), len(order)):
            start = ends[place] - len(self.pairs[order[place]])
            if start >= end:
                break
            ordinals = self.pairs[order[place]][max(0, begin - start) : end - start]
            if len(ordinals):
                found.append(Run(int(order[place]), ordinals))
        return found

    def places(self) -> np.ndarray:
        """Shard and place in it of the pair in each slot (slots, 2)."""
        places = np.zeros((sum(map(len, self.pairs)), 2), dtype=int)
        for turn, lane in enumerate(lane_order(self.lanes)):
            runs = [np.stack([np.full(len(run.ordinals), run.shard), run.ordinals], axis=1) for run in self.runs(lane)]
            if runs:
                places[turn :: self.lanes] = np.concatenate(runs)[self.turns(lane)]
        return places

    def turns(self, lane: int) -> np.ndarray:
        """Which of its pairs a lane gives in each turn, counted as they are read."""
        length = int(self._bounds[lane + 1] - self._bounds[lane])
        rng = np.random.default_rng((self.seed, self.epoch, lane, self.lanes))
        return shuffled_order(length, max(1, self.buffer_size // self.lanes), rng)


def shuffled_order(length: int, buffer_size: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a buffer of `buffer_size`, filled in sequence and emptied at random, gives `length` samples."""
    buffer = list(range(min(buffer_size, length)))
    order = []
    for arriving, place in zip(range(len(buffer), length), rng.integers(buffer_size, size=length)):
        order.append(buffer[place])
        buffer[place] = arriving
    return np.array(order + rng.permutation(buffer).tolist(), dtype=int)


@dataclass(frozen=True)
class Share:
    """Which slots of the epochs one process reads.

    Attributes:
        num_pairs: in an epoch.
        lanes: of an epoch.
        batch_size: pairs in a batch of one process.
        rank, world_size: this process, and how many there are.
        start: pairs that the run has seen, of all epochs together.
    """

    num_pairs: int
    lanes: int
    batch_size: int
    rank: int
    world_size: int
    start: int

    def slots(self, epoch: int) -> np.ndarray:
        """This process's slots of an epoch, in the order in which it trains on them."""
        per_batch = self.batch_size * self.world_size
        first, last = self.num_pairs * epoch, self.num_pairs * (epoch + 1)  # of all epochs' pairs laid end to end
        first_batch, last_batch = max(0, first - self.start) // per_batch, -(-(last - self.start) // per_batch)
        pairs = self.start + per_batch * np.arange(first_batch, last_batch)[:, None] + np.arange(per_batch)
        epochs, slots = np.divmod(pairs, self.num_pairs)
        lanes = lane_order(self.lanes)[slots % self.lanes]
        by_lane = np.argsort((epochs - epochs[0, 0]) * self.lanes + lanes, axis=1, kind="stable")
        own = by_lane[:, self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        own_slots, own_epochs = (np.take_along_axis(values, own, axis=1).ravel() for values in (slots, epochs))
        return own_slots[own_epochs == epoch]
