"""The converter: what shards and manifest hold, and that neither interruption nor damage goes unnoticed."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import Features, Value
from datasets import Image as ImageFeature
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from helpers import encode, write_parquet
from orpo.store import parquet
from orpo.store.convert import convert_unit
from orpo.store.folder import read_manifest, write_manifest
from orpo.store.index import Manifest, Shard, unpack_sizes
from orpo.store.plan import check_totals, plan_job
from PIL import Image

import convert_to_webdataset
from convert_to_webdataset import main


SCHEMA = pa.schema(
    {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.string(), "caption": pa.string(), "uid": pa.string()}
)
EXIF_ROTATED = 274


@pytest.fixture(scope="module", autouse=True)
def services(ray):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray.items():
            patch.setenv(name, value)
        yield


def noise(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def two_frames(seed: int) -> bytes:
    """As phones write them: a JPEG that Pillow calls MPO."""
    file = io.BytesIO()
    noise(seed).save(file, "MPO", save_all=True, append_images=[noise(seed + 1)])
    return file.getvalue()


def jpeg_with_exif(seed: int) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[EXIF_ROTATED] = 6
    noise(seed).save(file, "JPEG", exif=exif)
    return file.getvalue()


def make_rows(count: int, start: int = 0) -> list[dict]:
    """Rows that all differ, with labels 1, 0, tie in turn."""
    return [
        {
            "jpg_0": encode(noise(2 * i)),
            "jpg_1": encode(noise(2 * i + 1)),
            "label_0": ("1", "0.0", "0.5")[i % 3],
            "caption": f"a käse\n{i}",
            "uid": "unused",
        }
        for i in range(start, start + count)
    ]


def write(file: Path, rows: list[dict], row_group_size: int = 4) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=row_group_size)


def convert(data, output, *flags) -> Manifest:
    main([f"--dataset_name={data}", f"--output_dir={output}", *flags])
    return read_manifest(str(output))


def samples(output: Path, pattern: str = "*.tar") -> dict[str, dict]:
    """By key, as webdataset reads them."""
    shards = [str(shard) for shard in sorted(output.glob(pattern))]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_images_pass_through_bit_for_bit_under_the_extension_of_their_content(tmp_path):
    images = [jpeg_with_exif(0), encode(noise(1), "PNG"), encode(noise(2), "WEBP"), two_frames(3)]
    rows = [row | {"jpg_0": image, "label_0": "1"} for row, image in zip(make_rows(4), images)]
    write(tmp_path / "in" / "train.parquet", rows)
    convert(tmp_path / "in", tmp_path / "out")
    found = list(samples(tmp_path / "out").values())
    for sample, row, extension in zip(found, rows, ("jpg", "png", "webp", "jpg"), strict=True):
        assert sample[f"jpg_0.{extension}"] == row["jpg_0"]
        assert sample["jpg_1.jpg"] == row["jpg_1"]
        assert sample["original_prompt.txt"].decode() == row["caption"]
        assert (sample["label_0.txt"], sample["label_1.txt"]) == (b"1.0", b"0.0")
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        names = [member.name.split(".", 1)[1] for member in tar][:5]
    assert names == ["original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt", "label_1.txt"]


def test_keys_are_unique_over_shards_and_files_of_the_same_name(tmp_path):
    for i, folder in enumerate("ab"):
        write(tmp_path / "in" / folder / "data.parquet", make_rows(12, start=12 * i), row_group_size=(4, 12)[i])
    found = convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01", "--keep_ties")
    assert len(found.shards) > 4
    keys = [
        name.split(".")[0]
        for shard in found.shards
        for name in tarfile.open(tmp_path / "out" / shard.name).getnames()
        if name.endswith(".label_0.txt")
    ]
    assert sorted(set(keys)) == keys and len(keys) == 24
    assert all(re.fullmatch(r"train-\d{5}-\d{8}", key) for key in keys)
    prompts = [sample["original_prompt.txt"].decode() for sample in samples(tmp_path / "out").values()]
    assert prompts == [row["caption"] for row in make_rows(24)]


@pytest.mark.parametrize("keep", [False, True])
def test_ties_are_counted_and_dropped_unless_kept(tmp_path, keep):
    write(tmp_path / "in" / "train.parquet", make_rows(13))
    shard = convert(tmp_path / "in", tmp_path / "out", *["--keep_ties"] * keep).shards[0]
    labels = Counter(sample["label_0.txt"] for sample in samples(tmp_path / "out").values())
    assert shard.labels == {"jpg_0": 5, "jpg_1": 4, "tie": 4}
    assert labels == {b"1.0": 5, b"0.0": 4} | ({b"0.5": 4} if keep else {})
    assert shard.samples == (13 if keep else 9)


def test_bad_rows_are_counted_listed_and_logged(tmp_path, caplog):
    rows = make_rows(12)
    faults = {
        1: {"label_0": "yes"},
        2: {"label_0": None},
        3: {"jpg_0": None},
        4: {"jpg_1": b""},
        6: {"jpg_1": b"GIF? no"},
        7: {"caption": None},
    }
    for number, fault in faults.items():
        rows[number] |= fault
    rows[8] |= {"jpg_1": b"GIF? no"}  # of a tie, which training does not look at
    write(tmp_path / "in" / "train.parquet", rows)
    shard = convert(tmp_path / "in", tmp_path / "out").shards[0]
    assert [bad.row for bad in shard.bad_rows] == list(faults)
    for bad, word in zip(shard.bad_rows, ("'yes'", "None", "jpg_0", "jpg_1", "jpg_1", "caption"), strict=True):
        assert bad.file == "train.parquet" and word in bad.reason and f"row {bad.row}" in bad.reason
    assert shard.samples + shard.labels["tie"] + len(faults) == 12
    assert shard.samples == len(samples(tmp_path / "out"))
    assert "6 bad rows" in caplog.text


@pytest.mark.parametrize("fault", [{"jpg_0": None}, {"label_0": "0.5"}])
def test_no_pairs_at_all_is_an_error(tmp_path, fault):
    write(tmp_path / "in" / "train.parquet", [row | fault for row in make_rows(3)])
    with pytest.raises(ValueError, match="nothing to train on"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_trl_columns_as_datasets_writes_images(tmp_path):
    rows = [{"chosen": row["jpg_0"], "rejected": row["jpg_1"], "prompt": row["caption"]} for row in make_rows(3)]
    features = Features(chosen=ImageFeature(), rejected=ImageFeature(), prompt=Value("string"))
    convert(write_parquet(tmp_path / "in", rows, features=features), tmp_path / "out")
    for sample, row in zip(samples(tmp_path / "out").values(), rows, strict=True):
        assert (sample["jpg_0.jpg"], sample["jpg_1.jpg"]) == (row["chosen"], row["rejected"])
        assert sample["label_0.txt"] == b"1.0"


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"image": b"", "text": ""}, ["image, text", "jpg_0, jpg_1, label_0, caption", "chosen, rejected, prompt"]),
        ({"jpg_0": 1, "jpg_1": 2, "label_0": 1, "caption": ""}, ["jpg_0 holds int64"]),
    ],
)
def test_other_columns_are_refused_with_what_is_needed(tmp_path, columns, words):
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "odd.parquet")
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / "out")
    assert all(word in str(error.value) for word in ["odd.parquet", *words])


def test_files_of_a_split_are_known_by_file_or_folder(tmp_path):
    """As datasets knows them, so that the rows are those of training from the same folder."""
    hub = ["data/train-00000-of-00002-ab12.parquet", "data/train-00001-of-00002.parquet"]
    for i, name in enumerate([*hub, "data/test_unique-00000-of-00001.parquet", ".cache/train.parquet"]):
        write(tmp_path / name, make_rows(1, start=i))

    def files(split=None):
        return plan_job(str(tmp_path), "unused", split=split).files

    assert files("train") == hub == files()
    assert files("test_unique") == ["data/test_unique-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match="no split 'dev'.*choose --dataset_split_name among train, test_unique"):
        files("dev")
    for name in hub:
        (tmp_path / name).unlink()
    assert files() == ["data/test_unique-00000-of-00001.parquet"]


def test_a_second_split_keeps_the_first(tmp_path):
    for i, split in enumerate(("train", "validation")):
        write(tmp_path / "in" / f"{split}-00000-of-00001.parquet", make_rows(6, start=6 * i))
    first = convert(tmp_path / "in", tmp_path / "out", "--dataset_split_name=validation")
    both = convert(tmp_path / "in", tmp_path / "out", "--dataset_split_name=train")
    assert [shard.name for shard in both.shards] == ["train-00000.tar", "validation-00000.tar"]
    assert both.of_split("validation") == first.shards
    assert len(samples(tmp_path / "out")) == 8
    assert set(content(tmp_path / "out")) == {"manifest.json", "train-00000.tar", "validation-00000.tar"}


@pytest.mark.parametrize("seed", range(3))
def test_shards_cover_every_row_once_in_order_at_about_the_size_asked_for(tmp_path, seed):
    rng = random.Random(seed)
    for file in range(3):
        rows = [row | {"jpg_0": encode(noise(i, 100))} for i, row in enumerate(make_rows(rng.randrange(1, 30)))]
        write(tmp_path / f"{file}.parquet", rows, row_group_size=rng.randrange(1, 30))
    size = 6 * len(rows[0]["jpg_0"]) / 1e6
    job = plan_job(str(tmp_path), "unused", shard_size_mb=size)
    covered = [
        (source.file, source.first_row + i) for unit in job.units for source in unit.source for i in range(source.rows)
    ]
    rows_of = {file: pq.read_metadata(tmp_path / file).num_rows for file in job.files}
    assert covered == [(file, row) for file in job.files for row in range(rows_of[file])]
    assert all(unit.rows <= 10 for unit in job.units)
    assert sum(unit.rows < 3 for unit in job.units) <= 1
    assert job == plan_job(str(tmp_path), "unused", shard_size_mb=size)


def test_every_row_is_accounted_for(tmp_path):
    write(tmp_path / "in" / "train.parquet", make_rows(9))
    (tmp_path / "out").mkdir()
    job = plan_job(str(tmp_path / "in"), str(tmp_path / "out"))
    write(tmp_path / "in" / "train.parquet", make_rows(8))
    shard = Shard.from_dict(json.loads(convert_unit({"item": 0}, job)["shard"]))
    with pytest.raises(ValueError, match="9 rows.*does not add up"):
        check_totals(job, [shard])


def test_manifest_describes_the_shards(tmp_path):
    write(tmp_path / "in" / "train.parquet", make_rows(20))
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    entries = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert entries["version"] == 1 and len(entries["shards"]) > 2
    for shard in entries["shards"]:
        assert set(shard) == {
            "name",
            "split",
            "samples",
            "bytes",
            "sha256",
            "labels",
            "source",
            "bad_rows",
            "ties",
            "sizes",
        }
        file = tmp_path / "out" / shard["name"]
        assert shard["bytes"] == file.stat().st_size
        assert shard["sha256"] == subprocess.check_output(["sha256sum", file], text=True).split()[0]
        found = samples(tmp_path / "out", shard["name"])
        assert shard["samples"] == len(found)
        opened = [
            [Image.open(io.BytesIO(sample[name])).size[::-1] for name in sorted(sample) if name.startswith("jpg_")]
            for sample in found.values()
        ]
        assert unpack_sizes(len(found), shard["sizes"]).tolist() == [[*first, *second] for first, second in opened]
    assert sum(source["rows"] for shard in entries["shards"] for source in shard["source"]) == 20


def test_manifest_survives_the_round_trip_and_other_versions_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="convert_to_webdataset"):
        read_manifest(str(tmp_path))
    write(tmp_path / "in" / "train.parquet", [*make_rows(4), *[row | {"jpg_0": None} for row in make_rows(1)]])
    found = convert(tmp_path / "in", tmp_path / "out")
    write_manifest(str(tmp_path), found)
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
    for broken in ('{"version": 2, "shards": []}', '{"version": 1}', "[]", "{"):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match="manifest.json is not a manifest of shards"):
            read_manifest(str(tmp_path))


def test_the_same_rows_give_the_same_bytes(tmp_path):
    write(tmp_path / "in" / "train.parquet", make_rows(12))
    convert(tmp_path / "in", tmp_path / "a", "--shard_size_mb=0.01")
    (tmp_path / "in").rename(tmp_path / "moved")
    time.sleep(1.1)  # tar counts time in seconds
    convert(tmp_path / "moved", tmp_path / "b", "--shard_size_mb=0.01")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def kill_midway(command: list[str], output: Path, shards: int) -> None:
    """Starts a conversion, and kills all of its processes at once when so many shards are complete."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(list(output.glob(".train-*.json"))) < shards:
            assert process.poll() is None
            time.sleep(0.002)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for member in filter(psutil.Process.is_running, family):  # Ray gives some of its processes groups of their own
        member.kill()
    while any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family):
        time.sleep(0.01)


def test_killed_and_run_again_equals_one_clean_run(tmp_path):
    rows = [row | {"jpg_0": encode(noise(i, 320), "PNG")} for i, row in enumerate(make_rows(48))]
    rows[7] |= {"jpg_1": None}
    write(tmp_path / "in" / "train.parquet", rows, row_group_size=1)
    flags = ["--shard_size_mb=0.1", "--keep_ties"]
    convert(tmp_path / "in", tmp_path / "clean", *flags)

    command = [sys.executable, convert_to_webdataset.__file__, f"--dataset_name={tmp_path / 'in'}", *flags]
    kill_midway([*command, f"--output_dir={tmp_path / 'out'}"], tmp_path / "out", shards=3)
    left = {path.name: path.stat() for path in (tmp_path / "out").glob("*.tar")}
    kept = {f"{path.name[1:-5]}.tar" for path in (tmp_path / "out").glob(".train-*.json")}
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert 3 <= len(kept) < 40
    for name in left:  # a shard under its name is whole
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()

    convert(tmp_path / "in", tmp_path / "out", *flags)
    assert content(tmp_path / "out") == content(tmp_path / "clean")
    assert all((tmp_path / "out" / name).stat().st_ino == left[name].st_ino for name in kept)


def test_a_finished_conversion_is_left_alone_but_for_missing_shards(tmp_path, capsys):
    write(tmp_path / "in" / "train.parquet", make_rows(20))
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    clean, times = content(tmp_path / "out"), {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "train-00001.tar").unlink()
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    assert content(tmp_path / "out") == clean
    remade = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert remade == {"train-00001.tar", "manifest.json"}


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(tmp_path, finished):
    write(tmp_path / "in" / "train.parquet", make_rows(20))
    flags = [f"--dataset_name={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}"]
    if finished:
        main([*flags, "--shard_size_mb=0.01"])
    else:
        (tmp_path / "out").mkdir()
        convert_unit({"item": 3}, plan_job(str(tmp_path / "in"), str(tmp_path / "out"), shard_size_mb=0.01))
    before = content(tmp_path / "out")
    for other in (["--shard_size_mb=1"], ["--shard_size_mb=0.01", "--keep_ties"]):
        with pytest.raises(ValueError, match="another --shard_size_mb"):
            main([*flags, *other])
    write(tmp_path / "in" / "train.parquet", make_rows(20, start=1))
    with pytest.raises(ValueError, match="other files or rows"):
        main([*flags, "--shard_size_mb=0.01"])
    assert content(tmp_path / "out") == before


def test_verify_names_every_damaged_shard(tmp_path, capsys):
    write(tmp_path / "in" / "train.parquet", make_rows(20))
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    main([f"--output_dir={tmp_path / 'out'}", "--verify"])
    assert "are good" in capsys.readouterr().out
    flipped, truncated, missing = (tmp_path / "out" / f"train-0000{i}.tar" for i in range(3))
    damaged = bytearray(flipped.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    flipped.write_bytes(damaged)
    truncated.write_bytes(truncated.read_bytes()[:-512])
    missing.unlink()
    command = [sys.executable, convert_to_webdataset.__file__, f"--output_dir={tmp_path / 'out'}", "--verify"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [flipped.name, "has"],
        [truncated.name, "has"],
        [missing.name, "is"],
    ]
    assert "SHA-256" in lines[0] and "bytes" in lines[1] and "missing" in lines[2]


def test_s3_holds_what_a_folder_would(tmp_path):
    write(tmp_path / "in" / "train.parquet", make_rows(20))
    convert(tmp_path / "in", tmp_path / "out", "--shard_size_mb=0.01")
    client = boto3.client("s3")
    client.create_bucket(Bucket="pairs")
    (tmp_path / "wait").mkdir()
    url = "s3://pairs/some/where"
    flags = ["--shard_size_mb=0.01", f"--staging_dir={tmp_path / 'wait'}"]
    convert(tmp_path / "in", url, *flags)

    def on_s3():
        entries = client.list_objects_v2(Bucket="pairs", Prefix="some/where/")["Contents"]
        names = [entry["Key"] for entry in entries if entry["Size"]]
        return {name.split("/")[-1]: client.get_object(Bucket="pairs", Key=name)["Body"].read() for name in names}

    assert on_s3() == content(tmp_path / "out")
    assert not any((tmp_path / "wait").iterdir())
    client.delete_object(Bucket="pairs", Key="some/where/train-00001.tar")
    with pytest.raises(SystemExit, match="1 of"):
        main([f"--output_dir={url}", "--verify"])
    convert(tmp_path / "in", url, *flags)
    assert on_s3() == content(tmp_path / "out")
    main([f"--output_dir={url}", "--verify"])


def test_what_is_no_folder_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    """datasets lists the Hub's files with their revision; they are read through a file system, here of a folder."""
    write(tmp_path / "datasets" / "some" / "pairs@1a2b" / "data" / "train.parquet", make_rows(6))
    listed = {"train": ["hf://datasets/some/pairs@1a2b/data/train.parquet"]}
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files=listed), info=SimpleNamespace(splits=None, features=None)
    )
    monkeypatch.setattr(parquet, "find_builder", lambda *args: builder)
    monkeypatch.setattr(parquet, "HfFileSystem", lambda: DirFileSystem(tmp_path, LocalFileSystem()))
    job = plan_job("some/pairs", str(tmp_path))
    assert json.loads(convert_unit({"item": 0}, job)["shard"])["samples"] == 4
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no/such can't be read"):
        plan_job("no/such", "unused")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    write(tmp_path / "a.parquet", make_rows(3))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match="b.parquet can't be read"):
        convert(tmp_path, tmp_path / "out")
