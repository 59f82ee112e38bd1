"""Datasets in every form that training takes: the converter makes shards of the same pairs, or both refuse."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers import FEATURES, face_rows, write_parquet
from orpo.pairs.sources import open_table
from orpo.pairs.table import PreferencePairs
from orpo.store.convert import convert_unit
from orpo.store.plan import plan_job
from orpo.store.reader import read_samples
from orpo.store.sample import to_pair


ROWS = face_rows(6, ties=1)


def folders(folder: Path) -> Path:
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
    for i, row in enumerate(ROWS[:4]):
        winner, loser = (row["jpg_0"], row["jpg_1"])[:: 1 if row["label_0"] else -1]
        (folder / "chosen" / f"{i}.jpg").write_bytes(winner)
        (folder / "rejected" / f"{i}.jpg").write_bytes(loser)
        (folder / "chosen" / f"{i}.txt").write_text(row["caption"])
    return folder


def imagefolder(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for i, row in enumerate(ROWS):
        for name in ("jpg_0", "jpg_1"):
            (folder / f"{i}_{name}.jpg").write_bytes(row[name])
        files = {f"{name}_file_name": f"{i}_{name}.jpg" for name in ("jpg_0", "jpg_1")}
        lines.append(json.dumps(files | {"label_0": row["label_0"], "caption": row["caption"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def saved(folder: Path) -> Path:
    Dataset.from_list(ROWS, features=FEATURES).save_to_disk(folder)
    return folder


def saved_splits(folder: Path) -> Path:
    whole = Dataset.from_list(ROWS, features=FEATURES)
    DatasetDict(train=whole, test=whole.select(range(2))).save_to_disk(folder)
    return folder


def one_file(folder: Path) -> Path:
    return Path(write_parquet(folder, ROWS), "train.parquet")


def with_a_url(folder: Path) -> str:
    return f"file://{Path(write_parquet(folder / 'a b', ROWS))}/".replace(" ", "%20")


def arrow_file(folder: Path) -> Path:
    return next(saved(folder).glob("*.arrow"))


SOURCES = [folders, imagefolder, saved, saved_splits, one_file, with_a_url, arrow_file]


def test_cache_dir_is_where_datasets_keeps_what_it_reads(tmp_path):
    job = plan_job(str(imagefolder(tmp_path / "data")), str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert job.rows == len(ROWS)
    assert list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_shards_hold_the_pairs_that_training_takes(make, tmp_path):
    source, output = str(make(tmp_path / "data")), tmp_path / "shards"
    output.mkdir()
    pairs = PreferencePairs.of(open_table(source))
    job = plan_job(source, str(output))
    shards = [json.loads(convert_unit({"item": number}, job)["shard"]) for number in range(len(job.units))]
    found = [
        to_pair(members)
        for shard in shards
        for _, members in read_samples(str(output / shard["name"]), 0, shard["samples"], shard["samples"])
    ]
    assert len(found) >= 4 and found == [pairs[i] for i in range(len(pairs))]
    again = plan_job(source, str(output))
    assert again.plan == job.plan  # a conversion that was stopped goes on


@pytest.mark.parametrize(
    "names, words",
    [
        (["batch-1", "batch-2", "ab_test-3", "contest-4"], ["3 of 4 files", "batch-1", "contest-4", "ab_test-3"]),
        (["train", "extra"], ["1 of 2 files", "extra.parquet"]),
    ],
)
def test_files_that_would_be_left_out_are_an_error_in_both_tools(tmp_path, names, words):
    for name in names:
        write_parquet(tmp_path / name, ROWS)
        (tmp_path / name / "train.parquet").rename(tmp_path / f"{name}.parquet")
        (tmp_path / name).rmdir()
    errors = []
    for tool in (lambda: open_table(str(tmp_path)), lambda: plan_job(str(tmp_path), str(tmp_path))):
        with pytest.raises(ValueError) as raised:
            tool()
        errors.append(str(raised.value))
    assert errors[0] == errors[1] and all(word in errors[0] for word in words), errors
    lines = [f"      - split: train\n        path: {names[0]}.parquet"]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n  - config_name: a\n    data_files:\n" + "\n".join(lines) + "\n---\n"
    )
    assert len(open_table(str(tmp_path))) == len(ROWS) == plan_job(str(tmp_path), str(tmp_path)).rows


def test_a_class_label_that_only_the_card_names_is_read_by_both(tmp_path):
    rows = [row | {"label_0": int(row["label_0"])} for row in face_rows(4, ties=0)]
    features = FEATURES.copy()
    del features["label_0"]
    table = Dataset.from_list(rows).to_pandas()
    table.to_parquet(tmp_path / "train.parquet")
    described = "".join(
        f"  - name: {name}\n    dtype: {kind}\n"
        for name, kind in (("jpg_0", "binary"), ("jpg_1", "binary"), ("caption", "string"))
    )
    classes = (
        "  - name: label_0\n    dtype:\n      class_label:\n        names:\n          '0': '1'\n          '1': '0'\n"
    )
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n{described}{classes}---\n")
    expected = [1.0 - row["label_0"] for row in rows]
    job = plan_job(str(tmp_path), str(tmp_path))
    of_training = PreferencePairs.of(open_table(str(tmp_path)))
    assert of_training.table.labels.tolist() == expected
    assert job.columns["train.parquet"].classes == {"label_0": ("1", "0")}


def test_files_of_a_split_must_have_the_same_columns(tmp_path):
    write_parquet(tmp_path / "x", ROWS)
    trl = [{"chosen": row["jpg_0"], "rejected": row["jpg_1"], "prompt": row["caption"]} for row in ROWS]
    write_parquet(tmp_path / "y", trl, features=None)
    shutil.move(tmp_path / "x" / "train.parquet", tmp_path / "a.parquet")
    shutil.move(tmp_path / "y" / "train.parquet", tmp_path / "b.parquet")
    (tmp_path / "x").rmdir(), (tmp_path / "y").rmdir()
    with pytest.raises(ValueError, match="b.parquet has the columns chosen.*must have the same"):
        plan_job(str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match="can't be read"):
        open_table(str(tmp_path))


@pytest.mark.parametrize(
    "name, words",
    [
        ("{}/pairs [v2]", ["wildcards", "pairs [v2]"]),
        ("{}/nothing", ["there is no such file or folder"]),
        ("~/no-such-folder-here", ["there is no such file or folder"]),
        ("{}/train-00000.tar", ["--dataset_path", ".parquet"]),
    ],
)
def test_paths_that_cannot_be_read_are_refused_in_one_sentence(tmp_path, name, words):
    write_parquet(tmp_path / "pairs [v2]", ROWS)
    (tmp_path / "train-00000.tar").write_bytes(b"")
    for tool in (open_table, lambda path: plan_job(path, str(tmp_path))):
        with pytest.raises(ValueError) as raised:
            tool(name.format(tmp_path))
        assert all(word in str(raised.value) for word in words), raised.value
