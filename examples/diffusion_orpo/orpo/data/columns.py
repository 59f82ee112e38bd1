"""How a row of a table says which two images it compares, for which prompt, and which of them people preferred.

Each convention is one entry of CONVENTIONS. Training, checker and converter read rows through `Columns` alone, so they
agree on every one.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ..system.messages import printable
from .bad_pair import BadPair


TIE = 0.5


def parse_label(label, where: str, name: str = "label_0") -> float:
    """Reads `label_0`: 1.0 where image 0 is preferred, 0.0 where image 1 is, 0.5 for a tie.

    Args:
        label: a number, or text that holds one (as `.txt` members of shards do).
        where: names the row in the error.
        name: of what is read, for the error.

    Raises:
        BadPair: it is anything else.
    """
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if value not in (0.0, 0.5, 1.0):
        raise BadPair("bad label", f"{name} is {printable(repr(label))}", where)
    return value


def _pick_a_pic_label(row: dict[str, object]) -> float:
    """`label_0`, unless another column says that there is no preference; one that says something else is an error."""
    if _flag(row, "has_label") is False or _flag(row, "are_different") is False:
        return TIE
    label = parse_label(row["label_0"], "")
    if row.get("label_1") is not None and parse_label(row["label_1"], "", "label_1") != 1 - label:
        raise _contradiction(f"label_0 is {label:g} and label_1 is {row['label_1']}")
    best, uids = row.get("best_image_uid"), [row.get("image_0_uid"), row.get("image_1_uid")]
    if best is not None and None not in uids and uids[0] != uids[1]:
        says = {uids[0]: 1.0, uids[1]: 0.0}.get(best, TIE)
        if says != label:
            found = f"best_image_uid is {best!r}, image_0_uid {uids[0]!r} and image_1_uid {uids[1]!r}"
            raise _contradiction(f"label_0 is {label:g}, and {found}")
    return label


def _chosen_label(row: dict[str, object]) -> float:
    """The first image is the chosen one; labels beside it must agree."""
    for name, expected in (("label_0", 1.0), ("label_1", 0.0)):
        if row.get(name) is not None and parse_label(row[name], "", name) != expected:
            raise _contradiction(f"{name} is {row[name]!r}, and the first image is in the column chosen")
    return 1.0


def _flag(row: dict[str, object], name: str) -> bool | None:
    """The value of a boolean column; None where it is empty."""
    value = row.get(name)
    if value is None:
        return None
    flags = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (said := str(value).strip().lower()) not in flags:
        raise BadPair("bad label", f"{name} is {printable(repr(value))}", advice="Write true or false.")
    return flags[said]


def _contradiction(what: str) -> BadPair:
    return BadPair("contradicting columns", f"{printable(what)}: they contradict each other")


@dataclass(frozen=True)
class Convention:
    """The columns of one kind of table.

    Attributes:
        name: for messages.
        images: the first and the second image.
        prompt: of both.
        verdict: columns that say which is preferred, and must be there.
        hints: optional columns that also say something about it.
        label: reads those that exist: 1.0, 0.0, or 0.5 for no preference. Raises BadPair.
    """

    name: str
    images: tuple[str, str]
    prompt: str
    verdict: tuple[str, ...]
    hints: tuple[str, ...]
    label: Callable[[dict[str, object]], float]

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.images, *self.verdict, self.prompt)


CONVENTIONS = (
    Convention(
        "Pick-a-Pic",  # kashif/pickascore and yuvalkirstain/pickapic_v2
        images=("jpg_0", "jpg_1"),
        prompt="caption",
        verdict=("label_0",),
        hints=("label_1", "has_label", "are_different", "best_image_uid", "image_0_uid", "image_1_uid"),
        label=_pick_a_pic_label,
    ),
    Convention(
        "TRL",
        images=("chosen", "rejected"),
        prompt="prompt",
        verdict=(),
        hints=("label_0", "label_1"),
        label=_chosen_label,
    ),
)

# For a table that names image files instead of holding images.
PATHS_ADVICE = (
    "If these are paths, put the table beside the images as metadata.jsonl (or .csv) and call the column {column}_file_name:"
    " the folder is then an imagefolder. Or read the files into the column."
)

NEEDED = ", or ".join(", ".join(convention.needed) for convention in CONVENTIONS)


@dataclass(frozen=True)
class Row:
    """What a row says, as far as it can be read.

    Attributes:
        label: None where it is bad.
        prompt, images: None where they are bad, or left alone.
        problems: all that is wrong with it.
    """

    label: float | None
    prompt: str | None = None
    images: tuple[bytes | None, bytes | None] = (None, None)
    problems: tuple[BadPair, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold pairs.

    Attributes:
        convention: what they mean.
        verdict: those that say which image is preferred, among the table's columns.
        classes: names of the classes of a column whose cells are their numbers (ClassLabel).
    """

    convention: Convention
    verdict: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]

    @classmethod
    def find(cls, schema: pa.Schema, where: str, classes: Mapping[str, Iterable[str]] | None = None) -> "Columns":
        """Finds the convention that a table follows.

        Args:
            schema: the table's columns.
            where: names the table in errors.
            classes: names of the classes of each ClassLabel column.

        Raises:
            ValueError: it follows none, or several, or holds no images where they should be.
        """
        names = schema.names
        fitting = [convention for convention in CONVENTIONS if set(convention.needed) <= set(names)]
        if not fitting:
            found = f"has the columns {printable(', '.join(names))}" if names else "has no columns"
            raise ValueError(f"{where} {found}. It needs {NEEDED}.")
        if len(fitting) > 1:
            readings = " and as ".join(f"{c.name} ({', '.join(c.needed)})" for c in fitting)
            raise ValueError(f"{where} can be read as {readings}: remove or rename the columns of one of them.")
        for column in fitting[0].images:
            _check_image_column(schema.field(column).type, column, where)
        verdict = tuple(name for name in (*fitting[0].verdict, *fitting[0].hints) if name in names)
        return cls(fitting[0], verdict, {name: tuple(value) for name, value in (classes or {}).items()})

    @property
    def images(self) -> tuple[str, str]:
        return self.convention.images

    @property
    def prompt(self) -> str:
        return self.convention.prompt

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.images, *self.verdict, self.prompt)

    def read_label(self, cells: Mapping[str, pa.Scalar], where: str = "") -> float:
        """A row's label: 1.0 where the first image is preferred, 0.0 where the second is, 0.5 for no preference.

        Args:
            cells: of the columns in `verdict`, at least.
            where: names the row in errors.

        Raises:
            BadPair: it is bad, or columns contradict each other.
        """
        try:
            return self.convention.label({name: self._verdict_value(cells[name], name) for name in self.verdict})
        except BadPair as bad:
            raise bad.within(where) from bad.__cause__

    def read_prompt(self, cell: pa.Scalar, where: str = "") -> str:
        """A row's prompt.

        Raises:
            BadPair: it is not text.
        """
        value = _value(cell, "bad prompt", self.prompt, where)
        if not isinstance(value, str):
            raise BadPair("bad prompt", f"{self.prompt} is {printable(repr(value))}, not text", where)
        return value

    def read_image(self, cell: pa.Scalar, column: str, where: str = "", follows_paths: bool = False) -> bytes:
        """The bytes of an image file.

        Args:
            cell: holds them, or is a struct of them and a path.
            column: its name.
            where: names the row in errors.
            follows_paths: whether a path may be opened where there are no bytes. In a table from elsewhere, it could
                name any file of this machine.

        Raises:
            BadPair: there are none, or the path can't be read or must not be.
        """
        image = _value(cell, "missing image", column, where)
        where = place_of_image(image, column, where)
        path = image.get("path") if isinstance(image, dict) else None
        image = image.get("bytes") if isinstance(image, dict) else image
        if image:
            return image
        if path is None:
            raise BadPair("missing image", "it is empty", where)
        if not follows_paths:
            raise BadPair("missing image", "it holds a path and no image", where)
        try:
            return Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise BadPair("missing image", printable(str(error)), where) from error

    def read(
        self, cells: Mapping[str, pa.Scalar], where: str = "", follows_paths: bool = False, ties_too: bool = False
    ) -> Row:
        """All of a row.

        Args:
            cells: of the columns in `used`, at least.
            where, follows_paths: see `read_image`.
            ties_too: whether prompt and images of a row without a preference are wanted, or left alone.
        """
        problems: list[BadPair] = []

        def attempt(read: Callable, *args):
            try:
                return read(*args)
            except BadPair as bad:
                problems.append(bad)

        label = attempt(self.read_label, cells, where)
        if label == TIE and not ties_too:
            return Row(label)
        prompt = attempt(self.read_prompt, cells[self.prompt], where)
        images = tuple(attempt(self.read_image, cells[name], name, where, follows_paths) for name in self.images)
        return Row(label, prompt, images, tuple(problems))

    def _verdict_value(self, cell: pa.Scalar, name: str):
        value = _value(cell, "bad label", name, "")
        if name in self.classes and value is not None:  # the number of a class says nothing, its name does
            classes = self.classes[name]
            value = classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None
        return value


def place_of_image(image: object, column: str, where: str) -> str:
    """Names an image in messages: by row, column and, where that is known, file.

    Args:
        image: the cell's value.
        column: its name.
        where: names the row.
    """
    path = image.get("path") if isinstance(image, dict) else None
    file = f" ({printable(Path(path).name)})" if isinstance(path, str) else ""
    return ", ".join(filter(None, (where, f"{column}{file}")))


def _check_image_column(kind: pa.DataType, column: str, where: str) -> None:
    """
    Raises:
        ValueError: the column holds neither encoded images nor structs of them and their paths.
    """
    holds = kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        holds = kind.field("bytes").type
    if pa.types.is_binary(holds) or pa.types.is_large_binary(holds):
        return
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    raise ValueError(
        f"{where}: column {column} holds {kind}, not images or their encoded bytes."
        + (f" {PATHS_ADVICE.format(column=column)}" if is_text else "")
    )


def _value(cell: pa.Scalar, kind: str, column: str, where: str):
    """A cell as Python has it.

    Raises:
        BadPair: it can't be read, as text that is not UTF-8.
    """
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:  # a UnicodeDecodeError is a ValueError
        raise BadPair(kind, f"{column} can't be read: {printable(str(error))}", where) from error
