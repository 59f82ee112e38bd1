#!/usr/bin/env python
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from a data set."""

import argparse
import sys

from orpo.data.dataset import DataOptions, add_dataset_arguments, load_pairs
from orpo.data.encoding_cache import cache_encodings
from orpo.models.sdxl import StableDiffusionXL
from orpo.system.processes import main_process_first
from orpo.training.arguments import add_training_arguments, check_training_arguments
from orpo.training.loop import train
from orpo.training.run import start_run, weight_dtype


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_dataset_arguments(parser)
    add_training_arguments(parser, StableDiffusionXL, train_batch_size=4)
    args = parser.parse_args(input_args)
    check_training_arguments(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    with start_run(args) as (accelerator, checkpoint):
        with main_process_first(accelerator):  # the others then find the data in the cache
            data = load_pairs(DataOptions.from_flags(args))
        dtype = weight_dtype(accelerator)
        if args.cache_latents:
            data = cache_encodings(
                data,
                accelerator,
                identify=lambda: StableDiffusionXL.encoding_identity(args, dtype),
                load_model=lambda: StableDiffusionXL.load(args, accelerator.device, dtype, denoiser=False),
                vae_batch_size=args.vae_encode_batch_size,
                cache_dir=args.cache_dir,
            )
        model = StableDiffusionXL.load(args, accelerator.device, dtype, encoders=not data.is_encoded)
        return train(args, accelerator, checkpoint, model, data)


if __name__ == "__main__":
    sys.exit(main())
