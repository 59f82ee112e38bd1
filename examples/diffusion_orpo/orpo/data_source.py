"""Pairs from a data set or from shards, whichever the flags name."""

import argparse

import torch
from accelerate import Accelerator

from .data.dataset import DataOptions, PreferenceData, add_dataset_arguments, load_pairs
from .data.encoding_cache import cache_encodings
from .shards.stream import ShardData, add_shard_arguments, load_shards
from .system.processes import main_process_first


DATASET_FLAGS = ("dataset_config_name", "dataset_split_name", "max_train_samples", "cache_latents")
SHARD_FLAGS = ("num_train_examples", "shuffle_buffer_size", "max_bad_samples")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of both sources."""
    add_dataset_arguments(parser, required=False)
    add_shard_arguments(parser, required=False)


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where not exactly one source is named, or a flag of the other one is given."""
    if (args.dataset_name is None) == (args.dataset_path is None):
        parser.error("Name one source of pairs: --dataset_name for a data set, or --dataset_path for shards.")
    source, others = ("shards", DATASET_FLAGS) if args.dataset_path else ("a data set", SHARD_FLAGS)
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing for pairs from {source}.")


def load_data(args, accelerator: Accelerator, family: type, dtype: torch.dtype) -> PreferenceData | ShardData:
    """Opens the source that the flags name, and encodes it where they say so.

    Args:
        args: the flags.
        accelerator: of the run.
        family: the model family, such as `StableDiffusion3`.
        dtype: of its frozen weights.

    Raises:
        ValueError, OSError: see `load_pairs` and `load_shards`.
    """
    if args.dataset_path is not None:
        return load_shards(args, accelerator, family, dtype)
    with main_process_first(accelerator):  # the others then find the data in the cache
        data = load_pairs(DataOptions.from_flags(args))
    return encode_pairs(data, args, accelerator, family, dtype) if args.cache_latents else data


def encode_pairs(
    data: PreferenceData, args, accelerator: Accelerator, family: type, dtype: torch.dtype
) -> PreferenceData:
    """The same pairs, encoded by the family's VAE and text encoders or found in the cache: see `cache_encodings`."""
    return cache_encodings(
        data,
        accelerator,
        identify=lambda: family.encoding_identity(args, dtype),
        load_model=lambda: family.load(args, accelerator.device, dtype, denoiser=False),
        vae_batch_size=args.vae_encode_batch_size,
        cache_dir=args.cache_dir,
    )
