"""Opens a data set as one table: from the Hub, from files, from folders of images, or as datasets saved it."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.fingerprint import Hasher

from .bad_pair import BadPair
from .columns import Columns
from .files import READERS, as_given, common_folder, find_builder, pick_split, readable, split_names
from .folders import is_pair_folders, layout_hint, load_pair_folders
from .image_files import ImageFiles, is_list
from .ranked import RankedPairs
from .reading import Reading


@dataclass(frozen=True)
class Table:
    """All pairs of a data set, unchecked.

    Attributes:
        dataset: its rows, images undecoded.
        name: for messages.
        columns: what they mean; for ranked images, the columns of their pairs.
        split: that the rows are from; "train" where there are none.
        files: the image files that cells may name.
        ranked: the pairs made of ranked images. None if each row is a pair.
        results: folder for what is found out about the rows. None: beside them, in the cache of datasets.
    """

    dataset: Dataset
    name: str
    columns: Columns
    split: str = "train"
    files: ImageFiles = ImageFiles()
    ranked: RankedPairs | None = None
    results: Path | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        name: str,
        split: str = "train",
        files: ImageFiles = ImageFiles(),
        reading: Reading = Reading(),
    ) -> "Table":
        """
        Raises:
            ValueError: columns are missing, ambiguous, or hold no images; or there are no two images to compare.
        """
        classes = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
        schema = pa.schema([(field.name, plain_type(field.type)) for field in dataset.data.schema])
        columns = reading.find_columns(schema, name, classes, files)
        for column in columns.used:
            if schema.field(column).type != dataset.data.schema.field(column).type:
                feature = Features.from_arrow_schema(pa.schema([schema.field(column)]))[column]
                dataset = dataset.cast_column(column, feature)
        for column in columns.images:
            if isinstance(dataset.features[column], Image):
                dataset = dataset.cast_column(column, Image(decode=False))
        if not columns.convention.is_ranked:
            return cls(dataset, name, columns, split, files)
        ranked = RankedPairs.of(dataset, columns.convention, reading.pairs_per_group)
        if not len(ranked):
            raise ValueError(f"{name}: no two images of a prompt are ranked, so there are no pairs.")
        return cls(dataset, name, columns.of_pairs(), split, files, ranked)

    def result_file(self, rows: Dataset, *decisive: object) -> str | None:
        """Where the result of a look at some rows is kept; None leaves that to datasets.

        Args:
            rows: those that are looked at.
            decisive: what else the result depends on.
        """
        if self.results is None:
            return None
        self.results.mkdir(parents=True, exist_ok=True)
        return str(self.results / f"{Hasher.hash([rows._fingerprint, *decisive])}.arrow")

    def __len__(self) -> int:
        return len(self.dataset) if self.ranked is None else len(self.ranked)

    @property
    def used(self) -> tuple[str, ...]:
        """The columns of the data set that are read."""
        if self.ranked is None:
            return self.columns.used
        return self.ranked.convention.needed

    def where(self, pair: int) -> str:
        """Names a pair in messages."""
        return f"row {pair}" if self.ranked is None else self.ranked.where(pair)

    def cells(self, pair: int, columns: tuple[str, ...]) -> dict[str, pa.Scalar]:
        """A pair's cells, as Arrow has them: reading one that is broken must not keep the others from being read."""
        if self.ranked is None:
            return {name: self.dataset.data.column(name)[pair] for name in columns}
        return {name: self.ranked.cell(self.dataset, pair, name) for name in columns}

    def column(self, name: str, start: int, stop: int) -> pa.Array | pa.ChunkedArray:
        """The cells of several pairs in a column other than images."""
        if self.ranked is None:
            return self.dataset.data.column(name).slice(start, stop - start)
        return self.ranked.column(self.dataset, name, start, stop)

    def labels(self) -> Iterator[float | BadPair]:
        """The label of each pair, or what is wrong with it."""
        names = self.columns.verdict
        columns = [self.column(name, 0, len(self)) for name in names]
        for cells in zip(*columns) if names else repeat((), len(self)):
            try:
                yield self.columns.read_label(dict(zip(names, cells)))
            except BadPair as bad:
                yield bad

    def images_of(self, pairs: np.ndarray) -> "PlacedImages":
        """The images of some pairs, each once."""
        if self.ranked is None:
            places = [np.stack([pairs, np.full_like(pairs, side)], axis=1) for side in (0, 1)]
            return PlacedImages(self.columns.images, np.stack(places, axis=1))
        return PlacedImages(self.ranked.convention.images, self.ranked.places[pairs].reshape(-1, 2, 2))


@dataclass(frozen=True)
class PlacedImages:
    """Where the images of pairs are in a data set.

    Attributes:
        columns: that hold them.
        places: int64 (pairs, 2, 2): row and place of both images. The place is that of the column, or in the cell's list.
    """

    columns: tuple[str, ...]
    places: np.ndarray

    @cached_property
    def by_row(self) -> dict[int, list[int]]:
        """The places that are used in each row."""
        found: dict[int, list[int]] = {}
        for row, place in np.unique(self.places.reshape(-1, 2), axis=0).tolist():
            found.setdefault(row, []).append(place)
        return found


def cell_of_image(cells: list[pa.Scalar], names: tuple[str, ...], place: int) -> tuple[pa.Scalar, str]:
    """The cell of an image among those of its row, and its name in messages."""
    if len(cells) > 1:
        return cells[place], names[place]
    return (cells[0].values[place], f"{names[0]} {place}") if is_list(cells[0].type) else (cells[0], names[0])


def open_table(
    name: str,
    config: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
    reading: Reading = Reading(),
) -> Table:
    """All pairs of a data set.

    Args:
        name: identifier on the Hub; or a folder of parquet, JSON or CSV files, of images with metadata, of `chosen/` and
            `rejected/`, or of `save_to_disk`; or a file.
        config: of a data set that has several.
        split: Default: the only one, else train.
        cache_dir: of datasets; None for the default.
        reading: how the flags say that rows are read.

    Raises:
        ValueError: they can't be read, or hold no pairs.
    """
    path = as_given(name)
    if reading.image_root is not None and not reading.image_root.is_dir():
        raise ValueError(f"--image_root={reading.image_root} is not a folder.")
    if is_pair_folders(path):
        _refuse_splits(f"{name} has chosen/ and rejected/", config, split)
        dataset = load_pair_folders(Path(path), cache_dir)
        return Table.of(dataset, f"{name} (chosen, rejected)", files=LISTED, reading=reading)
    inner = Path(path, "pairs", "train.parquet")
    if Path(path, "images", "metadata.jsonl").is_file() and inner.is_file():
        raise ValueError(f"{name} holds the output of make_preferences.py: its pairs are in {inner.parent}.")
    if os.path.isfile(path):
        _refuse_splits(f"{name} is a file", config, split)
        reader = _reader(path)
        with readable(name):
            options = csv_options(path) if reader == "csv" else {}
            dataset = load_dataset(reader, data_files=glob.escape(path), split="train", cache_dir=cache_dir, **options)
        try:
            return Table.of(dataset, name, files=reading.files_below(Path(path).parent), reading=reading)
        except ValueError as error:
            raise ValueError(f"{error} {json_hint(path)}".rstrip()) from error
    if is_saved(path):
        dataset, shown, split = _open_saved(path, name, config, split)
        table = Table.of(dataset, shown, split, reading.files_below(None), reading)
        # datasets would write them into the saved folder, which is the user's and may be read-only.
        return replace(table, results=Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "results_on_saved"))
    builder = find_builder(path, config, cache_dir)
    split = pick_split(split_names(builder), split, name)
    with readable(name):
        tables = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
        options = csv_options(tables[0]) if tables and type(builder).__name__ == "Csv" and os.path.isdir(path) else {}
        dataset = load_dataset(path, config, split=split, cache_dir=cache_dir, **options)
    is_imagefolder = dataset.builder_name == "imagefolder"
    files = LISTED if is_imagefolder else reading.files_below(common_folder(builder, split))
    try:
        return Table.of(dataset, f"{name} ({split})", split, files, reading)
    except ValueError as error:
        hint = layout_hint(Path(path)) if os.path.isdir(path) and is_imagefolder else ""
        raise ValueError(f"{error} {hint}".rstrip()) from error


LISTED = ImageFiles(listed=True)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that all of Arrow's functions take, for the views and dictionaries that newer programs write."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind


def json_hint(path: str) -> str:
    """What to do about a JSON file that is one object, such as pandas' columns or rows below a key, and not rows."""
    if not path.endswith(".json"):
        return ""
    with open(path, encoding="utf-8-sig") as file:
        try:
            is_object = isinstance(json.load(file), dict)
        except ValueError:  # a row on each line
            return ""
    form = 'a list of rows, [{"jpg_0": ..., "caption": ...}, ...]'
    return (
        f'The file holds one JSON object. Write {form}, as pandas does by to_json(orient="records").'
        if is_object
        else ""
    )


def csv_options(path: str) -> dict:
    """How datasets reads a CSV file whose cells are all taken as they are written, whatever separates them."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    separator = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    return {
        "sep": separator,
        "features": Features({name: Value("string") for name in names}),
        "keep_default_na": False,
    }


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
