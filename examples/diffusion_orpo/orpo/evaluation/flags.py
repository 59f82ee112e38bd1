"""The flags of evaluate_lora.py that other scripts don't have."""

import argparse
from pathlib import Path

from ..drawing.flags import PROMPTS, check_prompts
from ..runtime.flags import Flag, FlagGroup
from ..scoring.names import BUILT_IN, repeated_label


LORA = FlagGroup(
    "model",
    (
        Flag(
            "lora_weights",
            "The trained LoRA: a folder, a file, or a name on the Hub.",
            required=True,
            is_source=True,
        ),
    ),
)

NUMBER = FlagGroup("drawing", (Flag("num_images_per_prompt", "Images per prompt and model.", int, 1, range=(1,)),))

JUDGING = FlagGroup(
    "judging and output",
    (
        Flag(
            "scorers",
            f"Built in: {', '.join(BUILT_IN)}. Your own: my_module:my_function or path/to/file.py:my_function, a "
            "function of images and prompts that returns a score for each, the higher the better.",
            nargs="+",
            default=["pickscore"],
        ),
        Flag("output_dir", "Folder for all that is written.", Path, Path("evaluation")),
        Flag(
            "base_images_dir",
            "Folder of the base's images, which several evaluations may share. Default: base, in --output_dir.",
            Path,
            lambda args: args.output_dir / "base",
        ),
    ),
)

# A script adds the flags of the model, and of drawing with it.
EVALUATION = [LORA, PROMPTS, NUMBER, JUDGING]


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    check_prompts(parser, args)
    if (label := repeated_label(args.scorers)) is not None:
        parser.error(f"--scorers: names must differ; {label} is given twice.")
