#!/usr/bin/env python
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from WebDataset shards."""

import argparse
import sys
from pathlib import Path

from orpo.data.flags import IMAGES
from orpo.models.options import ModelOptions
from orpo.models.registry import SDXL
from orpo.shards.flags import SHARDS
from orpo.system.flags import assemble, make_parser, parse
from orpo.system.start import begin
from orpo.training.flags import TRAINING, check_training_flags


FLAGS = assemble([SHARDS, *SDXL.flags, IMAGES, *TRAINING], SDXL.defaults | {"train_batch_size": 8})


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    SDXL.check_flags(parser, args)
    check_training_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.models.sdxl import StableDiffusionXL
    from orpo.shards.stream import ShardOptions, load_shards
    from orpo.training.loop import train
    from orpo.training.run import start_run

    options = ModelOptions.from_flags(args)
    with start_run(args, FLAGS) as run:
        StableDiffusionXL.check(options, is_resumed=run.checkpoint is not None)
        data = load_shards(
            ShardOptions.from_flags(args),
            run.accelerator,
            lambda: StableDiffusionXL.encoding_identity(options, run.dtype),
        )
        model = StableDiffusionXL.load(options, run.accelerator.device, run.dtype, encoders=not data.is_encoded)
        return train(run, model, data)


if __name__ == "__main__":
    sys.exit(main())
