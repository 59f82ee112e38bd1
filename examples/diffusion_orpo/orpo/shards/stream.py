"""The stream of pairs from shards: an order that seed and epoch decide, shared out over processes, resumable.

The shards of an epoch are shuffled and laid end to end. Every data-loading worker of every process takes a part of the
same length, to the sample, shuffles it in a bounded buffer, and begins the next epoch when it is through. A part is
read once and in sequence, so shards may come from pipes; shards outside of it are not opened.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..data.pair import PairTransform, collate_pairs, sample_seed
from ..system.processes import on_main_process, wait_for_reading
from ..system.signals import shield_worker
from .encoded_sample import check_encoding
from .listing import Shards, find_shards, read_samples, shard_name
from .reader import ShardReader, transform_sample


logger = logging.getLogger(__name__)


def load_shards(args, accelerator: Accelerator, family: type, dtype: torch.dtype) -> "ShardData":
    """Finds and counts the shards of the flags, on one process for all, and splits off the held-out samples.

    Args:
        args: the flags.
        accelerator: of the run.
        family: the model family, such as `StableDiffusionXL`.
        dtype: of its frozen weights.

    Raises:
        ValueError: shards are missing or hold too little, or were encoded by other encoders than the run's.
        OSError: a URL can't be read.
    """
    found = find_shards(args.dataset_path, args.num_train_examples) if accelerator.is_main_process else None
    wait_for_reading(accelerator)
    (shards,) = broadcast_object_list([found])
    if shards.encoding is not None:
        on_main_process(accelerator, check_encoding, args, family, dtype, shards)
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
    def is_encoded(self) -> bool:
        """Whether batches hold latents and embeddings, so that a run needs neither VAE nor text encoders."""
        return self.shards.encoding is not None

    @property
    def skip(self) -> np.ndarray:
        """Held-out samples at the beginning of each shard."""
        before = np.cumsum(self.shards.counts) - self.shards.counts
        return np.clip(self.num_held_out - before, 0, self.shards.counts)

    @property
    def fingerprint(self) -> str:
        """Tells other shards from these: by name, size and how many samples are held out."""
        names = [shard_name(url) for url in self.shards.urls]  # signed URLs differ from run to run
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
                where = self.shards.where(shard, ordinal, members)
                sample, problem = transform_sample(
                    self.shards.encoding, transform, members, sample_seed(0, 0, place), where
                )
                if problem is not None:
                    logger.warning(f"{where}, held out: {problem.kind}: {problem}")
                samples += [] if sample is None else [sample]
                if len(samples) == batch_size:
                    yield collate_pairs(samples)
                    samples = []
        if samples:
            yield collate_pairs(samples)


@dataclass
class ShardBatches:
    """Endless batches of one process, that know where they are.

    Attributes:
        data: the source.
        batch_size, seed, rank, world_size: as for `training_batches`.
        readers: workers, or 1 where the main process reads.
        batches: how many were given.
        places: of each reader, the epoch and the samples of its part that it is through with.
        problems: different bad samples and ties met since the start of the process, for the progress bar.
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
        reader = ShardReader(
            self.data.shards,
            self.data.skip,
            self.data.transform,
            self.batch_size,
            self.data.buffer_size,
            self.data.max_bad_samples,
            self.seed,
            first_part=self.rank * self.readers,
            num_parts=self.world_size * self.readers,
            places=list(self.places),
            next_reader=self.batches % self.readers,
        )
        loader = DataLoader(
            reader,
            batch_size=None,  # readers make whole batches
            num_workers=self.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),
        )
        passed_over: dict[str, set[tuple[int, int]]] = {"bad": set(), "ties": set()}
        for batch in loader:
            self.places[batch.pop("reader")] = batch.pop("place")
            for kind, samples in passed_over.items():
                samples.update(map(tuple, batch.pop(kind)))
            self.batches += 1
            self.problems = {kind: len(samples) for kind, samples in passed_over.items() if samples}
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
            raise ValueError(f"Cannot resume the shards' stream: {'; '.join(differences)}. Go on with the same.")
        self.batches, self.places = position["batches"], [tuple(place) for place in position["places"]]
