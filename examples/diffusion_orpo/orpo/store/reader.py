"""Reads the pairs of one process, in the order in which it trains on them, and decodes them.

Shards on this machine are read at random, by the workers that decode. Of URLs and commands, whose bytes come in sequence, the
main process reads each lane from its beginning to its end, and hands the samples to the workers. So no process reads a byte
twice, and the number of workers changes nothing. A shard is open from the first pair that the process takes from it to the
last.

Whether a sample is good is known only now, when the pair has its place in a batch, on one process. The other processes
don't know, and the batch must not be short. So another pair takes the place of a bad one: one among the first of any shard,
chosen by seed, epoch and the bad sample's number, so that it is the same however many processes and workers there are. It is
read afresh, which costs opening a shard.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import numpy as np
from torch.utils.data import Dataset

from ..pairs.bad_pair import BadPair
from ..pairs.order import BatchOrder
from ..pairs.pair import PairTransform, collate_pairs, sample_seed
from .index import Shards
from .locate import is_remote
from .order import EpochOrder, batches_of
from .sample import read_encoded, to_pair
from .tar import BrokenShard, goes_on, open_shard, read_at, walk_samples


logger = logging.getLogger(__name__)

FIRST = 16  # of a shard that may stand in: from a URL or a command, everything before a sample has to be read
TRIES = 100


@dataclass(frozen=True)
class Arrival:
    """A sample on its way.

    Attributes:
        epoch: the one that it is read for.
        shard, ordinal: its place.
        bucket: number of its shape.
        is_read: whether its members are; else a worker reads them.
        members: as `walk_samples` gives them; None where the shard ends before the sample.
    """

    epoch: int
    shard: int
    ordinal: int
    bucket: int
    is_read: bool = False
    members: dict | None = None


def read_samples(url: str, first: int, last: int, count: int | None = None) -> Iterator[tuple[int, dict]]:
    """Reads samples `first` to `last` - 1 of a shard, as far as it can be read.

    Args:
        url: of the shard.
        first, last: places in it.
        count: samples that it should hold, if that is known.

    Yields:
        The sample's place in the shard, and its members, as `walk_samples` gives them.

    Raises:
        OSError: the URL can't be read, or the command fails.
        ValueError: the shard is compressed, or goes on after `count` samples.
    """
    shards = Shards((url,), np.array([last + 1 if count is None else count]))
    places = np.stack([np.zeros(last - first, dtype=int), np.arange(first, last)], axis=1)
    for (_, ordinal), members in read_in_sequence(shards, places):
        if members is not None:
            yield ordinal, members


def read_in_sequence(shards: Shards, places: np.ndarray) -> Iterator[tuple[tuple[int, int], dict | None]]:
    """Samples of shards, each of which is read once, from the first sample that is wanted to the last.

    Args:
        shards: all of them.
        places: shard and place in it (N, 2); those of a shard follow one another and rise.

    Yields:
        Each place, and its members, as `walk_samples` gives them; None where the shard ends before it.

    Raises:
        OSError: a URL can't be read, or a command fails.
        ValueError: a shard is compressed, or holds more samples than it should.
    """
    for shard, group in groupby(places.tolist(), key=itemgetter(0)):
        awaited = deque(ordinal for _, ordinal in group)
        last, count = awaited[-1] + 1, shards.counts[shard]
        try:
            with open_shard(shards.urls[shard]) as tar:
                for ordinal, members in walk_samples(tar, awaited[0], last + 1 if last == count else last):
                    if ordinal == count:
                        raise goes_on(shards.urls[shard], int(count))
                    if awaited and ordinal == awaited[0]:
                        yield (shard, awaited.popleft()), members
        except BrokenShard as error:
            logger.warning(str(error))
        for ordinal in awaited:
            yield (shard, ordinal), None


def read(shards: Shards, arrival: Arrival) -> Arrival:
    """The sample with its members."""
    if arrival.is_read:
        return arrival
    url, count = shards.urls[arrival.shard], int(shards.counts[arrival.shard])
    if not is_remote(url):
        return replace(arrival, is_read=True, members=read_at(url, arrival.ordinal, count))
    _, members = next(read_in_sequence(shards, np.array([[arrival.shard, arrival.ordinal]])))
    return replace(arrival, is_read=True, members=members)


class PairReader:
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
        self.epoch = lru_cache(maxsize=3)(lambda epoch: EpochOrder(pairs, seed, epoch, buffer_size))
        self.is_local = not any(map(is_remote, shards.urls))

    def buckets_of(self, epoch: int) -> np.ndarray:
        """The bucket in each slot of an epoch."""
        order = self.epoch(epoch)
        shards, ordinals = order.places[order.slots].T
        return self.buckets[self.starts[shards] + ordinals]

    def batches(self, order: BatchOrder, rank: int, world_size: int) -> Iterator[list[Arrival]]:
        """Endless batches of a process.

        Args:
            order: of the batches of all processes.
            rank, world_size: this process, and how many there are.
        """
        batches = batches_of(order, rank, world_size, self.epoch(0).lanes)
        if self.is_local:
            yield from ([self._arrival(bucket, *key) for key in keys] for bucket, keys in batches)
        for epoch, of_epoch in groupby(batches, key=lambda batch: batch[1][0][0]):
            own, sequence = list(of_epoch), self.epoch(epoch)
            slots = [slot for _, keys in own for key_epoch, slot in keys if key_epoch == epoch]
            wanted = np.sort(sequence.slots[slots])
            lanes = np.searchsorted(sequence.bounds, wanted, side="right") - 1
            streams = [
                read_in_sequence(self.shards, sequence.places[wanted[lanes == lane]]) for lane in range(sequence.lanes)
            ]
            waiting: dict[tuple[int, int], dict | None] = {}  # in a lane's buffer
            for bucket, keys in own:
                batch = []
                for key in keys:
                    arrival = self._arrival(bucket, *key)
                    place = arrival.shard, arrival.ordinal
                    if key[0] != epoch:  # one of the few that a batch at an epoch's end takes from the next
                        waiting[place] = read(self.shards, arrival).members
                    while place not in waiting:
                        found, members = next(streams[sequence.lane_of(key[1])])
                        waiting[found] = members
                    batch.append(replace(arrival, is_read=True, members=waiting.pop(place)))
                yield batch

    def _arrival(self, bucket: int, epoch: int, slot: int) -> Arrival:
        sequence = self.epoch(epoch)
        return Arrival(epoch, *sequence.places[sequence.slots[slot]].tolist(), bucket)


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


@dataclass(frozen=True)
class Problem:
    """A bad sample."""

    epoch: int
    shard: int
    ordinal: int
    bad: BadPair


def decode(shards: Shards, transform: PairTransform, arrival: Arrival, seed: int) -> dict:
    """Reads, decodes and transforms a sample. One that is encoded was transformed before.

    Args:
        shards: all of them.
        transform: of the images.
        arrival: the sample.
        seed: of everything random about it.

    Raises:
        BadPair: it can't be used; `where` names it.
    """
    where = shards.where(arrival.shard, arrival.ordinal, arrival.members)
    try:
        if arrival.members is None:
            raise BadPair("unreadable", "the shard ends or is cut off before it")
        if shards.encoding is not None:
            sample = read_encoded(shards.encoding, arrival.members, arrival.bucket, transform, seed)
        else:
            pair = to_pair(arrival.members)
            sample = pair and transform(pair, arrival.bucket, seed, where)
        if sample is None:
            raise BadPair("unlisted tie", "it is a tie that the manifest does not list")
        return sample
    except BadPair as bad:
        raise BadPair(bad.kind, bad.problem, bad.where or where, bad.advice) from bad
    except ValueError as error:
        raise BadPair("undecodable image", str(error), where) from error


@dataclass(frozen=True)
class PairDecoder(Dataset):
    """Samples by their arrival: tensors, and the problem where they come from a stand-in.

    Attributes:
        shards: all of them.
        pairs: the places of the pairs to train on, for each shard.
        buckets: the numbers of the samples' shapes, for each shard.
        transform: for the images, where the shards hold any.
        seed: of transform and noise.
    """

    shards: Shards
    pairs: list[np.ndarray]
    buckets: list[np.ndarray]
    transform: PairTransform
    seed: int

    def __getitem__(self, arrival: Arrival) -> tuple[dict, Problem | None]:
        index = int(self.shards.counts[: arrival.shard].sum()) + arrival.ordinal  # in the listing of all shards
        seed = sample_seed(self.seed, arrival.epoch, index)
        arrival = read(self.shards, arrival)
        try:
            return decode(self.shards, self.transform, arrival, seed), None
        except BadPair as bad:
            return self._stand_in(arrival, index, seed), Problem(arrival.epoch, arrival.shard, arrival.ordinal, bad)

    def _stand_in(self, arrival: Arrival, index: int, seed: int) -> dict:
        """Another pair in the same shape: images of any, encodings of the same bucket."""
        pairs = self.pairs
        if self.shards.encoding is not None:
            pairs = [places[of_shard[places] == arrival.bucket] for places, of_shard in zip(pairs, self.buckets)]
        candidates = [shard for shard, ordinals in enumerate(pairs) if len(ordinals)]
        rng = np.random.default_rng((self.seed, arrival.epoch, index, len(candidates)))
        for _ in range(TRIES):
            shard = int(rng.choice(candidates))
            other = Arrival(arrival.epoch, shard, int(rng.choice(pairs[shard][:FIRST])), arrival.bucket)
            try:
                return decode(self.shards, self.transform, read(self.shards, other), seed)
            except BadPair:
                continue
        raise ValueError(
            f"No pairs to train on: {TRIES} pairs, chosen at random among the first {FIRST} of each shard, are all bad."
            " Check what made the shards: check_preferences.py says what is wrong with them."
        )


def collate(items: list[tuple[dict, Problem | None]]) -> dict:
    """A batch, as `collate_pairs` makes it, with `problems`: those of the samples that were replaced by a stand-in."""
    problems = [problem for _, problem in items if problem is not None]
    return collate_pairs([sample for sample, _ in items]) | {"problems": problems}
