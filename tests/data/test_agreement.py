"""Training, checker and converter read rows alike: random tables of every convention, good and bad."""

import random

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from faults.samples import images
from helpers import face_rows
from orpo.checking.sources import RowSource
from orpo.conversion.sample import read_pair
from orpo.data.bad_pair import BadPair
from orpo.data.columns import CONVENTIONS, Columns
from orpo.data.rows import PreferenceRows
from orpo.data.table import Table


GOOD = [row["jpg_0"] for row in face_rows(6, ties=0)]
IMAGES = [*GOOD * 3, *images().values(), GOOD[0][:700], b"<html>", b"", None]
PROMPTS = ["a", "a fox", "", "x" * 300, None]
LABELS = ["1", "0", "1.0", "0.5", "0.7", "yes", None]
FLAGS = ["true", "False", "1", "maybe", None]
UIDS = ["a", "b", "tie", None]

# Of each convention, the columns that say who won, with what they may hold; the first values are likely ones.
VERDICTS = {
    "Pick-a-Pic": {
        "label_0": LABELS,
        "label_1": LABELS,
        "has_label": FLAGS,
        "are_different": FLAGS,
        "best_image_uid": UIDS,
        "image_0_uid": UIDS[:2],
        "image_1_uid": UIDS[1:],
    },
    "TRL": {"label_0": LABELS, "label_1": LABELS},
}


def random_table(convention, rng: random.Random) -> pa.Table:
    """One to four rows, with some of the columns that may be there."""
    optional = [name for name in convention.hints if rng.random() < 0.4]
    columns = {name: [rng.choice(IMAGES) for _ in range(4)] for name in convention.images}
    columns = {name: pa.array(values, pa.binary()) for name, values in columns.items()}
    for name in (*convention.verdict, *optional):
        columns[name] = pa.array([rng.choice(VERDICTS[convention.name][name]) for _ in range(4)], pa.string())
    columns[convention.prompt] = pa.array([rng.choice(PROMPTS) for _ in range(4)], pa.string())
    return pa.table(columns).slice(0, rng.randint(1, 4))


def of_training(table: pa.Table, row: int):
    """The pair; "tie"; or the kind of what is wrong first."""
    try:
        pairs = PreferenceRows.open(Table.of(Dataset(table.slice(row, 1)), "rows"))
        pairs.check()
    except BadPair as bad:
        return bad.kind
    except ValueError as error:
        assert "are ties" in str(error)
        return "tie"
    pair = pairs[0]
    return pair.winner, pair.loser, pair.prompt


def of_checker(table: pa.Table, row: int):
    source = RowSource(Table.of(Dataset(table), "rows"), None, decode=True)
    (found,) = source.inspect([row])
    if found.problems:
        return found.problems[0].kind
    if found.label == 0.5:
        return "tie"
    pair = source.pair((0, row))
    return pair.winner, pair.loser, pair.prompt


def of_converter(table: pa.Table, row: int):
    columns = Columns.find(table.schema, "rows")
    try:
        label, members = read_pair(columns, {name: table.column(name)[row] for name in columns.used}, f"row {row}")
    except BadPair as bad:
        return bad.kind
    if not members:
        assert label == 0.5
        return "tie"
    pair = [next(value for name, value in members.items() if name.startswith(f"jpg_{i}.")) for i in (0, 1)]
    assert float(members["label_0.txt"]) == label == 1 - float(members["label_1.txt"])
    return *(pair if label == 1 else pair[::-1]), members["original_prompt.txt"].decode()


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.name)
def test_training_checker_and_converter_say_the_same_of_every_row(convention):
    rng, seen = random.Random(0), set()
    for _ in range(60):
        table = random_table(convention, rng)
        for row in range(table.num_rows):
            verdicts = of_training(table, row), of_checker(table, row), of_converter(table, row)
            assert verdicts[0] == verdicts[1] == verdicts[2], (table.slice(row, 1).to_pylist(), verdicts)
            seen.add(verdicts[0] if isinstance(verdicts[0], str) else "pair")
    expected = {"pair", "bad label", "contradicting columns", "bad prompt", "missing image", "undecodable image"}
    assert seen >= expected | ({"tie"} if convention.verdict else set())


def pick_a_pic(**columns) -> float | str:
    """The label of one row, or why it has none."""
    row = {"jpg_0": b"", "jpg_1": b"", "caption": "a", "label_0": 1.0} | columns
    table = pa.Table.from_pylist([row])
    try:
        return Columns.find(table.schema, "rows").read_label({name: table.column(name)[0] for name in row})
    except BadPair as bad:
        return bad.kind


@pytest.mark.parametrize(
    "columns, label",
    [
        ({}, 1.0),
        ({"label_1": 0.0, "has_label": True, "are_different": True}, 1.0),
        ({"label_1": 1.0}, "contradicting columns"),
        ({"label_0": 0.0, "label_1": 0.0}, "contradicting columns"),
        ({"label_0": 0.5, "label_1": 0.5}, 0.5),
        ({"label_1": None}, 1.0),
        ({"label_1": 0.7}, "bad label"),
        ({"has_label": False}, 0.5),
        ({"label_0": None, "has_label": False}, 0.5),
        ({"are_different": False}, 0.5),
        ({"has_label": "perhaps"}, "bad label"),
        ({"best_image_uid": "x", "image_0_uid": "x", "image_1_uid": "y"}, 1.0),
        ({"best_image_uid": "y", "image_0_uid": "x", "image_1_uid": "y"}, "contradicting columns"),
        ({"best_image_uid": "tie", "image_0_uid": "x", "image_1_uid": "y"}, "contradicting columns"),
        ({"label_0": 0.5, "best_image_uid": "tie", "image_0_uid": "x", "image_1_uid": "y"}, 0.5),
        ({"best_image_uid": "x"}, 1.0),
    ],
)
def test_all_columns_that_speak_of_the_preference_are_heeded(columns, label):
    assert pick_a_pic(**columns) == label


@pytest.mark.parametrize("names", [["1", "0"], ["0", "1"], ["0.5", "1", "0"], ["tie", "0", "1"]])
def test_a_class_label_is_read_by_its_names(names, tmp_path):
    """The number of a class says nothing: `label_0` of the class "1" may be number 0."""
    from orpo.conversion.plan import plan_job

    labels = [name for name in ("1", "0", "1", "0.5") if name in names]
    rows = [{"jpg_0": GOOD[0], "jpg_1": GOOD[1], "label_0": label, "caption": "a"} for label in labels]
    features = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "caption": Value("string")}
    dataset = Dataset.from_list(rows, features=Features(features | {"label_0": ClassLabel(names=names)}))
    table = Table.of(dataset, "rows")
    dataset.to_parquet(tmp_path / "train.parquet")
    of_file = plan_job(str(tmp_path), str(tmp_path)).columns["train.parquet"]
    for columns in (table.columns, of_file):
        assert [columns.read_label(table.cells(row, ("label_0",))) for row in range(len(rows))] == list(
            map(float, labels)
        )


def test_a_class_label_whose_names_are_no_labels_is_refused():
    rows = [{"jpg_0": GOOD[0], "jpg_1": GOOD[1], "label_0": "rejected", "caption": "a"}]
    features = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "caption": Value("string")}
    features = Features(features | {"label_0": ClassLabel(names=["preferred", "rejected"])})
    table = Table.of(Dataset.from_list(rows, features=features), "rows")
    with pytest.raises(BadPair, match="row 0: label_0 is 'rejected'"):
        PreferenceRows.open(table)


def test_columns_that_can_be_read_in_two_ways_are_refused():
    names = dict.fromkeys(("jpg_0", "jpg_1", "chosen", "rejected"), b"")
    table = pa.Table.from_pylist([names | {"label_0": 1, "caption": "a", "prompt": "a"}])
    with pytest.raises(ValueError, match="rows can be read as Pick-a-Pic .* and as TRL"):
        Columns.find(table.schema, "rows")
