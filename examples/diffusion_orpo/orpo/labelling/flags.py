"""The flags of label_preferences.py."""

import unicodedata
from functools import partial

from ..runtime.flags import Flag, FlagGroup


FLAGS = [
    FlagGroup(
        "labelling",
        (
            Flag(
                "images_dir",
                "Folder of the images: with a metadata.jsonl, or with a caption file beside each image. Votes go there.",
                required=True,
            ),
            Flag("annotator", "Name of the annotator.", partial(unicodedata.normalize, "NFC"), "me"),
            Flag(
                "ranking",
                "Show this many images of a prompt, and ask for the best, then the worst. Default: show two.",
                int,
                range=(3, 9),
            ),
            Flag(
                "overlap",
                "Share of the questions that every annotator answers; each of the others goes to one.",
                float,
                0.2,
                range=(0, 1),
            ),
            Flag("seed", "Seed of the images' sides and of the order of questions.", int, 0),
            Flag("port", "Port of the page; 0 for any free one.", int, 8765, range=(0, 65535)),
        ),
    ),
    FlagGroup(
        "output",
        (
            Flag(
                "export",
                "Write the votes of all annotators as a data set to this folder, and serve no page.",
            ),
        ),
    ),
]
