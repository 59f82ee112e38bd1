"""Pairs from a data set that fits on disk, in an order that seed and epoch decide: Hub, parquet, or image files."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..system.signals import shield_worker
from .pair import PairTransform, collate_pairs, sample_seed
from .reading import Reading
from .rows import HELD_OUT_SEED, PreferenceRows, hold_out
from .table import Table, open_table


@dataclass(frozen=True)
class DataOptions:
    """Which pairs of a data set to use, and how.

    Attributes:
        name, config, split, cache_dir, reading: as for `open_table`.
        transform: of the training images.
        max_pairs: use the first so many pairs only; None for all.
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
    def from_flags(cls, args) -> "DataOptions":
        return cls(
            name=args.dataset_name,
            transform=PairTransform.from_flags(args),
            config=args.dataset_config_name,
            split=args.dataset_split_name,
            max_pairs=args.max_train_samples,
            num_held_out=args.num_validation_pairs if args.run_validation else 0,
            num_workers=args.dataloader_num_workers,
            cache_dir=args.cache_dir,
            reading=Reading.from_flags(args),
        )

    def open_table(self) -> Table:
        """All rows, unchecked."""
        return open_table(self.name, self.config, self.split, self.cache_dir, self.reading)


def load_pairs(options: DataOptions) -> "PreferenceData":
    """Opens a data set, checks the pairs it will use and splits off the held-out ones.

    The first run on a data set decodes every image once, so that a broken one stops the run now and not days later;
    datasets' cache remembers the result.

    Raises:
        BadPair: a label, prompt or image is bad; names the row.
        ValueError: the split or columns are missing, or no pairs are left.
    """
    pairs, number = PreferenceRows.open(options.open_table()), options.num_held_out
    if number >= len(pairs):
        raise ValueError(
            f"--num_validation_pairs={number} leaves none of the {len(pairs)} pairs of {pairs.name} to train on."
        )
    if options.max_pairs is not None:
        pairs = pairs.select(np.arange(min(options.max_pairs + number, len(pairs))))
    images = pairs.check()
    train, held_out = hold_out(pairs.with_digests(images), images, number)
    return PreferenceData(train, held_out, options.transform, options.num_workers)


@dataclass(frozen=True)
class PreferenceData:
    """A data source as training needs it: how many pairs there are, and endless batches of them from any position.

    Attributes:
        train: pairs to train on.
        held_out: pairs to validate on, or None.
        transform: of the training images; held-out images are cropped at the centre, and never mirrored.
        num_workers: processes that decode.
        encodings: cached ones of all images and prompts, or None.
    """

    train: PreferenceRows
    held_out: PreferenceRows | None
    transform: PairTransform
    num_workers: int
    encodings: "Encodings | None" = None  # noqa: F821

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
        """Changes whenever the pairs do."""
        return self.train.fingerprint

    def __str__(self) -> str:
        held_out = f", {len(self.held_out)} held out" if self.held_out else ""
        return f"{self.train.name}: {self.num_pairs} pairs to train on{held_out}, {self.train.left_out}"

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
        start = position["pairs_seen"] if position else 0
        order = EndlessOrder(self.num_pairs, batch_size, seed, start, rank, world_size)
        loader = self._loader(self._samples(self.train, self.transform, seed), order)
        return PairBatches(loader, pairs_seen=start, pairs_per_batch=batch_size * world_size)

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> DataLoader | None:
        """This process's share of the held-out pairs, once; None where there are none."""
        if self.held_out is None:
            return None
        keys = [(0, index) for index in range(rank, len(self.held_out), world_size)]
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        return self._loader(
            self._samples(self.held_out, PairTransform(self.transform.resolution), HELD_OUT_SEED), batches
        )

    def _samples(self, pairs: PreferenceRows, transform: PairTransform, seed: int) -> torch.utils.data.Dataset:
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
            generator=torch.Generator(),  # or it would draw from the global one, which LoRA dropout uses
        )


@dataclass
class PairBatches:
    """Batches that know where they are.

    Attributes:
        loader: gives the batches.
        pairs_seen: pairs that all processes together have been given.
        pairs_per_batch: pairs that all processes together are given at a time.
        problems: for the progress bar; none, since the data set was checked before.
    """

    loader: DataLoader
    pairs_seen: int
    pairs_per_batch: int
    problems: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            self.pairs_seen += self.pairs_per_batch
            yield batch

    @property
    def position(self) -> dict:
        """For the checkpoint: valid for any number of processes and any batch size."""
        return {"pairs_seen": self.pairs_seen}


@dataclass(frozen=True)
class TransformedPairs(torch.utils.data.Dataset):
    """Pairs by (epoch, index): the same key gives the same tensors, in any process."""

    pairs: PreferenceRows
    transform: PairTransform
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        return self.transform(self.pairs[index], sample_seed(self.seed, epoch, index), self.pairs.where(index))


@dataclass(frozen=True)
class EndlessOrder:
    """Batches of (epoch, index) for one process, for ever.

    Each epoch is a permutation of the pairs that (seed, epoch) alone decides. Epochs are laid end to end, and cut
    into steps of world_size * batch_size pairs. So every process has as many batches as the others, no batch is ever
    short, and how many pairs were seen is all that a resumed run needs to know.
    """

    num_pairs: int
    batch_size: int
    seed: int
    start: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)  # a batch may straddle two epochs
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_pairs)

        for step in count():
            first = self.start + (step * self.world_size + self.rank) * self.batch_size
            places = (divmod(position, self.num_pairs) for position in range(first, first + self.batch_size))
            yield [(epoch, int(permutation(epoch)[place])) for epoch, place in places]
