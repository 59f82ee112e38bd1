#!/usr/bin/env python
"""Aligns Stable Diffusion 1.x or 2.x with human preferences: trains a LoRA with ORPO on pairs from a data set or from shards."""

import argparse
import sys

from orpo.data_source import add_data_arguments, check_data_arguments, load_data
from orpo.models.options import ModelOptions
from orpo.models.sd import StableDiffusion
from orpo.training.arguments import add_training_arguments, check_training_arguments
from orpo.training.loop import train
from orpo.training.run import start_run, weight_dtype


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, StableDiffusion, train_batch_size=4)
    args = parser.parse_args(input_args)
    check_data_arguments(parser, args)
    check_training_arguments(parser, args, StableDiffusion.resolution_step)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    with start_run(args) as (accelerator, checkpoint):
        dtype = weight_dtype(accelerator)
        data = load_data(args, accelerator, StableDiffusion, dtype)
        model = StableDiffusion.load(
            ModelOptions.from_flags(args), accelerator.device, dtype, encoders=not data.is_encoded
        )
        return train(args, accelerator, checkpoint, model, data)


if __name__ == "__main__":
    sys.exit(main())
