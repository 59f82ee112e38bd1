"""Shards in aspect-ratio buckets: batches of one shape, every pair once an epoch, whoever reads them, and after any stop."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encode, shaped_rows, write_shards
from orpo.pairs.pair import PairTransform
from orpo.store.index import find_shards, pack_sizes, unpack_sizes
from orpo.store.stream import ShardData
from PIL import Image


SHAPES = ((32, 32), (24, 40), (40, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """34 pairs in 5 shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), shaped_rows(34), per_shard=7)


def data(folder: Path, cache: Path, held_out: int = 0, workers: int = 0, max_crop: float = 1.0, bad: float = 0.0):
    found = find_shards([str(folder)], cache_dir=str(cache))
    return ShardData(found, held_out, PairTransform(SHAPES, max_crop=max_crop), workers, 16, bad)


def batches(source: ShardData, count: int, batch_size=2, position=None, rank=0, world_size=1) -> list[dict]:
    return list(islice(source.training_batches(batch_size, 0, position, rank, world_size), count))


def number(prompt: str) -> int:
    return int(prompt.rsplit(" ", 1)[1])


def expected_shape(row: int) -> tuple[int, int]:
    """That of a row of `shaped_rows`, by its rule."""
    return SHAPES[[1, 2, 0, 1, 0, 1][row % 6]]


def test_batches_have_one_shape_and_pairs_come_once_an_epoch(folder, tmp_path):
    source = data(folder, tmp_path)
    total = source.pairs_of(2, 2, 0, None)
    seen = Counter()
    for batch in batches(source, total // 2):
        for prompt, seed in zip(batch["prompts"], batch["seeds"]):
            assert batch["pixel_values"].shape[2:] == expected_shape(number(prompt))
            seen[seed] += 1
    assert max(seen.values()) == 1 and 68 <= len(seen) == total <= 68 + 3
    assert source.shapes == [SHAPES[1], SHAPES[0], SHAPES[2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_out_what_one_process_reads(folder, tmp_path, workers):
    source = data(folder, tmp_path, workers=workers)
    alone = [batch["seeds"] for batch in batches(data(folder, tmp_path), 40)]
    for world_size in (2, 4):
        ranks = [batches(source, 40 // world_size, 2, None, rank, world_size) for rank in range(world_size)]
        for number, step in enumerate(zip(*ranks)):
            expected = alone[number * world_size : (number + 1) * world_size]
            assert Counter(seed for batch in step for seed in batch["seeds"]) == Counter(sum(expected, []))


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_resumed_stream_equals_the_uninterrupted_one(folder, tmp_path, stop):
    source = data(folder, tmp_path)
    whole = source.training_batches(2, 0, None, 1, 2)
    expected = list(islice(whole, stop + 12))[stop:]
    again = source.training_batches(2, 0, None, 1, 2)
    for _ in islice(again, stop):
        pass
    position = json.loads(json.dumps(again.position))
    assert position["pairs_seen"] == sum(position["buckets"].values()) == 4 * stop
    for one, other in zip(expected, batches(data(folder, tmp_path), 12, 2, position, 1, 2), strict=True):
        assert one["seeds"] == other["seeds"] and torch.equal(one["pixel_values"], other["pixel_values"])


def test_no_pair_is_lost_where_processes_and_batch_size_change(folder, tmp_path):
    source, seen, position = data(folder, tmp_path), [], None
    for world_size, batch_size, count in ((2, 2, 3), (1, 5, 2), (3, 1, 4), (1, 3, 9)):
        streams = [
            iter(source.training_batches(batch_size, 0, position, rank, world_size)) for rank in range(world_size)
        ]
        last = source.training_batches(batch_size, 0, position, 0, world_size)
        for _ in range(count):
            seen += [seed for stream in streams for seed in next(stream)["seeds"]]
        for _ in islice(last, count):
            pass
        position = last.position
    assert len(seen) == len(set(seen)) == position["pairs_seen"]
    everything = {seed for batch in batches(source, 60) for seed in batch["seeds"]}
    assert len(everything & set(seen)) >= 34  # the first epoch, of which nothing was passed over


def test_held_out_pairs_keep_their_shapes(folder, tmp_path):
    source, seen = data(folder, tmp_path, held_out=8), Counter()
    for rank in (0, 1):
        for batch in source.held_out_batches(3, rank, 2):
            for prompt in batch["prompts"]:
                assert batch["pixel_values"].shape[2:] == expected_shape(number(prompt))
                seen[number(prompt)] += 1
    assert seen == Counter(range(8))


def test_pairs_that_would_lose_too_much_are_left_out_and_counted(folder, tmp_path):
    source = data(folder, tmp_path, max_crop=0.5)
    kept = {number(prompt) for batch in batches(source, 40) for prompt in batch["prompts"]}
    assert kept == {row for row in range(34) if row % 6 != 5} and "5 pairs left out" in str(source)
    assert "5 pairs whose images differ in shape" in str(source)


def test_sizes_of_a_manifest_are_those_that_a_look_finds(folder, tmp_path):
    rows = shaped_rows(34)
    looked = np.concatenate(find_shards([str(folder)], cache_dir=str(tmp_path)).sizes)
    own = [
        [side for name in ("jpg_0", "jpg_1") for side in Image.open(io.BytesIO(row[name])).size[::-1]] for row in rows
    ]
    assert looked.tolist() == own
    assert np.array_equal(unpack_sizes(34, pack_sizes([tuple(size) for size in own])), looked)
    for damaged in (["2 * 1 2 3"], ["0 * 1 2 3 4", "2 * 1 1 1 1"], ["2 * 1 2 3 00"], ["x"], ["999999999 * 1 1 1 1"]):
        with pytest.raises(ValueError):
            unpack_sizes(2, damaged)


def test_an_image_that_cannot_be_read_has_a_stand_in_of_the_batchs_shape(tmp_path):
    rows = shaped_rows(12)
    rows[3] |= {"jpg_0": b"broken"}
    folder = write_shards(tmp_path / "shards", rows, per_shard=12)
    source = data(folder, tmp_path / "cache", bad=0.5)
    found = batches(source, source.pairs_of(1, 2, 0, None) // 2)
    assert {tuple(batch["pixel_values"].shape) for batch in found} == {(4, 3, *shape) for shape in SHAPES}
    assert 3 not in {number(prompt) for batch in found for prompt in batch["prompts"]}


@pytest.mark.parametrize(
    "change", [{"sizes": ["x"]}, {"sizes": [3]}, {"samples": 33}, {"ties": [99]}, {"bytes": "7"}, None]
)
def test_a_damaged_cache_only_costs_time(tmp_path, change):
    folder = write_shards(tmp_path / "shards", shaped_rows(12), per_shard=6, manifest=False)
    expected = data(folder, tmp_path / "good")
    data(folder, tmp_path / "bad")
    for file in (tmp_path / "bad").rglob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change) if change else "{")
    again = data(folder, tmp_path / "bad")
    assert np.array_equal(np.concatenate(again.shards.sizes), np.concatenate(expected.shards.sizes))
    assert again.num_pairs == expected.num_pairs


def test_more_processes_than_an_epoch_has_batches(tmp_path):
    source = data(write_shards(tmp_path / "shards", shaped_rows(5), per_shard=2), tmp_path / "cache")
    alone = [batch["seeds"] for batch in batches(source, 32)]
    ranks = [batches(source, 4, 2, None, rank, 8) for rank in range(8)]
    for number, step in enumerate(zip(*ranks)):
        expected = alone[number * 8 : (number + 1) * 8]
        assert Counter(seed for batch in step for seed in batch["seeds"]) == Counter(sum(expected, []))


def test_a_position_without_buckets_is_refused(folder, tmp_path):
    position = data(folder, tmp_path).training_batches(2, 0, None, 0, 1).position
    del position["buckets"]
    with pytest.raises(ValueError, match="the checkpoint is of a run without them"):
        data(folder, tmp_path).training_batches(2, 0, position, 0, 1)


def test_an_image_on_its_side_counts_as_it_stands(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = shaped_rows(4)
    file = io.BytesIO()
    Image.new("RGB", (80, 48), "red").save(file, "JPEG", exif=exif)
    rows[0] |= {"jpg_0": file.getvalue(), "jpg_1": encode(Image.new("RGB", (48, 80), "blue"))}
    source = data(write_shards(tmp_path / "shards", rows, per_shard=4), tmp_path / "cache")
    assert source.buckets[0][0] == 2
