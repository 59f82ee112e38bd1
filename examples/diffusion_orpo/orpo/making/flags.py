"""The flags of make_preferences.py that other scripts don't have."""

import argparse
import math

from ..drawing.flags import PROMPTS, check_prompts
from ..runtime.flags import Flag, FlagGroup
from ..scoring.names import BUILT_IN, repeated_label


WINNERS = FlagGroup(
    "prompts",
    (
        Flag(
            "winners_dir",
            "Folder of your own images, each with a caption file (fox.txt for fox.png), or with a metadata.jsonl: each of"
            " them is preferred to the model's images of its caption. Takes the place of prompts and scorers.",
            is_source=True,
        ),
    ),
)

LORA = FlagGroup(
    "model",
    (
        Flag(
            "lora_weights",
            "A trained LoRA to draw with, for a second round: a folder, a file, or a name on the Hub.",
            is_source=True,
        ),
    ),
)

NUMBER = FlagGroup(
    "drawing",
    (
        Flag(
            "num_images_per_prompt",
            "Images of each prompt, or of each caption in --winners_dir. Default: 4, or 1.",
            int,
            lambda args: 4 if args.winners_dir is None else 1,
            range=(1,),
        ),
    ),
)

JUDGING = FlagGroup(
    "judging and output",
    (
        Flag(
            "scorers",
            f"Who prefers which image. Built in: {', '.join(BUILT_IN)}."
            " Your own: my_module:my_function or path/to/file.py:my_function, a function of images and prompts that"
            " returns a score for each, the higher the better. Default: nobody; judge the images yourself with"
            " label_preferences.py.",
            nargs="+",
        ),
        Flag(
            "combine",
            "Several scorers: all must prefer the same image (consensus), or their weighted sum decides.",
            default="consensus",
            choices=("consensus", "sum"),
        ),
        Flag(
            "weights", "Weights of the scorers, in their order, for --combine=sum. Default: equal.", float, nargs="+"
        ),
        Flag(
            "min_margin",
            "By how much an image must be better, in standard deviations of a scorer among the images of a prompt.",
            float,
            0.25,
            range=(0,),
        ),
        Flag(
            "pairs",
            "The pair of each prompt that differs most (best against worst, with one scorer), or all with the margin.",
            default="best_worst",
            choices=("best_worst", "all"),
        ),
        Flag("output_dir", "Folder for images/ and pairs/.", default="preferences"),
    ),
)

# A script adds the flags of the model, and of drawing with it.
MAKING = [PROMPTS, WINNERS, LORA, NUMBER, JUDGING]
WITHOUT_WINNERS = ("prompt_file", "dataset_name", "scorers")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    if args.winners_dir is not None:
        given = [f"--{name}" for name in WITHOUT_WINNERS if getattr(args, name) is not None]
        if given:
            parser.error(f"{', '.join(given)}: means nothing with --winners_dir, which brings prompts and winners.")
    elif args.num_images_per_prompt < 2:
        parser.error("--num_images_per_prompt must be at least 2: images of a prompt are compared with each other.")
    check_prompts(parser, args)
    if (label := repeated_label(args.scorers or ())) is not None:
        parser.error(f"--scorers: names must differ; {label} is given twice.")
    if args.weights is not None:
        if args.combine != "sum" or len(args.weights) != len(args.scorers or ()):
            parser.error("--weights: one for each of the --scorers, with --combine=sum.")
        if not all(0 < weight < math.inf for weight in args.weights):
            parser.error("--weights must be positive, and finite.")
