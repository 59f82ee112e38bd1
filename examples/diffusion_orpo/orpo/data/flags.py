"""The flags that choose a data set, and those that say what becomes of its images and captions."""

from ..system.flags import Flag, FlagGroup


DATA_SET = FlagGroup(
    "data set",
    (
        Flag(
            "dataset_name",
            "Identifier of a data set on the Hub, a local folder of parquet files, an imagefolder with metadata, or a "
            "folder with chosen/ and rejected/. Columns: jpg_0, jpg_1, label_0, caption; or chosen, rejected, prompt.",
            required=True,
            is_source=True,
        ),
        Flag("dataset_config_name", "Configuration of the data set, if it has several."),
        Flag("dataset_split_name", "Split to train on. Default: the only one, else train."),
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
        Flag("max_train_samples", "Train on the first so many pairs only.", int, range=(1,)),
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
            'Alone: shapes of the area of --resolution, from 1:2 to 2:1. Or list them, "height,width;height,width;...".',
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
