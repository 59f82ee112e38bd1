"""The flags of scripts that take pairs from a data set or from shards, whichever they name."""

import argparse

from .data.flags import DATA_SET, check_reading
from .runtime.flags import optional
from .store.flags import SHARDS


SOURCES = [optional(DATA_SET), optional(SHARDS)]


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where not exactly one source is named, or a flag of the other one is given."""
    if (args.dataset_name is None) == (args.dataset_path is None):
        parser.error("Name one source of pairs: --dataset_name for a data set, or --dataset_path for shards.")
    source, others = ("shards", DATA_SET) if args.dataset_path else ("a data set", SHARDS)
    for flag in others.flags:
        if flag.name in args and getattr(args, flag.name) != parser.get_default(flag.name):
            parser.error(f"--{flag.name} means nothing for pairs from {source}.")
    check_reading(parser, args)
