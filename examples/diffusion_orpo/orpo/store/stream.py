"""The stream of pairs from shards: an order that seed and epoch decide, for any number of processes, resumable.

`order.py` says what the order is, `reader.py` reads and decodes it.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..config import LoadingConfig
from ..pairs.bad_pair import BadPair
from ..pairs.buckets import Assignment, assign, describe
from ..pairs.order import BatchOrder, given_of, in_one_bucket, position_of
from ..pairs.pair import PairTransform, collate_pairs, sample_seed
from ..runtime.processes import on_main_process, wait_for_reading
from ..runtime.redaction import without_secrets
from ..runtime.shapes import Shape
from ..runtime.signals import shield_worker
from .index import Shards, find_shards
from .reader import Arrival, PairDecoder, PairReader, Problem, ReadAhead, collate, decode, read_in_sequence
from .sample import check_encoding


logger = logging.getLogger(__name__)


def load_shards(
    config: LoadingConfig, accelerator: Accelerator, encoding_identity: Callable[[], dict[str, str]]
) -> "ShardData":
    """Finds the shards and their pairs, on one process for all, and splits off the held-out ones.

    Args:
        config: names the shards, and says how to read them.
        accelerator: of the run.
        encoding_identity: returns what this run's encodings depend on; called where the shards are encoded.

    Raises:
        ValueError: shards are missing, hold too few pairs, or were encoded with other models or settings than the run's.
        OSError: a URL can't be read.
    """
    found = find_shards(list(config.dataset_path), config.cache_dir) if accelerator.is_main_process else None
    wait_for_reading(accelerator)
    (shards,) = broadcast_object_list([found])
    transform = PairTransform.from_config(config)
    if shards.encoding is not None:
        on_main_process(accelerator, lambda: check_encoding(shards.encoding, transform, encoding_identity()))
    data = ShardData(
        shards,
        config.num_held_out,
        transform,
        config.dataloader_num_workers,
        config.shuffle_buffer_size,
        config.max_bad_samples,
        config.max_train_samples,
    )
    if data.num_held_out and data.num_pairs <= 0:
        raise ValueError(
            f"--num_validation_pairs={data.num_held_out} leaves none of the {sum(map(len, shards.pairs()))} pairs to"
            " train on."
        )
    return data


@dataclass(frozen=True)
class ShardData:
    """A data source as training needs it, from shards.

    Attributes:
        shards: all of them.
        num_held_out: pairs at the beginning that are validated on instead.
        transform: of the training images; held-out images are cropped at the centre, and never mirrored.
        num_workers: processes that decode.
        buffer_size: samples that all processes together shuffle among.
        max_bad_samples: the share of a process's samples in an epoch that may be bad.
        max_pairs: pairs to train on, the first ones after those held out; None for all.
    """

    shards: Shards
    num_held_out: int
    transform: PairTransform
    num_workers: int
    buffer_size: int
    max_bad_samples: float
    max_pairs: int | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all processes."""
        return sum(map(len, self.pairs))

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that pairs are trained in, the most frequent first."""
        counts = Counter(
            np.concatenate([of_shard[places] for of_shard, places in zip(self.buckets, self.pairs)]).tolist()
        )
        return [self.transform.shapes[bucket] for bucket, _ in counts.most_common()]

    @cached_property
    def _assignment(self) -> Assignment | None:
        """What becomes of all samples, ties included; None where sizes decide nothing."""
        if not self.transform.depends_on_sizes:
            return None
        return assign(np.concatenate(self.shards.sizes).reshape(-1, 2, 2), self.transform.shapes)

    @cached_property
    def buckets(self) -> list[np.ndarray]:
        """Of each shard, the numbers of its samples' shapes."""
        if self._assignment is None:
            return [np.zeros(count, dtype=int) for count in self.shards.counts]
        return np.split(self._assignment.buckets, self._ends[:-1])

    @cached_property
    def _usable(self) -> list[np.ndarray]:
        """Of each shard, the places of the pairs of which no image would lose too much."""
        pairs = self.shards.pairs()
        if self._assignment is None:
            return pairs
        fits = self._assignment.cut.max(axis=1) <= self.transform.max_crop
        return [places[of_shard[places]] for places, of_shard in zip(pairs, np.split(fits, self._ends[:-1]))]

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shards.counts)

    @property
    def is_encoded(self) -> bool:
        """Whether batches hold latents and embeddings, so that a run needs neither VAE nor text encoders."""
        return self.shards.encoding is not None

    @cached_property
    def _split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return first_pairs(self._usable, self.num_held_out, self.max_pairs)

    @property
    def held_out(self) -> list[np.ndarray]:
        """The places of the pairs to validate on, for each shard."""
        return self._split[0]

    @property
    def pairs(self) -> list[np.ndarray]:
        """The places of the pairs to train on, for each shard."""
        return self._split[1]

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the shards, and with the choice of samples that are trained on."""
        digest = hashlib.blake2b(json.dumps([*self.shards.contents, self.num_held_out]).encode(), digest_size=16)
        for pairs in self.pairs:
            digest.update(pairs.tobytes() + b"|")
        return digest.hexdigest()

    def __str__(self) -> str:
        held_out = f", {self.num_held_out} held out" if self.num_held_out else ""
        ties = f", {self.shards.num_ties} ties left out" if self.shards.num_ties else ""
        return f"{len(self.shards.urls)} shards: {self.num_pairs} pairs to train on{held_out}{ties}{self._note()}"

    def _note(self) -> str:
        if self._assignment is None:
            return ""
        left_out = sum(map(len, self.shards.pairs())) - sum(map(len, self._usable))
        note = describe(self._assignment, self.transform.shapes, left_out, self.transform.max_crop)
        return f"; {note}" if note else ""

    def training_batches(
        self, batch_size: int, seed: int, position: dict | None, rank: int, world_size: int
    ) -> "ShardBatches":
        """Endless batches for one process.

        Args:
            batch_size: pairs per batch.
            seed: decides, with epoch and sample, the order and everything random.
            position: where to continue: that of any process's `ShardBatches`; None for the start.
            rank, world_size: this process, and how many there are.

        Raises:
            ValueError: there are no pairs, or the position is of another order.
        """
        if self.num_pairs == 0:
            shown = ", ".join(without_secrets(url) for url in self.shards.urls[:3])
            raise ValueError(
                f"No pairs to train on: the {len(self.shards.urls)} shards ({shown}, ...) hold only ties. Check what made"
                " them."
            )
        return ShardBatches(self, self.order(batch_size, seed, position), seed, rank, world_size)

    def order(self, batch_size: int, seed: int, position: dict | None) -> BatchOrder:
        """Which pairs make up each batch, from a position on.

        Raises:
            ValueError: the position is one in another order.
        """
        if position is not None and position["shuffle_buffer_size"] != self.buffer_size:
            raise ValueError(
                "Cannot resume the stream of shards: --shuffle_buffer_size was"
                f" {position['shuffle_buffer_size']} and is now {self.buffer_size}. Continue with the same."
            )
        shapes = self.transform.shapes
        given = given_of(position, shapes)
        if len(shapes) == 1:
            return in_one_bucket(self.num_pairs, batch_size, *given or ())
        return BatchOrder(self.reader(seed).buckets_of, len(shapes), batch_size, given)

    def reader(self, seed: int) -> PairReader:
        return PairReader(self.shards, self.pairs, self.buckets, seed, self.buffer_size)

    def pairs_of(self, epochs: int, batch_size: int, seed: int, position: dict | None) -> int:
        """Pairs that a run has seen after this many epochs, with what fills the last batch of each bucket."""
        return self.order(batch_size, seed, position).pairs_of(epochs)

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict] | None:
        """This process's share of the held-out pairs, once; None where there are none. Bad ones are logged and left out."""
        return self._held_out_batches(batch_size, rank, world_size) if self.num_held_out else None

    def _held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict]:
        """Batches of one bucket each; those that the pairs don't fill come last."""
        transform = self.transform.plain
        samples: dict[int, list[dict]] = defaultdict(list)
        shards = np.repeat(np.arange(len(self.held_out)), list(map(len, self.held_out)))
        places = np.stack([shards, np.concatenate(self.held_out)], axis=1)[rank::world_size]
        for number, ((shard, ordinal), members) in enumerate(read_in_sequence(self.shards, places)):
            bucket = int(self.buckets[shard][ordinal])
            arrival = Arrival(0, shard, ordinal, bucket, True, members)
            try:
                sample = decode(self.shards, transform, arrival, sample_seed(0, 0, rank + number * world_size + 1))
            except BadPair as bad:
                logger.warning(f"{bad.where}, held out: {bad.kind}: {bad.problem}")
                continue
            samples[bucket].append(sample)
            if len(samples[bucket]) == batch_size:
                yield collate_pairs(samples.pop(bucket))
        yield from map(collate_pairs, samples.values())


def first_pairs(
    pairs: list[np.ndarray], num_held_out: int, max_pairs: int | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits the pairs of shards, given by their places in each, into the first ones, held out, and those to train on.

    Args:
        pairs: from `Shards.pairs`.
        num_held_out: how many to hold out.
        max_pairs: how many to train on, at most; None for all.
    """
    starts = np.cumsum([0, *map(len, pairs)])
    begins = [max(0, num_held_out - start) for start in starts]
    ends = [None if max_pairs is None else max(0, num_held_out + max_pairs - start) for start in starts]
    held_out = [of_shard[:begin] for of_shard, begin in zip(pairs, begins)]
    return held_out, [of_shard[begin:end] for of_shard, begin, end in zip(pairs, begins, ends)]


@dataclass
class ShardBatches:
    """Endless batches of one process, which know their position.

    Attributes:
        data: the source.
        order: of the batches of all processes, as far as they are given.
        seed, rank, world_size: as for `training_batches`.
        problems: for the progress bar: different bad samples that this process has met.
    """

    data: ShardData
    order: BatchOrder
    seed: int
    rank: int
    world_size: int
    problems: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        data, bad = self.data, set()
        tolerance = Tolerance(data.shards, data.num_pairs / self.world_size, data.max_bad_samples)
        for batch in self._loader():
            for problem in batch.pop("problems"):
                tolerance.count(problem)
                bad.add((problem.shard, problem.ordinal))
            self.problems = {"bad": len(bad)} if bad else {}
            self.order.skip(self.world_size)
            yield batch

    def _loader(self) -> DataLoader:
        data, reader = self.data, self.data.reader(self.seed)
        batches = reader.batches(
            data.order(self.order.batch_size, self.seed, self.position), self.rank, self.world_size
        )
        return DataLoader(
            PairDecoder(data.shards, data.pairs, data.buckets, data.transform, self.seed),
            batch_sampler=batches if reader.is_local or not data.num_workers else ReadAhead(batches, data.num_workers),
            collate_fn=collate,
            num_workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # or it would advance the global one, which LoRA dropout uses
        )

    @property
    def position(self) -> dict:
        """For the checkpoint: valid for any number of processes and workers, and any batch size."""
        given = position_of(self.order.given, self.data.transform.shapes)
        return {"shuffle_buffer_size": self.data.buffer_size} | given


class Tolerance:
    """Counts and logs the bad samples of one process in each epoch, and stops it if there are too many.

    Args:
        shards: all of them.
        total: samples that the process reads in an epoch.
        max_bad_samples: the share of them that may be bad.
    """

    def __init__(self, shards: Shards, total: float, max_bad_samples: float) -> None:
        self.shards, self.total, self.max_bad_samples = shards, total, max_bad_samples
        self.epoch, self.counts = 0, Counter()

    def count(self, problem: Problem) -> None:
        """Counts one.

        Raises:
            ValueError: they are more than `max_bad_samples` allows; lists shards and kinds.
        """
        bad = problem.bad
        logger.warning(f"{bad.where}: {bad.kind}: {bad.problem}. Another pair takes its place")
        if problem.epoch != self.epoch:
            self.epoch, self.counts = problem.epoch, Counter()
        self.counts[without_secrets(self.shards.urls[problem.shard]), bad.kind] += 1
        if self.counts.total() > self.max_bad_samples * self.total:
            listing = "; ".join(f"{url}: {number} {kind}" for (url, kind), number in self.counts.most_common(10))
            raise ValueError(
                f"{self.counts.total()} of {round(self.total)} samples are bad, more than"
                f" --max_bad_samples={self.max_bad_samples}: {listing}. {bad.advice} Or allow more."
            )
