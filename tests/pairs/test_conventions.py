"""Each convention in the form it is published in: training, checker and converter find the same winners, by their pixels."""

import csv
import json
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers import arguments, encode, train
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.columns import CONVENTIONS, Reading, named_columns
from orpo.pairs.dataset import DataOptions, load_pairs
from orpo.pairs.image import decode_image
from orpo.pairs.sources import open_table
from orpo.pairs.table import PreferencePairs
from orpo.reports.inspection import TableSource
from orpo.store.convert import convert_unit
from orpo.store.plan import plan_job
from orpo.store.reader import read_samples
from orpo.store.sample import to_pair
from PIL import Image

from train_diffusion_orpo_sdxl_lora import parse_args


# How good an image is stands in its red pixels: 250 is the best.
def image(goodness: int, number: int = 0) -> bytes:
    return encode(Image.new("RGB", (16 + number, 24), (goodness, 10 * number, 0)), "PNG")


def goodness(encoded: bytes) -> int:
    return decode_image(encoded, "").getpixel((3, 3))[0]


def write_images(folder: Path, *names: str) -> None:
    """Files named by goodness and number: `images/250-1.png`."""
    for name in names:
        good, _, number = Path(name).stem.partition("-")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(int(good), int(number or 0)))


def pick_a_pic(folder: Path) -> Path:
    rows = [
        {"caption": "a", "jpg_0": image(250), "jpg_1": image(50), "label_0": 1.0, "label_1": 0.0, "has_label": True},
        {"caption": "b", "jpg_0": image(60), "jpg_1": image(200), "label_0": 0.0, "label_1": 1.0, "has_label": True},
        {"caption": "c", "jpg_0": image(1), "jpg_1": image(2), "label_0": 0.5, "label_1": 0.5, "has_label": True},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def trl(folder: Path) -> Path:
    rows = [
        {"prompt": "a", "chosen": image(250), "rejected": image(50)},
        {"prompt": "b", "chosen": image(200), "rejected": image(60)},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def hpd_v3(folder: Path) -> Path:
    """An array of objects beside the images; votes are not known of every pair."""
    names = ["images/250.png", "images/50.png", "images/200-1.png", "images/60-1.png", "images/9.png", "images/8.png"]
    write_images(folder, *names)
    known = {"confidence": 0.98, "choice_dist": [8, 1], "model1": "flux", "model2": "sdxl"}
    unknown = {"confidence": None, "choice_dist": None, "model1": "kolors", "model2": "sd2"}
    tie = known | {"choice_dist": [4, 4]}
    rows = [
        {"prompt": prompt, "path1": path1, "path2": path2, **rest}
        for prompt, path1, path2, rest in zip("abc", names[::2], names[1::2], (known, unknown, tie))
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def hpd_v2_train(folder: Path) -> Path:
    write_images(folder, "250.png", "50.png", "60.png", "200.png")
    rows = [
        {"human_preference": [1, 0], "prompt": "a", "file_path": ["250.png", "50.png"]},
        {"human_preference": [0, 1], "prompt": "b", "file_path": ["60.png", "200.png"]},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def hpd_v2_test(folder: Path) -> Path:
    """Rank 1 is the best."""
    write_images(folder, "250.png", "50.png", "100.png")
    raw = [{"rank": [1, 3, 2], "user_hash": "0a"}]
    rows = [{"prompt": "a", "image_path": ["50.png", "250.png", "100.png"], "rank": [3, 1, 2], "raw_annotations": raw}]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json"


def votes(folder: Path, names: tuple[str, str], values: list[tuple[float, float]]) -> Path:
    rows = []
    for prompt, (first, second) in zip("abcd", values):
        images = {"image1": image(250 if first > second else 40), "image2": image(30 if first > second else 200)}
        models = {"model1": "flux", "model2": "sd3", "detailed_results": "{}"}
        rows.append({"prompt": prompt, **images, names[0]: first, names[1]: second, **models})
    kinds = dict.fromkeys(("prompt", "model1", "model2", "detailed_results"), Value("string"))
    kinds |= {
        "image1": ImageFeature(),
        "image2": ImageFeature(),
        names[0]: Value("float64"),
        names[1]: Value("float64"),
    }
    rows = [row | {name: {"bytes": row[name], "path": "x.png"} for name in ("image1", "image2")} for row in rows]
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(folder / "train.parquet")
    return folder


rapidata_votes = partial(votes, names=("votes_image1", "votes_image2"), values=[(20, 6), (3, 23), (13, 13)])
WEIGHTED = ("weighted_results_image1_preference", "weighted_results_image2_preference")
rapidata_weighted = partial(votes, names=WEIGHTED, values=[(0.9, 0.1), (0.45, 0.55), (0.5, 0.5)])


RANKED = {"rank": [2, 1, 3], "goodness": [100, 250, 50]}  # rank 1 is the best


def image_reward_db(folder: Path) -> Path:
    """A row an image; the two prompts' rows are mixed."""
    rows = []
    for prompt in ("a", "b"):
        for rank, good in zip(RANKED["rank"], RANKED["goodness"]):
            file = {"bytes": image(good, ord(prompt) - 97), "path": "x.webp"}
            extra = {"classification": "People", "image_amount_in_total": 3, "rank": rank, "overall_rating": 8 - rank}
            rows.append({"image": file, "prompt_id": f"000-{prompt}", "prompt": prompt, **extra})
    rows = rows[::2] + rows[1::2]
    kinds = {name: Value("int8") for name in ("image_amount_in_total", "rank", "overall_rating")}
    kinds |= {name: Value("string") for name in ("prompt_id", "prompt", "classification")}
    features = Features(kinds | {"image": ImageFeature()})
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def image_reward_db_metadata(folder: Path) -> Path:
    write_images(folder, "train_1/100.png", "train_1/250.png", "train_1/50.png")
    rows = [
        {"image_path": f"train_1/{good}.png", "prompt_id": "000-a", "prompt": "a", "rank": rank}
        for rank, good in zip(RANKED["rank"], RANKED["goodness"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata-train.parquet")
    return folder / "metadata-train.parquet"


def image_reward_db_groups(folder: Path) -> Path:
    files = [{"bytes": image(good), "path": "x.webp"} for good in RANKED["goodness"]]
    row = {"prompt_id": "000-a", "prompt": "a", "classification": "", "image": files, "rank": RANKED["rank"]}
    kinds = {name: Value("string") for name in ("prompt_id", "prompt", "classification")}
    features = Features(kinds | {"image": List(ImageFeature()), "rank": List(Value("int8"))})
    Dataset.from_list([row], features=features).to_parquet(folder / "train.parquet")
    return folder


def image_reward_db_pairs(folder: Path) -> Path:
    rows = [{"prompt_id": "000-a", "prompt": "a", "img_better": image(250), "img_worse": image(50)}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def scored(folder: Path) -> Path:
    """As a reward model would write them: the highest score is the best. One image stands alone."""
    write_images(folder, "50.png", "250.png", "7.png")
    lines = [
        {"image": "50.png", "prompt_id": 1, "prompt": "a", "score": -0.7},
        {"image": "7.png", "prompt_id": 2, "prompt": "b", "score": 0.2},
        {"image": "250.png", "prompt_id": 1, "prompt": "a", "score": 1.3},
    ]
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "scores.jsonl"


def table_of_paths(folder: Path, suffix: str) -> Path:
    write_images(folder, "images/250.png", "images/50.png", "images/60.png", "images/200.png")
    rows = [
        {"jpg_0": "images/250.png", "jpg_1": "images/50.png", "label_0": 1, "caption": "a"},
        {"jpg_0": "images/60.png", "jpg_1": "images/200.png", "label_0": 0, "caption": "b"},
    ]
    path = folder / f"pairs.{suffix}"
    with open(path, "w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif suffix == "json":
            json.dump(rows, file)
        else:
            file.write("\n".join(map(json.dumps, rows)))
    return path


def named(folder: Path) -> Path:
    """Columns of other names, among them some that would be taken for a convention's if they were not named."""
    rows = [
        {"first": image(250), "second": image(50), "better": 1, "text": "a", "prompt": "x", "chosen": b"", "rejected": b""},
        {"first": image(200), "second": image(60), "better": 1, "text": "b", "prompt": "x", "chosen": b"", "rejected": b""},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


TWO = [("a", 250, 50), ("b", 200, 60)]
THREE = [("a", 250, 100), ("a", 100, 50), ("a", 250, 50)]
BY_NAME = Reading(named=named_columns(("first", "second"), "text", "better"))
BY_CHOICE = Reading(named=named_columns(("first", "second"), "text", None))
# Of each: what makes it, how it is read, the winners and losers, and the ties that are dropped.
FORMS = {
    "Pick-a-Pic": (pick_a_pic, Reading(), TWO, 1),
    "TRL": (trl, Reading(), TWO, 0),
    "HPDv3": (hpd_v3, Reading(), TWO, 1),
    "HPDv2, train": (hpd_v2_train, Reading(), TWO, 0),
    "HPDv2, test": (hpd_v2_test, Reading(), THREE, 0),
    "HPDv2, best and worst": (hpd_v2_test, Reading(pairs_per_group="best_worst"), [("a", 250, 50)], 0),
    "Rapidata, votes": (rapidata_votes, Reading(), [("a", 250, 30), ("b", 200, 40)], 1),
    "Rapidata, weighted": (rapidata_weighted, Reading(), [("a", 250, 30), ("b", 200, 40)], 1),
    "Rapidata, agreed": (rapidata_weighted, Reading(min_agreement=0.7), [("a", 250, 30)], 1),
    "ImageRewardDB": (image_reward_db, Reading(), THREE + [("b", *pair[1:]) for pair in THREE], 0),
    "ImageRewardDB, metadata": (image_reward_db_metadata, Reading(), THREE, 0),
    "ImageRewardDB, groups": (image_reward_db_groups, Reading(), THREE, 0),
    "ImageRewardDB, pairs": (image_reward_db_pairs, Reading(), TWO[:1], 0),
    "ImageRewardDB, best and worst": (
        image_reward_db,
        Reading(pairs_per_group="best_worst"),
        [("a", 250, 50), ("b", 250, 50)],
        0,
    ),
    "scores": (scored, Reading(), TWO[:1], 0),
    "JSON of paths": (partial(table_of_paths, suffix="json"), Reading(), TWO, 0),
    "JSONL of paths": (partial(table_of_paths, suffix="jsonl"), Reading(), TWO, 0),
    "CSV of paths": (partial(table_of_paths, suffix="csv"), Reading(), TWO, 0),
    "named columns": (named, BY_NAME, TWO, 0),
    "named columns of a choice": (named, BY_CHOICE, TWO, 0),
}


def seen(pairs) -> list[tuple[str, int, int]]:
    return sorted((pair.prompt, goodness(pair.winner), goodness(pair.loser)) for pair in pairs)


def of_training(source: Path, reading: Reading) -> tuple[list, int]:
    pairs = PreferencePairs.of(open_table(str(source), reading=reading))
    hashes = pairs.checked().digests
    assert len(hashes) == len(pairs) and len(set(hashes.reshape(-1).tolist())) >= 2
    return seen(pairs[i] for i in range(len(pairs))), pairs.num_ties


def of_checker(source: Path, reading: Reading) -> tuple[list, int]:
    rows = TableSource(open_table(str(source), reading=reading), None, decode=True)
    found = [pair for task in rows.tasks() for pair in rows.inspect(task)]
    assert not [problem for pair in found for problem in pair.problems]
    good = [pair.key for pair in found if pair.chosen is not None]
    return seen(rows.pairs(good)), sum(pair.label == 0.5 for pair in found)


def of_converter(source: Path, reading: Reading, output: Path) -> tuple[list, int]:
    output.mkdir()
    job = plan_job(str(source), str(output), reading=reading)
    shards = [json.loads(convert_unit({"item": number}, job)["shard"]) for number in range(len(job.units))]
    assert not [row for shard in shards for row in shard["bad_rows"]]
    samples = [
        to_pair(members)
        for shard in shards
        for _, members in read_samples(str(output / shard["name"]), 0, shard["samples"], shard["samples"])
    ]
    return seen(samples), sum(shard["labels"]["tie"] for shard in shards)


@pytest.mark.parametrize("name", FORMS)
def test_training_checker_and_converter_find_the_winners(name, tmp_path):
    make, reading, winners, ties = FORMS[name]
    (tmp_path / "data").mkdir()
    source = make(tmp_path / "data")
    expected = (sorted(winners), ties)
    assert of_training(source, reading) == expected
    assert of_checker(source, reading) == expected
    assert of_converter(source, reading, tmp_path / "shards") == expected


def test_every_convention_has_a_form(tmp_path):
    """Of those that differ in the names of columns alone, one will do."""
    found = set()
    for i, (make, reading, *_) in enumerate(FORMS.values()):
        (tmp_path / str(i)).mkdir()
        table = open_table(str(make(tmp_path / str(i))), reading=reading)
        found.add(table.columns.convention.name)
    assert found == {convention.name for convention in CONVENTIONS} | {"named columns"}


# What can be read in two ways, or in none


@pytest.mark.parametrize(
    "columns, readings",
    [
        (
            {"prompt": "a", "path1": "a.png", "path2": "b.png", "model1": "", "chosen": b"", "rejected": b""},
            ["as TRL (chosen, rejected, prompt)", "as HPDv3 (path1, path2, prompt)"],
        ),
        (
            {"prompt": "a", "prompt_id": "1", "image": b"", "rank": 1, "score": 0.5},
            ["as ImageRewardDB (image, rank, prompt_id, prompt)", "ImageRewardDB (image, score, prompt_id, prompt)"],
        ),
        (
            {"prompt": "a", "image_path": ["a", "b"], "rank": [1, 2], "human_preference": [1, 0]},
            ["as HPDv2 (image_path, human_preference, prompt)", "HPDv2 (image_path, rank, prompt)"],
        ),
        (
            dict.fromkeys(("image1", "image2"), b"")
            | {"prompt": "a", "votes_image1": 3, "votes_image2": 1, WEIGHTED[0]: 0.1, WEIGHTED[1]: 0.9},
            ["as votes (image1, image2, votes_image1", "as weighted votes (image1, image2, weighted"],
        ),
    ],
)
def test_ambiguous_columns_are_refused_with_both_readings(columns, readings, tmp_path):
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "train.parquet")
    for tool in (lambda: open_table(str(tmp_path)), lambda: plan_job(str(tmp_path), str(tmp_path))):
        with pytest.raises(ValueError) as raised:
            tool()
        assert all(reading in str(raised.value) for reading in readings), raised.value


def test_two_paths_alone_could_mean_anything(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "path1": "a", "path2": "b"}]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="It needs .*--columns chosen=NAME"):
        open_table(str(tmp_path))


def test_columns_that_flags_name_must_be_there(tmp_path):
    reading = Reading(named=named_columns(("first", "second"), "words", None))
    with pytest.raises(ValueError, match="It needs first, second, words, as flags say"):
        open_table(str(named(tmp_path)), reading=reading)


WAYS_TO_NAME = [
    ["image_0=first", "image_1=second", "label=better", "prompt=text"],
    ["chosen=first", "rejected=second", "prompt=text"],
]


@pytest.mark.parametrize("columns", WAYS_TO_NAME, ids=["labelled", "chosen"])
def test_flags_name_columns_in_training(tmp_path, columns):
    rows = {"soft_labels": True, "min_agreement": 0.6} if "label=better" in columns else {}
    data = load(arguments("unused", str(named(tmp_path)), "unused", columns=columns, **rows))
    assert seen(data.train[i] for i in range(data.num_pairs)) == sorted(TWO)


def test_flags_say_where_images_are_and_which_to_compare(tmp_path):
    (tmp_path / "data").mkdir(), (tmp_path / "elsewhere").mkdir()
    path = hpd_v2_test(tmp_path / "data")
    write_images(tmp_path / "elsewhere", "250.png", "50.png", "90.png")
    (tmp_path / "elsewhere" / "90.png").rename(tmp_path / "elsewhere" / "100.png")
    flags = {"image_root": str(tmp_path / "elsewhere"), "pairs_per_group": "best_worst"}
    data = load(arguments("unused", str(path), "unused", **flags))
    assert seen(data.train[i] for i in range(data.num_pairs)) == [("a", 250, 50)]


def load(line: list[str]):
    return load_pairs(DataOptions.from_config(parse_args(line)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["chosen=x"], "name all columns: chosen, rejected and prompt"),
        (["image_0=x", "image_1=x", "prompt=x"], "name all columns: chosen, rejected and prompt"),
        (["winner=x"], "write what a column holds and its name"),
        (["chosen", "rejected=x", "prompt=x"], "write what a column holds and its name"),
    ],
)
def test_some_of_the_columns_are_not_enough(columns, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(arguments("unused", str(named(tmp_path)), "unused", columns=columns))
    assert message in capsys.readouterr().err


def test_training_from_a_ranking_equals_training_from_its_pairs(tmp_path, tiny_sdxl):
    (tmp_path / "ranked").mkdir(), (tmp_path / "pairs").mkdir()
    ranked = image_reward_db(tmp_path / "ranked")
    pairs = PreferencePairs.of(open_table(str(ranked)))
    rows = [
        {"chosen": pair.winner, "rejected": pair.loser, "prompt": pair.prompt}
        for pair in (pairs[i] for i in range(len(pairs)))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs" / "train.parquet")
    first, second = (
        train(
            tiny_sdxl,
            str(source),
            tmp_path / f"lora-{i}",
            cache_latents=True,
            run_validation=True,
            num_validation_pairs=3,
        )
        for i, source in enumerate((ranked, tmp_path / "pairs"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


# Votes


def label_of(folder: Path, soft_labels: bool, min_agreement: float | None, **columns) -> float | str:
    row = {"jpg_0": image(1), "jpg_1": image(2), "caption": "a"} | columns
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    reading = Reading(soft_labels=soft_labels, min_agreement=min_agreement)
    table = open_table(str(folder / "train.parquet"), reading=reading)
    return table.problems[0].kind if table.problems else table.labels[0]


@pytest.mark.parametrize(
    "soft_labels, min_agreement, columns, label",
    [
        (False, None, {"label_0": 0.7}, "bad label"),
        (True, None, {"label_0": 0.7}, 1.0),
        (True, None, {"label_0": 0.499}, 0.0),
        (True, None, {"label_0": 1}, 1.0),
        (True, 0.7, {"label_0": 0.7}, 1.0),
        (True, 0.7, {"label_0": 0.3}, 0.0),
        (True, 0.8, {"label_0": 0.3}, -1.0),
        (True, 0.8, {"label_0": 0.5}, 0.5),
        (True, None, {"label_0": 1.2}, "bad label"),
        (True, None, {"label_0": float("nan")}, "bad label"),
        (True, 0.8, {"label_0": 0.3, "label_1": 0.7}, -1.0),
        (True, 0.8, {"label_0": 0.3, "label_1": 0.3}, "contradicting columns"),
        (False, 0.8, {"label_0": 1.0, "votes_0": 3, "votes_1": 1, "votes_tie": 0, "votes_bad": 0}, -1.0),
        (False, 0.75, {"label_0": 1.0, "votes_0": 3, "votes_1": 1, "votes_tie": 0, "votes_bad": 0}, 1.0),
        (False, 0.75, {"label_0": 0.0, "votes_0": 0, "votes_1": 2, "votes_tie": 1, "votes_bad": 0}, -1.0),
    ],
)
def test_agreement(tmp_path, soft_labels, min_agreement, columns, label):
    assert label_of(tmp_path, soft_labels, min_agreement, **columns) == label


def test_a_share_of_votes_is_refused_with_the_flag_that_takes_it(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{"jpg_0": image(1), "jpg_1": image(2), "caption": "a", "label_0": 0.7}]),
        tmp_path / "train.parquet",
    )
    with pytest.raises(BadPair, match="label_0 is 0.7.*say so: --soft_labels"):
        PreferencePairs.of(open_table(str(tmp_path)))


def test_pairs_of_low_agreement_are_counted(tmp_path):
    pairs = PreferencePairs.of(open_table(str(rapidata_weighted(tmp_path)), reading=Reading(min_agreement=0.7)))
    assert (len(pairs), pairs.skipped) == (1, "1 ties skipped, 1 of low agreement skipped")
    with pytest.raises(ValueError, match="no pairs left, 1 of the 3 rows are ties.*--min_agreement=0.95"):
        PreferencePairs.of(open_table(str(tmp_path), reading=Reading(min_agreement=0.95)))
    job = plan_job(str(tmp_path), str(tmp_path), reading=Reading(min_agreement=0.7))
    labels = json.loads(convert_unit({"item": 0}, job)["shard"])["labels"]
    assert labels == {"jpg_0": 1, "jpg_1": 0, "tie": 1, "low_agreement": 1}
    assert job.plan != plan_job(str(tmp_path), str(tmp_path)).plan


def test_the_converter_writes_the_majority_of_a_share(tmp_path):
    rows = [{"jpg_0": image(1), "jpg_1": image(2), "caption": "a", "label_0": share} for share in (0.7, 0.2, 0.5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    job = plan_job(str(tmp_path), str(tmp_path), reading=Reading(soft_labels=True))
    labels = json.loads(convert_unit({"item": 0}, job)["shard"])["labels"]
    assert labels == {"jpg_0": 1, "jpg_1": 1, "tie": 1}
    assert job.plan != plan_job(str(tmp_path), str(tmp_path)).plan  # shards of another reading are not taken for these


def test_flags_about_votes_need_votes(tmp_path):
    (tmp_path / "table").mkdir()
    write_images(tmp_path / "folders", "chosen/250.png", "rejected/250.png")
    (tmp_path / "folders" / "prompts.txt").write_text("a\n")
    for source in (trl(tmp_path / "table"), tmp_path / "folders"):
        assert len(open_table(str(source))) > 0
        with pytest.raises(ValueError, match="--min_agreement=0.7: .* holds no votes"):
            open_table(str(source), reading=Reading(min_agreement=0.7))
        with pytest.raises(ValueError, match="--soft_labels: .* holds no label that could be a share"):
            open_table(str(source), reading=Reading(soft_labels=True))
        with pytest.raises(ValueError, match="It needs first, second, text"):
            open_table(str(source), reading=BY_CHOICE)


def test_labels_alone_are_no_votes(tmp_path):
    row = {"jpg_0": image(1), "jpg_1": image(2), "caption": "a", "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="--min_agreement=0.9: .* holds no votes .* add --soft_labels"):
        open_table(str(tmp_path), reading=Reading(min_agreement=0.9))


def test_votes_against_the_preferred_path_are_a_contradiction(tmp_path):
    path = hpd_v3(tmp_path)
    rows = json.loads(path.read_text())
    rows[0]["choice_dist"] = [1, 8]
    path.write_text(json.dumps(rows))
    with pytest.raises(BadPair, match=r"row 0: choice_dist is \[1, 8\], and the first image"):
        PreferencePairs.of(open_table(str(path)))


# Rankings


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rank": [3, 1]}, ["row 0, images 0 and 2", "3 images in image_path have 2 values in rank"]),
        ({"rank": [3, None, 2]}, ["row 0, images 0 and 1", "rank is None"]),
        ({"rank": None}, ["3 images in image_path have no values in rank"]),
    ],
)
def test_a_bad_ranking_names_its_row_and_images(tmp_path, change, words):
    path = hpd_v2_test(tmp_path)
    row = json.loads(path.read_text())[0] | change
    path.write_text(json.dumps([row, row | {"rank": [3, 1, 2], "prompt": "b"}]))
    for pairs_per_group in ("all", "best_worst"):
        with pytest.raises(BadPair) as raised:
            PreferencePairs.of(open_table(str(path), reading=Reading(pairs_per_group=pairs_per_group)))
        assert all(word in str(raised.value) for word in (words if pairs_per_group == "all" else words[1:]))


def test_a_preference_is_not_a_rank(tmp_path):
    path = hpd_v2_train(tmp_path)
    path.write_text(path.read_text().replace("[0, 1]", "[2, 1]"))
    with pytest.raises(BadPair, match="row 1, images 0 and 1: human_preference is 2 and 1. Write 1 for the preferred"):
        PreferencePairs.of(open_table(str(path)))


def test_equal_ranks_are_ties(tmp_path):
    path = hpd_v2_test(tmp_path)
    path.write_text(json.dumps([json.loads(path.read_text())[0] | {"rank": [2, 1, 2]}]))
    pairs = PreferencePairs.of(open_table(str(path)))
    assert (len(pairs), pairs.num_ties) == (2, 1)


def test_a_group_with_several_prompts_is_refused(tmp_path):
    path = scored(tmp_path)
    path.write_text(path.read_text().replace('"prompt_id": 2', '"prompt_id": 1'))
    with pytest.raises(BadPair, match="rows 0 and 2: prompt_id 1 has several prompts"):
        PreferencePairs.of(open_table(str(path)))


# Paths


def test_all_missing_files_are_told_at_once(tmp_path):
    path = hpd_v3(tmp_path)
    for name in ("250.png", "60-1.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(ValueError) as raised:
        PreferencePairs.of(open_table(str(path))).checked()
    words = ["2 image files can't be read", "images/250.png (No such file", "images/60-1.png (No such", "--image_root"]
    assert all(word in str(raised.value) for word in words), raised.value
    rows = [{"prompt": "a", "chosen": f"{i}.png", "rejected": "x.png"} for i in range(30)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"31 image files can't be read: 0.png .* and 19 more\."):
        PreferencePairs.of(open_table(str(tmp_path / "many.jsonl"))).checked()


def test_paths_start_from_image_root_where_it_is_given(tmp_path):
    (tmp_path / "data").mkdir(), (tmp_path / "elsewhere").mkdir()
    path = hpd_v3(tmp_path / "data")
    os.rename(tmp_path / "data" / "images", tmp_path / "elsewhere" / "images")
    reading = Reading(image_root=tmp_path / "elsewhere")
    assert of_training(path, reading) == (sorted(TWO), 1)
    with pytest.raises(ValueError, match="--image_root=.*nowhere is not a folder"):
        open_table(str(path), reading=Reading(image_root=tmp_path / "nowhere"))


def test_a_table_without_a_folder_of_its_own_needs_image_root(tmp_path):
    """As on the Hub, in what `save_to_disk` wrote, and in folders with tables in several ones."""
    (tmp_path / "data").mkdir()
    path = table_of_paths(tmp_path / "data", "jsonl")
    Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()]).save_to_disk(tmp_path / "saved")
    for name in "ab":
        (tmp_path / "several" / name).mkdir(parents=True)
        (tmp_path / "several" / name / "pairs.jsonl").write_text(path.read_text())
    for source, copies in ((tmp_path / "saved", 1), (tmp_path / "several", 2)):
        with pytest.raises(ValueError, match="column jpg_0 holds string.*--image_root"):
            open_table(str(source))
        assert of_training(source, Reading(image_root=tmp_path / "data")) == (sorted(TWO * copies), 0)
    with pytest.raises(ValueError, match="--image_root has no effect with s3://"):
        plan_job("s3://bucket/pairs", str(tmp_path), reading=Reading(image_root=tmp_path))


@pytest.mark.parametrize("way", ["..", "absolute", "link", "url", "pipe", "folder"])
def test_paths_that_lead_out_of_the_folder_or_to_no_file_are_refused(tmp_path, way):
    (tmp_path / "data").mkdir()
    path = table_of_paths(tmp_path / "data", "jsonl")
    write_images(tmp_path, "secret/250.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "data" / "pipe")
    other = {
        "..": "../secret/250.png",
        "absolute": str(tmp_path / "secret" / "250.png"),
        "link": "link/250.png",
        "url": "https://example.com/250.png",
        "pipe": "pipe",
        "folder": "images",
    }[way]
    path.write_text(path.read_text().replace("images/250.png", other))
    with pytest.raises(ValueError, match="1 image files can't be read: .*(outside|URL|not a file)"):
        PreferencePairs.of(open_table(str(path))).checked()
    source = TableSource(open_table(str(path)), None, decode=True)
    assert [problem.kind for problem in source.inspect([0])[0].problems] == ["missing image"]
    if way == "absolute":
        root = Reading(image_root=tmp_path)
        path.write_text(path.read_text().replace("images/", str(tmp_path / "data" / "images") + "/"))
        assert of_training(path, root) == (sorted(TWO), 0)


def test_a_file_that_changed_is_checked_again(tmp_path):
    path = table_of_paths(tmp_path, "jsonl")
    file = tmp_path / "images" / "50.png"
    first, before = PreferencePairs.of(open_table(str(path))).checked().digests.tolist(), file.read_bytes()
    file.write_bytes(image(51))
    assert len(file.read_bytes()) == len(before) and file.read_bytes() != before
    assert PreferencePairs.of(open_table(str(path))).checked().digests.tolist() != first


def test_the_converter_leaves_pairs_with_missing_files_out_and_names_them(tmp_path, caplog):
    (tmp_path / "data").mkdir(), (tmp_path / "out").mkdir()
    path = table_of_paths(tmp_path / "data", "jsonl")
    (tmp_path / "data" / "images" / "50.png").unlink()
    job = plan_job(str(path), str(tmp_path / "out"))
    shard = json.loads(convert_unit({"item": 0}, job)["shard"])
    assert (shard["samples"], [row["row"] for row in shard["bad_rows"]]) == (1, [0])
    assert "1 images are missing: row 0, jpg_1 (50.png): " in caplog.text


def test_a_folder_of_images_beside_a_table_says_to_name_the_table(tmp_path):
    table_of_paths(tmp_path, "jsonl")
    with pytest.raises(ValueError, match="name that file: .*pairs.jsonl"):
        open_table(str(tmp_path))


def test_a_folder_is_read_like_the_table_in_it_where_that_is_named_by_a_split(tmp_path):
    hpd_v3(tmp_path)
    assert of_training(tmp_path, Reading()) == (sorted(TWO), 1)
