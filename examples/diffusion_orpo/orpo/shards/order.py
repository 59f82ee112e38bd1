"""Who reads which samples of an epoch, and in which order: decided by numbers alone, before anything is opened."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """Samples `first` to `last` - 1 of a shard."""

    shard: int
    first: int
    last: int


def part_of_epoch(counts: np.ndarray, skip: np.ndarray, seed: int, epoch: int, part: int, num_parts: int) -> list[Run]:
    """What one of `num_parts` readers reads in an epoch: all together read each sample once.

    Args:
        counts: samples in each shard.
        skip: samples at the beginning of each shard that are not for training.
        seed, epoch: decide the order of the shards.
        part, num_parts: this reader, and how many there are.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(counts))
    ends = np.cumsum((counts - skip)[order])
    begin, end = part * ends[-1] // num_parts, (part + 1) * ends[-1] // num_parts
    runs = []
    for shard, stop in zip(order, ends):
        start = stop - (counts - skip)[shard]
        first, last = max(begin, start), min(end, stop)
        if first < last:
            offset = skip[shard] - start
            runs.append(Run(int(shard), int(first + offset), int(last + offset)))
    return runs


def shuffled_order(length: int, buffer_size: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a buffer of `buffer_size`, filled in sequence and emptied at random, gives `length` samples."""
    buffer = list(range(min(buffer_size, length)))
    order = []
    for arriving, place in zip(range(len(buffer), length), rng.integers(buffer_size, size=length)):
        order.append(buffer[place])
        buffer[place] = arriving
    return np.array(order + rng.permutation(buffer).tolist(), dtype=int)
