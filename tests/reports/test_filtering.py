"""A copy without what the check complains of, and how often scorers agree with the labels."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import check, encode, write_parquet, write_shards
from PIL import Image


# Files of scorers: one that sees how red an image is, one that sees nothing of it, and some that fail.
SCORERS = """
def redness(images, prompts):
    return [image.getpixel((2, 2))[0] for image in images]

def blueness(images, prompts):
    return [image.getpixel((2, 2))[2] for image in images]

def nan(images, prompts):
    return [float("nan") for image in images]

def small(images, prompts):
    if any(image.width > 32 for image in images):
        raise MemoryError("too large")
    return [1.0 for image in images]

def stacked(images, prompts):
    import numpy
    return numpy.stack(images).mean(axis=(1, 2, 3))
"""


def colour(red: int, size: int = 32) -> bytes:
    return encode(Image.new("RGB", (size, size + 1), (red, 0, 0)), "PNG")


def pair(chosen: int, rejected: int, caption: str = "a", label: float = 1.0, size: int = 32) -> dict:
    images = [colour(chosen, size), colour(rejected, size)][:: 1 if label else -1]
    return {"jpg_0": images[0], "jpg_1": images[1], "label_0": label, "caption": caption}


ROWS = [
    pair(200, 10),
    pair(201, 11, label=0.0),
    pair(202, 12, label=0.5),  # a tie
    pair(203, 13),
    pair(203, 13),  # a duplicate
    pair(204, 14),
    pair(14, 204, label=0.0),  # contradicts the one before it
    pair(205, 205),  # an image with itself
    pair(206, 16) | {"jpg_1": b"<html>"},
    pair(207, 17) | {"label_0": None},
    pair(208, 18, caption="b"),
]
GOOD = [(200, 10, "a", "row 0"), (201, 11, "a", "row 1"), (203, 13, "a", "row 3"), (208, 18, "b", "row 10")]


def written(folder: Path) -> list[tuple]:
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    assert {row["label_0"] for row in rows} == {1.0}
    red = [[Image.open(io.BytesIO(row[name])).getpixel((2, 2))[0] for name in ("jpg_0", "jpg_1")] for row in rows]
    return [(*colours, row["caption"], row["source"]) for colours, row in zip(red, rows)]


def test_a_filtered_copy_has_the_good_pairs_and_counts_the_others(tmp_path, capsys):
    source = write_parquet(tmp_path / "data", ROWS)
    status, report = check(tmp_path / "out", dataset_name=source, filter=tmp_path / "copy")
    assert status == 1 and written(tmp_path / "copy") == GOOD  # the data themselves are as they were
    skipped = {
        "ties": 1,
        "of low agreement": 0,
        "bad": 2,
        "contradicting": 2,
        "of an image with itself": 1,
        "duplicates": 1,
    }
    assert report["filtered"] == {"file": str(tmp_path / "copy" / "train.parquet"), "pairs": 4, "skipped": skipped}
    assert sum(skipped.values()) + 4 == len(ROWS)
    said = "4 pairs. Skipped: 1 ties, 2 bad, 2 contradicting, 1 of an image with itself, 1 duplicates."
    assert said in capsys.readouterr().out
    status, again = check(tmp_path / "out2", dataset_name=tmp_path / "copy", filter=tmp_path / "copy2")
    assert status == 0 and again["pairs"] == 4 == again["filtered"]["pairs"]
    assert not any(again["filtered"]["skipped"].values())
    with pytest.raises(SystemExit):
        check(tmp_path / "out", dataset_name=source, filter=source)
    assert "already exists: name a new folder" in capsys.readouterr().err


def test_shards_are_filtered_too(tmp_path):
    shards = write_shards(tmp_path / "shards", [row for row in ROWS if row["label_0"] is not None], per_shard=4)
    flags = {"filter": tmp_path / "copy", "max_bad_samples": 1}
    _, report = check(tmp_path / "out", dataset_path=shards, **flags)
    assert [row[:3] for row in written(tmp_path / "copy")] == [row[:3] for row in GOOD]
    assert report["filtered"]["skipped"]["bad"] == 1


def test_what_stops_training_is_not_in_the_copy(tmp_path):
    """Votes against the label, and a file that is missing: the way out that the errors name."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(colour(10 * i))
    rows = [
        {"prompt": "a", "path1": f"{2 * i}.png", "path2": f"{2 * i + 1}.png", "choice_dist": votes}
        for i, votes in enumerate([[8, 1], [1, 8], [5, 4]])
    ]
    (tmp_path / "4.png").unlink()
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, report = check(tmp_path / "out", dataset_name=tmp_path / "train.jsonl", filter=tmp_path / "copy")
    assert status == 1 and report["filtered"]["skipped"]["bad"] == 2
    kinds = {problem["kind"]: problem["count"] for problem in report["problems"]}
    assert kinds == {"contradicting columns": 1, "missing image": 1}
    status, again = check(tmp_path / "out2", dataset_name=tmp_path / "copy")
    assert status == 0 and again["pairs"] == 1


def test_pairs_of_low_agreement_are_not_in_the_copy_and_votes_are(tmp_path):
    rows = [row | {"label_0": share} for row, share in zip(ROWS[:4], (0.9, 0.4, 0.5, 0.75))]
    flags = {"filter": tmp_path / "copy", "soft_labels": True, "min_agreement": 0.7}
    status, report = check(tmp_path / "out", dataset_name=write_parquet(tmp_path / "data", rows), **flags)
    assert status == 0 and report["filtered"]["pairs"] == 2
    assert report["labels"] == {"first_preferred": 2, "second_preferred": 0, "ties": 1, "low_agreement": 1, "bad": 0}
    assert report["filtered"]["skipped"]["of low agreement"] == 1
    labels = check(tmp_path / "out2", dataset_name=tmp_path / "copy", min_agreement=0.8)[1]["labels"]
    assert (labels["first_preferred"], labels["low_agreement"]) == (1, 1)  # 0.9 and 0.75 of the votes


# Scorers


@pytest.fixture
def scorers(tmp_path) -> Path:
    (tmp_path / "scorers.py").write_text(SCORERS)
    return tmp_path / "scorers.py"


def test_scorers_are_compared_with_the_labels(tmp_path, scorers, capsys):
    rows = [pair(200 + i, 10 + i, f"prompt {i // 2}") for i in range(18)]
    rows += [pair(10 + i, 200 + i, f"prompt {i}", size=40) for i in range(2)]  # the less red image is preferred
    source = write_parquet(tmp_path / "data", rows)
    names = [f"{scorers}:redness", f"{scorers}:blueness"]
    report = check(tmp_path / "out", dataset_name=source, scorers=names)[1]
    found = report["scorers"]
    red, blue = found["scorers"]["redness"], found["scorers"]["blueness"]
    assert found["pairs"] == 20 and red["agree"] == 18 / 20 and 0.5 < red["low"] < 0.9 < red["high"] <= 1
    assert blue["low"] < 0.5 == blue["agree"] < blue["high"]  # ties on every pair are no certainty
    assert (found["all_agree"], found["none_agrees"]) == (0, 0)
    assert "redness               90.0%  (" in capsys.readouterr().out
    assert not [note for note in report["notes"] if "No scorer" in note]
    report = check(tmp_path / "out", dataset_name=source, scorers=names[1:], num_scored_pairs=5)[1]
    assert report["scorers"]["pairs"] == 5
    assert any("No scorer agrees with the labels" in note for note in report["notes"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("nan", "nan returned nan"),
        ("small", "small fails on an image of 40 x 41 pixels, prompt 'large'. MemoryError. too large"),
        ("stacked", "stacked fails on 10 images of 32 x 33, 40 x 41 pixels at once, but on none of them alone"),
    ],
)
def test_a_scorer_that_fails_is_named_with_the_image_and_all_else_is_written(tmp_path, scorers, capsys, name, message):
    rows = [*ROWS[:4], pair(220, 20, "large", size=40), ROWS[4]]
    source = write_parquet(tmp_path / "data", rows)
    with pytest.raises(ValueError, match=f"Scorer .*{message}") as failed:
        check(tmp_path / "out", dataset_name=source, filter=tmp_path / "copy", scorers=[f"{scorers}:{name}"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pairs"] == 5 and "scorers" not in report and str(failed.value) in report["notes"][-1]
    assert len(written(tmp_path / "copy")) == 4
    assert str(failed.value) in capsys.readouterr().out and (tmp_path / "out" / "index.html").exists()


def test_an_unknown_scorer_is_refused_before_anything_is_looked_at(tmp_path):
    with pytest.raises(ValueError, match="Unknown scorer 'nothing'"):
        check(tmp_path / "out", dataset_name=write_parquet(tmp_path / "data", ROWS), scorers="nothing")
    assert not (tmp_path / "out").exists()
