"""The flags that the training scripts share."""

import argparse
import os
import sys


# What the model draws when the run is validated: a face, a medium, a place and a relation between objects.
VALIDATION_PROMPTS = [
    "close-up portrait of an old fisherman laughing, window light, 85mm photograph",
    "a fox reading a newspaper in a cafe, watercolor on rough paper",
    "a quiet harbor at dawn, fog over wooden boats, wide angle, highly detailed",
    "a red teapot left of a stack of three blue books on a marble table",
]


def add_training_arguments(parser: argparse.ArgumentParser, family: type, train_batch_size: int) -> None:
    """Adds the flags of model, images, optimization, validation and output.

    Args:
        parser: gets the flags; the script adds those of its data source.
        family: the model family, such as `StableDiffusionXL`; adds flags of its own and decides some defaults.
        train_batch_size: the default of `--train_batch_size`, in pairs per device.
    """
    group = parser.add_argument_group("model")
    _add_model_arguments(group, family.lora_layers)
    family.add_arguments(group)
    _add_image_arguments(parser.add_argument_group("images and captions"))
    group = parser.add_argument_group("loss")
    _add_loss_arguments(group)
    family.noise_process_class.add_arguments(group)
    _add_optimization_arguments(parser.add_argument_group("optimization"), train_batch_size)
    _add_validation_arguments(parser.add_argument_group("validation"))
    _add_output_arguments(parser.add_argument_group("output"), f"diffusion-orpo-lora-{family.slug}")
    parser.set_defaults(**family.defaults)


# Lowest and highest value that a flag may have, the highest left out where there is none.
RANGES = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0,),
    "adam_weight_decay": (0,),
    "beta_orpo": (0,),
    "checkpointing_steps": (1,),
    "checkpoints_total_limit": (1,),
    "dataloader_num_workers": (0,),
    "ddp_timeout": (1,),
    "gradient_accumulation_steps": (1,),
    "guidance_scale": (0,),
    "learning_rate": (0,),
    "logit_mean": (-10, 10),
    "logit_std": (0, 10),
    "lora_dropout": (0, 1),
    "lr_num_cycles": (1,),
    "lr_warmup_steps": (0,),
    "max_bad_samples": (0, 1),
    "max_grad_norm": (0,),
    "max_sequence_length": (1, 512),
    "max_train_samples": (1,),
    "max_train_steps": (1,),
    "mode_scale": (-1, 1.75),
    "num_train_epochs": (1,),
    "num_validation_images": (1,),
    "num_validation_pairs": (0,),
    "proportion_empty_prompts": (0, 1),
    "rank": (1,),
    "resolution": (8,),
    "seed": (0, 2**32 - 1),
    "shuffle_buffer_size": (1,),
    "snr_gamma": (1e-6,),
    "train_batch_size": (1,),
    "vae_encode_batch_size": (1,),
    "validation_inference_steps": (1,),
    "validation_steps": (1,),
}


def check_training_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, resolution_step: int = 8
) -> None:
    """Stops with a message where flags contradict each other or lie out of range, and fills in derived defaults.

    Args:
        parser: complains.
        args: what it read.
        resolution_step: --resolution is a multiple of it.
    """
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(
            f"--hub_token with --report_to={args.report_to}: the tracker could record your token with the command line."
            " Leave --hub_token out and run `hf auth login`."
        )
    for name, (lowest, *highest) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not lowest <= value <= (highest[0] if highest else sys.float_info.max):
            limits = f"between {lowest} and {highest[0]}" if highest else f"at least {lowest}, and finite"
            parser.error(f"--{name} must be {limits}; got {value}.")
    if args.resolution % resolution_step != 0:
        parser.error(f"--resolution must be a multiple of {resolution_step}; got {args.resolution}.")
    if getattr(args, "cache_latents", False) and args.random_crop:
        parser.error("--cache_latents keeps one crop of each image, the centre: leave --random_crop out.")
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.validation_scorer is not None:
        _check_validation_scorer(parser, args)


def _check_validation_scorer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.run_validation:
        parser.error("--validation_scorer needs --run_validation.")
    if os.environ.get("RANK", "0") != "0":
        return  # the main process judges, and finds out whether it can
    from ..scoring.scorers import check_scorer

    try:
        check_scorer(args.validation_scorer, args.resolution)
    except ValueError as error:
        parser.error(f"--validation_scorer: {error}")


def _add_model_arguments(group, lora_layers: str) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="Path to pretrained model or model identifier from huggingface.co/models.",
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="Path or identifier of a VAE to use instead of the model's own, such as madebyollin/sdxl-vae-fp16-fix, "
        "which works in float16. A VAE whose config says `force_upcast` runs in float32.",
    )
    group.add_argument("--revision", help="Revision of the pretrained model.")
    group.add_argument("--variant", help="Variant of the pretrained model's files, e.g. fp16.")
    group.add_argument("--cache_dir", help="Folder for downloaded models and data sets.")
    group.add_argument(
        "--quantize_base",
        choices=["8bit", "nf4"],
        help="Load the denoiser's linear layers in 8 or 4 bits with bitsandbytes: less memory, slower. The LoRA trains in "
        "float32 all the same, and loads into the model that is not quantized. Needs a GPU.",
    )
    group.add_argument("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    group.add_argument("--lora_alpha", type=float, help="The LoRA is scaled by alpha / rank. Default: the rank.")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Dropout probability in the LoRA layers.")
    group.add_argument(
        "--lora_layers",
        default=lora_layers,
        help="Comma-separated names of the denoiser's modules that get a LoRA. Default: all attention projections, "
        "and in FLUX.1 the feed-forward layers.",
    )


def _add_image_arguments(group) -> None:
    group.add_argument(
        "--resolution", type=int, default=1024, help="Images are resized by their shorter side and cropped to this."
    )
    group.add_argument(
        "--random_crop", action="store_true", help="Crop at random, both images of a pair alike. Default: the centre."
    )
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the pairs, both images alike.")
    group.add_argument(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        help="Share of captions replaced by the empty string, from 0 to 1.",
    )
    group.add_argument(
        "--vae_encode_batch_size", type=int, default=8, help="Images that the VAE encodes at once; bounds its memory."
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="Processes that decode images. 0: the main process decodes them.",
    )


def _add_loss_arguments(group) -> None:
    group.add_argument(
        "--beta_orpo",
        type=float,
        default=0.1,
        help="Weight of the odds ratio term: 0 is supervised fine-tuning on winners, larger values push harder.",
    )


def _add_optimization_arguments(group, train_batch_size: int) -> None:
    group.add_argument("--seed", type=int, help="Seed of everything random. Default: drawn, and logged.")
    group.add_argument(
        "--train_batch_size", type=int, default=train_batch_size, help="Pairs per device and forward pass."
    )
    group.add_argument("--num_train_epochs", type=int, default=1, help="Passes over the pairs.")
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Forward passes whose gradients make one step."
    )
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations backward: less memory, slower."
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="Compile the denoiser's repeated blocks with torch.compile: a minute at the start, then faster steps.",
    )
    group.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by processes, accumulation steps and batch size.",
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        help="Course of the learning rate over the run.",
    )
    group.add_argument(
        "--lr_warmup_steps", type=int, default=0, help="Optimizer steps of warm-up; `constant` has none."
    )
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="Power of the polynomial scheduler.")
    group.add_argument("--use_8bit_adam", action="store_true", help="Use 8-bit AdamW from bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of Adam's first moment.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of Adam's second moment.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Weight decay of AdamW.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradient norm limit; 0 is no limit.")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of the frozen weights and of the forward pass; the LoRA trains in float32 in any case. "
        "Default: as in the accelerate configuration.",
    )
    group.add_argument(
        "--ddp_timeout",
        type=int,
        default=1800,
        help="Seconds that processes wait for one another, also for the main one to draw validation images and upload, "
        "before the run ends. Reading the data set may take longer.",
    )
    group.add_argument("--allow_tf32", action="store_true", help="Use TF32 for float32 matrix products on CUDA.")


def _add_validation_arguments(group) -> None:
    group.add_argument(
        "--run_validation",
        action="store_true",
        help="Measure held-out pairs and draw images during training, and both with and without the LoRA after it.",
    )
    group.add_argument(
        "--num_validation_pairs",
        type=int,
        default=64,
        help="Pairs, at most, kept out of training to measure preference accuracy on, with --run_validation: of a data set "
        "such that those that share an image stay together, of shards the first samples.",
    )
    group.add_argument("--validation_steps", type=int, default=200, help="Optimizer steps between validations.")
    group.add_argument(
        "--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, help="Prompts to draw. Default: four built in."
    )
    group.add_argument("--num_validation_images", type=int, default=1, help="Images per validation prompt.")
    group.add_argument("--validation_inference_steps", type=int, default=25, help="Sampling steps per image.")
    group.add_argument("--validation_guidance_scale", type=float, default=5.0, help="Classifier-free guidance.")
    group.add_argument(
        "--validation_scorer",
        help="Judge of the validation images: logs how often the LoRA's beat the base's from the same seeds. A built-in "
        "scorer (pickscore, hpsv2, imagereward, aesthetic, clip, saturation, high_frequency), or your own as "
        "my_module:my_function or path/to/file.py:my_function. Its model stays in the first GPU's memory.",
    )


def _add_output_arguments(group, name: str) -> None:
    group.add_argument("--output_dir", default=name, help="Folder of checkpoints, logs and the trained LoRA.")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep this many of the newest. Default: all.")
    group.add_argument(
        "--resume_from_checkpoint",
        help='A checkpoint folder (a path, or a name in --output_dir), or "latest": the newest in --output_dir, '
        "if there is one.",
    )
    group.add_argument(
        "--report_to",
        default="tensorboard",
        help='"tensorboard", "wandb", "comet_ml", "all" (those installed) or "none".',
    )
    group.add_argument("--tracker_name", default=name, help="Project name in the tracker.")
    group.add_argument("--logging_dir", default="logs", help="TensorBoard's folder inside --output_dir.")
    group.add_argument("--push_to_hub", action="store_true", help="Upload LoRA, model card and images at the end.")
    group.add_argument(
        "--hub_token",
        help="Token for the upload. Default: the one of `hf auth login` or HF_TOKEN, which is safer: accelerate prints the "
        "command of a run that failed.",
    )
    group.add_argument("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")
