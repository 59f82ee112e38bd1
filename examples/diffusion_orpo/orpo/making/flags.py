"""The flags of make_preferences.py."""

import argparse
import math

from ..scoring.names import BUILT_IN, scorer_label
from ..system.flags import Flag, FlagGroup


WINNERS = FlagGroup(
    "prompts",
    (
        Flag(
            "winners_dir",
            "Folder of your own images, each with a caption file (fox.txt for fox.png), or with a metadata.jsonl: every one"
            " of them is preferred to what the model draws from its caption. Takes the place of prompts and scorers.",
            is_source=True,
        ),
    ),
)

MODEL = FlagGroup(
    "model",
    (
        Flag(
            "pretrained_model_name_or_path",
            "Path to pretrained model or model identifier from huggingface.co/models.",
            required=True,
            is_source=True,
        ),
        Flag(
            "pretrained_vae_model_name_or_path",
            "Path or identifier of a VAE to use instead of the model's own, such as madebyollin/sdxl-vae-fp16-fix.",
            is_source=True,
        ),
        Flag("revision", "Revision of the pretrained model."),
        Flag("variant", "Variant of the pretrained model's files, e.g. fp16."),
        Flag("cache_dir", "Folder for downloaded models."),
        Flag(
            "lora_weights",
            "A trained LoRA to draw with, for a second round: a folder, a file, or a name on the Hub.",
            is_source=True,
        ),
        Flag("lora_scale", "Strength of the LoRA.", float, 1.0, range=(0,)),
        Flag(
            "prediction_type",
            "What the U-Net predicts, where the training was told so. Default: what the model's scheduler says.",
            choices=("epsilon", "v_prediction"),
        ),
        Flag(
            "dtype",
            "Precision to draw in. Default: fp16 on a GPU, fp32 on a CPU.",
            choices=("fp32", "fp16", "bf16"),
        ),
    ),
)

DRAWING = FlagGroup(
    "drawing",
    (
        Flag(
            "num_images_per_prompt",
            "Images of each prompt, or of each caption in --winners_dir. Default: 4, or 1.",
            int,
            lambda args: 4 if args.winners_dir is None else 1,
            range=(1,),
        ),
        Flag("resolution", "Pixels a side. Default: what the model was made for.", int, range=(8,)),
        Flag("num_inference_steps", "Sampling steps per image.", int, 30, range=(1,)),
        Flag("guidance_scale", "Classifier-free guidance.", float, 5.0, range=(0,)),
        Flag("max_sequence_length", "Tokens of a prompt that T5 reads, in families that have it.", int, range=(1,)),
        Flag(
            "seed",
            "Seed of the first image; each further one has the next. Another round wants others.",
            int,
            0,
            range=(0,),
        ),
        Flag("batch_size", "Images drawn at once, and scored at once.", int, 4, range=(1,)),
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
        Flag("weights", "Of the scorers, in their order, for --combine=sum. Default: all alike.", float, nargs="+"),
        Flag(
            "min_margin",
            "By how much an image must be better, in standard deviations of a scorer among the images of a prompt.",
            float,
            0.25,
            range=(0,),
        ),
        Flag(
            "pairs",
            "Of each prompt the pair that differs most (best against worst, with one scorer), or all with the margin.",
            default="best_worst",
            choices=("best_worst", "all"),
        ),
        Flag("output_dir", "Folder for images/ and pairs/.", default="preferences"),
    ),
)

# A script adds the flags that choose prompts.
MAKING = [WINNERS, MODEL, DRAWING, JUDGING]
WITHOUT_WINNERS = ("prompt_file", "dataset_name", "scorers")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    if args.winners_dir is not None:
        given = [f"--{name}" for name in WITHOUT_WINNERS if getattr(args, name) is not None]
        if given:
            parser.error(f"{', '.join(given)}: means nothing with --winners_dir, which brings prompts and winners.")
    elif args.num_images_per_prompt < 2:
        parser.error("--num_images_per_prompt must be at least 2: images of a prompt are compared with each other.")
    if args.prompt_file is not None and args.dataset_name is not None:
        parser.error("--prompt_file and --dataset_name: choose one.")
    if args.prompt_file is not None and not args.prompt_file.exists():
        parser.error(f"--prompt_file={args.prompt_file} does not exist.")
    if args.scorers is not None:
        labels = [scorer_label(name) for name in args.scorers]
        if len(set(labels)) < len(labels):
            parser.error(f"--scorers: names must differ; got {', '.join(labels)}.")
    if args.weights is not None:
        if args.combine != "sum" or len(args.weights) != len(args.scorers or ()):
            parser.error("--weights: one for each of the --scorers, with --combine=sum.")
        if not all(0 < weight < math.inf for weight in args.weights):
            parser.error("--weights must be positive, and finite.")
