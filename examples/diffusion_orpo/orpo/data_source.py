"""Pairs from a data set or from shards, whichever the flags name."""

import argparse

from .data.flags import DATA_SET, check_reading
from .shards.flags import SHARDS
from .system.flags import optional


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


def load_data(args, accelerator, family: type, dtype):
    """Opens the source that the flags name, and encodes it where they say so.

    Args:
        args: the flags.
        accelerator: of the run.
        family: the model family, such as `StableDiffusion3`.
        dtype: of its frozen weights.

    Returns:
        A `PreferenceData` or a `ShardData`.

    Raises:
        ValueError, OSError: see `load_pairs` and `load_shards`.
    """
    if args.dataset_path is not None:
        from .shards.stream import ShardOptions, load_shards

        options = family.options_class.from_flags(args)
        return load_shards(
            ShardOptions.from_flags(args), accelerator, lambda: family.encoding_identity(options, dtype)
        )
    from .data.dataset import DataOptions, load_pairs
    from .system.processes import main_process_first

    with main_process_first(accelerator):  # the others then find the data in the cache
        data = load_pairs(DataOptions.from_flags(args))
    return encode_pairs(data, args, accelerator, family, dtype) if args.cache_latents else data


def encode_pairs(data, args, accelerator, family: type, dtype):
    """The same pairs, encoded by the family's VAE and text encoders or found in the cache: see `cache_encodings`."""
    from .data.encoding_cache import cache_encodings

    options = family.options_class.from_flags(args)
    return cache_encodings(
        data,
        accelerator,
        identify=lambda: family.encoding_identity(options, dtype),
        load_model=lambda: family.load(options, accelerator.device, dtype, denoiser=False),
        vae_batch_size=args.vae_encode_batch_size,
        cache_dir=args.cache_dir,
    )
