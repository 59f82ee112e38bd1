"""The conventions by which published preference data name their columns: one entry of CONVENTIONS for each.

Rows are read through `Columns`, by training, checker and converter alike.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pyarrow as pa

from .image_files import is_list
from .verdicts import JUDGES_VOTES, Verdict, by_label, by_order, by_votes, first_preferred, hpd_v3, pick_a_pic


@dataclass(frozen=True)
class Convention:
    """The columns of one kind of table.

    Attributes:
        name: for messages.
        images: columns of the first and the second image; or one column of ranked images, which become pairs.
        prompt: of both.
        verdict: required columns that say which is preferred.
        hints: optional columns that also say something about it.
        label: reads those that exist. Its second argument is whether the label is a share of votes. Raises BadPair.
        marks: at least one of these columns is required too, since the others alone could mean something else.
        votes: columns of which each alone tells how many voters agree.
        soft_labels: whether the label may be the share of the votes for the first image.
        group: the column that identifies the prompt, if ranked images have a row each; None if a row lists them.
    """

    name: str
    images: tuple[str, ...]
    prompt: str
    verdict: tuple[str, ...]
    label: Callable[[dict[str, object], bool], Verdict]
    hints: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    soft_labels: bool = False
    group: str | None = None

    def with_prompt(self, names: Iterable[str], prompt: str | None) -> "Convention":
        """The same with the prompt's column among these names: the one asked for, its own, or one that is called alike."""
        if prompt is None:
            prompt = next((name for name in (self.prompt, *PROMPTS) if name in names), self.prompt)
        return replace(self, prompt=prompt)

    @property
    def is_ranked(self) -> bool:
        return len(self.images) == 1

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.images, *self.verdict, *filter(None, [self.group]), self.prompt)

    def fits(self, schema: pa.Schema) -> bool:
        """Whether a table has its columns."""
        names = set(schema.names)
        if not set(self.needed) <= names or self.marks and names.isdisjoint(self.marks):
            return False
        return not self.is_ranked or is_list(schema.field(self.images[0]).type) == (self.group is None)

    def of_pairs(self) -> "Convention":
        """The convention of the pairs that `RankedPairs` makes of ranked images."""
        return Convention(
            self.name, ("image_0", "image_1"), self.prompt, ("order_0", "order_1", "problem"), self.label
        )


def _ranked(name: str, images: str, order: str, lower_is_better: bool, group: str | None = None) -> Convention:
    label = partial(by_order, name=order, lower_is_better=lower_is_better, yes_or_no=order == "human_preference")
    return Convention(name, (images,), "prompt", (order,), label, group=group)


def _counted(name: str, votes: tuple[str, str]) -> Convention:
    return Convention(name, ("image1", "image2"), "prompt", votes, partial(by_votes, names=votes), votes=votes)


PROMPTS = ("prompt", "caption", "text")

# Comments name the documents that define the columns; cards and loading scripts are on huggingface.co/datasets.
CONVENTIONS = (
    Convention(
        "Pick-a-Pic",  # cards of kashif/pickascore and yuvalkirstain/pickapic_v2
        images=("jpg_0", "jpg_1"),
        prompt="caption",
        verdict=("label_0",),
        label=pick_a_pic,
        hints=("label_1", "has_label", "are_different", "best_image_uid", "image_0_uid", "image_1_uid", *JUDGES_VOTES),
        votes=JUDGES_VOTES,
        soft_labels=True,
    ),
    Convention(
        "TRL",  # docs of huggingface/trl, "Dataset formats": preference
        images=("chosen", "rejected"),
        prompt="prompt",
        verdict=(),
        label=first_preferred,
        hints=("label_0", "label_1"),
    ),
    Convention(
        "HPDv3",  # card of MizzenAI/HPDv3: path1 is the preferred image; loaders of HPSv3 and LightRFT read it so
        images=("path1", "path2"),
        prompt="prompt",
        verdict=(),
        label=hpd_v3,
        hints=("choice_dist", "label_0", "label_1"),
        marks=("choice_dist", "model1", "model2"),
        votes=("choice_dist",),
    ),
    # card of Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3
    _counted("votes", ("votes_image1", "votes_image2")),
    # card of Rapidata/open-image-preferences-v1-more-results
    _counted("weighted votes", ("weighted_results_image1_preference", "weighted_results_image2_preference")),
    Convention(
        "ImageRewardDB, pairs",  # ImageRewardDB.py of THUDM/ImageRewardDB, configurations *_pair
        images=("img_better", "img_worse"),
        prompt="prompt",
        verdict=(),
        label=first_preferred,
    ),
    # Card of ymhao/HPDv2: human_preference is 1 for the preferred image, rank is lowest for the best.
    # ImageRewardDB.py, configurations *_group: lists as well, and again the lowest rank is best.
    *(
        _ranked("HPDv2", images, order, lower_is_better)
        for images, (order, lower_is_better) in product(
            ("file_path", "image_path", "image"), (("human_preference", False), ("rank", True), ("score", False))
        )
    ),
    # ImageRewardDB.py, the other configurations, and its metadata: one row per image.
    *(
        _ranked("ImageRewardDB", images, order, lower_is_better, group="prompt_id")
        for images, (order, lower_is_better) in product(("image", "image_path"), (("rank", True), ("score", False)))
    ),
)

NEEDED = (
    "jpg_0, jpg_1, label_0, caption; or chosen, rejected, prompt; or those of HPDv2, HPDv3, ImageRewardDB or Rapidata (see"
    " docs/data.md); or name your own: --columns image_0=NAME image_1=NAME label=NAME prompt=NAME, or --columns chosen=NAME"
    " rejected=NAME prompt=NAME"
)


def named_columns(images: tuple[str, str], prompt: str, label: str | None) -> Convention:
    """The columns that flags name.

    Args:
        images: the first and the second one; without a label, the preferred and the rejected one.
        prompt: of both.
        label: as label_0 is; None where the first image is preferred.
    """
    if label is None:
        return Convention("named columns", images, prompt, (), first_preferred)
    return Convention("named columns", images, prompt, (label,), partial(by_label, name=label), soft_labels=True)
