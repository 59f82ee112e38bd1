"""The flags of loss, optimization, validation and output."""

import argparse
import os

from ..runtime.flags import Flag, FlagGroup, truth


# What the model draws when the run is validated: a face, a medium, a place and a relation between objects.
VALIDATION_PROMPTS = [
    "close-up portrait of an old fisherman laughing, window light, 85mm photograph",
    "a fox reading a newspaper in a cafe, watercolor on rough paper",
    "a quiet harbor at dawn, fog over wooden boats, wide angle, highly detailed",
    "a red teapot left of a stack of three blue books on a marble table",
]

LOSS = FlagGroup(
    "loss",
    (
        Flag(
            "beta_orpo",
            "Strength as in the paper, in place of --loser_share: the weight of the odds ratio term; 0 is supervised fine-tuning on "
            "the chosen images. It is strong at small errors and weak at large ones, so it means something else for every "
            "model and noise level.",
            float,
            range=(0,),
            resume="warn",
            card=True,
        ),
        Flag(
            "loser_share",
            "Strength, above 0 and below 0.5: the rejected image's share of a pair's gradient while both images are predicted "
            "equally well. It means the same at every noise level and for every model. 0.375 is safe, 0.475 strong. "
            "Default: 0.375, unless --beta_orpo is given.",
            float,
            lambda args: 0.375 if args.beta_orpo is None else None,
            range=(0, 0.5),
            resume="same",
            card=True,
        ),
        Flag(
            "odds_temperature",
            "Flattens the odds ratio's sigmoid where it is above 1: pairs whose winner has the larger error, as many of those with "
            "wrong labels have, then weigh less. 4 is good where people often disagree; 1 is ORPO as published.",
            float,
            1.0,
            range=(1e-3,),
            resume="warn",
            card=True,
        ),
    ),
)

AMOUNT = FlagGroup(
    "optimization",
    (
        Flag(
            "seed",
            "Seed of everything random. Default: drawn, and logged.",
            int,
            range=(0, 2**32 - 1),
            resume="same",
            card=True,
        ),
        Flag("train_batch_size", "Pairs per device and forward pass.", int, 4, range=(1,), card=True),
        Flag("num_train_epochs", "Passes over the pairs.", int, 1, range=(1,)),
        Flag("max_train_steps", "Optimizer steps; overrides --num_train_epochs.", int, range=(1,)),
        Flag(
            "gradient_accumulation_steps",
            "Forward passes whose gradients make one step.",
            int,
            1,
            range=(1,),
            card=True,
        ),
    ),
)

OPTIMIZER = FlagGroup(
    "optimization",
    (
        Flag(
            "learning_rate",
            "Learning rate after warm-up.",
            float,
            1e-4,
            range=(0,),
            resume="same",
            card=True,
        ),
        Flag(
            "scale_lr",
            "Multiply the learning rate by processes, accumulation steps and batch size.",
            bool,
            resume="same",
        ),
        Flag(
            "lr_scheduler",
            "Learning-rate schedule.",
            default="constant",
            choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
            resume="same",
            card=True,
        ),
        Flag("lr_warmup_steps", "Optimizer steps of warm-up; `constant` has none.", int, 0, range=(0,), card=True),
        Flag("lr_num_cycles", "Restarts of cosine_with_restarts.", int, 1, range=(1,)),
        Flag("lr_power", "Power of the polynomial scheduler.", float, 1.0),
        Flag(
            "optimizer",
            "AdamW, or Prodigy (arXiv 2306.06101; `pip install prodigyopt`), which finds its own step size: give it"
            " --learning_rate=1.",
            default="AdamW",
            choices=("AdamW", "prodigy"),
            resume="same",
            card=True,
        ),
        Flag("use_8bit_adam", "Use 8-bit AdamW from bitsandbytes.", bool, resume="same", card=True),
        Flag(
            "prodigy_beta3",
            "Decay of Prodigy's estimate of the step size. Default: the square root of --adam_beta2.",
            float,
            range=(0, 1),
            resume="same",
        ),
        Flag(
            "prodigy_decouple",
            "Whether Prodigy decays weights as AdamW does.",
            truth,
            True,
            nargs="?",
            resume="same",
        ),
        Flag(
            "prodigy_use_bias_correction",
            "Whether Prodigy corrects the bias of Adam's moments.",
            truth,
            True,
            nargs="?",
            resume="same",
        ),
        Flag(
            "prodigy_safeguard_warmup",
            "Whether Prodigy leaves the learning rate of the warm-up out of its estimate.",
            truth,
            True,
            nargs="?",
            resume="same",
        ),
        Flag("adam_beta1", "Decay of Adam's first moment.", float, 0.9, range=(0, 1), resume="same"),
        Flag("adam_beta2", "Decay of Adam's second moment.", float, 0.999, range=(0, 1), resume="same"),
        Flag("adam_weight_decay", "Weight decay of AdamW.", float, 1e-2, range=(0,), resume="same"),
        Flag("adam_epsilon", "Adam's epsilon.", float, 1e-8, range=(0,), resume="same"),
        Flag(
            "max_grad_norm",
            "Gradient norm limit; 0 is no limit.",
            float,
            1.0,
            range=(0,),
            resume="warn",
            card=True,
        ),
        Flag(
            "ddp_timeout",
            "Seconds that processes wait for one another, including for the main one to draw validation images and upload, "
            "before the run is ended. Reading the data set may take longer.",
            int,
            1800,
            range=(1,),
        ),
    ),
)

VALIDATION = FlagGroup(
    "validation",
    (
        Flag(
            "run_validation",
            "Measure held-out pairs and draw images during training, and both with and without the LoRA after it.",
            bool,
        ),
        Flag(
            "num_validation_pairs",
            "Pairs, at most, kept out of training to measure preference accuracy on, with --run_validation: in a data set, "
            "those that share an image stay together; in shards, they are the first samples.",
            int,
            64,
            range=(0,),
        ),
        Flag(
            "validation_draws",
            "How often each held-out pair is predicted, at noise spread evenly over the levels. 12 leave the accuracy on 64 "
            "pairs a standard error of at most 2 points, and cost as much as 6 training passes.",
            int,
            12,
            range=(4,),
            resume="same",
        ),
        Flag(
            "keep_best",
            "Make the checkpoint with the best accuracy on held-out pairs the result, in place of the last step; never one whose "
            "eval_prompt_margin is below half of the base's. Each new best is saved when it is validated, and "
            "--checkpoints_total_limit keeps it.",
            bool,
            resume="same",
            card=True,
        ),
        Flag("validation_steps", "Optimizer steps between validations.", int, 200, range=(1,)),
        Flag(
            "validation_prompts",
            "Prompts to draw. Default: four built-in ones.",
            nargs="+",
            default=VALIDATION_PROMPTS,
        ),
        Flag("num_validation_images", "Images per validation prompt.", int, 1, range=(1,)),
        Flag("validation_inference_steps", "Sampling steps per image.", int, 25, range=(1,)),
        Flag("validation_guidance_scale", "Classifier-free guidance.", float, 5.0),
        Flag(
            "validation_scorer",
            "Judge of the validation images: logs how often the LoRA's beat the base's from the same seeds. A built-in "
            "scorer (pickscore, hpsv2, imagereward, aesthetic, clip, saturation, high_frequency), or your own as "
            "my_module:my_function or path/to/file.py:my_function. Its model stays in the first GPU's memory.",
        ),
    ),
)

OUTPUT = FlagGroup(
    "output",
    (
        Flag("output_dir", "Folder of checkpoints, logs and the trained LoRA."),
        Flag("checkpointing_steps", "Optimizer steps between checkpoints.", int, 500, range=(1,)),
        Flag("checkpoints_total_limit", "Keep this many of the newest. Default: all.", int, range=(1,)),
        Flag(
            "resume_from_checkpoint",
            'A checkpoint folder (a path, or a name in --output_dir), or "latest": the newest in --output_dir, '
            "if there is one.",
        ),
        Flag(
            "report_to",
            '"tensorboard", "wandb", "comet_ml", "all" (those installed) or "none".',
            default="tensorboard",
        ),
        Flag("tracker_name", "Project name in the tracker."),
        Flag("logging_dir", "TensorBoard's folder inside --output_dir.", default="logs"),
        Flag("push_to_hub", "Upload LoRA, model card and images at the end.", bool),
        Flag(
            "hub_token",
            "Token for the upload. Default: the one of `hf auth login` or HF_TOKEN, which is safer: accelerate prints the "
            "command of a run that failed.",
        ),
        Flag("hub_model_id", "Repository to upload to. Default: the name of --output_dir."),
    ),
)

TRAINING = [LOSS, AMOUNT, OPTIMIZER, VALIDATION, OUTPUT]


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(
            f"--hub_token with --report_to={args.report_to}: the tracker could record your token with the command line."
            " Leave --hub_token out and run `hf auth login`."
        )
    if args.use_8bit_adam and args.optimizer != "AdamW":
        parser.error(f"--use_8bit_adam with --optimizer={args.optimizer}: choose one.")
    if getattr(args, "cache_latents", False) and args.random_crop:
        parser.error("--cache_latents keeps one crop of each image, the centre: leave --random_crop out.")
    if args.loser_share is not None:
        _check_loser_share(parser, args)
    if args.keep_best and not (args.run_validation and args.num_validation_pairs):
        parser.error(
            "--keep_best compares checkpoints on held-out pairs, and there are none: add --run_validation, and set "
            "--num_validation_pairs above 0."
        )
    if args.validation_scorer is not None:
        _check_validation_scorer(parser, args)


def _check_loser_share(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 0 < args.loser_share < 0.5:
        parser.error(
            f"--loser_share={args.loser_share} must lie above 0 and below 0.5. For fine-tuning on the chosen images use"
            " --beta_orpo=0."
        )
    if args.beta_orpo is not None:
        parser.error("--loser_share and --beta_orpo are two ways to set the same strength: give one of them.")


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
