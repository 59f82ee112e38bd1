"""What a worker does: read its part of the shards, shuffle it in a buffer, decode, make batches, count what is bad."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..data.pair import PairTransform, collate_pairs, sample_seed
from ..system.redaction import without_secrets
from .encoded_sample import read_encoded
from .listing import BadSample, Shards, read_samples, to_pair
from .manifest import Encoding
from .order import Run, part_of_epoch, shuffled_order


logger = logging.getLogger(__name__)


def transform_sample(
    encoding: Encoding | None, transform: PairTransform, members: dict[str, bytes], seed: int, where: str
) -> tuple[dict | None, BadSample | None]:
    """Reads, decodes and transforms a sample: (sample, None), (None, None) for a tie, or (None, what is wrong).

    What has an encoding was transformed before.
    """
    try:
        if encoding is not None:
            return read_encoded(encoding, members, seed), None
        pair = to_pair(members)
        return (None if pair is None else transform(pair, seed, where)), None
    except BadSample as error:
        return None, error
    except ValueError as error:
        return None, BadSample("undecodable image", str(error))


class Tolerance:
    """Counts and logs the bad samples of one reader in one epoch, and stops it where they are too many.

    Args:
        shards: all of them.
        runs: what the reader reads in this epoch.
        max_bad_samples: the share of it that may be bad.
    """

    def __init__(self, shards: Shards, runs: list[Run], max_bad_samples: float) -> None:
        self.shards, self.max_bad_samples = shards, max_bad_samples
        self.total = sum(run.last - run.first for run in runs)
        self.counts: Counter[tuple[str, str]] = Counter()

    def count(self, shard: int, ordinal: int, members: dict | None, problem: BadSample) -> None:
        """Counts one.

        Raises:
            ValueError: they are more than `max_bad_samples` allows; lists shards and kinds.
        """
        logger.warning(f"{self.shards.where(shard, ordinal, members)}: {problem.kind}: {problem}")
        self.counts[without_secrets(self.shards.urls[shard]), problem.kind] += 1
        if self.counts.total() > self.max_bad_samples * self.total:
            listing = "; ".join(f"{url}: {number} {kind}" for (url, kind), number in self.counts.most_common(10))
            raise ValueError(
                f"{self.counts.total()} of {self.total} samples are bad, more than"
                f" --max_bad_samples={self.max_bad_samples}: {listing}. Replace these shards, or allow more."
            )


@dataclass
class ShardReader(IterableDataset):
    """Gives the batches of the readers of one process; runs in the workers, a reader in each.

    Attributes:
        shards: all of them.
        skip: samples at the beginning of each shard that are not for training.
        transform: of the images, where the shards hold any.
        batch_size: pairs.
        buffer_size: samples to shuffle among.
        max_bad_samples: share of a reader's samples in an epoch that may be bad.
        seed: of order, transform and noise.
        first_part, num_parts: of an epoch, this process's first part, and how many all processes' readers have.
        places: of each reader, the epoch and the samples of its part that it is through with.
        next_reader: whose turn it is.
    """

    shards: Shards
    skip: np.ndarray
    transform: PairTransform
    batch_size: int
    buffer_size: int
    max_bad_samples: float
    seed: int
    first_part: int
    num_parts: int
    places: list[tuple[int, int]]
    next_reader: int

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        # Batches come from the workers in turn, beginning with worker 0: after a resume, it is the reader whose turn it is.
        reader = (self.next_reader + (worker.id if worker else 0)) % len(self.places)
        first_epoch, start = self.places[reader]
        samples, bad, ties = [], [], []
        for epoch in count(first_epoch):
            tolerance = Tolerance(self.shards, self._runs(reader, epoch), self.max_bad_samples)
            good = 0
            for through, shard, ordinal, members in self._read(reader, epoch, start):
                sample, problem = self._transform(epoch, shard, ordinal, members)
                if problem is not None:
                    tolerance.count(shard, ordinal, members, problem)
                    bad.append((shard, ordinal))
                elif sample is None:
                    ties.append((shard, ordinal))
                else:
                    samples.append(sample)
                    good += 1
                if len(samples) == self.batch_size:
                    report = {"reader": reader, "place": (epoch, through), "bad": bad, "ties": ties}
                    yield collate_pairs(samples) | report
                    samples, bad, ties = [], [], []
            if good == 0 and start == 0:
                shown = [without_secrets(url) for url in self.shards.urls[:3]]
                raise ValueError(
                    f"No pairs to train on in a whole epoch of {len(self.shards.urls)} shards ({', '.join(shown)}, ...):"
                    " only ties or bad samples. Check what made them."
                )
            start = 0

    def _runs(self, reader: int, epoch: int) -> list[Run]:
        part = self.first_part + reader
        return part_of_epoch(self.shards.counts, self.skip, self.seed, epoch, part, self.num_parts)

    def _read(self, reader: int, epoch: int, start: int) -> Iterator[tuple[int, int, int, dict | None]]:
        """The part's samples from the `start`-th on, in shuffled order: (how many are then through, shard, place in the
        shard, members). Members are None where the shard breaks off before the sample."""
        runs = self._runs(reader, epoch)
        samples = [(run, ordinal) for run in runs for ordinal in range(run.first, run.last)]
        rng = np.random.default_rng((self.seed, epoch, self.first_part + reader, self.num_parts))
        order = shuffled_order(len(samples), self.buffer_size, rng)
        turn = np.argsort(order)  # when each sample has its turn
        buffer: dict[int, dict | None] = {}
        place, through = 0, start
        for run in runs:
            length = run.last - run.first
            wanted = turn[place : place + length] >= start
            for ordinal, members in self._read_run(run, wanted):
                buffer[place + ordinal - run.first] = members
                while through < len(order) and order[through] in buffer:
                    sample = order[through]
                    through += 1
                    yield through, samples[sample][0].shard, samples[sample][1], buffer.pop(sample)
            place += length

    def _read_run(self, run: Run, wanted: np.ndarray) -> Iterator[tuple[int, dict | None]]:
        """The wanted samples of a run in sequence; a shard none of whose samples is wanted is not opened."""
        if not wanted.any():
            return
        expected = iter(run.first + np.flatnonzero(wanted))
        awaited = next(expected)
        samples_of_shard = int(self.shards.counts[run.shard])
        for ordinal, members in read_samples(self.shards.urls[run.shard], int(awaited), run.last, samples_of_shard):
            if ordinal == awaited:
                yield ordinal, members
                awaited = next(expected, None)
        while awaited is not None:
            yield int(awaited), None
            awaited = next(expected, None)

    def _transform(self, epoch: int, shard: int, ordinal: int, members: dict | None):
        if members is None:
            return None, BadSample("unreadable", "the shard ends or breaks off before it")
        index = int(self.shards.counts[:shard].sum()) + ordinal  # in the listing of all shards
        seed = sample_seed(self.seed, epoch, index)
        where = self.shards.where(shard, ordinal, members)
        return transform_sample(self.shards.encoding, self.transform, members, seed, where)
