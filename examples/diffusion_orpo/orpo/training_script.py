"""What the training scripts share: their flags, and the way from these to a trained LoRA.

A script names its model family and its sources of pairs. Torch and the libraries on top of it take seconds to load, so
nothing here imports them before the flags are known to be good.
"""

import argparse
from collections.abc import Callable

from .data.flags import IMAGES
from .models.options import ModelOptions
from .models.registry import Family
from .runtime.flags import FlagGroup, assemble, make_parser, parse
from .runtime.start import begin
from .training.flags import TRAINING, check_training_flags


def training_flags(family: Family, sources: list[FlagGroup], **defaults: object) -> list[FlagGroup]:
    """All flags of a training script.

    Args:
        family: the one it trains.
        sources: the flags that name pairs.
        defaults: of flags for which this script has its own.
    """
    return assemble([*sources, *family.flags, IMAGES, *TRAINING], family.defaults | defaults)


def parse_training_flags(
    description: str,
    flags: list[FlagGroup],
    family: Family,
    input_args: list[str] | None,
    check_source: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None,
) -> argparse.Namespace:
    """Reads a command line, and stops with a message where flags contradict each other."""
    parser = make_parser(description, flags)
    args = parse(parser, flags, input_args)
    if check_source is not None:
        check_source(parser, args)
    family.check_flags(parser, args)
    check_training_flags(parser, args)
    return args


def train_lora(script: str, args: argparse.Namespace, flags: list[FlagGroup], *families: Family) -> int:
    """Opens the pairs, loads the model and trains its LoRA.

    Args:
        script: its name, for messages.
        args: the values of its flags.
        flags: their declarations.
        families: those that the script trains; the model's files say which of several it is.

    Returns:
        The exit status: see `train`.
    """
    begin(script)

    from .training.loop import train
    from .training.run import start_run

    options = ModelOptions.from_flags(args)
    with start_run(args, flags) as run:
        family = family_of(options, families).load_class()
        family.check(options, is_resumed=run.checkpoint is not None)
        data = load_data(args, run.accelerator, family, run.dtype)
        model = family.load(options, run.accelerator.device, run.dtype, encoders=not data.is_encoded)
        return train(run, model, data)


def family_of(options: ModelOptions, families: tuple[Family, ...]) -> Family:
    """The one of these families that the model belongs to; the first where it belongs to none, which `check` then refuses."""
    from .models.checks import read_index

    name = read_index(options, families[0].pipeline).get("_class_name")
    return next((family for family in families if family.pipeline == name), families[0])


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
    if getattr(args, "dataset_path", None) is not None:
        from .store.stream import ShardOptions, load_shards

        options = ModelOptions.from_flags(args)
        return load_shards(
            ShardOptions.from_flags(args), accelerator, lambda: family.encoding_identity(options, dtype)
        )
    from .data.dataset import DataOptions, load_pairs
    from .runtime.processes import main_process_first

    with main_process_first(accelerator):  # the others then find the data in the cache
        data = load_pairs(DataOptions.from_flags(args))
    return encode_pairs(data, args, accelerator, family, dtype) if args.cache_latents else data


def encode_pairs(data, args, accelerator, family: type, dtype):
    """The same pairs, encoded by the family's VAE and text encoders or found in the cache: see `cache_encodings`."""
    from .data.encoding_cache import cache_encodings

    options = ModelOptions.from_flags(args)
    return cache_encodings(
        data,
        accelerator,
        identify=lambda: family.encoding_identity(options, dtype),
        load_model=lambda: family.load(options, accelerator.device, dtype, denoiser=False),
        vae_batch_size=args.vae_encode_batch_size,
        cache_dir=args.cache_dir,
    )
