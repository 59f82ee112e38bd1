"""Preference pairs from a data set that fits on disk: Hub id, folder of parquet, or imagefolder."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count

import numpy as np
import torch
from datasets import Dataset, Image, Value, get_dataset_split_names, load_dataset
from networkx.utils import UnionFind
from torch.utils.data import DataLoader

from pairs import PairTransform, PreferencePair, collate_pairs, decode_image, parse_label, sample_seed


# Held-out pairs are the same in every run on a data set, whatever its seed, and so is the noise they are judged under.
HELD_OUT_SEED = 20240311

PICK_A_PIC_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
BINARY = (Value("binary"), Value("large_binary"))
TRL_COLUMNS = ("chosen", "rejected", "prompt")


def add_dataset_arguments(parser) -> None:
    """Adds the flags that choose data set, split and rows."""
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--dataset_name",
        required=True,
        help="Identifier of a data set on the Hub, a local folder of parquet files, or an imagefolder with metadata. "
        "Columns: jpg_0, jpg_1, label_0, caption; or chosen, rejected, prompt.",
    )
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", help="Split to train on. Default: the only one, else train.")
    group.add_argument("--max_train_samples", type=int, help="Train on the first so many pairs only.")
    group.add_argument(
        "--num_validation_pairs",
        type=int,
        default=64,
        help="Pairs, at most, kept out of training to measure preference accuracy on, with --run_validation. Pairs that "
        "share an image stay together.",
    )


def load_pairs(args) -> "PreferenceData":
    """Opens the data set of the flags, checks the pairs it will use and splits off the held-out ones.

    The first run on a data set decodes every image once, so that a broken one stops the run now and not days later;
    datasets' cache remembers the result.

    Raises:
        ValueError: split or columns are not there, a label, caption or image is bad, or no pairs are left. Names the
            row where there is one.
    """
    split = choose_split(args.dataset_name, args.dataset_config_name, args.dataset_split_name)
    dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    pairs = PreferenceRows.open(dataset, name=f"{args.dataset_name} ({split})")
    num_held_out = args.num_validation_pairs if args.run_validation else 0
    if num_held_out >= len(pairs):
        raise ValueError(
            f"--num_validation_pairs={num_held_out} leaves none of the {len(pairs)} pairs of {pairs.name} to train on."
        )
    if args.max_train_samples is not None:
        pairs = pairs.select(np.arange(min(args.max_train_samples + num_held_out, len(pairs))))
    train, held_out = hold_out(pairs, pairs.check(), num_held_out)
    transform = PairTransform(args.resolution, args.random_crop, args.random_flip, args.proportion_empty_prompts)
    return PreferenceData(train, held_out, transform, args.dataloader_num_workers)


def hold_out(
    pairs: "PreferenceRows", images: list[tuple[bytes, bytes]], number: int
) -> tuple["PreferenceRows", "PreferenceRows | None"]:
    """Splits off at most `number` pairs, such that no image of theirs is trained on.

    Where an image stands in several pairs, as in Pick-a-Pic, all of these pairs go to the same side.

    Args:
        pairs: all of them.
        images: a hash of either image of each pair.
        number: of pairs to hold out.

    Returns:
        The pairs to train on, and those held out, or None where none are.

    Raises:
        ValueError: more than `number` pairs hang together by their images, so that none can be held out.
    """
    if number == 0:
        return pairs, None
    together = UnionFind()
    for image_0, image_1 in images:
        together.union(image_0, image_1)
    groups: dict[bytes, list[int]] = {}
    for index, (image_0, _) in enumerate(images):
        groups.setdefault(together[image_0], []).append(index)
    held_out: list[int] = []
    groups_in_order = list(groups.values())
    for i in np.random.default_rng(HELD_OUT_SEED).permutation(len(groups_in_order)):
        if len(held_out) + len(groups_in_order[i]) <= number:
            held_out += groups_in_order[i]
    if not held_out:
        raise ValueError(
            f"--num_validation_pairs={number} is too small: all pairs of {pairs.name} share images with more others."
        )
    return pairs.select(np.setdiff1d(np.arange(len(pairs)), held_out)), pairs.select(np.sort(held_out))


def choose_split(name: str, config: str | None, split: str | None) -> str:
    """The split asked for, else the only one, else "train".

    Raises:
        ValueError: there is no such split; lists those there are.
    """
    names = get_dataset_split_names(name, config)
    if split is None and len(names) == 1:
        return names[0]
    split_or_train = split or "train"
    if split_or_train not in names:
        asked = f"no split {split!r}" if split else "several splits and none called train"
        raise ValueError(f"{name} has {asked}: choose --dataset_split_name among {', '.join(names)}.")
    return split_or_train


@dataclass(frozen=True)
class PreferenceRows:
    """The rows of a data set that hold a preference.

    Attributes:
        dataset: all rows, images undecoded.
        name: for messages.
        rows: numbers of the rows that hold a preference.
        winner_is_0: for each of those, whether the first image is the preferred one.
        columns: names of first image, second image and caption.
    """

    dataset: Dataset
    name: str
    rows: np.ndarray
    winner_is_0: np.ndarray
    columns: tuple[str, str, str]
    num_ties: int = 0

    @classmethod
    def open(cls, dataset: Dataset, name: str) -> "PreferenceRows":
        """Finds the columns, reads the labels and drops ties.

        Raises:
            ValueError: columns are missing or hold no images, a label is bad, or there are only ties.
        """
        found = dataset.column_names
        if set(PICK_A_PIC_COLUMNS) <= set(found):
            columns = ("jpg_0", "jpg_1", "caption")
            labels = [
                parse_label(v, f"{name}, row {i}") for i, v in enumerate(dataset.data.column("label_0").to_pylist())
            ]
        elif set(TRL_COLUMNS) <= set(found):
            columns = TRL_COLUMNS
            labels = [1.0] * len(dataset)
        else:
            raise ValueError(
                f"{name} has the columns {', '.join(found)}. Needed are {', '.join(PICK_A_PIC_COLUMNS)}, or"
                f" {', '.join(TRL_COLUMNS)}."
            )
        for column in columns[:2]:
            if not isinstance(dataset.features[column], Image) and dataset.features[column] not in BINARY:
                raise ValueError(
                    f"{name}: column {column} holds {dataset.features[column]}, not images or their encoded bytes."
                )
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        labels = np.array(labels)
        rows = np.flatnonzero(labels != 0.5)
        if len(rows) == 0:
            raise ValueError(f"{name}: no pairs left, all of the {len(labels)} rows are ties (label_0 = 0.5).")
        return cls(dataset, name, rows, labels[rows] == 1.0, columns, num_ties=len(labels) - len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> "PreferenceRows":
        return replace(self, rows=self.rows[indices], winner_is_0=self.winner_is_0[indices])

    def where(self, index: int) -> str:
        """Names a pair in messages by the row it comes from."""
        return f"{self.name}, row {self.rows[index]}"

    def __getitem__(self, index: int) -> PreferencePair:
        row = self.dataset[int(self.rows[index])]
        images = [_encoded_bytes(row[column]) for column in self.columns[:2]]
        winner, loser = images if self.winner_is_0[index] else images[::-1]
        return PreferencePair(winner, loser, row[self.columns[2]])

    def check(self) -> list[tuple[bytes, bytes]]:
        """Decodes every image and looks at every caption.

        Returns:
            A hash of either image of each pair.

        Raises:
            ValueError: names the first bad row.
        """
        many = len(self) >= 1000  # worth starting processes for
        checked = (
            self.dataset.select_columns(list(self.columns))
            .select(self.rows)
            .map(
                partial(_check_row, rows=self.rows, columns=self.columns, name=self.name),
                with_indices=True,
                remove_columns=list(self.columns),
                num_proc=os.cpu_count() if many else None,
                desc=f"Checking {self.name}",
            )
        )
        return list(zip(checked["hash_0"], checked["hash_1"]))

    @property
    def fingerprint(self) -> str:
        """Changes with rows, labels and captions."""
        captions = self.dataset.select_columns([self.columns[2]]).select(self.rows)[self.columns[2]]
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.rows.tobytes(), self.winner_is_0.tobytes(), json.dumps(list(captions)).encode()):
            digest.update(part)
        return digest.hexdigest()


def _encoded_bytes(image: bytes | dict) -> bytes:
    """The bytes of an image file, whether the column holds them, or a datasets Image that may only know its path."""
    if isinstance(image, dict):
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()
    return image


def _check_row(row: dict, index: int, rows: np.ndarray, columns: tuple[str, str, str], name: str) -> dict:
    where, hashes = f"{name}, row {rows[index]}", []
    for column in columns[:2]:
        if row[column] is None:
            raise ValueError(f"{where}: {column} is empty. Remove this row.")
        encoded = _encoded_bytes(row[column])
        decode_image(encoded, f"{where}, {column}")
        hashes.append(hashlib.blake2b(encoded, digest_size=16).digest())
    if not isinstance(row[columns[2]], str):
        raise ValueError(f"{where}: {columns[2]} is {row[columns[2]]!r}, not text.")
    return {"hash_0": hashes[0], "hash_1": hashes[1]}


@dataclass(frozen=True)
class PreferenceData:
    """What training asks of a data source: how many pairs there are, and endless batches of them from any position.

    Attributes:
        train: pairs to train on.
        held_out: pairs to validate on, or None.
        transform: of the training images; held-out images are cropped at the centre, and never mirrored.
        num_workers: processes that decode.
    """

    train: PreferenceRows
    held_out: PreferenceRows | None
    transform: PairTransform
    num_workers: int

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all processes."""
        return len(self.train)

    @property
    def fingerprint(self) -> str:
        """Tells other pairs from these."""
        return self.train.fingerprint

    def __str__(self) -> str:
        held_out = f", {len(self.held_out)} held out" if self.held_out else ""
        return f"{self.train.name}: {self.num_pairs} pairs to train on{held_out}, {self.train.num_ties} ties dropped"

    def training_batches(
        self, batch_size: int, seed: int, position: dict | None, rank: int, world_size: int
    ) -> "PairBatches":
        """Endless batches for one process.

        Args:
            batch_size: pairs per batch.
            seed: decides, with epoch and pair, the order and everything random.
            position: where to go on, of a `PairBatches` of any process; None for the start.
            rank, world_size: this process, and how many there are.
        """
        start = position["pairs_seen"] if position else 0
        order = EndlessOrder(self.num_pairs, batch_size, seed, start, rank, world_size)
        loader = self._loader(TransformedPairs(self.train, self.transform, seed), order)
        return PairBatches(loader, pairs_seen=start, pairs_per_batch=batch_size * world_size)

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> DataLoader | None:
        """This process's share of the held-out pairs, once; None where there are none."""
        if self.held_out is None:
            return None
        keys = [(0, index) for index in range(rank, len(self.held_out), world_size)]
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        return self._loader(
            TransformedPairs(self.held_out, PairTransform(self.transform.resolution), HELD_OUT_SEED), batches
        )

    def _loader(self, pairs: "TransformedPairs", batches) -> DataLoader:
        return DataLoader(
            pairs,
            batch_sampler=batches,
            collate_fn=collate_pairs,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one, which LoRA dropout uses
        )


@dataclass
class PairBatches:
    """Batches that know where they are.

    Attributes:
        loader: gives the batches.
        pairs_seen: pairs that all processes together have been given.
        pairs_per_batch: pairs that all processes together are given at a time.
        problems: for the progress bar; a data set was checked before, so there are none.
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
        """What a checkpoint keeps: it serves any number of processes and any batch size."""
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
