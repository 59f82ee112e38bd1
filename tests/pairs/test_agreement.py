"""Training, checker and converter read rows alike: random tables of every convention, good and bad."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from faults.samples import images
from helpers import face_rows
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.columns import CONVENTIONS, Columns, Reading, stored_columns
from orpo.pairs.table import PairTable, PreferencePairs
from orpo.reports.inspection import TableSource
from orpo.store.convert import read_pair
from orpo.store.parquet import write_copy


GOOD = [row["jpg_0"] for row in face_rows(6, ties=0)]
IMAGES = [*GOOD * 3, *images().values(), GOOD[0][:700], b"<html>", b"", None]
PROMPTS = ["a", "a fox", "", "x" * 300, None]
LABELS = ["1", "0", "1.0", "0.5", "0.7", "yes", None]
FLAGS = ["true", "False", "1", "maybe", None]
UIDS = ["a", "b", "tie", None]
NUMBERS = ["1", "2", "2.0", "7", "-1", "inf", "many", None]

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
    "HPDv3": {
        "choice_dist": ["[8, 1]", "[8, 1]", "[3, 2]", "[4, 4]", "[1, 8]", "[9]", "none", None],
        "label_0": ["1", "0", None],
        "label_1": ["0", "1", None],
    },
}
MANY_VOTES, SHARES = Reading(min_agreement=0.7), Reading(soft_labels=True, min_agreement=0.8)


def one_pair(convention, rng: random.Random) -> pa.Table:
    """The rows of a pair, with some of the columns that may be there."""
    if convention.is_ranked:
        return one_ranked_pair(convention, rng)
    optional = [name for name in (*convention.hints, *convention.marks[:1]) if rng.random() < 0.4]
    columns = {name: pa.array([rng.choice(IMAGES)], pa.binary()) for name in convention.images}
    for name in dict.fromkeys((*convention.verdict, *convention.marks[:1], *optional)):
        columns[name] = pa.array([rng.choice(VERDICTS.get(convention.name, {}).get(name, NUMBERS))], pa.string())
    return pa.table(columns | {convention.prompt: pa.array([rng.choice(PROMPTS)], pa.string())})


def one_ranked_pair(convention, rng: random.Random) -> pa.Table:
    """A row that lists two images, or two rows."""
    (images,), (order,) = convention.images, convention.verdict
    prompts = [rng.choice(PROMPTS)] * 2
    numbers = [*"01" * 5, "2", None] if order == "human_preference" else NUMBERS
    columns = {images: rng.choices(IMAGES, k=2), order: rng.choices(numbers, k=2), convention.prompt: prompts}
    types = {images: pa.binary(), order: pa.string(), convention.prompt: pa.string()}
    if convention.group is not None:
        columns |= {convention.group: rng.choice([["a", "a"]] * 4 + [["a", None]])}
        columns[convention.prompt][1] = rng.choice([prompts[0]] * 4 + ["another"])
        return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    columns |= {convention.prompt: prompts[0], order: columns[order][: rng.choice([2, 2, 2, 1])]}
    lists = {name: pa.list_(types[name]) for name in (images, order)}
    return pa.table({name: pa.array([value], lists.get(name, pa.string())) for name, value in columns.items()})


def of_training(table: PairTable):
    """The pair; "tie"; "low"; or the kind of what is wrong first."""
    try:
        pairs = PreferencePairs.of(table)
        pairs.checked()
    except BadPair as bad:
        return bad.kind
    except ValueError as error:
        assert "are ties" in str(error)
        return "low" if "0 of the" in str(error) else "tie"
    pair = pairs[0]
    return pair.winner, pair.loser, pair.prompt


def of_checker(table: PairTable):
    source = TableSource(table, None, decode=True)
    found = source.inspect([0])[0]
    if found.problems:
        return found.problems[0].kind
    if found.label in (0.5, -1):
        return "tie" if found.label == 0.5 else "low"
    (pair,) = source.pairs([(0, 0)])
    return pair.winner, pair.loser, pair.prompt


def of_converter(table: PairTable, folder: Path):
    columns, rows = table.columns, table.dataset.data
    if columns.convention.is_ranked:  # pairs are written to a file first
        columns, rows = stored_columns(columns), pq.read_table(write_copy(table, folder))
    try:
        label, members = read_pair(columns, {name: rows.column(name)[0] for name in columns.used}, "row 0")
    except BadPair as bad:
        return bad.kind
    if not members:
        assert label in (0.5, -1)
        return "tie" if label == 0.5 else "low"
    pair = [next(value for name, value in members.items() if name.startswith(f"jpg_{i}.")) for i in (0, 1)]
    assert float(members["label_0.txt"]) == label == 1 - float(members["label_1.txt"])
    return *(pair if label == 1 else pair[::-1]), members["original_prompt.txt"].decode()


def name_of(convention) -> str:
    return f"{convention.name} {'-'.join((*convention.images, *convention.verdict))}"


@pytest.mark.parametrize("convention", CONVENTIONS, ids=name_of)
def test_training_checker_and_converter_say_the_same_of_every_row(convention, tmp_path):
    rng, seen = random.Random(0), set()
    number = 400 if convention.name == "Pick-a-Pic" else 40 if convention.is_ranked else 80
    of_votes = [MANY_VOTES] * 90 * bool(convention.votes) + [SHARES] * 60 * convention.soft_labels
    for reading in [Reading()] * number + of_votes:
        rows = one_pair(convention, rng)
        if reading == MANY_VOTES and set(convention.votes).isdisjoint(rows.column_names):
            continue  # it would be refused
        table = PairTable.of(Dataset(rows), "rows", reading=reading)
        assert len(table) == 1 or rows.column(convention.group).null_count
        verdicts = of_training(table), of_checker(table), of_converter(table, tmp_path)
        assert verdicts[0] == verdicts[1] == verdicts[2], (rows.to_pylist(), verdicts)
        seen.add(verdicts[0] if isinstance(verdicts[0], str) else "pair")
    expected = {"pair"} if convention.is_ranked else {"pair", "bad prompt", "missing image", "undecodable image"}
    expected |= {"bad label", "contradicting columns"} if convention.name in VERDICTS else set()
    expected |= {"bad label", "tie"} if convention.verdict else set()
    assert seen >= expected | ({"low"} if convention.votes else set())


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
    from orpo.store.plan import plan_job

    labels = [name for name in ("1", "0", "1", "0.5") if name in names]
    rows = [{"jpg_0": GOOD[0], "jpg_1": GOOD[1], "label_0": label, "caption": "a"} for label in labels]
    features = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "caption": Value("string")}
    dataset = Dataset.from_list(rows, features=Features(features | {"label_0": ClassLabel(names=names)}))
    table = PairTable.of(dataset, "rows")
    dataset.to_parquet(tmp_path / "train.parquet")
    of_file = plan_job(str(tmp_path), str(tmp_path)).columns["train.parquet"]
    assert [of_file.read_label({"label_0": cell}) for cell in dataset.data.column("label_0")] == list(
        map(float, labels)
    )
    assert table.labels.tolist() == list(map(float, labels))


def test_a_class_label_whose_names_are_no_labels_is_refused():
    rows = [{"jpg_0": GOOD[0], "jpg_1": GOOD[1], "label_0": "rejected", "caption": "a"}]
    features = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "caption": Value("string")}
    features = Features(features | {"label_0": ClassLabel(names=["preferred", "rejected"])})
    table = PairTable.of(Dataset.from_list(rows, features=features), "rows")
    with pytest.raises(BadPair, match="row 0: label_0 is 'rejected'"):
        PreferencePairs.of(table)


def test_columns_that_can_be_read_in_two_ways_are_refused():
    names = dict.fromkeys(("jpg_0", "jpg_1", "chosen", "rejected"), b"")
    table = pa.Table.from_pylist([names | {"label_0": 1, "caption": "a", "prompt": "a"}])
    with pytest.raises(ValueError, match="rows can be read as Pick-a-Pic .* and as TRL"):
        Columns.find(table.schema, "rows")
