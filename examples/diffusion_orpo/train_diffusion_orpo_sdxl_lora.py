#!/usr/bin/env python
# coding=utf-8
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from a data set."""

import argparse
import sys
from pathlib import Path

from orpo.data.flags import DATA_SET, IMAGES, check_reading
from orpo.models.options import ModelOptions
from orpo.models.registry import SDXL
from orpo.system.flags import assemble, make_parser, parse
from orpo.system.start import begin
from orpo.training.flags import TRAINING, check_training_flags


FLAGS = assemble([DATA_SET, *SDXL.flags, IMAGES, *TRAINING], SDXL.defaults)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    check_reading(parser, args)
    SDXL.check_flags(parser, args)
    check_training_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.data.dataset import DataOptions, load_pairs
    from orpo.data.encoding_cache import cache_encodings
    from orpo.models.sdxl import StableDiffusionXL
    from orpo.system.processes import main_process_first
    from orpo.training.loop import train
    from orpo.training.run import start_run

    options = ModelOptions.from_flags(args)
    with start_run(args, FLAGS) as run:
        StableDiffusionXL.check(options, is_resumed=run.checkpoint is not None)
        with main_process_first(run.accelerator):  # the others then find the data in the cache
            data = load_pairs(DataOptions.from_flags(args))
        if args.cache_latents:
            data = cache_encodings(
                data,
                run.accelerator,
                identify=lambda: StableDiffusionXL.encoding_identity(options, run.dtype),
                load_model=lambda: StableDiffusionXL.load(options, run.accelerator.device, run.dtype, denoiser=False),
                vae_batch_size=args.vae_encode_batch_size,
                cache_dir=args.cache_dir,
            )
        model = StableDiffusionXL.load(options, run.accelerator.device, run.dtype, encoders=not data.is_encoded)
        return train(run, model, data)


if __name__ == "__main__":
    sys.exit(main())
