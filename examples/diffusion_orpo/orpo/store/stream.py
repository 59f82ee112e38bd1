"""The stream of pairs from shards: an order that seed and epoch decide, for any number of processes, resumable.

`order.py` says what the order is, `reader.py` reads it, `decoder.py` decodes it in workers.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..config import LoadingConfig
from ..pairs.bad_pair import BadPair
from ..pairs.buckets import Assignment, assign, describe
from ..pairs.order import BatchOrder, given_of, in_one_bucket
from ..pairs.pair import PairTransform, collate_pairs, sample_seed
from ..runtime.processes import on_main_process, wait_for_reading
from ..runtime.redaction import without_secrets
from ..runtime.shapes import Shape
from .batches import ShardBatches, check_position
from .bucket_reader import BucketReader
from .decoder import decode
from .encoded_sample import check_encoding
from .listing import Shards, find_shards, first_pairs
from .opening import shard_name
from .order import Run
from .reader import read_run


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """What the flags say about shards.

    Attributes:
        patterns: where they are, as `find_shards` takes it.
        num_held_out: pairs to validate on.
        max_pairs: pairs to train on; None for all.
        transform: of the images.
        num_workers: processes that decode.
        buffer_size, max_bad_samples: as in `ShardData`.
        cache_dir: for the results of scanning the shards.
    """

    patterns: list[str]
    num_held_out: int
    max_pairs: int | None
    transform: PairTransform
    num_workers: int
    buffer_size: int
    max_bad_samples: float
    cache_dir: str | None

    @classmethod
    def from_config(cls, config: LoadingConfig) -> "ShardOptions":
        return cls(
            list(config.dataset_path),
            config.num_held_out,
            config.max_train_samples,
            PairTransform.from_config(config),
            config.dataloader_num_workers,
            config.shuffle_buffer_size,
            config.max_bad_samples,
            config.cache_dir,
        )


def load_shards(
    options: ShardOptions, accelerator: Accelerator, encoding_identity: Callable[[], dict[str, str]]
) -> "ShardData":
    """Finds the shards and their pairs, on one process for all, and splits off the held-out ones.

    Args:
        options: the flags.
        accelerator: of the run.
        encoding_identity: returns what this run's encodings depend on; called where the shards are encoded.

    Raises:
        ValueError: shards are missing, hold too few pairs, or were encoded with other models or settings than the run's.
        OSError: a URL can't be read.
    """
    found = None
    if accelerator.is_main_process:
        found = find_shards(options.patterns, options.cache_dir, options.transform.depends_on_sizes)
    wait_for_reading(accelerator)
    (shards,) = broadcast_object_list([found])
    if shards.encoding is not None:
        on_main_process(accelerator, lambda: check_encoding(shards.encoding, options.transform, encoding_identity()))
    data = ShardData(
        shards,
        options.num_held_out,
        options.transform,
        options.num_workers,
        options.buffer_size,
        options.max_bad_samples,
        options.max_pairs,
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
        """Changes with the shards' names and sizes, and with the choice of samples that are trained on."""
        names = [shard_name(url) for url in self.shards.urls]  # signed URLs differ from run to run
        content = [names, self.shards.counts.tolist(), self.num_held_out]
        if (
            self.num_held_out + self.num_pairs != self.shards.counts.sum()
        ):  # ties are left out, or --max_train_samples is less
            content.append(hashlib.blake2b(b"".join(pairs.tobytes() + b"|" for pairs in self.pairs)).hexdigest())
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

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
    ) -> ShardBatches:
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
        if position is not None:
            check_position(position, self.buffer_size)
        shapes = self.transform.shapes
        given = given_of(position, shapes)
        if len(shapes) == 1:
            return in_one_bucket(self.num_pairs, batch_size, *given or ())
        return BatchOrder(self.reader(seed).buckets_of, len(shapes), batch_size, given)

    def reader(self, seed: int) -> BucketReader:
        """Reads pairs in buckets."""
        return BucketReader(self.shards, self.pairs, self.buckets, seed, self.buffer_size)

    def pairs_of(self, epochs: int, batch_size: int, seed: int, position: dict | None) -> int:
        """Pairs that a run has seen after this many epochs, with what fills the last batch of each bucket."""
        return self.order(batch_size, seed, position).pairs_of(epochs)

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict] | None:
        """This process's share of the held-out pairs, once; None where there are none. Bad ones are logged and left out."""
        return self._held_out_batches(batch_size, rank, world_size) if self.num_held_out else None

    def _held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict]:
        """Batches of one bucket each; those that the pairs don't fill come last."""
        transform, before = self.transform.plain, 0
        samples: dict[int, list[dict]] = defaultdict(list)
        for shard, ordinals in enumerate(self.held_out):
            numbers = before + np.arange(len(ordinals))
            own = numbers % world_size == rank
            before += len(ordinals)
            for number, arrival in zip(numbers[own], read_run(self.shards, 0, Run(shard, ordinals[own]))):
                bucket = int(self.buckets[shard][arrival.ordinal])
                try:
                    sample = decode(
                        self.shards, transform, replace(arrival, bucket=bucket), sample_seed(0, 0, int(number) + 1)
                    )
                except BadPair as bad:
                    logger.warning(f"{bad.where}, held out: {bad.kind}: {bad.problem}")
                    continue
                samples[bucket].append(sample)
                if len(samples[bucket]) == batch_size:
                    yield collate_pairs(samples.pop(bucket))
        yield from map(collate_pairs, samples.values())
