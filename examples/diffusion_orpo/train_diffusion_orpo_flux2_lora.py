#!/usr/bin/env python
"""Aligns FLUX.2, klein or dev, with human preferences: trains a LoRA with ORPO on pairs from a data set or from shards."""

import argparse
import sys
from pathlib import Path

from orpo.data.flags import IMAGES
from orpo.data_source import SOURCES, check_source
from orpo.models.options import ModelOptions
from orpo.models.registry import FLUX2, FLUX2_KLEIN
from orpo.system.flags import assemble, make_parser, parse
from orpo.system.start import begin
from orpo.training.flags import TRAINING, check_training_flags


FLAGS = assemble([*SOURCES, *FLUX2_KLEIN.flags, IMAGES, *TRAINING], FLUX2_KLEIN.defaults)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    check_source(parser, args)
    FLUX2_KLEIN.check_flags(parser, args)
    check_training_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.data_source import load_data
    from orpo.models.checks import read_index
    from orpo.training.loop import train
    from orpo.training.run import start_run

    options = ModelOptions.from_flags(args)
    is_dev = read_index(options, FLUX2_KLEIN.pipeline).get("_class_name") == FLUX2.pipeline
    family = (FLUX2 if is_dev else FLUX2_KLEIN).load_class()
    with start_run(args, FLAGS) as run:
        family.check(options)
        data = load_data(args, run.accelerator, family, run.dtype)
        model = family.load(options, run.accelerator.device, run.dtype, encoders=not data.is_encoded)
        return train(run, model, data)


if __name__ == "__main__":
    sys.exit(main())
