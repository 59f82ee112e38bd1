"""The order of pairs from shards, in numbers: the same for any number of processes and workers, over any changes of them."""

from collections import Counter
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
from orpo.pairs.order import BatchOrder, in_one_bucket
from orpo.store import reader
from orpo.store.index import Shards
from orpo.store.order import MAX_LANES, EpochOrder, batches_of, count_lanes, lane_order, shuffled_order


def all_pairs(counts: list[int]) -> list[np.ndarray]:
    return [np.arange(count) for count in counts]


@pytest.fixture
def opened(monkeypatch) -> list:
    """Shards of numbers in place of commands; lists what is open at each opening."""
    open_now, record = Counter(), []

    @contextmanager
    def open_shard(url):
        open_now[url] += 1
        record.append(+open_now)
        try:
            yield url
        finally:
            open_now[url] -= 1

    def walk_samples(url, first, last):
        count = int(url.removesuffix(".tar").split("-")[1])
        return ((ordinal, {"__key__": (url, ordinal)}) for ordinal in range(first, min(last, count)))

    monkeypatch.setattr(reader, "open_shard", open_shard)
    monkeypatch.setattr(reader, "walk_samples", walk_samples)
    return record


class Stream:
    """A run of all processes over shards of numbers, in one bucket or in three."""

    def __init__(self, pairs: list[np.ndarray], buckets: int = 1, buffer_size: int = 64) -> None:
        counts = np.array([max(of_shard, default=-1) + 1 for of_shard in pairs])
        shards = Shards(tuple(f"https://host/{i}-{count}.tar" for i, count in enumerate(counts)), counts)
        rng = np.random.default_rng(0)
        of_samples = [rng.integers(buckets, size=count) for count in counts]
        self.num_pairs, self.buckets = sum(map(len, pairs)), buckets
        self.reader = reader.PairReader(shards, pairs, of_samples, 5, buffer_size)

    def order(self, batch_size: int, given=None) -> BatchOrder:
        return BatchOrder(self.reader.buckets_of, self.buckets, batch_size, given)

    def steps(self, batch_size: int, world_size: int, number: int, given=None) -> list[list]:
        """What all processes together train on, step by step."""
        ranks = [self.reader.batches(self.order(batch_size, given), r, world_size) for r in range(world_size)]
        steps = []
        for _ in range(number):
            batches = [next(rank) for rank in ranks]
            for batch in batches:
                assert len(batch) == batch_size and len({arrival.bucket for arrival in batch}) == 1
                urls = self.reader.shards.urls
                assert all(a.members["__key__"] == (urls[a.shard], a.ordinal) for a in batch)
            steps.append([(a.epoch, a.shard, a.ordinal) for batch in batches for a in batch])
        return steps


COUNTS = [[7, 7, 7, 7, 6], [1], [1000], [3, 0, 5], list(range(1, 40)), [155] * 23]


@pytest.mark.parametrize("counts", COUNTS)
def test_the_lanes_hold_each_pair_once_and_differ_by_one_pair_at_most(counts):
    pairs = [np.flatnonzero(np.arange(count) % 5 != 1) for count in counts]  # as if every fifth were a tie
    order = EpochOrder(pairs, seed=0, epoch=3, buffer_size=64)
    expected = Counter((shard, int(n)) for shard, places in enumerate(pairs) for n in places)
    assert Counter(map(tuple, order.places.tolist())) == expected
    assert sorted(order.slots) == list(range(len(order.places)))
    lengths = np.diff(order.bounds)
    assert max(lengths) - min(lengths) <= 1 and len(lengths) == order.lanes
    for slot, place in enumerate(order.slots):
        lane = order.lane_of(slot)
        assert order.bounds[lane] <= place < order.bounds[lane + 1]


def test_lanes_are_a_power_of_two_and_no_more_than_shards():
    found = [count_lanes(number) for number in range(1, 100)]
    assert all(
        lanes <= min(number, MAX_LANES) < 2 * lanes or lanes == MAX_LANES for number, lanes in enumerate(found, 1)
    )
    assert {lanes & (lanes - 1) for lanes in found} == {0}
    assert [lane_order(lanes).tolist() for lanes in (1, 2, 8)] == [[0], [0, 1], [0, 4, 2, 6, 1, 5, 3, 7]]


def test_shards_are_shuffled_by_seed_and_epoch():
    pairs = all_pairs([5] * 20)
    order = lambda *key: tuple(EpochOrder(pairs, *key, 16).places[:, 0])  # noqa: E731
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({order(*key) for key in keys}) == 4 and order(0, 1) == order(0, 1)


@pytest.mark.parametrize("length, size", [(0, 4), (1, 4), (3, 4), (100, 1), (100, 10), (1000, 256)])
def test_the_shuffle_is_a_permutation_that_its_buffer_can_hold(length, size):
    order = shuffled_order(length, size, np.random.default_rng(0))
    assert sorted(order) == list(range(length))
    given = np.argsort(order)
    for turn in range(length):  # when a sample is given, at most `size` have arrived that were not given before
        arrived = order[turn : turn + 1].max() + 1 if turn < length else length
        assert (given[:arrived] >= turn).sum() <= size
    if size == 1:
        assert list(order) == list(range(length))
    if length > 2 * size > 2:
        assert np.abs(order - np.arange(length)).mean() > size / 4


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("start", [0, 8, 24, 72])
def test_global_batches_are_the_same_for_any_division(opened, world_size, batch_size, start):
    stream = Stream(all_pairs([7, 7, 0, 7, 6, 3]))  # an epoch of 30: batches straddle epochs
    alone = [sample for step in stream.steps(1, 1, 200) for sample in step]
    for number, step in enumerate(stream.steps(batch_size, world_size, 12, [start])):
        assert Counter(step) == Counter(alone[start + 8 * number : start + 8 * (number + 1)])


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_in_buckets_each_step_has_the_pairs_of_the_next_batches_of_the_order(opened, world_size):
    stream = Stream(all_pairs([7, 7, 0, 7, 6, 3]), buckets=3)
    alone = stream.steps(2, 1, 20 * world_size)
    for number, step in enumerate(stream.steps(2, world_size, 20)):
        expected = alone[number * world_size : (number + 1) * world_size]
        assert Counter(step) == Counter(sample for batch in expected for sample in batch)


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_any_chain_of_kills_and_changes_neither_repeats_nor_loses_a_pair(opened, seed, buckets):
    """From 1 to 64 processes, and other batch sizes: after each kill the run goes on from its last checkpoint."""
    rng = np.random.default_rng(seed)
    stream = Stream(all_pairs(rng.integers(0, 60, rng.integers(1, 40)).tolist() + [5]), buckets)
    alone = [sample for step in stream.steps(1, 1, 2 * stream.num_pairs + 2000) for sample in step]
    trained, given = [], [0] * buckets
    while sum(given) < 2 * stream.num_pairs:
        world_size, batch_size, number = map(int, (rng.integers(1, 65), rng.integers(1, 5), rng.integers(1, 6)))
        steps = stream.steps(batch_size, world_size, number, given)
        kept = int(rng.integers(0, number + 1))  # the others came after the last checkpoint
        trained += [sample for step in steps[:kept] for sample in step]
        order = stream.order(batch_size, given)
        order.skip(kept * world_size)
        given = order.given
        if buckets == 1:
            assert Counter(trained) == Counter(alone[: len(trained)])
    assert len(trained) == sum(given) == len(set(trained))
    for epoch in (0, 1) if buckets == 1 else ():
        assert sum(sample[0] == epoch for sample in trained) == stream.num_pairs


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 48, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_processes_read_few_lanes_and_share_as_few_as_they_can(world_size, batch_size):
    lanes, read = 16, []
    steps = 4000 // (world_size * batch_size)
    for rank in range(world_size):
        own = islice(batches_of(in_one_bucket(40_000, batch_size), rank, world_size, lanes), steps)
        read.append({slot % lanes for _, keys in own for _, slot in keys})
    total = sum(map(len, read))
    if lanes % world_size == 0:
        assert total == lanes and max(map(len, read)) == lanes // world_size
    elif world_size % lanes == 0:
        assert total == world_size
    else:
        assert total < 2 * max(lanes, world_size) and max(map(len, read)) <= 2.5 * lanes / min(world_size, lanes)


def test_a_process_has_no_more_shards_open_than_it_reads_lanes(opened):
    stream = Stream(all_pairs([50] * 40), buffer_size=256)
    for world_size, allowed in ((1, 16), (4, 4), (16, 1), (32, 1)):
        opened.clear()
        batches = stream.reader.batches(stream.order(2), 0, world_size)
        for _ in islice(batches, stream.num_pairs // (2 * world_size) - 1):
            pass
        assert max(now.total() for now in opened) == allowed
        different = len({url for now in opened for url in now})
        assert different <= 40 / min(world_size, 16) + 2 * allowed  # not every process opens every shard


def test_pairs_that_follow_one_another_in_a_shard_are_apart_in_the_order(opened):
    """Datasets keep the pairs of a prompt together; a batch should not."""
    steps = Stream(all_pairs([100] * 32)).steps(8, 1, 300)
    assert all(len({shard for _, shard, _ in batch}) == 8 for batch in steps)
