"""The flags of evaluate_lora.py."""

import argparse
from pathlib import Path

from ..scoring.names import BUILT_IN, scorer_label
from ..system.flags import Flag, FlagGroup


CAPTION_COLUMNS = ("caption", "prompt", "Prompt", "text")

MODEL = FlagGroup(
    "model",
    (
        Flag(
            "pretrained_model_name_or_path",
            "Path to pretrained model or model identifier from huggingface.co/models: what the LoRA was trained on.",
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
        Flag(
            "lora_weights",
            "The trained LoRA: a folder, a file, or a name on the Hub.",
            required=True,
            is_source=True,
        ),
        Flag("lora_scale", "Strength of the LoRA.", float, 1.0),
        Flag(
            "prediction_type",
            "What the U-Net predicts, where the training was told so. Default: what the model's scheduler says.",
            choices=("epsilon", "v_prediction"),
        ),
        Flag(
            "dtype",
            "Precision to draw in. Default: fp16 or bf16 on a GPU, as the family wants it; fp32 on a CPU.",
            choices=("fp32", "fp16", "bf16"),
        ),
    ),
)

PROMPTS = FlagGroup(
    "prompts",
    (
        Flag("prompt_file", "Text file with a prompt a line. Default: those built in.", Path),
        Flag("dataset_name", "Data set to take prompts from: on the Hub, or a local folder.", is_source=True),
        Flag("dataset_config_name", "Configuration of the data set, if it has several."),
        Flag("dataset_split_name", "Split to take prompts from. Default: the only one, else train."),
        Flag(
            "caption_column",
            f"Column of the prompts. Default: the first there is of {', '.join(CAPTION_COLUMNS)}.",
        ),
        Flag("num_prompts", "Draw the first so many different prompts.", int, 100, range=(1,)),
    ),
)

DRAWING = FlagGroup(
    "drawing",
    (
        Flag("num_images_per_prompt", "Images per prompt and model.", int, 1, range=(1,)),
        Flag("resolution", "Pixels a side. Default: what the model was made for.", int, range=(1,)),
        Flag("num_inference_steps", "Sampling steps per image.", int, 30, range=(1,)),
        Flag("guidance_scale", "Classifier-free guidance. Default: as in training's validation.", float),
        Flag(
            "max_sequence_length",
            "Tokens of a prompt that are read, in families that have the flag. Default: as in training.",
            int,
            range=(1,),
        ),
        Flag("seed", "Seed of the first image; each further one has the next.", int, 0),
        Flag("batch_size", "Images drawn at once.", int, 4, range=(1,)),
    ),
)

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

FLAGS = [MODEL, PROMPTS, DRAWING, JUDGING]


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    if args.prompt_file is not None and args.dataset_name is not None:
        parser.error("--prompt_file and --dataset_name: choose one.")
    if args.prompt_file is not None and not args.prompt_file.exists():
        parser.error(f"--prompt_file={args.prompt_file} does not exist.")
    labels = [scorer_label(name) for name in args.scorers]
    if len(set(labels)) < len(labels):
        parser.error(f"--scorers: names must differ; got {', '.join(labels)}.")
