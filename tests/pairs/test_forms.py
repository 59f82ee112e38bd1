"""Pairs in the forms in which other programs and systems write them: each form gives the same pairs, or says what to do."""

import hashlib
import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers import arguments, encode, face_rows, write_parquet
from orpo.pairs.columns import Reading
from orpo.pairs.dataset import DataOptions, load_pairs
from orpo.pairs.folders import load_pair_folders
from orpo.pairs.image import ImageFiles
from orpo.pairs.image_folder import read_listing
from orpo.pairs.sources import open_table
from orpo.pairs.table import PreferencePairs
from PIL import Image

from train_diffusion_orpo_sdxl_lora import parse_args


ROWS = face_rows(4, ties=0)
PAIRS = [
    (row["jpg_0"], row["jpg_1"], row["caption"]) if row["label_0"] else (row["jpg_1"], row["jpg_0"], row["caption"])
    for row in ROWS
]


def read(path, **reading) -> list[tuple[bytes, bytes, str]]:
    rows = PreferencePairs.of(open_table(str(path), reading=Reading(**reading)))
    return [(pair.winner, pair.loser, pair.prompt) for pair in (rows[i] for i in range(len(rows)))]


def write_images(folder: Path) -> None:
    for i, row in enumerate(ROWS):
        for side in "01":
            (folder / f"{i}_{side}.jpg").write_bytes(row[f"jpg_{side}"])


def path_rows(form: str = "{}_{}.jpg") -> list[dict]:
    return [
        {
            "jpg_0": form.format(i, 0),
            "jpg_1": form.format(i, 1),
            "label_0": int(row["label_0"]),
            "caption": row["caption"],
        }
        for i, row in enumerate(ROWS)
    ]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


STRUCT = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])


@pytest.mark.parametrize(
    "image, caption",
    [
        (pa.binary(), pa.string_view()),
        (pa.binary_view(), pa.string()),
        (pa.large_binary(), pa.large_string()),
        (pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.int32(), pa.string())),
        (STRUCT, pa.string_view()),
    ],
    ids=str,
)
def test_arrow_types_of_other_programs(tmp_path, image, caption):
    sides = [[row[f"jpg_{side}"] for row in ROWS] for side in "01"]
    if image is STRUCT:
        sides = [[{"bytes": content, "path": "x.jpg"} for content in side] for side in sides]
    table = {"jpg_0": pa.array(sides[0], image), "jpg_1": pa.array(sides[1], image)}
    table |= {"label_0": [row["label_0"] for row in ROWS], "caption": pa.array([r["caption"] for r in ROWS], caption)}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    assert read(tmp_path) == PAIRS
    assert read(tmp_path / "train.parquet") == PAIRS


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
@pytest.mark.parametrize(
    "captions", [["007", "1984", "42", "3"], ["NA", "", "null", "True"], ["a; b", "1e5", "a", "b"]]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_captions_are_taken_as_written(tmp_path, separator, suffix, captions, encoding):
    write_images(tmp_path)
    lines = [separator.join(["jpg_0", "jpg_1", "label_0", "caption"])]
    lines += [
        separator.join([f"{i}_0.jpg", f"{i}_1.jpg", str(i % 2), f'"{caption}"']) for i, caption in enumerate(captions)
    ]
    (tmp_path / f"pairs.{suffix}").write_text("\n".join(lines) + "\n", encoding=encoding)
    expected = [(*pair[:2], caption) for pair, caption in zip(PAIRS, captions)]
    assert read(tmp_path / f"pairs.{suffix}") == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        lambda rows: {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]},
        lambda rows: {"version": 1, "data": rows},
        lambda rows: {str(i): row for i, row in enumerate(rows)},
    ],
    ids=["columns", "pandas", "below a key", "by index"],
)
def test_json_that_is_one_object_says_how_rows_are_written(tmp_path, wrap):
    write_images(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps(wrap(path_rows())))
    with pytest.raises(ValueError, match=r"one JSON object. Write a list of rows, .*orient=\"records\""):
        read(tmp_path / "pairs.json")
    (tmp_path / "pairs.json").write_text(json.dumps(path_rows()), encoding="utf-8-sig")
    assert read(tmp_path / "pairs.json") == PAIRS


@pytest.mark.parametrize(
    "form", ["images\\{}_{}.jpg", "{folder}/images/{}_{}.jpg", "file://{folder}/images/{}_{}.jpg"]
)
def test_paths_as_other_systems_write_them(tmp_path, form):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    rows = path_rows(form.replace("{folder}", str(tmp_path)))
    assert read(write_lines(tmp_path / "pairs.jsonl", rows)) == PAIRS


def test_a_drive_of_windows_is_named_as_the_reason(tmp_path):
    (tmp_path / "C:\\x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a drive of Windows.*--image_root"):
        ImageFiles(root=tmp_path).find("C:\\Users\\me\\x.jpg")


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_in_either_unicode_form(tmp_path, on_disk, in_table):
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
    for side, form, image in (("chosen", on_disk, PAIRS[0][0]), ("rejected", in_table, PAIRS[0][1])):
        (tmp_path / side / unicodedata.normalize(form, "café.jpg")).write_bytes(image)
    (tmp_path / "chosen" / unicodedata.normalize(in_table, "café.txt")).write_text("a café")
    (row,) = load_pair_folders(tmp_path, None).with_format("arrow").to_list()
    assert (row["prompt"], Path(row["rejected"]["path"]).read_bytes()) == ("a café", PAIRS[0][1])
    name = unicodedata.normalize(in_table, "chosen/café.jpg")
    assert ImageFiles(root=tmp_path).find(name).read_bytes() == PAIRS[0][0]


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A folder in the Hub's cache: all its files are links to blobs. Beside it a file that no link may lead to."""
    folder, blobs = tmp_path / "datasets--me--pairs/snapshots/0123abc", tmp_path / "datasets--me--pairs/blobs"
    folder.mkdir(parents=True), blobs.mkdir()
    write_images(folder)
    write_lines(folder / "pairs.jsonl", path_rows())
    for i in range(4):
        (folder / f"{i}_0.txt").write_text(f"face {i}"), (folder / f"{i}_1.txt").write_text(f"face {i}")
    for path in list(folder.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, folder))
    (tmp_path / "secret.jpg").write_bytes(ROWS[0]["jpg_0"])
    return folder


def test_links_of_the_hubs_cache_are_followed_and_no_others(snapshot):
    assert read(snapshot / "pairs.jsonl") == PAIRS
    assert [image.prompt for image in read_listing(snapshot)] == [f"face {i}" for i in range(4) for _ in range(2)]
    (snapshot / "0_0.jpg").unlink()
    (snapshot / "0_0.jpg").symlink_to(snapshot.parents[2] / "secret.jpg")
    with pytest.raises(ValueError, match="outside"):
        PreferencePairs.of(open_table(str(snapshot / "pairs.jsonl"))).checked()
    with pytest.raises(ValueError, match="0_0.jpg is outside the folder: copy it there"):
        read_listing(snapshot)


@pytest.mark.parametrize("caption", ["{}.txt", "{}.TXT", "{}.png.txt", "{}.caption", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("folder", ["", "10_fox"])
def test_folders_of_ones_own_images(tmp_path, caption, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    for i in range(2):
        (tmp_path / folder / f"{i}.png").write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
        if not caption.startswith("metadata"):
            (tmp_path / folder / caption.format(i)).write_text(f"fox {i}", encoding="utf-8-sig")
    names = [str(Path(folder, f"{i}.png")) for i in range(2)]
    if caption == "metadata.csv":
        lines = ["file_name,prompt", *(f"{name},fox {i}" for i, name in enumerate(names))]
        (tmp_path / caption).write_text("\n".join(lines))
    elif caption == "metadata.jsonl":
        write_lines(tmp_path / caption, [{"file_name": name, "prompt": f"fox {i}"} for i, name in enumerate(names)])
    assert [(image.name, image.prompt) for image in read_listing(tmp_path)] == list(zip(names, ["fox 0", "fox 1"]))


def test_the_folder_above_the_right_one_names_it(tmp_path):
    write_parquet(tmp_path / "pairs", ROWS)
    (tmp_path / "images").mkdir()
    write_lines(tmp_path / "images" / "metadata.jsonl", [])
    with pytest.raises(ValueError, match=f"its pairs are in {tmp_path / 'pairs'}"):
        open_table(str(tmp_path))
    with pytest.raises(ValueError, match=f"its images are in {tmp_path / 'images'}"):
        read_listing(tmp_path)


@pytest.mark.parametrize(
    "name, what_to_do",
    [
        ("{a},{b}", "concatenate_datasets"),
        ("{folder}/*/train.parquet", "concatenate_datasets"),
        ("s3://bucket/pairs", "Download"),
        ("https://example.com/pairs.parquet", "Download"),
        ("hf://datasets/me/pairs/train.parquet", "me/pairs"),
    ],
)
def test_several_data_sets_and_those_elsewhere_say_what_to_do(tmp_path, name, what_to_do):
    a, b = (write_parquet(tmp_path / letter, ROWS) for letter in "ab")
    with pytest.raises(ValueError, match=what_to_do):
        open_table(name.format(a=a, b=b, folder=tmp_path))


@pytest.mark.parametrize("columns", [{"prompt": "caption"}, {"prompt": "text"}, {"prompt": "words"}])
def test_the_prompt_by_another_name(tmp_path, columns):
    rows = [{"chosen": w, "rejected": l, columns["prompt"]: prompt} for w, l, prompt in PAIRS]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    if columns["prompt"] == "words":
        with pytest.raises(ValueError, match="--columns"):
            read(tmp_path)
        assert read(tmp_path, prompt="words") == PAIRS
        line = arguments("unused", str(tmp_path), "unused", columns=["prompt=words"])
        assert load_pairs(DataOptions.from_config(parse_args(line))).num_pairs == 4
    else:
        assert read(tmp_path) == PAIRS


def fingerprint(path, **reading) -> str:
    flags = {name: str(value) for name, value in reading.items()}
    return load_pairs(
        DataOptions.from_config(parse_args(arguments("unused", str(path), "unused", **flags)))
    ).fingerprint


def test_the_fingerprint_changes_with_images_labels_and_captions(tmp_path):
    """By it a resumed run knows other data."""
    images, turned = tmp_path / "images", tmp_path / "turned"
    images.mkdir(), turned.mkdir()
    write_images(images), write_images(turned)
    for i in range(4):
        (turned / f"{i}_0.jpg").write_bytes(ROWS[i]["jpg_1"]), (turned / f"{i}_1.jpg").write_bytes(ROWS[i]["jpg_0"])
    table = write_lines(tmp_path / "pairs.jsonl", path_rows())
    first = fingerprint(table, image_root=images)
    assert fingerprint(table, image_root=turned) != first == fingerprint(table, image_root=images)
    exchanged = [row | {"jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"]} for row in ROWS]
    others = [exchanged, ROWS[:3], [row | {"caption": "x"} for row in ROWS], [r | {"label_0": 1.0} for r in ROWS]]
    prints = [fingerprint(write_parquet(tmp_path / str(i), rows)) for i, rows in enumerate([ROWS, *others])]
    assert len(set(prints)) == 5 and prints[0] == first
    write_parquet(tmp_path / "0", exchanged)  # overwritten
    assert fingerprint(tmp_path / "0") == prints[1]
