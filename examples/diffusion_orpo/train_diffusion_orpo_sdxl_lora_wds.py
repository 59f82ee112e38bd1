#!/usr/bin/env python
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from WebDataset shards."""

import argparse
import sys

from orpo.models.options import ModelOptions
from orpo.models.sdxl import StableDiffusionXL
from orpo.shards.stream import add_shard_arguments, load_shards
from orpo.training.arguments import add_training_arguments, check_training_arguments
from orpo.training.loop import train
from orpo.training.run import start_run, weight_dtype


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shard_arguments(parser)
    add_training_arguments(parser, StableDiffusionXL, train_batch_size=8)
    args = parser.parse_args(input_args)
    check_training_arguments(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    with start_run(args) as (accelerator, checkpoint):
        dtype = weight_dtype(accelerator)
        data = load_shards(args, accelerator, StableDiffusionXL, dtype)
        model = StableDiffusionXL.load(
            ModelOptions.from_flags(args), accelerator.device, dtype, encoders=not data.is_encoded
        )
        return train(args, accelerator, checkpoint, model, data)


if __name__ == "__main__":
    sys.exit(main())
