"""What a row of a table says: which two images it compares, for which prompt, and which of them people preferred.

Training, checker and converter read rows through `Columns` alone, so they agree on every one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from ..runtime.messages import printable
from .bad_pair import BadPair
from .conventions import CONVENTIONS, NEEDED, Convention
from .image_files import ImageFiles, check_image_column, read_image
from .verdicts import LOW_AGREEMENT, TIE, Verdict


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

    def of_pairs(self) -> "Columns":
        """The columns of the pairs that `RankedPairs` makes of ranked images."""
        convention = self.convention.of_pairs()
        return Columns(convention, convention.verdict, {})

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
