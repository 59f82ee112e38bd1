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
"""Did the LoRA get better? Draws base and LoRA from the same prompts and seeds, and lets scorers judge.

    python evaluate_lora.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --lora_weights=diffusion-sdxl-orpo --scorers pickscore imagereward --output_dir=evaluation

Writes the images, `results.json` and `index.html`, a page that shows every pair. Started again, it continues where it stopped.
"""

import argparse
import sys
from pathlib import Path

from orpo.evaluation.flags import EVALUATION, check_flags
from orpo.models.drawing_flags import DRAWING, DRAWN_MODEL
from orpo.runtime.flags import assemble, make_parser, parse
from orpo.runtime.start import begin


FLAGS = assemble([DRAWN_MODEL, *EVALUATION, DRAWING])


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    check_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.evaluation.run import evaluate
    from orpo.models.base_and_lora import BaseAndLora

    try:
        evaluate(args, BaseAndLora.from_flags)
    except ValueError as error:  # what the user can put right
        sys.exit(f"evaluate_lora.py: {error}")


if __name__ == "__main__":
    main()
