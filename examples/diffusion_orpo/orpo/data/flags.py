"""The flags that choose a data set, and those that say what becomes of its images and captions."""

import argparse

from ..runtime.flags import Flag, FlagGroup


DATA_SET = FlagGroup(
    "data set",
    (
        Flag(
            "dataset_name",
            "Identifier of a data set on the Hub, a local folder of parquet, JSONL or CSV files, such a file, an imagefolder "
            "with metadata, or a folder with chosen/ and rejected/. Columns: jpg_0, jpg_1, label_0, caption; or chosen, "
            "rejected, prompt; or those of HPDv2, HPDv3, ImageRewardDB or Rapidata.",
            required=True,
            is_source=True,
        ),
        Flag("dataset_config_name", "Configuration of the data set, if it has several."),
        Flag("dataset_split_name", "Split to train on. Default: the only one, else train."),
        Flag("image_0_column", "Column of the first image, where its name is another."),
        Flag("image_1_column", "Column of the second image."),
        Flag(
            "label_column",
            "Column that holds 1 where the first image is preferred, 0 where the second is, 0.5 for a tie.",
        ),
        Flag("chosen_column", "Column of the preferred image, in place of the three above."),
        Flag("rejected_column", "Column of the other image."),
        Flag("prompt_column", "Column of the prompt, with either set of names."),
        Flag(
            "image_root",
            "Folder that paths of images in a table start from, and must stay in. Default: the table's own.",
            is_source=True,
        ),
        Flag(
            "soft_labels",
            "label_0 is the share of the votes that are for the first image, 0 to 1, instead of 1, 0 or 0.5. The majority decides; "
            "--min_agreement leaves out pairs on which it is small.",
            bool,
        ),
        Flag(
            "min_agreement",
            "Share of the votes, 0.5 to 1, that must be for the preferred image; other pairs are left out, and counted. "
            "Default: a majority will do.",
            float,
            range=(0.5, 1),
        ),
        Flag(
            "pairs_per_group",
            "Pairs of the images that are ranked for a prompt: all, or the best against the worst.",
            default="all",
            choices=("all", "best_worst"),
        ),
        Flag(
            "cache_latents",
            "Encode every image and prompt once, before training, and train from datasets' cache. Later "
            "on, the VAE is loaded for validation images only, and text encoders once, for their prompts.",
            bool,
        ),
    ),
)

IMAGES = FlagGroup(
    "pairs",
    (
        Flag("max_train_samples", "Train on at most this many pairs, the first ones.", int, range=(1,)),
        Flag(
            "resolution",
            "Images are resized by their shorter side and cropped to this.",
            int,
            1024,
            range=(8,),
            resume="same",
            card=True,
        ),
        Flag(
            "aspect_ratio_buckets",
            "Crop each pair to the shape, of several, that cuts away least of its two images, instead of to a square. "
            'Alone: shapes of the area of --resolution, from 1:2 to 2:1. Or list them, in quotes: "height,width;height,width;...".',
            nargs="?",
            resume="same",
            card=True,
        ),
        Flag(
            "max_crop",
            "Leave out, and count, pairs of which an image would lose more than this share of its area.",
            float,
            1.0,
            range=(0, 1),
            resume="same",
            card=True,
        ),
        Flag(
            "random_crop",
            "Crop at random, both images of a pair alike. Default: the centre.",
            bool,
            resume="warn",
            card=True,
        ),
        Flag("random_flip", "Mirror half of the pairs, both images alike.", bool, resume="warn", card=True),
        Flag(
            "proportion_empty_prompts",
            "Share of captions replaced by the empty string, from 0 to 1.",
            float,
            0.0,
            range=(0, 1),
            resume="warn",
            card=True,
            aliases=("--caption_dropout",),
        ),
        Flag(
            "dataloader_num_workers",
            "Processes that decode images. 0: the main process decodes them.",
            int,
            0,
            range=(0,),
        ),
    ),
)

LABELLED = ("image_0_column", "image_1_column", "label_column", "prompt_column")
CHOSEN = ("chosen_column", "rejected_column", "prompt_column")

# All that say how rows are read (see `Reading`), for scripts that take these of DATA_SET alone.
READING = tuple(dict.fromkeys((*LABELLED, *CHOSEN, "image_root", "soft_labels", "min_agreement", "pairs_per_group")))


def check_reading(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops with a message where flags name some columns, and not all that are needed."""
    given = {name for name in (*LABELLED, *CHOSEN) if getattr(args, name) is not None}
    if given not in (set(), set(LABELLED), set(CHOSEN)):
        ways = ", or ".join(" ".join(f"--{name}" for name in names) for names in (LABELLED, CHOSEN))
        parser.error(f"{' '.join(f'--{name}' for name in sorted(given))}: name all columns: {ways}.")
