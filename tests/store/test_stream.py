"""The stream of pairs from shards: every pair once per epoch, the same on any processes and workers, hard on bad data."""

import json
import logging
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import face_rows, write_shards
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.pair import PairTransform
from orpo.runtime.shapes import square
from orpo.store import reader
from orpo.store.index import Shards, find_shards
from orpo.store.sample import to_pair
from orpo.store.stream import ShardData


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 pairs and 4 ties in 5 shards of 7, 7, 7, 7 and 6 samples."""
    return write_shards(tmp_path_factory.mktemp("shards"), face_rows(34), per_shard=7)


def data(found: Shards, held_out: int = 0, workers: int = 0, buffer_size: int = 16, bad: float = 0.0) -> ShardData:
    return ShardData(found, held_out, PairTransform(square(32)), workers, buffer_size, bad)


def seeds(
    source: ShardData, batches: int, batch_size=1, seed=0, position=None, rank=0, world_size=1
) -> list[list[int]]:
    stream = source.training_batches(batch_size, seed, position, rank, world_size)
    return [batch["seeds"] for batch in islice(stream, batches)]


# The same for any division


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("workers", [0, 3])
def test_global_batches_are_those_of_one_process(folder, world_size, batch_size, workers):
    """Seeds decide all that is random about a pair: crop, flip, empty prompt and noise are the same, too."""
    found = find_shards([str(folder)])
    alone = [seed for (seed,) in seeds(data(found), 9 * 8)]
    ranks = [
        seeds(data(found, workers=workers), 9, batch_size, 0, None, rank, world_size) for rank in range(world_size)
    ]
    for number, parts in enumerate(zip(*ranks, strict=True)):
        assert Counter(seed for part in parts for seed in part) == Counter(alone[8 * number : 8 * (number + 1)])
    assert len(set(alone[:30])) == 30 and not set(alone[:30]) & set(alone[30:60])  # an epoch counts pairs, not ties


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 5, 17])
def test_a_resumed_stream_equals_the_uninterrupted_one(folder, workers, stop):
    found = find_shards([str(folder)])
    whole = data(found, workers=workers).training_batches(2, 3, None, 1, 2)
    for _ in islice(whole, stop):
        pass
    position = json.loads(json.dumps(whole.position))
    expected = list(islice(data(found).training_batches(2, 3, None, 1, 2), stop + 10))[stop:]
    resumed = list(islice(data(found, workers=workers).training_batches(2, 3, position, 1, 2), 10))
    assert Counter(s for b in expected for s in b["seeds"]) == Counter(s for b in resumed for s in b["seeds"])
    for one, other in zip(expected, resumed, strict=True):
        assert one["seeds"] == other["seeds"] and one["prompts"] == other["prompts"]
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_resuming_reads_and_decodes_nothing_that_was_seen(folder, monkeypatch):
    from orpo.pairs import pair as pairs

    source = data(find_shards([str(folder)]), buffer_size=1)
    stream = source.training_batches(1, 0, None, 0, 1)
    for _ in islice(stream, 26):
        pass
    read, decoded = [], []
    original_read, original_decode = reader.read_at, pairs.decode_at_least
    monkeypatch.setattr(reader, "read_at", lambda *place: read.append(place) or original_read(*place))
    monkeypatch.setattr(pairs, "decode_at_least", lambda *a: decoded.append(a[1]) or original_decode(*a))
    seeds(source, 1, position=stream.position)
    assert len(read) == 1 and len(decoded) == 2


def test_another_buffer_size_is_refused(folder):
    found = find_shards([str(folder)])
    position = data(found).training_batches(1, 0, None, 0, 1).position
    with pytest.raises(ValueError, match="--shuffle_buffer_size was 16 and is now 5"):
        data(found, buffer_size=5).training_batches(1, 0, position, 0, 1)


def test_order_and_randomness_depend_on_the_seed(folder):
    found = find_shards([str(folder)])
    assert seeds(data(found), 30) == seeds(data(found), 30) != seeds(data(found), 30, seed=1)


# How many


def test_max_train_samples_counts_pairs(folder):
    found = find_shards([str(folder)])
    source = ShardData(found, 3, PairTransform(square(32)), 0, 16, 0.0, max_pairs=20)
    assert source.num_pairs == 20 and "20 pairs to train on, 3 held out, 4 ties left out" in str(source)
    first, second = ([seed for (seed,) in part] for part in (seeds(source, 20), seeds(source, 40)[20:]))
    assert len(set(first)) == len(set(second)) == 20
    places = [(n, int(i)) for n, of_shard in enumerate(source.pairs) for i in of_shard]
    assert places == [(place // 7, place % 7) for place in range(3, 23)]
    everything = ShardData(found, 3, PairTransform(square(32)), 0, 16, 0.0, max_pairs=1000)
    assert everything.num_pairs == 27
    assert source.fingerprint != everything.fingerprint == data(found, held_out=3).fingerprint


def test_held_out_pairs_are_never_trained_on(folder):
    source = data(find_shards([str(folder)]), held_out=9)
    held = [seed for rank in range(2) for batch in source.held_out_batches(4, rank, 2) for seed in batch["seeds"]]
    assert len(held) == len(set(held)) == 9 and source.num_pairs == 21
    first_nine = Counter(row["caption"] for row in face_rows(34)[:9])
    assert Counter(p for b in source.held_out_batches(4, 0, 1) for p in b["prompts"]) == first_nine
    places = [(n, int(i)) for n, of_shard in enumerate(source.pairs) for i in of_shard]
    assert places == [(place // 7, place % 7) for place in range(9, 30)]


def test_ties_at_the_beginning_are_not_held_out(tmp_path):
    rows = [row | {"label_0": 0.5} for row in face_rows(2, ties=0)] + face_rows(8, ties=0)
    source = data(find_shards([str(write_shards(tmp_path, rows, per_shard=5))]), held_out=2)
    (batch,) = source.held_out_batches(4, 0, 1)
    assert len(batch["seeds"]) == 2 and source.num_pairs == 6


def test_only_ties_are_an_error_and_not_an_endless_loop(tmp_path):
    folder = write_shards(tmp_path, face_rows(6, ties=6), per_shard=3)
    with pytest.raises(ValueError, match="No pairs to train on.*only ties"):
        seeds(data(find_shards([str(folder)])), 1)


# Reading ahead


def test_the_reader_ends_with_the_loader_and_passes_errors_on(folder):
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "shard reader"]

    url = f"pipe:cat {folder}/train-{{00000..00004}}.tar"
    stream = iter(data(find_shards([url]), workers=1).training_batches(1, 0, None, 0, 1))
    next(stream)
    assert threads() == ["shard reader"]
    stream.close()
    while threads():  # ends, or the test never does
        time.sleep(0.01)

    def fail():
        yield 1
        raise OSError("gone")

    ahead = iter(reader.ReadAhead(fail(), 3))
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_all_processes_does_not_end_the_commands_that_read(tmp_path, workers):
    """As SLURM and keyboards send it. The step that is under way needs its data."""
    folder = write_shards(tmp_path, face_rows(24, ties=0), per_shard=12)
    url = f"pipe:cat {folder}/train-{{00000..00001}}.tar; sleep 0.5"
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, lambda *args: None)
            stream = iter(data(find_shards([url]), workers=workers).training_batches(4, 0, None, 0, 1))
            next(stream)
            os.write(done, b"x")
            status = 0 if len(list(islice(stream, 12))) == 12 else 2
        finally:
            os._exit(status)
    assert os.read(ready, 1) == b"x"
    os.killpg(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What is in a sample


def members(row: dict, **changes) -> dict[str, bytes]:
    sample = {
        "jpg_0.jpg": row["jpg_0"],
        "jpg_1.jpg": row["jpg_1"],
        "label_0.txt": str(row["label_0"]).encode(),
        "label_1.txt": str(1 - row["label_0"]).encode(),
        "original_prompt.txt": row["caption"].encode(),
    }
    return {name: value for name, value in (sample | changes).items() if value is not None}


def test_the_label_decides_and_text_is_parsed():
    first, second = face_rows(2, ties=0)  # labels 0 and 1
    assert to_pair(members(first)).winner == first["jpg_1"]
    assert to_pair(members(second)).winner == second["jpg_0"]
    assert to_pair(members(second, **{"label_1.txt": None})).winner == second["jpg_0"]
    assert to_pair(members(second, **{"label_0.txt": b"0.5\n", "label_1.txt": b"0.5"})) is None


@pytest.mark.parametrize("prompt", [b"\xef\xbb\xbfa red fox", b"a red fox\n", b"\xef\xbb\xbfa red fox\r\n"])
def test_what_editors_add_to_a_text_is_not_part_of_it(prompt):
    row = face_rows(2, ties=0)[1]
    pair = to_pair(members(row, **{"original_prompt.txt": prompt, "label_0.txt": b"\xef\xbb\xbf1\r\n"}))
    assert pair.prompt == "a red fox" and pair.winner == row["jpg_0"]
    two = to_pair(members(row, **{"original_prompt.txt": b" a fox,\r\n red "})).prompt
    assert two == " a fox,\n red "


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"jpg_0.jpg": None}, "missing member"),
        ({"label_0.txt": None}, "missing member"),
        ({"original_prompt.txt": None}, "missing member"),
        ({"label_0.txt": b"yes"}, "bad label"),
        ({"label_0.txt": b"nan"}, "bad label"),
        ({"label_1.txt": b"1"}, "bad label"),
        ({"original_prompt.txt": b"\xff\xfe\xff"}, "not UTF-8"),
    ],
)
def test_bad_samples_have_a_kind(changes, kind):
    with pytest.raises(BadPair) as raised:
        to_pair(members(face_rows(2, ties=0)[1], **changes))
    assert raised.value.kind == kind


# Bad samples in the stream


def damage(folder: Path, tmp_path: Path) -> Path:
    """Shard 1 is truncated in its fourth sample; in shard 2, sample 2 has half an image and sample 4 no prompt."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with tarfile.open(folder / "train-00001.tar") as tar:
        cut = [member for member in tar if member.name.endswith("jpg_1.jpg")][3].offset_data + 100
    shard = tmp_path / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    rows = face_rows(34)[14:21]
    rows[2]["jpg_0"] = rows[2]["jpg_0"][:700]
    write_shards(tmp_path, rows, per_shard=7, first_shard=2, leave_out={4: "original_prompt.txt"}, manifest=False)
    return tmp_path


@pytest.mark.parametrize("world_size, workers", [(1, 0), (1, 2), (3, 0)])
def test_bad_samples_are_logged_and_another_pair_takes_their_place(folder, tmp_path, caplog, world_size, workers):
    """The stand-in is the same on any processes and workers, and no process has fewer batches than another."""
    found = find_shards([str(damage(folder, tmp_path))])
    alone = dict(places(data(found, bad=0.7), 90))
    assert len(alone) == 3 * 30  # three epochs
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        streams = [
            data(found, bad=0.7, workers=workers).training_batches(2, 0, None, rank, world_size)
            for rank in range(world_size)
        ]
        batches = [batch for stream in streams for batch in islice(stream, 90 // 2 // world_size)]
    together = {seed: pixels for batch in batches for seed, pixels in zip(batch["seeds"], winners(batch))}
    assert together.keys() == alone.keys()
    assert all(torch.equal(pixels, alone[seed]) for seed, pixels in together.items())
    assert sum(stream.problems.get("bad", 0) for stream in streams) >= 6
    for place in ("train-00002.tar, 2-000002, loser: undecodable image", "train-00002.tar, 2-000004: missing member"):
        assert caplog.text.count(place) == 3
    unreadable = [f"train-00001.tar, sample {ordinal}: unreadable" for ordinal in range(3, 7)]
    assert all(caplog.text.count(place) == 3 for place in unreadable)


def winners(batch: dict) -> torch.Tensor:
    return batch["pixel_values"][: len(batch["seeds"])]


def places(source: ShardData, batches: int) -> list[tuple[int, torch.Tensor]]:
    stream = source.training_batches(1, 0, None, 0, 1)
    return [(batch["seeds"][0], winners(batch)[0].clone()) for batch in islice(stream, batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_and_name_the_shards(folder, tmp_path, workers):
    source = data(find_shards([str(damage(folder, tmp_path))]), bad=0.1, workers=workers)
    with pytest.raises(ValueError, match=r"more than --max_bad_samples=0.1.*train-0000[12].tar: \d"):
        seeds(source, 60)


def test_no_stand_in_is_found_where_everything_is_bad(tmp_path):
    rows = [row | {"jpg_0": b"no image"} for row in face_rows(6, ties=0)]
    with pytest.raises(ValueError, match="No pairs to train on.*check_preferences.py"):
        seeds(data(find_shards([str(write_shards(tmp_path, rows, per_shard=3))]), bad=1.0), 1)


def test_a_tie_of_which_the_manifest_knows_nothing_is_a_bad_sample(tmp_path, caplog):
    rows = face_rows(6, ties=0)
    rows[2]["label_0"] = 0.5
    folder = write_shards(tmp_path, rows, per_shard=6)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["ties"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        assert len({seed for (seed,) in seeds(data(find_shards([str(folder)]), bad=0.2), 6)}) == 6
    assert "0-000002: unlisted tie" in caplog.text


def test_held_out_samples_that_are_bad_are_named_and_left_out(tmp_path, caplog):
    rows = face_rows(6, ties=0)
    rows[0]["jpg_0"] = b"no image"
    source = data(find_shards([str(write_shards(tmp_path, rows, per_shard=6))]), held_out=3)
    (batch,) = source.held_out_batches(4, 0, 1)
    assert len(batch["seeds"]) == 2
    assert "train-00000.tar, 0-000000, loser, held out: undecodable image" in caplog.text
