"""Batches of one shape each: which pairs they are made of, for any number of processes, and after any interruption."""

from collections import Counter
from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from orpo.pairs.order import BatchOrder, in_one_bucket, permutation


def order_of(buckets: list[int], batch_size: int, given=None, seed: int = 0) -> BatchOrder:
    numbers = np.array(buckets)
    return BatchOrder(lambda epoch: numbers[permutation(seed, epoch, len(numbers))], 4, batch_size, given)


def pairs(keys: list, num_pairs: int, seed: int = 0) -> list[tuple[int, int]]:
    return [(epoch, int(permutation(seed, epoch, num_pairs)[place])) for epoch, place in keys]


BUCKETS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.integers(1, 7), st.integers(1, 3))
def test_every_pair_comes_once_an_epoch_in_batches_of_one_bucket(buckets, batch_size, epochs):
    order = order_of(buckets, batch_size)
    total, seen = order.pairs_of(epochs), []
    for bucket, keys in islice(order, total // batch_size):
        assert len(keys) == batch_size and {buckets[index] for _, index in pairs(keys, len(buckets))} == {bucket}
        seen += pairs(keys, len(buckets))
    counts = Counter(seen)
    assert max(counts.values()) == 1
    assert all((epoch, index) in counts for epoch in range(epochs) for index in range(len(buckets)))
    # And not a batch more than that takes: one less, and a pair of the last epoch is missing.
    fewer = Counter(seen[:-batch_size])
    assert any((epochs - 1, index) not in fewer for index in range(len(buckets)))


@settings(deadline=None, max_examples=60)
@given(BUCKETS, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=6))
def test_however_often_a_run_changes_its_batch_size_no_pair_is_lost_or_repeated(buckets, stages):
    given_pairs, seen = None, []
    for batch_size, batches in stages:
        order = order_of(buckets, batch_size, given_pairs)
        for _, keys in islice(order, batches):
            seen += pairs(keys, len(buckets))
        given_pairs = order.given
    assert sum(given_pairs) == len(seen) == len(set(seen))
    for bucket in range(4):  # of each bucket the first so many, in the epochs' sequence
        of_bucket = sorted(pair for pair in seen if buckets[pair[1]] == bucket)
        members = buckets.count(bucket)
        epochs = Counter(epoch for epoch, _ in of_bucket)
        assert all(epochs[epoch] == members for epoch in range(max(epochs, default=0)))


@settings(deadline=None, max_examples=40)
@given(BUCKETS, st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**31))
def test_a_resumed_order_goes_on_as_if_nothing_had_been(buckets, batch_size, start, seed):
    whole = list(islice(order_of(buckets, batch_size, seed=seed), start + 20))
    first = order_of(buckets, batch_size, seed=seed)
    first.skip(start)
    assert list(islice(order_of(buckets, batch_size, first.given, seed), 20)) == whole[start:]


def test_with_one_bucket_it_is_the_sequence_itself():
    order = in_one_bucket(10, 4, 3)
    keys = [key for _, batch in islice(order, 6) for key in batch]
    assert keys == [divmod(place, 10) for place in range(3, 27)] and order.pairs_of(2) == 20


def test_a_rare_pair_does_not_wait_for_the_next_epoch():
    """One pair of 41 has a bucket of its own: its batch is filled with itself, of later epochs, in which it won't come again."""
    buckets = [0] * 40 + [1]
    order = order_of(buckets, 4)
    batches = list(islice(order, order.pairs_of(3) // 4))
    own = [(place, pairs(keys, 41)) for place, (bucket, keys) in enumerate(batches) if bucket == 1]
    assert own == [(10, [(epoch, 40) for epoch in range(4)])]


def test_no_pair_is_far_from_its_place_in_the_epoch():
    """A batch comes when its last pair does: until then, of each bucket less than a batch waits."""
    buckets = np.random.default_rng(1).integers(0, 4, 400).tolist()
    given = 0
    for _, keys in islice(order_of(buckets, 8), 45):
        last = max(epoch * 400 + place for epoch, place in keys)
        given += 8
        assert given <= last + 1 <= given + 3 * 7
