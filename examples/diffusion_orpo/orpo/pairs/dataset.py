"""Pairs from a dataset that fits on disk, in an order that seed and epoch decide: Hub, parquet, or image files."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..config import LoadingConfig
from ..runtime.shapes import Shape
from ..runtime.signals import shield_worker
from .buckets import assign, describe
from .columns import Reading
from .order import BatchOrder, given_of, permutation, position_of
from .pair import PairTransform, collate_pairs, sample_seed
from .sources import open_table
from .table import HELD_OUT_SEED, PairTable, PreferencePairs, hold_out


@dataclass(frozen=True)
class DataOptions:
    """Which pairs of a dataset to use, and how.

    Attributes:
        name, config, split, cache_dir, reading: as for `open_table`.
        transform: of the training images.
        max_pairs: train on at most this many pairs, the first ones; None for all.
        num_held_out: pairs to keep for validation, at most.
        num_workers: processes that decode.
    """

    name: str
    transform: PairTransform
    config: str | None = None
    split: str | None = None
    max_pairs: int | None = None
    num_held_out: int = 0
    num_workers: int = 0
    cache_dir: str | None = None
    reading: Reading = Reading()

    @classmethod
    def from_config(cls, config: LoadingConfig) -> "DataOptions":
        return cls(
            name=config.dataset_name,
            transform=PairTransform.from_config(config),
            config=config.dataset_config_name,
            split=config.dataset_split_name,
            max_pairs=config.max_train_samples,
            num_held_out=config.num_held_out,
            num_workers=config.dataloader_num_workers,
            cache_dir=config.cache_dir,
            reading=Reading.from_config(config),
        )

    def open_table(self) -> PairTable:
        """All rows, unchecked."""
        return open_table(self.name, self.config, self.split, self.cache_dir, self.reading)


def load_pairs(options: DataOptions) -> "PreferenceData":
    """Opens a dataset, checks the pairs it will use and splits off the held-out ones.

    The first run on a dataset decodes every image once, so that a broken one stops the run now and not days later;
    datasets' cache remembers the result.

    Raises:
        BadPair: a label, prompt or image is bad; names the row.
        ValueError: the split or columns are missing, or no pairs are left.
    """
    pairs, number = PreferencePairs.of(options.open_table()), options.num_held_out
    check_held_out(pairs, number)
    if options.max_pairs is not None:
        pairs = pairs.select(np.arange(min(options.max_pairs + number, len(pairs))))
    transform = options.transform
    pairs, note = put_in_buckets(pairs.checked(), transform)
    check_held_out(pairs, number)
    train, held_out = hold_out(pairs, number)
    if options.max_pairs is not None:  # where fewer pairs than asked for could be held out
        train = train.select(np.arange(min(options.max_pairs, len(train))))
    return PreferenceData(train, held_out, transform, options.num_workers, note=note)


def check_held_out(pairs: PreferencePairs, number: int) -> None:
    """Stops where holding out this many pairs leaves none to train on."""
    if number >= len(pairs):
        raise ValueError(
            f"--num_validation_pairs={number} leaves none of the {len(pairs)} pairs of {pairs.name} to train on."
        )


def put_in_buckets(pairs: PreferencePairs, transform: PairTransform) -> tuple[PreferencePairs, str]:
    """Chooses each pair's shape, and leaves out those that would lose too much of an image.

    Returns:
        The pairs that are left, and what the log says of them.

    Raises:
        ValueError: none are left.
    """
    found = assign(pairs.sizes, transform.shapes)
    kept = np.flatnonzero(found.cut.max(axis=1) <= transform.max_crop)
    if len(kept) == 0:
        raise ValueError(
            f"--max_crop={transform.max_crop:g} leaves none of the {len(pairs)} pairs of {pairs.name}: the least that one of"
            f" them loses of an image is {found.cut.max(axis=1).min():.2f}."
        )
    note = describe(found, transform.shapes, len(pairs) - len(kept), transform.max_crop)
    return replace(pairs, buckets=found.buckets).select(kept), note


@dataclass(frozen=True)
class PreferenceData:
    """A data source as training needs it: how many pairs there are, and endless batches of them from any position.

    Attributes:
        train: pairs to train on.
        held_out: pairs to validate on, or None.
        transform: of the training images; held-out images are cropped at the centre, and never mirrored.
        num_workers: processes that decode.
        encodings: cached ones of all images and prompts, or None.
        note: what the log says of buckets and crops.
    """

    train: PreferencePairs
    held_out: PreferencePairs | None
    transform: PairTransform
    num_workers: int
    encodings: "Encodings | None" = None  # noqa: F821
    note: str = ""

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all processes."""
        return len(self.train)

    @property
    def is_encoded(self) -> bool:
        """Whether batches hold latents and embeddings, so that a run needs neither VAE nor text encoders."""
        return self.encodings is not None

    @property
    def fingerprint(self) -> str:
        """Changes whenever the pairs do: those to train on, and those held out."""
        return self.train.fingerprint + (self.held_out.fingerprint if self.held_out else "")

    def __str__(self) -> str:
        held_out = f", {len(self.held_out)} held out" if self.held_out else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.train.name}: {self.num_pairs} pairs to train on{held_out}, {self.train.skipped}{note}"

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that pairs are trained in, the most frequent first."""
        counts = Counter(self.train.buckets.tolist())
        return [self.transform.shapes[bucket] for bucket, _ in counts.most_common()]

    def training_batches(
        self, batch_size: int, seed: int, position: dict | None, rank: int, world_size: int
    ) -> "PairBatches":
        """Endless batches for one process.

        Args:
            batch_size: pairs per batch.
            seed: decides, with epoch and pair, the order and everything random.
            position: where to continue: that of any process's `PairBatches`; None for the start.
            rank, world_size: this process, and how many there are.
        """
        order = self.order(batch_size, seed, position)
        samples = self._samples(self.train, self.transform, seed)
        keys = PairKeys(self.order(batch_size, seed, position), seed, self.num_pairs, rank, world_size)
        return PairBatches(self._loader(samples, keys), order, self.transform.shapes, world_size)

    def order(self, batch_size: int, seed: int, position: dict | None) -> BatchOrder:
        """Which pairs make up each batch, from a position on."""
        buckets, shapes = self.train.buckets, self.transform.shapes
        return BatchOrder(
            lambda epoch: buckets[permutation(seed, epoch, self.num_pairs)],
            len(shapes),
            batch_size,
            given_of(position, shapes),
        )

    def pairs_of(self, epochs: int, batch_size: int, seed: int, position: dict | None) -> int:
        """Pairs that a run has seen after this many epochs, with what fills the last batch of each bucket."""
        return self.order(batch_size, seed, position).pairs_of(epochs)

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> DataLoader | None:
        """This process's share of the held-out pairs, once; None where there are none."""
        if self.held_out is None:
            return None
        own, batches = np.arange(rank, len(self.held_out), world_size), []
        for bucket in range(len(self.transform.shapes)):
            keys = [(0, index) for index in own[self.held_out.buckets[own] == bucket].tolist()]
            batches += [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        return self._loader(self._samples(self.held_out, self.transform.plain, HELD_OUT_SEED), batches)

    def _samples(self, pairs: PreferencePairs, transform: PairTransform, seed: int) -> torch.utils.data.Dataset:
        make = TransformedPairs if self.encodings is None else self.encodings.samples
        return make(pairs, transform, seed)

    def _loader(self, samples: torch.utils.data.Dataset, batches) -> DataLoader:
        return DataLoader(
            samples,
            batch_sampler=batches,
            collate_fn=collate_pairs,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # or it would advance the global one, which LoRA dropout uses
        )


@dataclass
class PairBatches:
    """Batches that know where they are.

    Attributes:
        loader: gives the batches.
        order: of the batches of all processes, as far as they are given.
        shapes: of the buckets.
        world_size: processes.
        problems: for the progress bar; none, since the dataset was checked before.
    """

    loader: DataLoader
    order: BatchOrder
    shapes: tuple[Shape, ...]
    world_size: int
    problems: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            self.order.skip(self.world_size)
            yield batch

    @property
    def position(self) -> dict:
        """For the checkpoint: valid for any number of processes and any batch size."""
        return position_of(self.order.given, self.shapes)


@dataclass(frozen=True)
class PairKeys:
    """Batches of (epoch, index) for one process, for ever: every world_size-th of the order's."""

    order: BatchOrder
    seed: int
    num_pairs: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        index_of = lru_cache(maxsize=2)(lambda epoch: permutation(self.seed, epoch, self.num_pairs))
        for _, keys in islice(self.order, self.rank, None, self.world_size):
            yield [(epoch, int(index_of(epoch)[place])) for epoch, place in keys]


@dataclass(frozen=True)
class TransformedPairs(torch.utils.data.Dataset):
    """Pairs by (epoch, index): the same key gives the same tensors, in any process."""

    pairs: PreferencePairs
    transform: PairTransform
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        bucket, where = int(self.pairs.buckets[index]), self.pairs.where(index)
        return self.transform(self.pairs[index], bucket, sample_seed(self.seed, epoch, index), where)
