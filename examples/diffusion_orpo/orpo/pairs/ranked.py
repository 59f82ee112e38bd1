"""Pairs of images that a dataset ranks: a row lists all images of a prompt, or each image has its own row."""

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..runtime.messages import printable
from .bad_pair import BadPair
from .columns import Convention
from .labels import Verdict


def ranked_pairs(
    dataset: Dataset, convention: Convention, pairs_per_group: str = "all"
) -> tuple[np.ndarray, list[Verdict | BadPair], int]:
    """Which images of a dataset are compared.

    Args:
        dataset: all rows.
        convention: of its columns.
        pairs_per_group: "all", or "best_worst": the best image of a group and the worst.

    Returns:
        int64 (pairs, 2, 2): row and place in its list, of the first and of the second image; the verdict on each pair, or
        what is wrong with it; and the number of images that have no other one to be compared with.
    """
    places, verdicts, alone = [], [], 0
    groups = _listed(dataset, convention) if convention.group is None else _grouped(dataset, convention)
    for images, values, problem in groups:
        alone += len(images) == 1 and problem is None
        numbers = [_number(value) for value in values]
        for first, second in _choose(numbers, pairs_per_group) if problem is None else [(0, -1)]:
            places.append([images[first], images[second]])
            bad = [
                f"{convention.verdict[0]} is {printable(repr(values[i]))}"
                for i in (first, second)
                if numbers[i] is None
            ]
            if problem or bad:
                said = problem or bad[0]
                verdicts.append(
                    BadPair("bad label", printable(said), advice="Correct the ranking, or remove its images.")
                )
                continue
            try:
                verdicts.append(convention.order(numbers[first], numbers[second]))
            except BadPair as error:
                verdicts.append(error)
    return np.array(places, np.int64).reshape(-1, 2, 2), verdicts, alone


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
    if len(numbers) < 2 or pairs_per_group == "all":
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
