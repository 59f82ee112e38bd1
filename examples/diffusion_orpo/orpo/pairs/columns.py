"""What a row of a table says: which two images it compares, for which prompt, and which of them people preferred.

A convention by which published preference data name their columns is one entry of CONVENTIONS.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, repeat
from pathlib import Path

import pyarrow as pa

from ..config import PairsConfig
from ..runtime.messages import printable
from .bad_pair import BadPair
from .image import ImageFiles, check_image_column, is_list, read_image
from .labels import (
    LOW_AGREEMENT,
    PROBLEM,
    TIE,
    VOTES,
    Verdict,
    by_label,
    by_order,
    by_votes,
    first_preferred,
    hpd_v3,
    pick_a_pic,
    stored,
)


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
        order: compares the ranks or scores of two images, where a table ranks images. Raises BadPair.
        marks: at least one of these columns is required too, since the others alone could mean something else.
        votes: columns of which each alone tells how many voters agree.
        soft_labels: whether the label may be the share of the votes for the first image.
        group: the column that identifies the prompt, if ranked images have a row each; None if a row lists them.
    """

    name: str
    images: tuple[str, ...]
    prompt: str
    verdict: tuple[str, ...]
    label: Callable[[dict[str, object], bool], Verdict] = first_preferred
    order: Callable[[float, float], Verdict] | None = None
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


def _ranked(name: str, images: str, order: str, lower_is_better: bool, group: str | None = None) -> Convention:
    compare = partial(by_order, name=order, lower_is_better=lower_is_better, yes_or_no=order == "human_preference")
    return Convention(name, (images,), "prompt", (order,), order=compare, group=group)


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
        hints=("label_1", "has_label", "are_different", "best_image_uid", "image_0_uid", "image_1_uid", *VOTES),
        votes=VOTES,
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


def stored_columns(columns: "Columns") -> "Columns":
    """The columns of the pairs of a `PairTable` where they were written to a file, one pair a row."""
    verdict = ("label_0", *PROBLEM)
    return Columns(
        Convention(columns.convention.name, ("jpg_0", "jpg_1"), columns.prompt, verdict, stored), verdict, {}
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


@dataclass(frozen=True)
class Row:
    """What a row says, as far as it can be read.

    Attributes:
        label: None where it is bad.
        agreement: share of the votes that are for the preferred image; None if it is unknown.
        prompt, images: None where they are bad, or left alone.
        problems: all that is wrong with it.
    """

    label: float | None
    prompt: str | None = None
    images: tuple[bytes | None, bytes | None] = (None, None)
    problems: tuple[BadPair, ...] = ()
    agreement: float | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold pairs, or the ranked images that pairs are made of.

    Attributes:
        convention: what they mean.
        verdict: those that say which image is preferred, among the table's columns.
        classes: names of the classes of a column whose cells are their numbers (ClassLabel).
        soft_labels: whether the label is the share of the votes for the first image.
        min_agreement: share of the votes that must be for the preferred image. None: a majority will do.
    """

    convention: Convention
    verdict: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    soft_labels: bool = False
    min_agreement: float | None = None

    @classmethod
    def find(
        cls,
        schema: pa.Schema,
        where: str,
        classes: Mapping[str, Iterable[str]] | None = None,
        named: Convention | None = None,
        soft_labels: bool = False,
        min_agreement: float | None = None,
        paths: bool = False,
        prompt: str | None = None,
    ) -> "Columns":
        """Finds the convention that a table follows.

        Args:
            schema: the table's columns.
            where: names the table in errors.
            classes: names of the classes of each ClassLabel column.
            named: the columns that flags name, if any do.
            soft_labels, min_agreement: see the class.
            paths: whether an image may be the path of its file, as text.
            prompt: the column of the prompt, if a flag names that alone.

        Raises:
            ValueError: it follows none, or several, or holds no images where they should be, or no votes.
        """
        names = schema.names
        known = [named] if named else [convention.with_prompt(names, prompt) for convention in CONVENTIONS]
        fitting = [convention for convention in known if convention.fits(schema)]
        if not fitting:
            found = f"has the columns {printable(', '.join(names))}" if names else "has no columns"
            needed = f"{', '.join(named.needed)}, as flags say" if named else NEEDED
            if prompt is not None and prompt not in names:
                needed = f"{prompt}, as --columns says"
            raise ValueError(f"{where} {found}. It needs {needed}.")
        if len(fitting) > 1:
            readings = " and as ".join(f"{c.name} ({', '.join(c.needed)})" for c in fitting)
            raise ValueError(f"{where} can be read as {readings}: remove or rename the columns of one of them.")
        (convention,) = fitting
        for column in convention.images:
            check_image_column(schema.field(column).type, column, where, paths, lists=convention.is_ranked)
        held = f"({convention.name}: {', '.join(convention.needed)})"
        if soft_labels and not convention.soft_labels:
            raise ValueError(
                f"--soft_labels: {where} holds no label that could be a share of votes {held}. Leave the flag out."
            )
        names_of_classes = {name: tuple(value) for name, value in (classes or {}).items()}
        verdict = tuple(name for name in (*convention.verdict, *convention.hints) if name in names)
        columns = cls(convention, verdict, names_of_classes, soft_labels, min_agreement)
        if min_agreement is not None and not columns.has_votes:
            advice = "Leave the flag out."
            if convention.soft_labels:
                advice = "If its label is a share of votes, add --soft_labels; else leave the flag out."
            raise ValueError(f"--min_agreement={min_agreement:g}: {where} holds no votes {held}. {advice}")
        return columns

    @property
    def has_votes(self) -> bool:
        """Whether rows may say how many of the voters agree."""
        return self.soft_labels or not set(self.convention.votes).isdisjoint(self.verdict)

    @property
    def images(self) -> tuple[str, ...]:
        return self.convention.images

    @property
    def prompt(self) -> str:
        return self.convention.prompt

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.images, *self.verdict, *filter(None, [self.convention.group]), self.prompt)

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns of the dataset that are read."""
        return self.convention.needed if self.convention.is_ranked else self.used

    @property
    def lists_images(self) -> bool:
        """Whether a cell holds all the images of a prompt."""
        return self.convention.is_ranked and self.convention.group is None

    def read_verdicts(self, columns: list[pa.ChunkedArray], count: int) -> Iterator[Verdict | BadPair]:
        """The verdict of each row, or what is wrong with it.

        Args:
            columns: those of `verdict`, in its order.
            count: of the rows.
        """
        for cells in zip(*columns) if columns else repeat((), count):
            try:
                yield self.read_verdict(dict(zip(self.verdict, cells)))
            except BadPair as bad:
                yield bad

    def read_label(self, cells: Mapping[str, pa.Scalar], where: str = "") -> float:
        """A row's label: 1.0 where the first image is preferred, 0.0 where the second is, TIE, or LOW_AGREEMENT."""
        return self.read_verdict(cells, where).label

    def read_verdict(self, cells: Mapping[str, pa.Scalar], where: str = "") -> Verdict:
        """A row's label, and how many of the voters agree with it.

        Args:
            cells: of the columns in `verdict`, at least.
            where: names the row in errors.

        Raises:
            BadPair: it is bad, or columns contradict each other.
        """
        try:
            values = {name: self._verdict_value(cells[name], name) for name in self.verdict}
            verdict = self.convention.label(values, self.soft_labels)
        except BadPair as bad:
            raise bad.within(where) from bad.__cause__
        if verdict.label == TIE or self.min_agreement is None or verdict.agreement is None:
            return verdict
        return verdict if verdict.agreement >= self.min_agreement - 1e-9 else verdict._replace(label=LOW_AGREEMENT)

    def read_prompt(self, cell: pa.Scalar, where: str = "") -> str:
        """A row's prompt.

        Raises:
            BadPair: it is not text.
        """
        value = _value(cell, "bad prompt", self.prompt, where)
        if not isinstance(value, str):
            raise BadPair("bad prompt", f"{self.prompt} is {printable(repr(value))}, not text", where)
        return value

    def read(
        self,
        cells: Mapping[str, pa.Scalar],
        where: str = "",
        files: ImageFiles = ImageFiles(),
        ties_too: bool = False,
    ) -> Row:
        """All of a row.

        Args:
            cells: of the columns in `used`, at least.
            where: names the row in errors.
            files: that images may be read from, where a path stands in their place.
            ties_too: whether prompt and images of a row without a preference are wanted, or left alone.
        """
        problems: list[BadPair] = []

        def attempt(read: Callable, *args):
            try:
                return read(*args)
            except BadPair as bad:
                problems.append(bad)

        verdict = attempt(self.read_verdict, cells, where)
        label, agreement = verdict or (None, None)
        if label == LOW_AGREEMENT or label == TIE and not ties_too:
            return Row(label)
        prompt = attempt(self.read_prompt, cells[self.prompt], where)
        images = tuple(attempt(read_image, cells[name], name, where, files) for name in self.images)
        return Row(label, prompt, images, tuple(problems), agreement)

    def _verdict_value(self, cell: pa.Scalar, name: str):
        value = _value(cell, "bad label", name, "")
        if name in self.classes and value is not None:  # the number of a class says nothing, its name does
            classes = self.classes[name]
            value = classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None
        return None if value == "" else value  # as CSV leaves out a value


def _value(cell: pa.Scalar, kind: str, column: str, where: str):
    """A cell as Python has it.

    Raises:
        BadPair: it can't be read, as text that is not UTF-8.
    """
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:  # a UnicodeDecodeError is a ValueError
        raise BadPair(kind, f"{column} can't be read: {printable(str(error))}", where) from error


@dataclass(frozen=True)
class Reading:
    """How rows are read, beyond what their columns say.

    Attributes:
        named: the columns, if flags name them all.
        prompt: the column of the prompt, if flags name it.
        soft_labels, min_agreement: as in `Columns`.
        pairs_per_group: as for `ranked_pairs`.
        image_root: the folder that paths of images start from. None: the table's own folder.
    """

    named: Convention | None = None
    soft_labels: bool = False
    min_agreement: float | None = None
    pairs_per_group: str = "all"
    image_root: Path | None = None
    prompt: str | None = None

    @classmethod
    def from_config(cls, config: PairsConfig) -> "Reading":
        root = None if config.image_root is None else Path(config.image_root)
        columns = config.named_columns
        votes = config.soft_labels, config.min_agreement
        return cls(_named(columns), *votes, config.pairs_per_group, root, columns.get("prompt"))

    def find_columns(
        self, schema: pa.Schema, where: str, classes: dict | None = None, files: ImageFiles = ImageFiles()
    ) -> Columns:
        """See `Columns.find`."""
        votes = self.soft_labels, self.min_agreement
        return Columns.find(schema, where, classes, self.named, *votes, files.root is not None, self.prompt)

    def files_below(self, folder: Path | None) -> ImageFiles:
        """The images that a table in this folder may name. None: the table is not on this machine, or in several folders."""
        return ImageFiles(root=self.image_root or folder)


def _named(columns: dict[str, str]) -> Convention | None:
    if "chosen" in columns:
        return named_columns((columns["chosen"], columns["rejected"]), columns["prompt"], None)
    if "image_0" in columns:
        return named_columns((columns["image_0"], columns["image_1"]), columns["prompt"], columns["label"])
    return None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that all of Arrow's functions take, for the views and dictionaries that newer programs write."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind
