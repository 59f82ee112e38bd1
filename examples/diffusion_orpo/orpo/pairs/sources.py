"""Opens a dataset by its name: from the Hub, from files, from folders of images, or as datasets saved it."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import DatasetCard

from ..config import ONE_DATASET
from ..runtime.messages import printable
from .columns import Reading
from .folders import METADATA, TABLE_SUFFIXES, is_pair_folders, layout_hint, load_pair_folders
from .image import ImageFiles
from .table import PairTable


# The reader for a single file.
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
SHOWN = 5


def as_given(name: str) -> str:
    """A name as a shell or a program hands it over, as a path: without `file://`, `~` and a slash at the end.

    Raises:
        ValueError: it is a path, and nothing is there; or one that datasets takes for a pattern.
    """
    _refuse_elsewhere(name)
    path = unquote(urlsplit(name).path) if name.startswith("file://") else name
    path = os.path.expanduser(path)
    path = path.rstrip("/") or path
    is_path = (
        name.startswith(("file://", "/", "~", "./", "../")) or Path(path).suffix in READERS or path.count("/") > 1
    )
    if os.path.exists(path):
        if os.path.isdir(path) and glob.has_magic(os.path.abspath(path)):
            raise ValueError(
                f"{printable(name)}: the library that reads datasets takes * ? [ ] in a path for wildcards. Rename the"
                " folder, or name it through a link: ln -s."
            )
    elif is_path and "://" not in path:
        raise ValueError(f"{printable(name)}: there is no such file or folder.")
    return path


def _refuse_elsewhere(name: str) -> None:
    """Stops with what to do where a name stands for several datasets, or for one that is neither here nor on the Hub."""
    if name.startswith("hf://datasets/"):
        raise ValueError(f"{printable(name)}: name it as on the Hub, {'/'.join(name.split('/')[3:5])}.")
    if "://" in name and not name.startswith("file://"):
        raise ValueError(
            f"{printable(name)}: pairs are read from this machine or from the Hub. Download the files, and name them."
        )
    if os.path.exists(os.path.expanduser(name)):
        return
    parts = [os.path.expanduser(part.strip()) for part in name.split(",")]
    if len(parts) > 1 and all(parts) or glob.has_magic(name):
        raise ValueError(f"{printable(name)} does not exist. {ONE_DATASET}")


def find_builder(path: str, config: str | None, cache_dir: str | None = None) -> DatasetBuilder:
    """What reads a folder or a dataset of the Hub; its `config.data_files` are the files of each split.

    Raises:
        ValueError: it can't be read, or files of a folder are in no split.
    """
    with readable(path):
        builder = load_dataset_builder(path, config, cache_dir=cache_dir)
    if os.path.isdir(path):
        _check_none_left_out(Path(path), builder)
    return builder


def split_names(builder: DatasetBuilder) -> list[str]:
    return list(map(str, builder.info.splits or builder.config.data_files or ()))


def common_folder(builder: DatasetBuilder, split: str) -> Path | None:
    """The folder that holds all files of a split; None where there are several, or they are not on this machine."""
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    folders = {os.path.dirname(file) for file in files}
    return Path(folders.pop()) if len(folders) == 1 and "://" not in files[0] else None


def pick_split(names: Iterable[str], split: str | None, name: str, flag: str = "--dataset_split_name") -> str:
    """The split asked for, else the only one, else "train".

    Args:
        names: the splits there are.
        split: the one asked for, if any.
        name: of the dataset, for the error.
        flag: that asks for one.

    Raises:
        ValueError: there is no such split; lists those there are.
    """
    names = list(names)
    if split is None and len(names) == 1:
        return names[0]
    split_or_train = split or "train"
    if split_or_train not in names:
        asked = f"no split {split!r}" if split else "several splits and none called train"
        raise ValueError(f"{name} has {asked}: choose {flag} among {', '.join(names)}.")
    return split_or_train


def choose_split(name: str, config: str | None, split: str | None) -> str:
    """The split of a folder or of a dataset of the Hub: see `pick_split`."""
    return pick_split(split_names(find_builder(as_given(name), config)), split, name)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Names the dataset, and the cause at the bottom of it, where datasets can't read it."""
    try:
        yield
    except Exception as error:  # those of datasets, of its readers, and of the HTTP library
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reasons = dict.fromkeys(printable(str(e)).rstrip(".") for e in (error, cause))
        has_script = any(reason.startswith("Dataset scripts are no longer supported") for reason in reasons)
        what_to_do = "Download it, and name its JSON, CSV or parquet file." if has_script else "Check its files."
        raise ValueError(f"{printable(name)} can't be read: {': '.join(reasons)}. {what_to_do}") from error


def _check_none_left_out(folder: Path, builder: DatasetBuilder) -> None:
    """datasets takes words in names of files and folders, such as `test`, for splits, and leaves out what has none.

    Raises:
        ValueError: files that look like the dataset's are in no split; names them.
    """
    if _says_which_files(folder):
        return
    used = {os.path.realpath(file) for files in (builder.config.data_files or {}).values() for file in files}
    suffixes = {Path(file).suffix.lower() for file in used} | set(TABLE_SUFFIXES)
    left_out = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes and os.path.realpath(path) not in used and not _is_ignored(path, folder)
    ]
    if not left_out or not used:
        return
    metadata = [str(path) for path in left_out if path.name in METADATA]
    if metadata:
        raise ValueError(
            f"{folder}: {metadata[0]} would be left out, since it does not lie in the folder of its split's images. Move it"
            f" there, beside {printable(os.path.relpath(min(used), folder))}, with file names as they are seen from there."
        )
    tables = [path for path in left_out if path.suffix.lower() in TABLE_SUFFIXES]
    if tables and not any(file.lower().endswith(TABLE_SUFFIXES) for file in used):
        raise ValueError(
            f"{folder}: {printable(str(tables[0]))} would be left out, since the library that reads datasets takes the"
            f" images. If it is the table of the pairs, name that file: {printable(str(folder / tables[0]))}."
        )
    splits = ", ".join(
        f"{split} ({Path(files[0]).name}{', ...' if len(files) > 1 else ''})"
        for split, files in builder.config.data_files.items()
    )
    shown = ", ".join(printable(str(path)) for path in left_out[:SHOWN])
    more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    raise ValueError(
        f"{folder}: {len(left_out)} of {len(left_out) + len(used)} files would be left out: {shown}{more}. The library that"
        f" reads datasets takes words such as train, test, dev or eval in names for splits, here {splits}; or it reads"
        " only one kind of file. Move all that belongs together into a folder train/ without such words in its files'"
        " names, or list the files of each split in a README.md (`configs`)."
    )


def _says_which_files(folder: Path) -> bool:
    """Whether a README.md lists the files, so that those left out are meant to be."""
    readme = folder / "README.md"
    try:
        return (folder / ".huggingface.yaml").exists() or (
            readme.is_file() and "configs" in DatasetCard.load(readme).data.to_dict()
        )
    except ValueError:  # datasets has reported a broken one already
        return False


def _is_ignored(path: Path, folder: Path) -> bool:
    """Whether a file is one that datasets never looks at, or that nobody means as data."""
    parts = path.relative_to(folder).parts
    return any(re.match(r"\.|__", part) for part in parts) or not path.is_file()


def open_table(
    name: str,
    config: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
    reading: Reading = Reading(),
) -> PairTable:
    """All pairs of a dataset.

    Args:
        name: identifier on the Hub; or a folder of parquet, JSON or CSV files, of images with metadata, of `chosen/` and
            `rejected/`, or of `save_to_disk`; or a file.
        config: of a dataset that has several.
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
        return PairTable.of(dataset, f"{name} (chosen, rejected)", files=LISTED, reading=reading)
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
            return PairTable.of(dataset, name, files=reading.files_below(Path(path).parent), reading=reading)
        except ValueError as error:
            raise ValueError(f"{error} {json_hint(path)}".rstrip()) from error
    if is_saved(path):
        dataset, shown, split = _open_saved(path, name, config, split)
        table = PairTable.of(dataset, shown, split, reading.files_below(None), reading)
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
        return PairTable.of(dataset, f"{name} ({split})", split, files, reading)
    except ValueError as error:
        hint = layout_hint(Path(path)) if os.path.isdir(path) and is_imagefolder else ""
        raise ValueError(f"{error} {hint}".rstrip()) from error


LISTED = ImageFiles(listed=True)


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
    """Opens what `save_to_disk` wrote: a dataset or a dictionary of splits."""
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
