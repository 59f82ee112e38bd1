"""Reads one process's share of the pairs, in the order in which it trains on them, undecoded.

It runs in the main process: workers only decode, so their number changes nothing, and no process reads a byte twice.
Each lane is read once and in sequence, so shards may come from pipes; a shard is open from the first pair that
this process takes from it to the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import numpy as np

from .listing import Shards
from .order import EpochOrder, Run, Share, lane_order
from .shard import read_samples


@dataclass(frozen=True)
class Arrival:
    """A sample as it was read.

    Attributes:
        epoch: the one it is read for.
        shard, ordinal: its place.
        members: as `walk_samples` gives them; None where the shard ends before the sample.
        bucket: number of its shape.
    """

    epoch: int
    shard: int
    ordinal: int
    members: dict | None
    bucket: int = 0


def read_share(
    shards: Shards, pairs: list[np.ndarray], seed: int, buffer_size: int, share: Share
) -> Iterator[list[Arrival]]:
    """Endless batches of a process's pairs.

    Args:
        shards: all of them.
        pairs: the places of the pairs to train on, for each shard.
        seed, buffer_size: decide the order.
        share: of this process.
    """
    arrivals = (
        arrival
        for epoch in count(share.start // share.num_pairs)
        for order in [EpochOrder(pairs, seed, epoch, buffer_size)]
        for arrival in read_slots(shards, order, share.slots(epoch))
    )
    while True:
        yield list(islice(arrivals, share.batch_size))


def read_slots(shards: Shards, order: EpochOrder, slots: np.ndarray) -> Iterator[Arrival]:
    """The pairs in these slots of an epoch, which rise within each lane."""
    lanes = lane_order(order.lanes)[slots % order.lanes]
    readers = {lane: _read_lane(shards, order, lane, slots[lanes == lane] // order.lanes) for lane in np.unique(lanes)}
    for lane in lanes:
        yield next(readers[lane])


def _read_lane(shards: Shards, order: EpochOrder, lane: int, turns: np.ndarray) -> Iterator[Arrival]:
    """The pairs that a lane gives in these turns, which are in ascending order."""
    given = order.turns(lane)[turns]
    is_wanted = np.zeros(sum(len(run.ordinals) for run in order.runs(lane)), dtype=bool)
    is_wanted[given] = True
    buffer: dict[int, Arrival] = {}
    place, through = 0, 0
    for run in order.runs(lane):
        wanted = np.flatnonzero(is_wanted[place : place + len(run.ordinals)])
        for number, arrival in zip(wanted, read_run(shards, order.epoch, Run(run.shard, run.ordinals[wanted]))):
            buffer[place + number] = arrival
            while through < len(given) and given[through] in buffer:
                yield buffer.pop(given[through])
                through += 1
        place += len(run.ordinals)


def read_run(shards: Shards, epoch: int, run: Run) -> Iterator[Arrival]:
    """The samples of a run in sequence. A shard is not opened if none of its samples is wanted."""
    awaited = list(map(int, run.ordinals[::-1]))
    if not awaited:
        return
    first, last, in_shard = awaited[-1], awaited[0] + 1, int(shards.counts[run.shard])
    for ordinal, members in read_samples(shards.urls[run.shard], first, last, in_shard):
        if ordinal == awaited[-1]:
            yield Arrival(epoch, run.shard, awaited.pop(), members)
    while awaited:
        yield Arrival(epoch, run.shard, awaited.pop(), None)


class ReadAhead:
    """Lets a thread run an endless iterator ahead, so that training does not wait for the next shard to open.

    The thread starts with the first item. By then a data loader has forked its workers: none is forked beside it.

    Args:
        iterator: what to run.
        items: how far ahead.
    """

    def __init__(self, iterator: Iterator, items: int) -> None:
        self.iterator, self.items = iterator, items

    def __iter__(self) -> Iterator:
        queue, room, stopping = SimpleQueue(), Semaphore(self.items), Event()
        Thread(target=self._run, args=(queue, room, stopping), daemon=True, name="shard reader").start()
        try:
            while True:
                item, error = queue.get()
                if error is not None:
                    raise error
                room.release()
                yield item
        finally:
            stopping.set()
            room.release()

    def _run(self, queue: SimpleQueue, room: Semaphore, stopping: Event) -> None:
        try:
            while room.acquire() and not stopping.is_set():
                queue.put((next(self.iterator), None))
        except Exception as error:
            queue.put((None, error))
        self.iterator.close()
