"""The order of pairs from shards, in numbers: the same for any number of processes and workers, over any changes of them."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from orpo.store import reader
from orpo.store.listing import Shards
from orpo.store.order import MAX_LANES, EpochOrder, Share, count_lanes, lane_order, shuffled_order


def all_pairs(counts: list[int]) -> list[np.ndarray]:
    return [np.arange(count) for count in counts]


def numbered(counts: list[int]) -> Shards:
    return Shards(tuple(f"{i}.tar" for i in range(len(counts))), np.array(counts))


@pytest.fixture
def opened(monkeypatch) -> list:
    """Shards of numbers in place of files; lists what is open at each opening."""
    open_now, record = Counter(), []

    def read_samples(url, first, last, count=None):
        open_now[url] += 1
        record.append(+open_now)
        try:
            for ordinal in range(first, last):
                yield ordinal, {"__key__": (url, ordinal)}
        finally:
            open_now[url] -= 1

    monkeypatch.setattr(reader, "read_samples", read_samples)
    return record


def share_of(shards: Shards, pairs: list, batch_size: int, rank: int, world_size: int, start: int) -> Share:
    lanes = count_lanes(sum(len(of_shard) > 0 for of_shard in pairs))
    return Share(sum(map(len, pairs)), lanes, batch_size, rank, world_size, start)


def global_batches(
    shards: Shards, pairs: list, batch_size: int, world_size: int, start: int, number: int
) -> list[list]:
    """What all processes together train on, batch by batch."""
    streams = [
        reader.read_share(shards, pairs, 5, 64, share_of(shards, pairs, batch_size, rank, world_size, start))
        for rank in range(world_size)
    ]
    batches = [[a for stream in streams for a in next(stream)] for _ in range(number)]
    return [[(a.epoch, a.shard, a.ordinal) for a in batch] for batch in batches]


COUNTS = [[7, 7, 7, 7, 6], [1], [1000], [3, 0, 5], list(range(1, 40)), [155] * 23]


@pytest.mark.parametrize("counts", COUNTS)
def test_the_lanes_hold_each_pair_once_and_differ_by_one_pair_at_most(counts):
    pairs = [np.flatnonzero(np.arange(count) % 5 != 1) for count in counts]  # as if every fifth were a tie
    order = EpochOrder(pairs, seed=0, epoch=3, buffer_size=64)
    runs = [order.runs(lane) for lane in range(order.lanes)]
    found = Counter((run.shard, int(n)) for lane in runs for run in lane for n in run.ordinals)
    assert found == Counter((shard, int(n)) for shard, places in enumerate(pairs) for n in places)
    lengths = [sum(len(run.ordinals) for run in lane) for lane in runs]
    assert max(lengths) - min(lengths) <= 1
    for lane, length in enumerate(lengths):
        assert sorted(order.turns(lane)) == list(range(length))


def test_lanes_are_a_power_of_two_and_no_more_than_shards():
    found = [count_lanes(number) for number in range(1, 100)]
    assert all(
        lanes <= min(number, MAX_LANES) < 2 * lanes or lanes == MAX_LANES for number, lanes in enumerate(found, 1)
    )
    assert {lanes & (lanes - 1) for lanes in found} == {0}
    assert [lane_order(lanes).tolist() for lanes in (1, 2, 8)] == [[0], [0, 1], [0, 4, 2, 6, 1, 5, 3, 7]]


def test_shards_are_shuffled_by_seed_and_epoch():
    pairs = all_pairs([5] * 20)
    order = lambda *key: tuple(run.shard for run in EpochOrder(pairs, *key, 16).runs(0))  # noqa: E731
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
    counts = [7, 7, 0, 7, 6, 3]  # an epoch of 30: batches straddle epochs
    shards, pairs = numbered(counts), all_pairs(counts)
    alone = [sample for batch in global_batches(shards, pairs, 1, 1, 0, 200) for sample in batch]
    found = global_batches(shards, pairs, batch_size, world_size, start, 12)
    for number, batch in enumerate(found):
        assert Counter(batch) == Counter(alone[start + 8 * number : start + 8 * (number + 1)])


@pytest.mark.parametrize("seed", range(12))
def test_any_chain_of_kills_and_changes_neither_repeats_nor_loses_a_pair(opened, seed):
    """From 1 to 64 processes, and other batch sizes: after each kill the run goes on from its last checkpoint."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 60, rng.integers(1, 40)).tolist() + [5]
    shards, pairs = numbered(counts), all_pairs(counts)
    num_pairs = sum(counts)
    alone = [sample for (sample,) in global_batches(shards, pairs, 1, 1, 0, 2 * num_pairs + 2000)]
    trained, seen = [], 0
    while seen < 2 * num_pairs:
        world_size, batch_size = int(rng.integers(1, 65)), int(rng.integers(1, 5))
        batches = global_batches(shards, pairs, batch_size, world_size, seen, int(rng.integers(1, 6)))
        kept = batches[: int(rng.integers(0, len(batches) + 1))]  # the others came after the last checkpoint
        for batch in kept:
            assert Counter(batch) == Counter(alone[seen : seen + len(batch)])
            trained += batch
            seen += len(batch)
    for epoch in (0, 1):
        samples = Counter(sample for sample in trained if sample[0] == epoch)
        assert len(samples) == num_pairs and set(samples.values()) == {1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 48, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_processes_read_few_lanes_and_share_as_few_as_they_can(world_size, batch_size):
    num_pairs, lanes = 40_000, 16
    read = []
    for rank in range(world_size):
        slots = Share(num_pairs, lanes, batch_size, rank, world_size, start=world_size * batch_size * 3).slots(0)
        window = slots[: -batch_size or None]  # the last batch may stand in two epochs
        read.append(set((window % lanes).tolist()))
    total = sum(map(len, read))
    if lanes % world_size == 0:
        assert total == lanes and max(map(len, read)) == lanes // world_size
    elif world_size % lanes == 0:
        assert total == world_size
    else:
        assert total < 2 * max(lanes, world_size) and max(map(len, read)) <= 2.5 * lanes / min(world_size, lanes)


def test_a_process_has_no_more_shards_open_than_it_reads_lanes(opened):
    counts = [50] * 40
    shards, pairs = numbered(counts), all_pairs(counts)
    for world_size, allowed in ((1, 16), (4, 4), (16, 1), (32, 1)):
        opened.clear()
        share = share_of(shards, pairs, 2, 0, world_size, 0)
        for _ in islice(reader.read_share(shards, pairs, 0, 256, share), share.num_pairs // (2 * world_size) - 1):
            pass
        assert max(now.total() for now in opened) == allowed
        different = len({url for now in opened for url in now})
        assert different <= 40 / min(world_size, 16) + 2 * allowed  # not every process opens every shard


def test_pairs_that_follow_one_another_in_a_shard_are_apart_in_the_order(opened):
    """Data sets keep the pairs of a prompt together; a batch should not."""
    counts = [100] * 32
    shards, pairs = numbered(counts), all_pairs(counts)
    batches = global_batches(shards, pairs, 8, 1, 0, 300)
    assert all(len({shard for _, shard, _ in batch}) == 8 for batch in batches)
