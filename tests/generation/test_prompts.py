"""Prompts from whatever people have: files of every encoding and length, and every form of dataset that training takes."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers import face_rows, write_parquet, write_shards
from orpo.config import PromptsConfig
from orpo.generation.prompts import FIRST, read_prompts

import make_preferences


ROWS = face_rows(3, 0)
PROMPTS = [row["caption"] for row in ROWS]


def read(**settings) -> tuple[list[str], list[str]]:
    return read_prompts(PromptsConfig(**settings))


def file_of(folder: Path, content: bytes) -> Path:
    (folder / "prompts.txt").write_bytes(content)
    return folder / "prompts.txt"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_no_part_of_a_prompt(tmp_path, end):
    """A mark inside is what `cat a.txt b.txt` leaves."""
    text = end.join(["\ufeffa red cat", " a blue cat ", "", "\ufeffa red cat", "a\u2028dog"])
    assert read(prompt_file=file_of(tmp_path, text.encode())) == (["a red cat", "a blue cat", "a\u2028dog"], [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = file_of(tmp_path, "a café\na dog\n".encode(encoding))
    with pytest.raises(ValueError, match=f"--prompt_file: {path} is .*Save it as UTF-8"):
        read(prompt_file=path)


def test_a_named_file_is_read_to_its_end_and_a_dataset_says_where_it_stops(tmp_path):
    lines = [f"a red cat number {i}" for i in range(FIRST + 20)]
    path = file_of(tmp_path, "\n".join(lines).encode())
    assert read(prompt_file=path) == (lines, [])
    prompts, (note,) = read(prompt_file=path, num_prompts=7)
    assert prompts == lines[:7] and note.startswith("The first 7 prompts of ")
    table = tmp_path / "p.jsonl"
    table.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    prompts, (note,) = read(dataset_name=str(table))
    assert prompts == lines[:FIRST] and "--num_prompts takes more" in note
    assert read(dataset_name=str(table), num_prompts=FIRST + 20) == (lines, [])


def test_json_is_no_text_with_a_prompt_on_each_line(tmp_path):
    path = file_of(tmp_path, b'{"prompt": "a red cat"}\n{"prompt": "a dog"}\n')
    with pytest.raises(ValueError, match="holds JSON.*Name it as --dataset_name"):
        read(prompt_file=path)
    assert read(prompt_file=file_of(tmp_path, b"{red|blue} cat\n")) == (["{red|blue} cat"], [])


def folders(path: Path) -> str:
    for side, column in (("chosen", "jpg_0"), ("rejected", "jpg_1")):
        (path / side).mkdir(parents=True)
        for i, row in enumerate(ROWS):
            (path / side / f"{i}.jpg").write_bytes(row[column])
    for i, prompt in enumerate(PROMPTS):
        (path / "chosen" / f"{i}.txt").write_text(prompt)
    return str(path)


def imagefolder(path: Path) -> str:
    path.mkdir()
    for i, row in enumerate(ROWS):
        (path / f"{i}.jpg").write_bytes(row["jpg_0"])
    lines = [{"file_name": f"{i}.jpg", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def table(path: Path, suffix: str) -> str:
    path.mkdir(parents=True)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    {".jsonl": dataset.to_json, ".csv": dataset.to_csv, ".parquet": dataset.to_parquet}[suffix](path / f"p{suffix}")
    return str(path / f"p{suffix}")


def saved(path: Path, splits: bool) -> str:
    dataset = Dataset.from_list(ROWS)
    (DatasetDict(train=dataset) if splits else dataset).save_to_disk(path)
    return str(path)


FORMS = {
    "parquet folder": lambda path: write_parquet(path, ROWS),
    "file URL": lambda path: Path(write_parquet(path, ROWS)).as_uri(),
    "slash at the end": lambda path: write_parquet(path, ROWS) + "/",
    "two folders": folders,
    "imagefolder": imagefolder,
    "parquet": lambda path: table(path, ".parquet"),
    "jsonl": lambda path: table(path, ".jsonl"),
    "csv": lambda path: table(path, ".csv"),
    "folder of jsonl": lambda path: str(Path(table(path, ".jsonl")).parent),
    "save_to_disk": lambda path: saved(path, splits=False),
    "save_to_disk with splits": lambda path: saved(path, splits=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_come_from_every_form_of_dataset_that_training_takes(tmp_path, form):
    assert read(dataset_name=FORMS[form](tmp_path / "data")) == (PROMPTS, [])


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table(tmp_path / "data", ".jsonl")
    line = ["--pretrained_model_name_or_path=a/model", "--dataset_name=~/data/p.jsonl"]
    assert read_prompts(make_preferences.parse_args(line)) == (PROMPTS, [])


def test_what_has_no_prompts_for_us_says_where_they_are(tmp_path):
    shards = write_shards(tmp_path / "shards", ROWS, 2)
    for name in (shards, next(shards.glob("*.tar"))):
        with pytest.raises(ValueError, match="holds shards. Name the dataset that they were made of"):
            read(dataset_name=str(name))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(ValueError, match="A text file with a prompt on each line is a --prompt_file"):
        read(dataset_name=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="--dataset_name=./nothing does not exist"):
        read(dataset_name="./nothing")
    (tmp_path / "empty.txt").write_text("\ufeff\n\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read(prompt_file=tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="none called colour.*--caption_column"):
        read(dataset_name=table(tmp_path / "t", ".csv"), caption_column="colour")
