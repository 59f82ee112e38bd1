"""Pairs of images that a data set ranks: a row lists all images of a prompt, or each image has its own row."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..runtime.messages import printable
from .conventions import Convention


ALL, BEST_WORST = "all", "best_worst"


@dataclass(frozen=True)
class RankedPairs:
    """Which images of a data set are compared.

    Attributes:
        convention: of the data set.
        places: int64 (pairs, 4): row and place in its list, for the first and for the second image.
        orders: float64 (pairs, 2): rank or score of both.
        problems: the bad pairs, with what is wrong with them.
        alone: number of images that have no other one to be compared with.
    """

    convention: Convention
    places: np.ndarray
    orders: np.ndarray
    problems: dict[int, str]
    alone: int

    @classmethod
    def of(cls, dataset: Dataset, convention: Convention, pairs_per_group: str = ALL) -> "RankedPairs":
        """
        Args:
            dataset: all rows.
            convention: of its columns.
            pairs_per_group: ALL, or BEST_WORST: the best image of a group and the worst.
        """
        places, orders, problems, alone = [], [], {}, 0
        groups = _listed(dataset, convention) if convention.group is None else _grouped(dataset, convention)
        for images, values, problem in groups:
            alone += len(images) == 1 and problem is None
            numbers = [_number(value) for value in values]
            for pair in _choose(numbers, pairs_per_group) if problem is None else [(0, -1)]:
                bad = [f"{convention.verdict[0]} is {printable(repr(values[i]))}" for i in pair if numbers[i] is None]
                if problem or bad:
                    problems[len(places)] = problem or bad[0]
                places.append([place for i in pair for place in images[i]])
                orders.append([math.nan if numbers[i] is None else numbers[i] for i in pair])
        return cls(
            convention, np.array(places, np.int64).reshape(-1, 4), np.array(orders).reshape(-1, 2), problems, alone
        )

    def __len__(self) -> int:
        return len(self.places)

    def where(self, pair: int) -> str:
        """Names a pair in messages."""
        row_0, place_0, row_1, place_1 = self.places[pair]
        if self.convention.group is None:
            return f"row {row_0}, images {place_0} and {place_1}"
        return f"rows {row_0} and {row_1}" if row_0 != row_1 else f"row {row_0}"

    def cell(self, dataset: Dataset, pair: int, name: str) -> pa.Scalar:
        """A cell of the pair, as a table of pairs would have it: see `Convention.of_pairs`."""
        if name in ("image_0", "image_1"):
            row, place = self.places[pair].reshape(2, 2)[int(name[-1])].tolist()
            cell = dataset.data.column(self.convention.images[0])[row]
            if self.convention.group is not None:
                return cell
            return cell.values[place] if cell.values else pa.scalar(None, pa.string())
        return self.column(dataset, name, pair, pair + 1)[0]

    def column(self, dataset: Dataset, name: str, start: int, stop: int) -> pa.Array | pa.ChunkedArray:
        """The cells of several pairs in one of the other columns."""
        if name in ("order_0", "order_1"):
            return pa.array(self.orders[start:stop, int(name[-1])])
        if name == "problem":
            return pa.array([self.problems.get(pair) for pair in range(start, stop)], pa.string())
        return dataset.data.column(name).take(pa.array(self.places[start:stop, 0]))


def _listed(dataset: Dataset, convention: Convention) -> Iterator[tuple[list, list, str | None]]:
    """The images of each row: their places, their ranks or scores, and what is wrong with them."""
    (images,), (order,) = convention.images, convention.verdict
    counts = pc.list_value_length(dataset.data.column(images)).to_pylist()
    for row, (count, values) in enumerate(zip(counts, map(_value, dataset.data.column(order)))):
        places = [(row, place) for place in range(count or 0)]
        if not places:
            yield [(row, 0)], [None], f"{images} is empty"
        elif not isinstance(values, list) or len(values) != count:
            given = len(values) if isinstance(values, list) else "no"
            yield places, [None] * count, f"{count} images in {images} have {given} values in {order}"
        else:
            yield places, values, None


def _grouped(dataset: Dataset, convention: Convention) -> Iterator[tuple[list, list, str | None]]:
    """The images of each group, in the order of their first rows."""
    columns = (convention.group, convention.prompt, convention.verdict[0])
    groups: dict[object, list[tuple[int, object]]] = {}
    prompts: dict[object, set] = {}
    for row, cells in enumerate(zip(*(dataset.data.column(name) for name in columns))):
        group, prompt, value = map(_value, cells)
        if group is None:
            yield [(row, 0)], [value], f"{convention.group} is {printable(repr(group))}"
            continue
        groups.setdefault(group, []).append((row, value))
        prompts.setdefault(group, set()).add(prompt)
    for group, images in groups.items():
        several = (
            f"{convention.group} {printable(repr(group))} has several prompts" if len(prompts[group]) > 1 else None
        )
        yield [(row, 0) for row, _ in images], [value for _, value in images], several


def _choose(numbers: list[float | None], pairs_per_group: str) -> list[tuple[int, int]]:
    """The images of a group to compare, by their places in it. Images with a bad rank are included, so that they get reported."""
    if len(numbers) < 2 or pairs_per_group == ALL:
        return list(combinations(range(len(numbers)), 2))
    bad = [i for i, number in enumerate(numbers) if number is None]
    if bad:
        return [(i, i - 1 if i else 1) for i in bad]
    return [(int(np.argmax(numbers)), int(np.argmin(numbers)))] if max(numbers) > min(numbers) else [(0, 1)]


def _number(value: object) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _value(cell: pa.Scalar) -> object:
    """A cell as Python has it; the bytes of text that is not UTF-8."""
    try:
        return cell.as_py()
    except ValueError:
        return cell.cast(pa.binary()).as_py() if pa.types.is_string(cell.type) else None
