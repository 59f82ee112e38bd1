"""The check of a preference dataset: it refuses what training refuses, counts all that is wrong, and shows the pairs."""

import json
import logging
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value
from datasets import Image as ImageFeature
from faults.samples import images as sample_images
from helpers import FEATURES, arguments, check, encode, face_rows, write_parquet, write_shards
from orpo.pairs.dataset import DataOptions, load_pairs
from orpo.pairs.pair import PairTransform
from orpo.pairs.sources import open_table
from orpo.reports import findings
from orpo.reports.inspection import TableSource, image_facts
from orpo.runtime.shapes import square
from orpo.store.index import find_shards
from orpo.store.stream import ShardData
from PIL import Image
from transformers import AutoTokenizer

import check_preferences
from train_diffusion_orpo_sdxl_lora import parse_args


TRL_FEATURES = Features(chosen=ImageFeature(), rejected=ImageFeature(), prompt=Value("string"))


def why_training_refuses(folder: str, **flags) -> str | None:
    try:
        load_pairs(DataOptions.from_config(parse_args(arguments("unused", folder, "unused", **flags))))
    except ValueError as error:
        return str(error)
    return None


def messages(report: dict) -> list[str]:
    return [message for problem in report.get("problems", []) for message in problem["first"]]


# Datasets


def with_cells(**cells) -> list[dict]:
    """Eight rows, the last one a tie; `jpg_0_3=...` replaces a cell."""
    rows = face_rows(8, ties=1)
    for name, value in cells.items():
        column, _, row = name.rpartition("_")
        rows[int(row)][column] = value
    return rows


ROWS = face_rows(20, ties=2)
TRUNCATED = ROWS[0]["jpg_0"][:900]
SETS = {
    "good": (with_cells(), {}),
    "bad image of a tie": (with_cells(jpg_0_7=b"no image"), {}),
    "label that is none": (with_cells(label_0_2=0.7, label_0_5=None), {}),
    "caption that is none": (with_cells(caption_4=None), {}),
    "empty caption": (with_cells(caption_4=""), {}),
    "truncated image": (with_cells(jpg_1_3=TRUNCATED), {}),
    "no image": (with_cells(jpg_0_6=b"<html>"), {}),
    "empty image": (with_cells(jpg_0_0=None), {}),
    "only ties": ([row | {"label_0": 0.5} for row in with_cells()], {}),
    "other columns": ([{"image": row["jpg_0"], "text": row["caption"]} for row in with_cells()], {}),
    "numbers for images": ([row | {"jpg_0": 7} for row in with_cells()], {}),
    "bad row that is not used": (with_cells(jpg_0_6=b"<html>"), {"max_train_samples": 4}),
    "bad row that is used": (with_cells(jpg_0_3=b"<html>"), {"max_train_samples": 4}),
    "bad row that is held out": (
        with_cells(jpg_0_4=b"<html>"),
        {"max_train_samples": 4, "run_validation": True, "num_validation_pairs": 1},
    ),
    "bad label of a row that is not used": (with_cells(label_0_6=7.0), {"max_train_samples": 2}),
    "all held out": (with_cells(), {"run_validation": True, "num_validation_pairs": 7}),
    "no such split": (with_cells(), {"dataset_split_name": "test"}),
}
WITHOUT_BAD_ROWS = {"only ties", "other columns", "numbers for images", "all held out", "no such split"}
ACCEPTED = {"good", "bad image of a tie", "empty caption", "bad row that is not used"}


@pytest.mark.parametrize("name", SETS)
def test_the_verdict_is_that_of_training(tmp_path, name):
    rows, flags = SETS[name]
    features = FEATURES if set(rows[0]) == set(FEATURES) and not isinstance(rows[0]["jpg_0"], int) else None
    folder = write_parquet(tmp_path / "data", rows, features=features)
    reason = why_training_refuses(folder, **flags)
    status, report = check(tmp_path / "out", dataset_name=folder, **flags)
    assert (reason is None) == (name in ACCEPTED)
    assert status == (reason is not None) and report["accepted"] == (reason is None) and report["reason"] == reason
    if reason is None or name in WITHOUT_BAD_ROWS:
        assert messages(report) == []
    else:
        assert any(message in reason for message in messages(report)), (reason, messages(report))


def test_imagefolders_are_judged_as_by_training_and_name_the_file(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in "abc":
        (tmp_path / "data" / "train" / f"{name}.jpg").write_bytes(ROWS[0]["jpg_0"])
    rows = [{"chosen_file_name": "a.jpg", "rejected_file_name": f"{name}.jpg", "prompt": "a"} for name in "bc"]
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert why_training_refuses(tmp_path / "data") is None
    assert check(tmp_path / "out", dataset_name=tmp_path / "data")[0] == 0
    (tmp_path / "data" / "train" / "c.jpg").write_bytes(b"<html>")
    status, report = check(tmp_path / "out", dataset_name=tmp_path / "data")
    (message,) = messages(report)
    assert status == 1 and "row 1, rejected" in message and "c.jpg" in message
    assert message in why_training_refuses(tmp_path / "data")


def test_a_path_in_a_table_is_not_followed(tmp_path):
    """It could name any file of this machine; here it names an image, which nothing else would refuse."""
    (tmp_path / "private.jpg").write_bytes(ROWS[0]["jpg_0"])
    cells = [{"bytes": None, "path": str(tmp_path / "private.jpg")}, {"bytes": ROWS[0]["jpg_0"], "path": None}]
    table = pa.table({"chosen": pa.array(cells), "rejected": pa.array(cells[1:] * 2), "prompt": ["a", "b"]})
    (tmp_path / "data").mkdir()
    pq.write_table(table.cast(TRL_FEATURES.arrow_schema), tmp_path / "data" / "train.parquet")
    status, report = check(tmp_path / "out", dataset_name=tmp_path / "data", num_sample_pairs=4)
    assert status == 1 and report["pairs"] == 1
    assert messages(report) == ["row 0, chosen (private.jpg): it holds a path and no image"]


@pytest.mark.parametrize("column", ["caption", "label_0"])
def test_text_that_is_not_utf8_is_one_bad_row(tmp_path, column):
    rows = face_rows(4, ties=0)
    values = {name: [row[name] for row in rows] for name in rows[0]}
    buffers = pa.array([b"1", b"1", b"\xff\xfe", b"0"], pa.binary()).buffers()
    values[column] = pa.StringArray.from_buffers(4, *buffers[1:])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(values), tmp_path / "data" / "train.parquet")
    status, report = check(tmp_path / "out", dataset_name=str(tmp_path / "data"), num_sample_pairs=4)
    assert status == 1 and (report["pairs"], report["bad_rows"]) == (3, 1)
    assert messages(report)[0] in report["reason"] and messages(report)[0].startswith(f"row 2: {column} can't be")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_that_is_wrong_is_counted_by_kind_and_the_first_rows_are_named(tmp_path, capsys, num_workers):
    rows = [face_rows(2, ties=0)[i % 2] for i in range(200)]
    for i in range(10, 19):
        rows[i] = rows[i] | {"jpg_0": b"no image"}
    rows[150] = rows[150] | {"jpg_0": None, "jpg_1": TRUNCATED, "label_0": 3.0, "caption": None}
    rows[170] = rows[170] | {"label_0": 0.5}
    folder = write_parquet(tmp_path / "data", rows)
    status, report = check(tmp_path / "out", dataset_name=folder, num_workers=num_workers)
    kinds = {"undecodable image": 10, "missing image": 1, "bad label": 1, "bad prompt": 1}
    assert status == 1 and {problem["kind"]: problem["count"] for problem in report["problems"]} == kinds
    first = next(problem["first"] for problem in report["problems"] if problem["kind"] == "undecodable image")
    assert [message.split(":")[0] for message in first] == [f"row {i}, jpg_0" for i in range(10, 15)]
    assert (report["rows"], report["pairs"], report["bad_rows"]) == (200, 189, 10)
    labels = {"first_preferred": 100, "second_preferred": 98, "ties": 1, "low_agreement": 0, "bad": 1}
    assert report["labels"] == labels
    said = capsys.readouterr().out
    assert "10 x undecodable image: Replace the image, or remove the pair.\n    row 10, jpg_0: " in said
    assert "and 5 more" in said and "200: 189 pairs, 1 ties, 10 bad" in said


def test_an_accepted_set_is_as_good_when_it_is_decoded_again(faces, tmp_path):
    """What training's own loading let pass is not decoded a second time; nothing may hide behind that."""
    again, trusting = (TableSource(open_table(faces), None, decode) for decode in (True, False))
    found = [source.inspect(source.numbers) for source in (again, trusting)]
    assert found[0] == found[1] and not any(pair.problems for pair in found[0])


@pytest.mark.parametrize("name", sample_images())
def test_size_and_format_from_the_header_are_those_of_the_decoded_image(name):
    encoded = sample_images()[name]
    assert image_facts(encoded, "", decode=False) == image_facts(encoded, "")


# Shards


def what_training_reads(folder: Path, max_bad_samples: float) -> tuple[bool, Counter]:
    """Whether a training process gets through an epoch, and the kinds of the different bad samples that it logs."""
    logged = set()
    handler = logging.Handler()
    handler.emit = lambda record: logged.add(record.getMessage())
    logging.getLogger("orpo.store.stream").addHandler(handler)
    try:
        data = ShardData(find_shards([str(folder)]), 0, PairTransform(square(8)), 0, 1, max_bad_samples)
        stream = data.training_batches(1, seed=0, position=None, rank=0, world_size=1)
        for _ in islice(stream, data.num_pairs):
            pass
        accepted = True
    except (ValueError, OSError):
        accepted = False
    finally:
        logging.getLogger("orpo.store.stream").removeHandler(handler)
    return accepted, Counter(message.split(": ")[1] for message in logged)


def cut_off(folder: Path) -> None:
    shard = folder / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def miscount(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["samples"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


SHARDS = {
    "good": (ROWS, {}, None, True),
    "no image": ([row | {"jpg_0": b"<html>"} if i == 4 else row for i, row in enumerate(ROWS)], {}, None, False),
    "missing label": (ROWS, {3: "label_0.txt"}, None, False),
    "bad label": ([row | {"label_0": 0.7} if i == 4 else row for i, row in enumerate(ROWS)], {}, None, False),
    "cut off": (ROWS, {}, cut_off, False),
    "longer than its manifest says": (ROWS, {}, miscount, False),
    "only ties": (face_rows(8, ties=8), {}, None, False),
    "no shards": ([], {}, None, False),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_are_judged_as_a_training_process_judges_them(tmp_path, name):
    rows, leave_out, damage, good = SHARDS[name]
    folder = write_shards(tmp_path / "shards", rows, per_shard=7, leave_out=leave_out)
    if damage:
        damage(folder)
    for number, allowed in enumerate((0.01, 1.0)):
        accepted, kinds = what_training_reads(folder, allowed)
        status, report = check(tmp_path / f"out-{number}", dataset_path=str(folder), max_bad_samples=allowed)
        assert (status == 0) == report["accepted"] == accepted, report["reason"]
    assert good == (name == "good") and (accepted or not good)
    if accepted:
        assert Counter({problem["kind"]: problem["count"] for problem in report["problems"]}) == kinds


def test_the_share_of_bad_samples_decides_and_a_bad_shard_is_pointed_out(tmp_path):
    rows = [row | {"jpg_0": b"<html>"} if i == 4 else row for i, row in enumerate(face_rows(40))]
    folder = write_shards(tmp_path / "shards", rows, per_shard=10)
    for allowed, status in ((0.027, 1), (0.028, 0)):  # 1 of 36: 4 are ties
        found, report = check(tmp_path / "out", dataset_path=str(folder), max_bad_samples=allowed)
        assert found == status == (not what_training_reads(folder, allowed)[0])
    assert any("10.0% of the samples of" in note and "train-00000.tar" in note for note in report["notes"])
    held_out = {"run_validation": True, "num_validation_pairs": 5}
    assert check(tmp_path / "out", dataset_path=str(folder), max_bad_samples=0.0, **held_out)[0] == 0
    assert check(tmp_path / "out", dataset_path=str(folder), run_validation=True, num_validation_pairs=40)[0] == 1


def test_shards_and_the_rows_they_were_made_of_give_the_same_counts(tmp_path):
    rows = face_rows(24)
    rows[5] = rows[4]
    of_rows = check(tmp_path / "a", dataset_name=write_parquet(tmp_path / "data", rows))[1]
    of_shards = check(tmp_path / "b", dataset_path=str(write_shards(tmp_path / "s", rows, 7)), num_workers=2)[1]
    for name in ("rows", "pairs", "labels", "prompts", "images", "problems"):
        assert of_rows[name] == of_shards[name], name
    assert of_rows["repeated"]["duplicates"] == {"count": 1, "first": [["row 4", "row 5"]]}
    assert "train-00000.tar, sample 5" in of_shards["repeated"]["duplicates"]["first"][0][1]


def test_encoded_shards_are_neither_accepted_nor_refused(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", face_rows(6), per_shard=6)
    sizes = {"original_sizes": ("int64", (2, 2)), "crop_top_lefts": ("int64", (2, 2))}
    tensors = sizes | dict.fromkeys(("moments_0", "moments_1"), ("float32", (8, 4, 4)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"split": "train", "ties": []}
    manifest["encodings"] = {"train": {"identity": {}, "libraries": {}, "tensors": tensors}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as ended:
        check(tmp_path / "out", dataset_path=str(folder))
    assert ended.value.code == 2 and "holds latents, not images" in capsys.readouterr().err


def test_a_token_in_a_command_is_not_written(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", face_rows(6), per_shard=6, manifest=False)
    command = f"pipe:cat {folder}/train-00000.tar # hf_PLANTEDTOKEN"
    status, report = check(tmp_path / "out", dataset_path=command)
    assert status == 0 and report["pairs"] == 2
    assert "PLANTED" not in json.dumps(report) + capsys.readouterr().out


# What repeats


def test_repeated_pairs_are_those_that_comparing_each_with_each_finds():
    rng = np.random.default_rng(0)
    for size, images in ((0, 1), (1, 3), (60, 4), (200, 12)):
        winners, losers = rng.integers(0, images, (2, size), dtype=np.uint64)
        prompts = rng.integers(0, 2, size, dtype=np.uint64)
        pairs = list(zip(winners.tolist(), losers.tolist(), prompts.tolist()))
        found = findings.find_repeated(winners, losers, prompts)
        earlier = [[j for j in range(i) if pairs[j] == pairs[i]] for i in range(size)]
        assert found.duplicates == [(js[0], i) for i, js in enumerate(earlier) if js]
        assert found.identical == [i for i, (winner, loser, _) in enumerate(pairs) if winner == loser]
        groups = defaultdict(list)
        for i, (winner, loser, prompt) in enumerate(pairs):
            groups[frozenset((winner, loser)), prompt].append(i)
        assert found.contradictions == sorted(g for g in groups.values() if len({pairs[i][0] for i in g}) > 1)
        uses = Counter(image for winner, loser, _ in pairs for image in {winner, loser})
        assert found.num_images == len(uses)
        assert [n for n, _ in found.most_used] == sorted(uses.values(), reverse=True)[:5]


def test_contradictions_duplicates_and_identical_images_are_named_and_do_not_stop_training(tmp_path):
    rows = face_rows(12, ties=0)
    rows[3] = rows[2] | {"label_0": 1 - rows[2]["label_0"]}
    rows[5] = rows[4] | {"jpg_0": rows[4]["jpg_1"], "jpg_1": rows[4]["jpg_0"], "label_0": 1 - rows[4]["label_0"]}
    rows[7] = rows[6] | {"caption": "another prompt", "label_0": 1 - rows[6]["label_0"]}
    rows[9] = rows[9] | {"jpg_1": rows[9]["jpg_0"]}
    status, report = check(tmp_path / "out", dataset_name=write_parquet(tmp_path / "data", rows))
    found = {kind: report["repeated"][kind] for kind in ("contradictions", "duplicates", "identical_images")}
    assert status == 0 and found == {
        "contradictions": {"count": 1, "first": [["row 2", "row 3"]]},
        "duplicates": {"count": 1, "first": [["row 4", "row 5"]]},  # the same pair, its sides swapped
        "identical_images": {"count": 1, "first": [["row 9"]]},
    }
    assert sum("Contradicting" in note or "repeat" in note or "with itself" in note for note in report["notes"]) == 3


# Sizes, formats, prompts


def noise(width: int, height: int, format: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), format)


def check_noise(folder: Path, chosen: tuple, rejected: tuple, **flags) -> dict:
    """The report on four pairs of these widths, heights and formats."""
    rows = [{"chosen": noise(*chosen, i), "rejected": noise(*rejected, i), "prompt": "a"} for i in range(4)]
    features = Features(chosen=Value("binary"), rejected=Value("binary"), prompt=Value("string"))
    return check(folder / "out", dataset_name=write_parquet(folder / "data", rows, features=features), **flags)[1]


def test_sizes_formats_and_what_gives_the_chosen_image_away(tmp_path):
    report = check_noise(tmp_path, (300, 600, "PNG"), (260, 130, "JPEG"), resolution=300)
    images, notes = report["images"], " ".join(report["notes"])
    shorter, aspect = images["shorter_side"], images["aspect"]
    assert shorter["chosen"] == [0, 4, 0, 0, 0, 0, 0] and shorter["rejected"][0] == 4
    assert aspect["chosen"][1] == aspect["rejected"][-1] == 4  # 1:2 and 2:1 are within their bounds
    assert images["formats"] == {"chosen": {"PNG": 4}, "rejected": {"JPEG": 4}}
    assert (images["enlarged"], images["chosen_has_more_pixels"], images["chosen_has_fewer_pixels"]) == (4, 4, 0)
    assert [images["cut_away"][shapes] for shapes in ("square", "buckets")] == pytest.approx([0.5, 0.5], abs=0.02)
    assert "compression" in notes and "sharpness" in notes and "50.0% of the images are smaller" in notes


def test_what_squares_cut_away_and_buckets_keep_is_told(tmp_path):
    sizes = (300, 600, "PNG"), (150, 300, "PNG")
    report = check_noise(tmp_path, *sizes, resolution=256)
    assert report["images"]["cut_away"] == {"square": pytest.approx(0.5), "buckets": pytest.approx(0)}
    assert "A square crop cuts away 50% of the images' area, aspect-ratio buckets 0%" in " ".join(report["notes"])
    refused = check_noise(tmp_path, *sizes, resolution=256, max_crop=0.3)
    assert not refused["accepted"] and "--max_crop=0.3 leaves none of the 4 pairs" in refused["reason"]
    assert check_noise(tmp_path, *sizes, resolution=256, max_crop=0.3, aspect_ratio_buckets=True)["accepted"]


def test_prompts_that_a_tokenizer_cuts_are_counted_by_each_tokenizer_of_the_pipeline(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "PROMPTS_AT_ONCE", 7)
    prompts = ["a red ball " * n for n in range(1, 40)] + ["a red ball " * 7 + "red"]
    rows = [row | {"caption": prompt} for row, prompt in zip(face_rows(40, ties=0), prompts)]
    rows.append(rows[-2])  # one pair more, and no other prompt
    folder = write_parquet(tmp_path / "data", rows)
    _, report = check(tmp_path / "out", dataset_name=folder, pretrained_model_name_or_path=tiny_sdxl)
    tokens = report["prompts"]["tokens"]
    assert set(tokens) == {"tokenizer", "tokenizer_2"}
    for name, found in tokens.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_sdxl, subfolder=name)
        kept = [len(tokenizer(prompt, truncation=True)["input_ids"]) for prompt in prompts]
        full = [len(tokenizer(prompt, truncation=False)["input_ids"]) for prompt in prompts]
        cut = sum(a < b for a, b in zip(kept, full))
        assert 0 < cut < len(prompts) and tokenizer.model_max_length in full  # the longest that is not cut
        assert found["cut"] == cut and found["share_of_pairs_cut"] == (cut + 1) / 41
        assert (found["limit"], found["longest"], found["median"]) == (max(kept), max(full), np.median(full))
    assert sum("won't see its end" in note for note in report["notes"]) == 2


def test_a_folder_that_is_no_pipeline_is_named(faces, tmp_path):
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path={tmp_path}: no tokenizers can be loaded"):
        check(tmp_path / "out", dataset_name=faces, pretrained_model_name_or_path=tmp_path)


# The page


EVIL = "<script>document.title = 'evil'</script>{{ 7 * 7 }} " + "b " * 500


def test_the_page_shows_the_findings_and_pairs_with_the_chosen_image_first(tmp_path, browse):
    red, blue = (encode(Image.new("RGB", size, colour)) for size, colour in (((90, 60), "red"), ((40, 80), "blue")))
    rows = [
        {"jpg_0": red, "jpg_1": blue, "label_0": 1.0, "caption": ""},
        {"jpg_0": blue, "jpg_1": red, "label_0": 0.0, "caption": EVIL},
        {"jpg_0": blue, "jpg_1": red, "label_0": 0.5, "caption": "a tie"},
        {"jpg_0": b"no image", "jpg_1": red, "label_0": 0.0, "caption": "bad"},
    ]
    report = check(tmp_path / "out", dataset_name=write_parquet(tmp_path / "data", rows), num_sample_pairs=9)[1]
    seen = browse(
        tmp_path / "out" / "index.html",
        {"js": "document.body.innerText"},
        {"js": "[...document.querySelectorAll('#pairs li')].map(li => li.innerText.split(/\\n+/))"},
        {
            "js": "[...document.querySelectorAll('#pairs img')].map(i => [i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().x])"
        },
        {
            "js": "[...document.querySelectorAll('#pairs img')].map(image => {"
            " const context = Object.assign(document.createElement('canvas'), {width: 9, height: 9}).getContext('2d');"
            " context.drawImage(image, 0, 0); return context.getImageData(4, 4, 1, 1).data[0] > 200 })"
        },
    )
    text, pairs, images, is_red = seen["values"]
    assert f"Training would refuse it: {report['reason']}" in text and "1 x undecodable image" in text
    assert all(note in text for note in report["notes"]) and "4: 2 pairs, 1 ties, 1 bad" in text
    sizes = ["chosen 90 x 60", "rejected 40 x 80"]
    assert pairs == [[*sizes, "(empty prompt) row 0"], [*sizes, f"{EVIL}row 1"]]
    assert [image[:2] for image in images] == [[90, 60], [40, 80]] * 2  # not stretched
    assert images[0][2] < images[1][2] and is_red == [True, False] * 2
    assert seen["console"] == [] and seen["requests"] == [f"file://{tmp_path / 'out' / 'index.html'}"]


# Folders


def write_folders(folder: Path, prompts: str = ".txt") -> tuple[str, list[tuple]]:
    """Eleven pairs, 0 to 10, with their prompts in one of the places; also returns images and prompt of each."""
    pairs = []
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
    for number, row in enumerate(face_rows(11, ties=0)):
        i = f"{number:02}" if prompts == "prompts.txt" else number
        chosen, rejected = (row["jpg_0"], row["jpg_1"])[:: 1 if row["label_0"] else -1]
        pairs.append((chosen, rejected, f"{row['caption']}, number {number}"))
        (folder / "chosen" / f"{i}.jpg").write_bytes(chosen)
        (folder / "rejected" / f"{i}.JPEG").write_bytes(rejected)
        if prompts in (".txt", ".jpg.txt"):
            (folder / "chosen" / f"{i}{prompts}").write_text(pairs[-1][2] + "\n")
    texts = [prompt for *_, prompt in pairs]
    match prompts:
        case "prompts.txt":
            (folder / prompts).write_text("\ufeff" + "".join(f"{text}\r\n" for text in texts), encoding="utf-8")
        case "metadata.jsonl":
            key = ["prompt", "caption", "text"]
            lines = [{"file_name": f"chosen/{i}.jpg", key[i % 3]: text} for i, text in enumerate(texts)]
            (folder / prompts).write_text("\n".join(map(json.dumps, lines[::-1])))
        case "metadata.csv":
            lines = ["file_name,text", *(f'{i}.jpg,"{text}"' for i, text in enumerate(texts))]
            (folder / prompts).write_text("\n".join(lines))
    return str(folder), pairs


@pytest.mark.parametrize("prompts", [".txt", ".jpg.txt", "prompts.txt", "metadata.jsonl", "metadata.csv"])
def test_folders_give_each_image_its_partner_and_prompt_in_natural_order(tmp_path, prompts):
    folder, pairs = write_folders(tmp_path / "data", prompts)
    train = load_pairs(DataOptions.from_config(parse_args(arguments("unused", folder, "unused")))).train
    assert [(p.winner, p.loser, p.prompt) for p in (train[i] for i in range(len(train)))] == pairs
    (tmp_path / "data" / "chosen").rename(tmp_path / "data" / "Chosen")
    status, report = check(tmp_path / "out", dataset_name=folder)
    assert (status, report["pairs"], report["problems"]) == (0, 11, [])


@pytest.mark.parametrize("lines", [sorted, lambda names: sorted(names, key=int)])
def test_prompts_whose_order_can_be_read_in_two_ways_are_refused(tmp_path, lines):
    """One prompt a line, written in the order in which `ls` lists the images, or with 2 before 10: which, nobody knows."""
    folder, _ = write_folders(tmp_path / "data", prompts="none")
    names = [path.stem for path in (tmp_path / "data" / "chosen").iterdir()]
    (tmp_path / "data" / "prompts.txt").write_text("".join(f"number {name}\n" for name in lines(names)))
    assert "prompts.txt: its lines can be read in two orders: line 3 is for 2" in why_training_refuses(folder)
    assert check(tmp_path / "out", dataset_name=folder)[1]["problems"][0]["kind"] == "prompts in two orders"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_prompts_in_another_encoding_are_refused(tmp_path, encoding):
    folder, _ = write_folders(tmp_path / "data")
    (tmp_path / "data" / "chosen" / "3.txt").write_bytes("a café".encode(encoding))
    reason = why_training_refuses(folder)
    assert "chosen/3.txt: it can't be read as UTF-8" in reason and "Save it as UTF-8." in reason


def write_prompts(folder: Path, lines: int, keep_captions: bool = False) -> None:
    for path in () if keep_captions else folder.rglob("*.txt"):
        path.unlink()
    (folder / "prompts.txt").write_text("a\n" * lines)


FOLDER_PROBLEMS = {
    "unpaired image": lambda folder: (folder / "rejected" / "3.JPEG").unlink(),
    "two images of one name": lambda folder: (folder / "chosen" / "3.png").write_bytes(TRUNCATED),
    "folder in a folder": lambda folder: (folder / "chosen" / "more").mkdir(),
    "no prompt": lambda folder: (folder / "chosen" / "3.txt").unlink(),
    "contradicting prompts": lambda folder: (folder / "rejected" / "3.txt").write_text("another prompt"),
    "several places of prompts": lambda folder: write_prompts(folder, 11, keep_captions=True),
    "unreadable prompt": lambda folder: (folder / "chosen" / "3.txt").write_bytes(b"caf\xe9"),
    "no prompts": lambda folder: [path.unlink() for path in folder.rglob("*.txt")],
    "bad prompts file": lambda folder: write_prompts(folder, 10),
    "undecodable image": lambda folder: (folder / "chosen" / "3.jpg").write_bytes(TRUNCATED),
}


@pytest.mark.parametrize("name", FOLDER_PROBLEMS)
def test_folders_that_are_not_as_they_must_be_are_refused_with_the_file(tmp_path, name):
    folder, _ = write_folders(tmp_path / "data")
    FOLDER_PROBLEMS[name](tmp_path / "data")
    reason = why_training_refuses(folder)
    status, report = check(tmp_path / "out", dataset_name=folder)
    assert status == 1 and report["reason"] == reason is not None
    assert [problem["kind"] for problem in report["problems"]] == [name]
    (message,) = messages(report)
    assert message in reason or name == "undecodable image" and "3.jpg" in message
    assert report["pairs"] == (11 if name not in ("unpaired image", "undecodable image") else 10)


def test_folders_count_all_problems_and_the_images_beside_them(tmp_path):
    folder, _ = write_folders(tmp_path / "data")
    for i in range(8):
        (tmp_path / "data" / "chosen" / f"{i}.txt").unlink()
    (tmp_path / "data" / "rejected" / "9.JPEG").write_bytes(b"<html>")
    problems = check(tmp_path / "out", dataset_name=folder)[1]["problems"]
    counts = {problem["kind"]: problem["count"] for problem in problems}
    assert counts == {"no prompt": 8, "undecodable image": 1}
    assert "3 more problems" in why_training_refuses(folder)


def test_what_is_skipped_is_said(tmp_path, caplog):
    folder, _ = write_folders(tmp_path / "data")
    (tmp_path / "data" / "chosen" / "3.npz").write_bytes(b"latents")
    (tmp_path / "data" / "chosen" / "left over.txt").write_text("a")
    (tmp_path / "data" / "rejected" / ".DS_Store").write_bytes(b"")
    assert why_training_refuses(folder) is None
    assert "1 .npz files" in caplog.text and "1 prompts without an image" in caplog.text
    status, report = check(tmp_path / "out", dataset_name=folder)
    assert status == 0 and report["skipped"] == {".npz files": 1, "prompts without an image": 1}


def test_folders_have_no_splits_and_an_image_that_was_replaced_is_checked_again(tmp_path):
    folder, _ = write_folders(tmp_path / "data")
    assert why_training_refuses(folder, dataset_split_name="train") is None
    assert "--dataset_split_name" in why_training_refuses(folder, dataset_split_name="validation")
    (tmp_path / "data" / "chosen" / "3.jpg").write_bytes(b"<html>")
    assert "row 3, chosen" in why_training_refuses(folder)


def test_an_imagefolder_that_calls_its_folders_so_stays_one(tmp_path):
    folder, pairs = write_folders(tmp_path / "data", prompts="none")
    lines = [
        {"chosen_file_name": f"chosen/{i}.jpg", "rejected_file_name": f"rejected/{10 - i}.JPEG", "prompt": str(i)}
        for i in range(11)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train = load_pairs(DataOptions.from_config(parse_args(arguments("unused", folder, "unused")))).train
    assert {(p.winner, p.loser) for p in (train[i] for i in range(11))} == {
        (pairs[i][0], pairs[10 - i][1]) for i in range(11)
    }


def test_one_source_is_required_and_numbers_have_limits():
    for line in (
        "",
        "--dataset_name=a --dataset_path=b",
        "--dataset_name=a --num_sample_pairs=-1",
        "--dataset_name=a --max_train_samples=0",
        "--dataset_path=a --max_bad_samples=2",
    ):
        with pytest.raises(SystemExit) as ended:
            check_preferences.parse_args(line.split())
        assert ended.value.code == 2
