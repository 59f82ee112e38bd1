"""The stream of pairs from shards: an order that seed and epoch decide, shared out over processes, resumable.

The shards of an epoch are shuffled and laid end to end. Every data-loading worker of every process takes a part of the
same length, to the sample, shuffles it in a bounded buffer, and begins the next epoch when it is through. A part is
read once and in sequence, so shards may come from pipes; shards outside of it are not opened.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pairs import PairTransform, collate_pairs, sample_seed
from shards import BadSample, Shards, find_shards, read_samples, to_pair


logger = logging.getLogger(__name__)


def add_shard_arguments(parser) -> None:
    """Adds the flags that name the shards and say how to read them."""
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--dataset_path",
        nargs="+",
        required=True,
        help="Folders of shards, paths with braces or wildcards, s3:// or https:// URLs with braces, or `pipe:` commands. "
        "Commands run in a shell: name only those you trust. WDS_SECURE=1 in the environment refuses them.",
    )
    group.add_argument(
        "--num_train_examples",
        type=int,
        help="Samples in all shards, checked against the manifest. Without a manifest, they are counted at the start.",
    )
    group.add_argument(
        "--shuffle_buffer_size",
        type=int,
        default=256,
        help="Samples, in encoded form, that each worker shuffles among; 1 keeps the order within shards.",
    )
    group.add_argument(
        "--max_bad_samples",
        type=float,
        default=0.01,
        help="Share of a worker's samples that may be unreadable before the run stops, from 0 to 1.",
    )
    group.add_argument(
        "--num_validation_pairs",
        type=int,
        default=64,
        help="Samples, the first of all shards, kept out of training to measure preference accuracy on, with "
        "--run_validation.",
    )


def load_shards(args, accelerator: Accelerator) -> "ShardData":
    """Finds and counts the shards of the flags, on one process for all, and splits off the held-out samples.

    Raises:
        ValueError: shards are missing or hold too little.
        OSError: a URL can't be read.
    """
    found = find_shards(args.dataset_path, args.num_train_examples) if accelerator.is_main_process else None
    (shards,) = broadcast_object_list([found])
    held_out = args.num_validation_pairs if args.run_validation else 0
    if held_out >= shards.counts.sum():
        raise ValueError(
            f"--num_validation_pairs={held_out} leaves none of the {shards.counts.sum()} samples to train on."
        )
    transform = PairTransform(args.resolution, args.random_crop, args.random_flip, args.proportion_empty_prompts)
    return ShardData(
        shards, held_out, transform, args.dataloader_num_workers, args.shuffle_buffer_size, args.max_bad_samples
    )


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


@dataclass(frozen=True)
class ShardData:
    """What training asks of a data source, from shards.

    Attributes:
        shards: all of them.
        num_held_out: samples kept for validation, the first of the shards in listing order.
        transform: of the training images.
        num_workers: processes that decode, for each training process.
        buffer_size: of the shuffle.
        max_bad_samples: share of a reader's samples that may be bad.
    """

    shards: Shards
    num_held_out: int
    transform: PairTransform
    num_workers: int
    buffer_size: int
    max_bad_samples: float

    @property
    def num_pairs(self) -> int:
        """Samples in an epoch, over all processes; ties among them are passed over."""
        return int(self.shards.counts.sum()) - self.num_held_out

    @property
    def skip(self) -> np.ndarray:
        """Held-out samples at the beginning of each shard."""
        before = np.cumsum(self.shards.counts) - self.shards.counts
        return np.clip(self.num_held_out - before, 0, self.shards.counts)

    @property
    def fingerprint(self) -> str:
        """Tells other shards from these: by name, size and how many samples are held out."""
        names = [url.rpartition("/")[2] for url in self.shards.urls]
        content = json.dumps([names, self.shards.counts.tolist(), self.num_held_out])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def __str__(self) -> str:
        held_out = f", {self.num_held_out} held out" if self.num_held_out else ""
        return f"{len(self.shards.urls)} shards: {self.num_pairs} samples to train on{held_out}"

    def training_batches(
        self, batch_size: int, seed: int, position: dict | None, rank: int, world_size: int
    ) -> "ShardBatches":
        """Endless batches for one process.

        Args:
            batch_size: pairs per batch.
            seed: decides, with epoch and sample, the order and everything random.
            position: where to go on, of this process's `ShardBatches`; None for the start.
            rank, world_size: this process, and how many there are.

        Raises:
            ValueError: the position is one of another number of processes or workers, or there are fewer samples than
                readers.
        """
        readers = max(1, self.num_workers)
        if self.num_pairs < readers * world_size:
            raise ValueError(
                f"{self.num_pairs} samples are too few for {world_size} processes of {readers} workers each:"
                " lower --dataloader_num_workers."
            )
        batches = ShardBatches(self, batch_size, seed, rank, world_size, readers)
        if position is not None:
            batches.go_to(position)
        return batches

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict] | None:
        """This process's share of the held-out samples, once; None where there are none."""
        return self._held_out(batch_size, rank, world_size) if self.num_held_out else None

    def _held_out(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict]:
        transform, samples, place = PairTransform(self.transform.resolution), [], 0
        for shard, last in enumerate(self.skip):
            for ordinal, members in read_samples(self.shards.urls[shard], 0, int(last)) if last else ():
                place += 1
                if place % world_size != rank:
                    continue
                sample, _ = transform_sample(
                    transform, members, sample_seed(0, 0, place), self.shards.where(shard, ordinal)
                )
                samples += [] if sample is None else [sample]
                if len(samples) == batch_size:
                    yield collate_pairs(samples)
                    samples = []
        if samples:
            yield collate_pairs(samples)


def transform_sample(
    transform: PairTransform, members: dict[str, bytes], seed: int, where: str
) -> tuple[dict | None, BadSample | None]:
    """Reads, decodes and transforms a sample: (sample, None), (None, None) for a tie, or (None, what is wrong)."""
    try:
        pair = to_pair(members)
        return (None if pair is None else transform(pair, seed, where)), None
    except BadSample as error:
        return None, error
    except ValueError as error:
        return None, BadSample("undecodable image", str(error))


@dataclass
class ShardBatches:
    """Endless batches of one process, that know where they are.

    Attributes:
        data: the source.
        batch_size, seed, rank, world_size: as for `training_batches`.
        readers: workers, or 1 where the main process reads.
        batches: how many were given.
        places: of each reader, the epoch and the samples of its part that it is through with.
        problems: different bad samples met since the start of the process, for the progress bar.
    """

    data: ShardData
    batch_size: int
    seed: int
    rank: int
    world_size: int
    readers: int
    batches: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = [(0, 0)] * self.readers

    def __iter__(self) -> Iterator[dict]:
        loader = DataLoader(
            ShardReader(self),
            batch_size=None,  # readers make whole batches
            num_workers=self.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        bad: set[tuple[int, int]] = set()
        for batch in loader:
            self.places[batch.pop("reader")] = batch.pop("place")
            bad.update(map(tuple, batch.pop("bad")))
            self.batches += 1
            self.problems = {"bad": len(bad)} if bad else {}
            yield batch

    @property
    def position(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "processes": self.world_size,
            "readers": self.readers,
            "buffer_size": self.data.buffer_size,
            "batches": self.batches,
            "places": self.places,
        }

    def go_to(self, position: dict) -> None:
        """Goes on where another run's batches were.

        Raises:
            ValueError: that run shared the samples out in another way, so that some would be repeated and some lost.
        """
        now = self.position
        flags = {
            "processes": "processes",
            "readers": "--dataloader_num_workers",
            "buffer_size": "--shuffle_buffer_size",
        }
        differences = [
            f"{flag} was {position.get(name)} and is now {now[name]}"
            for name, flag in flags.items()
            if position.get(name) != now[name]
        ]
        if differences:
            raise ValueError(
                f"Cannot resume the shards' stream: {'; '.join(differences)}. Start with the same number, or begin a new"
                " run from the trained LoRA."
            )
        self.batches, self.places = position["batches"], [tuple(place) for place in position["places"]]


class Tolerance:
    """Counts and logs the bad samples of one reader in one epoch, and stops it where they are too many.

    Args:
        data: the source.
        runs: what the reader reads in this epoch.
    """

    def __init__(self, data: ShardData, runs: list[Run]) -> None:
        self.data = data
        self.total = sum(run.last - run.first for run in runs)
        self.counts: Counter[tuple[str, str]] = Counter()

    def count(self, shard: int, ordinal: int, problem: BadSample) -> None:
        """Counts one.

        Raises:
            ValueError: they are more than `max_bad_samples` allows; lists shards and kinds.
        """
        logger.warning(f"{self.data.shards.where(shard, ordinal)}: {problem.kind}: {problem}")
        self.counts[self.data.shards.urls[shard], problem.kind] += 1
        if self.counts.total() > self.data.max_bad_samples * self.total:
            listing = "; ".join(f"{url}: {number} {kind}" for (url, kind), number in self.counts.most_common(10))
            raise ValueError(
                f"{self.counts.total()} of {self.total} samples are bad, more than"
                f" --max_bad_samples={self.data.max_bad_samples}: {listing}"
            )


class ShardReader(IterableDataset):
    """Reads one reader's part of each epoch, and makes batches of it. Runs in the workers."""

    def __init__(self, batches: ShardBatches) -> None:
        self.data, self.shards, self.seed = batches.data, batches.data.shards, batches.seed
        self.batch_size, self.readers, self.places = batches.batch_size, batches.readers, list(batches.places)
        self.first_part, self.num_parts = batches.rank * batches.readers, batches.world_size * batches.readers
        self.next_reader = batches.batches % batches.readers
        self.offsets = np.cumsum(self.shards.counts) - self.shards.counts

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        # Batches come from the workers in turn, beginning with worker 0: after a resume, it is the reader whose turn it is.
        reader = (self.next_reader + (worker.id if worker else 0)) % self.readers
        first_epoch, start = self.places[reader]
        samples, bad = [], []
        for epoch in count(first_epoch):
            tolerance = Tolerance(self.data, self._runs(reader, epoch))
            good = 0
            for through, shard, ordinal, members in self._read(reader, epoch, start):
                sample, problem = self._transform(epoch, shard, ordinal, members)
                if problem is not None:
                    tolerance.count(shard, ordinal, problem)
                    bad.append((shard, ordinal))
                if sample is not None:
                    samples.append(sample)
                    good += 1
                if len(samples) == self.batch_size:
                    yield collate_pairs(samples) | {"reader": reader, "place": (epoch, through), "bad": bad}
                    samples, bad = [], []
            if good == 0 and start == 0:
                raise ValueError(
                    f"No pairs to train on in a whole epoch of {self.shards.urls}: only ties or bad samples."
                )
            start = 0

    def _runs(self, reader: int, epoch: int) -> list[Run]:
        counts, skip = self.shards.counts, self.data.skip
        return part_of_epoch(counts, skip, self.seed, epoch, self.first_part + reader, self.num_parts)

    def _read(self, reader: int, epoch: int, start: int) -> Iterator[tuple[int, int, int, dict | None]]:
        """The part's samples from the `start`-th on, in shuffled order: (how many are then through, shard, place in the
        shard, members). Members are None where the shard breaks off before the sample."""
        runs = self._runs(reader, epoch)
        samples = [(run, ordinal) for run in runs for ordinal in range(run.first, run.last)]
        rng = np.random.default_rng((self.seed, epoch, self.first_part + reader, self.num_parts))
        order = shuffled_order(len(samples), self.data.buffer_size, rng)
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
        for ordinal, members in read_samples(self.shards.urls[run.shard], int(awaited), run.last):
            if ordinal == awaited:
                yield ordinal, members
                awaited = next(expected, None)
        while awaited is not None:
            yield int(awaited), None
            awaited = next(expected, None)

    def _transform(self, epoch: int, shard: int, ordinal: int, members: dict | None):
        if members is None:
            return None, BadSample("unreadable", "the shard breaks off before it")
        seed = sample_seed(self.seed, epoch, int(self.offsets[shard]) + ordinal)
        return transform_sample(self.data.transform, members, seed, self.shards.where(shard, ordinal))
