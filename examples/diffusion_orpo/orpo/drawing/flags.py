"""The flags that choose prompts to draw."""

import argparse
from pathlib import Path

from ..runtime.flags import Flag, FlagGroup


CAPTION_COLUMNS = ("caption", "prompt", "Prompt", "text")

PROMPTS = FlagGroup(
    "prompts",
    (
        Flag("prompt_file", "Text file with one prompt per line. Default: the built-in prompts.", Path),
        Flag("dataset_name", "Data set to take prompts from: on the Hub, or a local folder.", is_source=True),
        Flag("dataset_config_name", "Configuration of the data set, if it has several."),
        Flag("dataset_split_name", "Split to take prompts from. Default: the only one, else train."),
        Flag(
            "caption_column",
            f"Column of the prompts. Default: the first that exists of {', '.join(CAPTION_COLUMNS)}.",
        ),
        Flag("num_prompts", "Draw at most this many different prompts, the first ones.", int, 100, range=(1,)),
    ),
)


def check_prompts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where prompts have two sources, or a file that does not exist."""
    if args.prompt_file is not None and args.dataset_name is not None:
        parser.error("--prompt_file and --dataset_name: choose one.")
    if args.prompt_file is not None and not args.prompt_file.exists():
        parser.error(f"--prompt_file={args.prompt_file} does not exist.")
