#!/usr/bin/env python
"""Did the LoRA get better? Draws base and LoRA from the same prompts and seeds, and lets scorers judge.

    python evaluate_lora.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --lora_weights=diffusion-sdxl-orpo --scorers pickscore imagereward --output_dir=evaluation

Writes the images, `results.json` and `index.html`, a page that shows every pair. Started again, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from orpo.evaluation.flags import FLAGS, check_flags
from orpo.system.flags import make_parser, parse
from orpo.system.start import begin


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
