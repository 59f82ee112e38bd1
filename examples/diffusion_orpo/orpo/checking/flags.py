"""The flags of check_preferences.py that other scripts don't have."""

import argparse
from pathlib import Path

from ..runtime.cores import num_cores
from ..runtime.flags import Flag, FlagGroup


PROMPTS = FlagGroup(
    "prompts",
    (
        Flag(
            "max_sequence_length",
            "Tokens of a prompt that training will read, for tokenizers other than CLIP's. Default: what the tokenizer says.",
            int,
            range=(1,),
        ),
    ),
)

OUTPUT = FlagGroup(
    "output",
    (
        Flag("output_dir", "Folder for report.json and contact_sheet.png.", Path, Path("preference_check")),
        Flag("num_sample_pairs", "Pairs to show, chosen at random; 0: none.", int, 12, range=(0,)),
        Flag(
            "filter",
            "New folder for a copy, as parquet, without the pairs that it complains about: contradictions, duplicates, pairs of an image "
            "with itself, bad rows, low agreement; and without ties.",
            Path,
        ),
        Flag(
            "num_scored_pairs",
            "Pairs that --scorers judge, chosen at random; 0: all.",
            int,
            1000,
            range=(0,),
        ),
        Flag("num_workers", "Processes that decode. Default: one per core.", int, lambda _: num_cores(), range=(0,)),
    ),
)


def check_filter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where --filter would write over something."""
    if args.filter is not None and args.filter.exists() and (args.filter.is_file() or any(args.filter.iterdir())):
        parser.error(f"--filter={args.filter} already exists: name a new folder.")
