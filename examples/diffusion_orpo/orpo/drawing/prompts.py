"""The prompts to draw: from a file, from a data set, or built in."""

from itertools import islice
from pathlib import Path

from datasets import load_dataset

from ..config import PromptsConfig
from ..pairs.files import choose_split


CAPTION_COLUMNS = ("caption", "prompt", "Prompt", "text")

# Written for this project and dedicated to the public domain (CC0 1.0).
BUILT_IN_PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(config: PromptsConfig) -> list[str]:
    """The first `--num_prompts` different prompts of the source that the flags name.

    Raises:
        ValueError: two sources are named, or one that has no prompts.
    """
    if config.dataset_name is not None:
        source, lines = config.dataset_name, _dataset_captions(config)
    else:
        source = config.prompt_file or BUILT_IN_PROMPTS
        try:
            lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines would split at U+2028, too
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt_file={source} can't be read as text: {error}") from error
    stripped = (line.strip() for line in lines if isinstance(line, str))
    prompts = list(islice(_distinct(line for line in stripped if line), config.num_prompts))
    if not prompts:
        raise ValueError(f"{source} has no prompts.")
    return prompts


def _distinct(lines):
    seen = set()
    for line in lines:
        if line not in seen:
            seen.add(line)
            yield line


def _dataset_captions(config: PromptsConfig):
    """Captions row by row, without downloading all of a large data set."""
    name, configuration = config.dataset_name, config.dataset_config_name
    split = choose_split(name, configuration, config.dataset_split_name)
    dataset = load_dataset(name, configuration, split=split, streaming=True)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    wanted = [config.caption_column] if config.caption_column else CAPTION_COLUMNS
    found = [column for column in wanted if column in columns]
    if not found:
        raise ValueError(
            f"{name} has the columns {', '.join(columns)}, and none called {' or '.join(wanted)}: name the one with"
            " the prompts as --caption_column."
        )
    return (row[found[0]] for row in dataset.select_columns(found[:1]))
