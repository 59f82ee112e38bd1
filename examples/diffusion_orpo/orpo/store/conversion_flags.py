"""The flags of convert_to_webdataset.py."""

import argparse
import re
from dataclasses import replace

from ..data.flags import DATA_SET, IMAGES, READING, check_reading
from ..models.flags import MODEL
from ..runtime.flags import Flag, FlagGroup, pick


CONVERSION = FlagGroup(
    "conversion",
    (
        Flag(
            "dataset_path",
            "What --dataset_name is in training: a folder, a file, or identifier of a data set on the Hub; or parquet files "
            "in s3://bucket/prefix.",
            is_source=True,
        ),
        Flag(
            "output_dir",
            "Folder for the shards, or s3://bucket/prefix. On a cluster a folder that all nodes share.",
            required=True,
        ),
        Flag("dataset_config_name", "Configuration of the data set, if it has several."),
        Flag("split", "Split to convert. Default: the only one, else train."),
        Flag("shard_size_mb", "Approximate size of a shard, in 10^6 bytes.", float, 500.0),
        Flag("keep_ties", "Write pairs with label 0.5, too.", bool),
        Flag("ray_address", "Ray cluster to run on. Default: this machine, all its cores."),
        *pick([MODEL], ("cache_dir",)),
        Flag("staging_dir", "Folder where shards wait for their upload to S3. Default: the system's temporary one."),
        Flag("verify", "Convert nothing; compare the shards in --output_dir with the manifest.", bool),
    ),
)

ENCODE = Flag(
    "encode",
    "Write latents of both images, cropped at the centre, and the prompt's embeddings. On all GPUs that Ray finds, or else on "
    "this machine's cores.",
    bool,
)

# The training scripts' flags that decide an encoding; without them it has the defaults of the model's family.
TRAINING_FLAGS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "revision",
    "variant",
    "resolution",
    "aspect_ratio_buckets",
    "mixed_precision",
    "vae_encode_batch_size",
)
NOTES = {
    "resolution": "Pixels per side of the crops. Default: as in training, 1024 for SDXL.",
    "aspect_ratio_buckets": "Crop each pair to one of several shapes, as in training. Default: squares.",
    "mixed_precision": "Precision that the training will run in. Default: no.",
    "vae_encode_batch_size": "Images that the VAE encodes at once. Default: 8.",
}
ENCODED_WITH = (
    *(
        replace(flag, default=None, required=False, help=NOTES.get(flag.name, flag.help))
        for flag in pick([MODEL, IMAGES], TRAINING_FLAGS)
    ),
    Flag("max_sequence_length", "Tokens of a prompt that the text encoder reads. Default: as in training.", int),
)

ROWS = FlagGroup("rows, as the training scripts read them", pick([DATA_SET], READING))

FLAGS = [CONVERSION, ROWS, FlagGroup("encoding", (ENCODE, *ENCODED_WITH))]


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags contradict each other."""
    given = [flag.name for flag in ENCODED_WITH if getattr(args, flag.name) is not None]
    if given and not args.encode:
        parser.error(f"--{given[0]} means nothing without --encode.")
    if args.encode and args.pretrained_model_name_or_path is None:
        parser.error("--encode needs --pretrained_model_name_or_path.")
    check_reading(parser, args)
    if args.dataset_path is None and not args.verify:
        parser.error("--dataset_path is needed, except with --verify.")
    if args.split is not None and not re.fullmatch(r"\w+", args.split):
        parser.error(f"--split={args.split} is not the name of a split: letters, digits and _ only.")
    if not args.shard_size_mb > 0:
        parser.error(f"--shard_size_mb={args.shard_size_mb:g} must be above 0.")
