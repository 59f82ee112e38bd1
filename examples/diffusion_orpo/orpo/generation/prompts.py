"""The prompts to generate images of: from a file, from a dataset, or built in."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from datasets import load_dataset, load_from_disk

from ..config import PromptsConfig
from ..pairs.folders import is_pair_folders, load_pair_folders
from ..pairs.sources import READERS, as_given, choose_split, is_saved, pick_split, readable
from ..runtime.text import read_text


CAPTION_COLUMNS = ("caption", "prompt", "Prompt", "text")
FIRST = 100  # prompts of a dataset

# Written for this project and dedicated to the public domain (CC0 1.0).
BUILT_IN_PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(config: PromptsConfig) -> tuple[list[str], list[str]]:
    """The different prompts of the source that is named: all of a file, and of a dataset the first hundred, or `num_prompts`.

    Returns:
        The prompts, and sentences about what was not taken.

    Raises:
        ValueError: the source can't be read, or has no prompts.
    """
    if config.dataset_name is not None:
        source, lines, limit = config.dataset_name, _dataset_prompts(config), config.num_prompts or FIRST
    else:
        source, limit = config.prompt_file or BUILT_IN_PROMPTS, config.num_prompts
        lines = _file_prompts(Path(source))
    prompts = _distinct(lines)
    taken = list(islice(prompts, limit))
    if not taken:
        raise ValueError(f"{source} has no prompts.")
    more = next(prompts, None) is not None
    return taken, [f"The first {len(taken)} prompts of {source} are used: --num_prompts takes more."] if more else []


def _distinct(lines: Iterable[object]) -> Iterator[str]:
    seen = {""}
    for line in lines:
        prompt = line.replace("\ufeff", "").strip() if isinstance(line, str) else ""
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def _file_prompts(path: Path) -> list[str]:
    try:
        lines = read_text(path).split("\n")  # splitlines would split at U+2028, too
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt_file: {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith(("{", "[{")) and _is_json(first):
        raise ValueError(
            f"--prompt_file={path} holds JSON, and a file with a prompt on each line is needed. Name it as --dataset_name."
        )
    return lines


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list))
    except ValueError:
        return False


def _dataset_prompts(config: PromptsConfig) -> Iterator[object]:
    """The prompts row by row, without downloading all of a large dataset."""
    name, dataset = config.dataset_name, _open_dataset(config)
    with readable(name):
        columns = dataset.column_names or list(next(iter(dataset), {}))
    wanted = [config.caption_column] if config.caption_column else CAPTION_COLUMNS
    column = next((column for column in wanted if column in columns), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {', '.join(columns)}, and none called {' or '.join(wanted)}: name the one with"
            " the prompts as --caption_column."
        )
    with readable(name):
        yield from (row[column] for row in dataset.select_columns([column]))


def _open_dataset(config: PromptsConfig):
    """A dataset in any of the forms that training takes, of which only the prompts need to be there."""
    name, split = config.dataset_name, config.dataset_split_name
    path = as_given(name)
    suffix = Path(path).suffix.lower()
    if suffix == ".tar" or (os.path.isdir(path) and any(Path(path).glob("*.tar"))):
        raise ValueError(
            f"--dataset_name={name} holds shards. Name the dataset that they were made of, or write the prompts into a"
            " --prompt_file."
        )
    if os.path.isfile(path):
        if suffix not in READERS:
            raise ValueError(
                f"--dataset_name={name} is no table ({', '.join(READERS)}). A text file with a prompt on each line is a"
                " --prompt_file."
            )
        pick_split(["train"], split, name)
        with readable(name):
            return load_dataset(READERS[suffix], data_files=glob.escape(path), split="train", streaming=True)
    if is_pair_folders(path):
        pick_split(["train"], split, name)
        return load_pair_folders(Path(path), None)
    if is_saved(path):
        with readable(name):
            saved = load_from_disk(path)
        return saved[pick_split(saved, split, name)] if isinstance(saved, dict) else saved
    split = choose_split(name, config.dataset_config_name, split)
    with readable(name):
        return load_dataset(path, config.dataset_config_name, split=split, streaming=True)
