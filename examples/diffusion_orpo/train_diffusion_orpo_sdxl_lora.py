#!/usr/bin/env python
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from a data set."""

import argparse
import sys

from orpo.data.flags import DATA_SET, IMAGES
from orpo.models.options import ModelOptions
from orpo.models.registry import SDXL
from orpo.system.flags import assemble, make_parser, parse
from orpo.training.flags import TRAINING, check_training_flags


FLAGS = assemble([DATA_SET, *SDXL.flags, IMAGES, *TRAINING], SDXL.defaults)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    SDXL.check_flags(parser, args)
    check_training_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.data.dataset import load_pairs
    from orpo.data.encoding_cache import cache_encodings
    from orpo.models.sdxl import StableDiffusionXL
    from orpo.system.processes import main_process_first
    from orpo.training.loop import train
    from orpo.training.run import start_run

    options = ModelOptions.from_flags(args)
    StableDiffusionXL.check(options)
    with start_run(args, FLAGS) as run:
        with main_process_first(run.accelerator):  # the others then find the data in the cache
            data = load_pairs(args)
        if args.cache_latents:
            data = cache_encodings(args, run.accelerator, StableDiffusionXL, run.dtype, data)
        model = StableDiffusionXL.load(options, run.accelerator.device, run.dtype, encoders=not data.is_encoded)
        return train(run, model, data)


if __name__ == "__main__":
    sys.exit(main())
