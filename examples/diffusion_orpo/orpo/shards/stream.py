"""The stream of pairs from shards: an order that seed and epoch decide, for any number of processes, resumable.

`order.py` says what the order is, `reader.py` reads it, `decoder.py` decodes it in workers.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..data.bad_pair import BadPair
from ..data.pair import PairTransform, collate_pairs, sample_seed
from ..system.processes import on_main_process, wait_for_reading
from ..system.redaction import without_secrets
from ..system.signals import shield_worker
from .decoder import PairDecoder, collate, decode
from .encoded_sample import check_encoding
from .listing import Shards, find_shards, first_pairs
from .opening import shard_name
from .order import ORDER_VERSION, Run, Share, count_lanes
from .reader import ReadAhead, read_run, read_share
from .tolerance import Tolerance


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """What the flags say about shards.

    Attributes:
        patterns: where they are, as `find_shards` takes it.
        num_train_examples: samples that the user expects.
        num_held_out: pairs to validate on.
        max_pairs: pairs to train on; None for all.
        transform: of the images.
        num_workers: processes that decode.
        buffer_size, max_bad_samples: as in `ShardData`.
        cache_dir: for the results of scanning the shards.
    """

    patterns: list[str]
    num_train_examples: int | None
    num_held_out: int
    max_pairs: int | None
    transform: PairTransform
    num_workers: int
    buffer_size: int
    max_bad_samples: float
    cache_dir: str | None

    @classmethod
    def from_flags(cls, args) -> "ShardOptions":
        return cls(
            args.dataset_path,
            args.num_train_examples,
            args.num_validation_pairs if args.run_validation else 0,
            args.max_train_samples,
            PairTransform.from_flags(args),
            args.dataloader_num_workers,
            args.shuffle_buffer_size,
            args.max_bad_samples,
            args.cache_dir,
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
        found = find_shards(options.patterns, options.num_train_examples, options.cache_dir)
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
    def is_encoded(self) -> bool:
        """Whether batches hold latents and embeddings, so that a run needs neither VAE nor text encoders."""
        return self.shards.encoding is not None

    @cached_property
    def _split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return first_pairs(self.shards.pairs(), self.num_held_out, self.max_pairs)

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
        return f"{len(self.shards.urls)} shards: {self.num_pairs} pairs to train on{held_out}{ties}"

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
        batches = ShardBatches(self, batch_size, seed, rank, world_size)
        if position is not None:
            batches.go_to(position)
        return batches

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict] | None:
        """This process's share of the held-out pairs, once; None where there are none. Bad ones are logged and left out."""
        return self._held_out_batches(batch_size, rank, world_size) if self.num_held_out else None

    def _held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[dict]:
        transform, samples, before = PairTransform(self.transform.resolution), [], 0
        for shard, ordinals in enumerate(self.held_out):
            numbers = before + np.arange(len(ordinals))
            own = numbers % world_size == rank
            before += len(ordinals)
            for number, arrival in zip(numbers[own], read_run(self.shards, 0, Run(shard, ordinals[own]))):
                try:
                    samples.append(decode(self.shards, transform, arrival, sample_seed(0, 0, int(number) + 1)))
                except BadPair as bad:
                    logger.warning(f"{bad.where}, held out: {bad.kind}: {bad.problem}")
                if len(samples) == batch_size:
                    yield collate_pairs(samples)
                    samples = []
        if samples:
            yield collate_pairs(samples)


@dataclass
class ShardBatches:
    """Endless batches of one process, which know their position.

    Attributes:
        data: the source.
        batch_size, seed, rank, world_size: as for `training_batches`.
        pairs_seen: pairs that all processes together have been given.
        problems: for the progress bar: different bad samples that this process has met.
    """

    data: ShardData
    batch_size: int
    seed: int
    rank: int
    world_size: int
    pairs_seen: int = 0
    problems: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        data, bad = self.data, set()
        tolerance = Tolerance(data.shards, data.num_pairs / self.world_size, data.max_bad_samples)
        for batch in self._loader():
            for problem in batch.pop("problems"):
                tolerance.count(problem)
                bad.add((problem.shard, problem.ordinal))
            self.problems = {"bad": len(bad)} if bad else {}
            self.pairs_seen += self.batch_size * self.world_size
            yield batch

    def _loader(self) -> DataLoader:
        data = self.data
        lanes = count_lanes(sum(len(pairs) > 0 for pairs in data.pairs))
        share = Share(data.num_pairs, lanes, self.batch_size, self.rank, self.world_size, self.pairs_seen)
        batches = read_share(data.shards, data.pairs, self.seed, data.buffer_size, share)
        return DataLoader(
            PairDecoder(data.shards, data.pairs, data.transform, self.seed),
            batch_sampler=ReadAhead(batches, data.num_workers) if data.num_workers else batches,
            collate_fn=collate,
            num_workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # or it would draw from the global one, which LoRA dropout uses
        )

    @property
    def position(self) -> dict:
        """For the checkpoint: valid for any number of processes and workers, and any batch size."""
        return {
            "order": ORDER_VERSION,
            "pairs_seen": self.pairs_seen,
            "shuffle_buffer_size": self.data.buffer_size,
        }

    def go_to(self, position: dict) -> None:
        """Continues where another run's batches stopped.

        Raises:
            ValueError: that run had another order, so that some pairs would be repeated and some lost.
        """
        if position.get("order") != ORDER_VERSION:
            raise ValueError(
                "Cannot resume the stream of shards: another version of these scripts saved this checkpoint, and read"
                " shards in another order. Finish the run with that version, or start a new one."
            )
        if position["shuffle_buffer_size"] != self.data.buffer_size:
            raise ValueError(
                f"Cannot resume the stream of shards: --shuffle_buffer_size was {position['shuffle_buffer_size']} and is"
                f" now {self.data.buffer_size}. Continue with the same."
            )
        self.pairs_seen = position["pairs_seen"]
