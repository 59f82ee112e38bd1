"""A copy without what the check complains of, and how often scorers agree with the labels."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import encode, face_rows, write_parquet, write_shards
from orpo.scoring.win_rate import interval
from PIL import Image

import check_preferences


# Files of scorers: one that sees how red an image is, and two that see nothing of it.
SCORERS = """
def redness(images, prompts):
    return [image.getpixel((2, 2))[0] for image in images]

def blueness(images, prompts):
    return [image.getpixel((2, 2))[2] for image in images]

def constant(images, prompts):
    return [1.0 for image in images]

def broken(images, prompts):
    return [float("nan") for image in images]
"""


def check(output_dir: Path, *line: str) -> tuple[int, dict]:
    status = check_preferences.main(["--num_workers=1", "--num_sample_pairs=0", f"--output_dir={output_dir}", *line])
    return status, json.loads((output_dir / "report.json").read_text())


def colour(red: int, blue: int = 0, size: int = 32) -> bytes:
    return encode(Image.new("RGB", (size, size), (red, 0, blue)), "PNG")


def pair(winner: int, loser: int, caption: str = "a", label: float = 1.0, size: int = 32) -> dict:
    images = [colour(winner, size=size), colour(loser, size=size)][:: 1 if label else -1]
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


def red(encoded: bytes) -> int:
    return Image.open(io.BytesIO(encoded)).getpixel((2, 2))[0]


def test_a_filtered_copy_has_the_good_pairs_and_counts_the_others(tmp_path, capsys):
    source = write_parquet(tmp_path / "data", ROWS)
    status, report = check(tmp_path / "out", f"--dataset_name={source}", f"--filter={tmp_path / 'copy'}")
    assert status == 1  # the data themselves are as they were
    copy = pq.read_table(tmp_path / "copy" / "train.parquet").to_pylist()
    assert [(red(row["jpg_0"]), red(row["jpg_1"]), row["caption"], row["source"]) for row in copy] == GOOD
    assert {row["label_0"] for row in copy} == {1.0}
    left_out = {
        "ties": 1,
        "of low agreement": 0,
        "bad": 2,
        "contradicting": 2,
        "of an image with itself": 1,
        "duplicates": 1,
    }
    assert report["filtered"] == {"file": str(tmp_path / "copy" / "train.parquet"), "pairs": 4, "left_out": left_out}
    assert sum(left_out.values()) + 4 == len(ROWS)
    said = "4 pairs. Left out: 1 ties, 2 bad, 2 contradicting, 1 of an image with itself, 1 duplicates."
    assert said in capsys.readouterr().out
    status, again = check(tmp_path / "out2", f"--dataset_name={tmp_path / 'copy'}", f"--filter={tmp_path / 'copy2'}")
    assert status == 0 and again["pairs"] == 4 == again["filtered"]["pairs"]
    assert not any(again["filtered"]["left_out"].values())


def test_what_stops_training_is_left_out_of_the_copy(tmp_path):
    """Votes against the label, and a file that is missing: the way out that the errors name."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(colour(10 * i))
    votes = [[8, 1], [1, 8], [5, 4]]
    lines = [
        {"prompt": "a", "path1": f"{2 * i}.png", "path2": f"{2 * i + 1}.png", "choice_dist": dist}
        for i, dist in enumerate(votes)
    ]
    (tmp_path / "4.png").unlink()
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = [f"--dataset_name={tmp_path / 'train.jsonl'}", f"--filter={tmp_path / 'copy'}"]
    status, report = check(tmp_path / "out", *line)
    assert status == 1 and report["filtered"]["left_out"]["bad"] == 2
    kinds = {problem["kind"]: problem["count"] for problem in report["problems"]}
    assert kinds == {"contradicting columns": 1, "missing image": 1}
    status, again = check(tmp_path / "out2", f"--dataset_name={tmp_path / 'copy'}")
    assert status == 0 and again["pairs"] == 1


def test_low_agreement_is_left_out(tmp_path):
    rows = [row | {"label_0": share} for row, share in zip(ROWS[:4], (0.9, 0.4, 0.5, 0.75))]
    source = write_parquet(tmp_path / "data", rows)
    line = [f"--dataset_name={source}", f"--filter={tmp_path / 'copy'}", "--soft_labels", "--min_agreement=0.7"]
    status, report = check(tmp_path / "out", *line)
    assert status == 0 and report["filtered"]["pairs"] == 2
    assert report["labels"] == {"first_preferred": 2, "second_preferred": 0, "ties": 1, "low_agreement": 1, "bad": 0}
    assert report["filtered"]["left_out"]["of low agreement"] == 1
    _, again = check(tmp_path / "out2", f"--dataset_name={tmp_path / 'copy'}", "--min_agreement=0.8")
    assert (again["labels"]["first_preferred"], again["labels"]["low_agreement"]) == (
        1,
        1,
    )  # 0.9 and 0.75 of the votes


def test_shards_are_filtered_too(tmp_path):
    good = [row for row in ROWS if row["label_0"] is not None]
    shards = write_shards(tmp_path / "shards", good, per_shard=4)
    _, report = check(
        tmp_path / "out", f"--dataset_path={shards}", f"--filter={tmp_path / 'copy'}", "--max_bad_samples=1"
    )
    copy = pq.read_table(tmp_path / "copy" / "train.parquet").to_pylist()
    assert [(red(row["jpg_0"]), red(row["jpg_1"]), row["caption"]) for row in copy] == [row[:3] for row in GOOD]
    assert report["filtered"]["left_out"]["bad"] == 1


def test_a_folder_that_is_there_is_not_written_to(tmp_path, capsys):
    source = write_parquet(tmp_path / "data", ROWS)
    with pytest.raises(SystemExit):
        check(tmp_path / "out", f"--dataset_name={source}", f"--filter={source}")
    assert "already exists: name a new folder" in capsys.readouterr().err


# Scorers


@pytest.fixture
def scorers(tmp_path) -> Path:
    (tmp_path / "scorers.py").write_text(SCORERS)
    return tmp_path / "scorers.py"


def test_scorers_are_compared_with_the_labels(tmp_path, scorers, capsys):
    rows = [pair(200 + i, 10 + i, f"prompt {i // 2}") for i in range(18)]
    rows += [pair(10 + i, 200 + i, f"prompt {i}", size=40) for i in range(2)]  # the less red image is preferred
    source = write_parquet(tmp_path / "data", rows)
    names = [f"{scorers}:redness", f"{scorers}:constant"]
    _, report = check(tmp_path / "out", f"--dataset_name={source}", "--scorers", *names)
    found = report["scorers"]
    assert found["pairs"] == 20 and found["scorers"]["redness"]["agree"] == 18 / 20
    assert 0.5 < found["scorers"]["redness"]["low"] < 0.9 < found["scorers"]["redness"]["high"] <= 1
    constant = found["scorers"]["constant"]
    assert constant["low"] < 0.5 == constant["agree"] < constant["high"]  # ties on every pair are no certainty
    assert (found["all_agree"], found["none_agrees"]) == (0, 0)
    assert "redness               90.0%  (" in capsys.readouterr().out
    assert not [note for note in report["notes"] if "No scorer" in note]


def test_data_on_which_every_scorer_is_at_chance_are_pointed_out(tmp_path, scorers):
    source = write_parquet(tmp_path / "data", [pair(200 + i, 10 + i) for i in range(8)])
    _, report = check(
        tmp_path / "out", f"--dataset_name={source}", "--scorers", f"{scorers}:blueness", "--num_scored_pairs=5"
    )
    assert report["scorers"]["pairs"] == 5
    assert any("No scorer agrees with the labels" in note for note in report["notes"])


def test_scores_that_are_not_finite_stop_with_the_scorers_name(tmp_path, scorers):
    source = write_parquet(tmp_path / "data", face_rows(4, ties=0))
    with pytest.raises(ValueError, match="Scorer .*broken returned nan"):
        check(tmp_path / "out", f"--dataset_name={source}", "--scorers", f"{scorers}:broken")
    with pytest.raises(ValueError, match="Unknown scorer 'nothing'"):
        check(tmp_path / "out", f"--dataset_name={source}", "--scorers", "nothing")


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Prompts have shares of their own, and ten pairs each: an interval over pairs would be too narrow."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        shares = rng.choice([0.2, 1.0], size=60)
        won = (rng.random((60, 10)) < shares[:, None]).astype(float).ravel()
        low, high = interval(won, [str(i) for i in range(60) for _ in range(10)], (0, 1))
        inside += low <= 0.6 <= high
    assert 88 <= inside <= 99


def test_an_interval_without_a_pair_to_the_contrary_is_not_a_point():
    low, high = interval(np.ones(30), [str(i) for i in range(30)], (0, 1))
    assert 0.85 < low < 0.9 and high == pytest.approx(1)
