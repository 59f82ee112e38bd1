"""Opens a data set as one table: from the Hub, from files, from folders of images, or as datasets saved it."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from .columns import Columns
from .files import READERS, as_given, find_builder, pick_split, readable, split_names
from .folders import is_pair_folders, layout_hint, load_pair_folders


@dataclass(frozen=True)
class Table:
    """All rows of a data set, unchecked.

    Attributes:
        dataset: the rows, images undecoded.
        name: for messages.
        columns: what they mean.
        split: the one the rows are from; "train" where there are none.
        follows_paths: whether images may be named by a path, since their files were listed. In a table from elsewhere, a
            path could be any file of this machine.
    """

    dataset: Dataset
    name: str
    columns: Columns
    split: str = "train"
    follows_paths: bool = False

    @classmethod
    def of(cls, dataset: Dataset, name: str, split: str = "train", follows_paths: bool = False) -> "Table":
        """
        Raises:
            ValueError: columns are missing, ambiguous, or hold no images.
        """
        classes = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
        columns = Columns.find(dataset.data.schema, name, classes)
        for column in columns.images:
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        return cls(dataset, name, columns, split, follows_paths)

    def __len__(self) -> int:
        return len(self.dataset)

    def cells(self, row: int, columns: tuple[str, ...]) -> dict:
        """A row's cells, as Arrow has them: reading one that is broken must not keep the others from being read."""
        return {name: self.dataset.data.column(name)[row] for name in columns}


def open_table(name: str, config: str | None = None, split: str | None = None, cache_dir: str | None = None) -> Table:
    """All rows of a data set.

    Args:
        name: identifier on the Hub; or a folder of parquet, JSON or CSV files, of images with metadata, of `chosen/` and
            `rejected/`, or of `save_to_disk`; or a file.
        config: of a data set that has several.
        split: Default: the only one, else train.
        cache_dir: of datasets; None for the default.

    Raises:
        ValueError: they can't be read, or hold no pairs.
    """
    path = as_given(name)
    if is_pair_folders(path):
        _refuse_splits(f"{name} has chosen/ and rejected/", config, split)
        return Table.of(load_pair_folders(Path(path), cache_dir), f"{name} (chosen, rejected)", follows_paths=True)
    if os.path.isfile(path):
        _refuse_splits(f"{name} is a file", config, split)
        reader = _reader(path)
        with readable(name):
            dataset = load_dataset(reader, data_files=glob.escape(path), split="train", cache_dir=cache_dir)
        return Table.of(dataset, name)
    if is_saved(path):
        return Table.of(*_open_saved(path, name, config, split))
    split = pick_split(split_names(find_builder(path, config, cache_dir)), split, name)
    with readable(name):
        dataset = load_dataset(path, config, split=split, cache_dir=cache_dir)
    try:
        return Table.of(dataset, f"{name} ({split})", split, follows_paths=dataset.builder_name == "imagefolder")
    except ValueError as error:
        hint = layout_hint(Path(path)) if os.path.isdir(path) and dataset.builder_name == "imagefolder" else ""
        raise ValueError(f"{error} {hint}".rstrip()) from error


def is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _open_saved(path: str, name: str, config: str | None, split: str | None) -> tuple[Dataset, str, str]:
    """Opens what `save_to_disk` wrote: a data set or a dictionary of splits."""
    with readable(name):
        saved = load_from_disk(path)
    if isinstance(saved, DatasetDict):
        _refuse_splits(f"{name} was written by save_to_disk", config, None)
        split = pick_split(saved, split, name)
        return saved[split], f"{name} ({split})", split
    _refuse_splits(f"{name} was written by save_to_disk", config, split)
    return saved, name, "train"


def _reader(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        shard = " Shards are named by --dataset_path." if suffix == ".tar" else ""
        raise ValueError(
            f"{path} is not a kind of file that holds pairs: name a folder, or a file ending in {', '.join(READERS)}.{shard}"
        )
    return READERS[suffix]


def _refuse_splits(what: str, config: str | None, split: str | None) -> None:
    if config is not None or split not in (None, "train"):
        raise ValueError(
            f"{what}, so it has neither splits nor configurations: leave out --dataset_split_name and"
            " --dataset_config_name, or name another folder."
        )
