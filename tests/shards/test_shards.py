"""The stream of pairs from shards: every pair once per epoch, resumable, and hard on bad data."""

import http.server
import json
import logging
import os
import tarfile
from collections import Counter
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import face_rows, write_shards
from orpo.data.pair import PairTransform
from orpo.shards import listing as shards
from orpo.shards.listing import BadSample, Shards, find_shards, read_samples, to_pair
from orpo.shards.order import part_of_epoch, shuffled_order
from orpo.shards.stream import ShardData


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 pairs and 4 ties in 5 shards of 7, 7, 7, 7 and 6 samples."""
    return write_shards(tmp_path_factory.mktemp("shards"), face_rows(34), per_shard=7)


def data(found: Shards, held_out: int = 0, workers: int = 0, buffer_size: int = 4, bad: float = 0.0) -> ShardData:
    return ShardData(found, held_out, PairTransform(32), workers, buffer_size, bad)


def prompts(source: ShardData, batches: int, batch_size=1, seed=0, position=None, rank=0, world_size=1) -> list[str]:
    stream = source.training_batches(batch_size, seed, position, rank, world_size)
    return [prompt for batch in islice(stream, batches) for prompt in batch["prompts"]]


# Who reads what


@pytest.mark.parametrize("counts", [[7, 7, 7, 6], [1], [1000], [3, 0, 5], list(range(1, 40)), [1553] * 13])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 64 * 8])
def test_all_parts_together_read_each_sample_once(counts, num_parts):
    counts = np.array(counts)
    skip = np.minimum(counts, [2] + [0] * (len(counts) - 1))
    seen, sizes = Counter(), []
    for part in range(num_parts):
        runs = part_of_epoch(counts, skip, seed=0, epoch=3, part=part, num_parts=num_parts)
        samples = [(run.shard, ordinal) for run in runs for ordinal in range(run.first, run.last)]
        seen.update(samples)
        sizes.append(len(samples))
    expected = [(shard, i) for shard, n in enumerate(counts) for i in range(skip[shard], n)]
    assert seen == Counter(expected)
    assert max(sizes) - min(sizes) <= 1


def test_shards_are_shuffled_by_seed_and_epoch():
    counts, skip = np.full(20, 5), np.zeros(20, dtype=int)
    order = lambda seed, epoch: [run.shard for run in part_of_epoch(counts, skip, seed, epoch, 0, 1)]  # noqa: E731
    assert sorted(order(0, 0)) == list(range(20)) != order(0, 0)
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize("length, size", [(0, 4), (1, 4), (3, 4), (100, 1), (100, 10), (1000, 256)])
def test_the_shuffle_is_a_permutation_that_its_buffer_can_hold(length, size):
    order = shuffled_order(length, size, np.random.default_rng(0))
    assert sorted(order) == list(range(length))
    given = np.argsort(order)
    for turn in range(length):  # when a sample is given, at most `size` have arrived that were not given before
        arrived = order[turn : turn + 1].max() + 1 if turn < length else length
        assert (given[:arrived] >= turn).sum() <= size
    if size == 1:
        assert list(order) == list(range(length))
    if length > 2 * size > 2:
        assert np.abs(order - np.arange(length)).mean() > size / 4


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (1, 2), (3, 2)])
def test_every_pair_once_per_epoch_over_ranks_and_workers(folder, world_size, workers):
    """Ties are passed over. Parts are equal to the sample, so epochs end together, to a pair, on every reader."""
    source = data(find_shards([str(folder)]), workers=workers)
    seen = []
    for rank in range(world_size):
        stream = source.training_batches(1, 0, None, rank, world_size)
        for batch in stream:
            if all(epoch >= 1 for epoch, _ in stream.places):
                break
            seen += [(stream.places, tuple(batch["prompts"]))]
    counted = Counter()
    for rank in range(world_size):
        stream = source.training_batches(1, 0, None, rank, world_size)
        first_epoch = {reader: [] for reader in range(max(1, workers))}
        before = list(stream.places)
        for batch in stream:
            reader = next(i for i, (old, new) in enumerate(zip(before, stream.places)) if old != new)
            if stream.places[reader][0] == 0:
                first_epoch[reader] += batch["seeds"]
            before = list(stream.places)
            if all(epoch >= 1 for epoch, _ in stream.places):
                break
        counted.update(seed for seeds in first_epoch.values() for seed in seeds)
    assert len(counted) == 30 and set(counted.values()) == {1}


def test_64_ranks_of_8_workers_see_every_sample_once_and_stay_in_step(tmp_path, monkeypatch):
    """No images: samples are numbers. 23 shards that divide badly, 512 readers, every one through its first epoch."""
    counts = np.random.default_rng(0).integers(1, 400, 23)
    found = Shards(tuple(f"{i}.tar" for i in range(23)), counts)
    from orpo.shards import reader as shard_reader

    def fake_read(url, first, last, count):
        return ((ordinal, {"__key__": (int(url[:-4]), ordinal)}) for ordinal in range(first, last))

    monkeypatch.setattr(shard_reader, "read_samples", fake_read)
    monkeypatch.setattr(shard_reader, "transform_sample", lambda e, t, members, seed, where: (members, None))
    monkeypatch.setattr(shard_reader, "collate_pairs", lambda samples: {"ids": [s["__key__"] for s in samples]})
    seen, steps = Counter(), set()
    for part in range(64 * 8):
        skip = np.zeros(23, dtype=int)
        batches = shard_reader.ShardReader(found, skip, None, 1, 16, 0.0, 0, part, 64 * 8, [(0, 0)], 0)
        first = [batch["ids"][0] for batch in takewhile(lambda batch: batch["place"][0] == 0, batches)]
        seen.update(first)
        steps.add(len(first))
    assert seen == Counter({(shard, i): 1 for shard, n in enumerate(counts) for i in range(n)})
    assert max(steps) - min(steps) <= 1


def test_more_readers_than_samples_are_refused(folder):
    with pytest.raises(ValueError, match="too few for 20 processes of 2 workers.*--dataloader_num_workers"):
        data(find_shards([str(folder)]), workers=2).training_batches(1, 0, None, 0, 20)


# Resume


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 5, 17, 40])
def test_a_resumed_stream_equals_the_uninterrupted_one(folder, workers, stop):
    found = find_shards([str(folder)])
    whole = data(found, workers=workers).training_batches(2, 3, None, 1, 2)
    batches = []
    for batch in islice(whole, stop):
        batches.append(batch)
    position = json.loads(json.dumps(whole.position))
    expected = list(islice(data(found, workers=workers).training_batches(2, 3, None, 1, 2), stop + 15))[stop:]
    resumed = list(islice(data(found, workers=workers).training_batches(2, 3, position, 1, 2), 15))
    for one, other in zip(expected, resumed, strict=True):
        assert one["seeds"] == other["seeds"] and one["prompts"] == other["prompts"]
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_resuming_opens_no_shard_that_is_through_and_decodes_nothing_seen(folder, monkeypatch):
    from orpo.data import pair as pairs

    source = data(find_shards([str(folder)]), buffer_size=1)
    stream = source.training_batches(1, 0, None, 0, 1)
    for _ in islice(stream, 20):
        pass
    opened, decoded = [], []
    original_open, original_decode = shards._open, pairs.decode_at_least
    monkeypatch.setattr(shards, "_open", lambda url: opened.append(url) or original_open(url))
    monkeypatch.setattr(pairs, "decode_at_least", lambda *a: decoded.append(a[1]) or original_decode(*a))
    prompts(source, 1, position=stream.position)
    assert len(opened) == 1 and len(decoded) == 2


@pytest.mark.parametrize("change", [{"world_size": 2}, {"workers": 2}, {"buffer_size": 5}])
def test_resuming_with_another_division_is_refused(folder, change):
    stream = data(find_shards([str(folder)])).training_batches(1, 0, None, 0, 1)
    next(iter(stream))
    world_size = change.pop("world_size", 1)
    with pytest.raises(ValueError, match="Cannot resume the shards' stream"):
        data(find_shards([str(folder)]), **change).training_batches(1, 0, stream.position, 0, world_size)


def test_order_and_randomness_depend_on_the_seed(folder):
    found = find_shards([str(folder)])
    assert prompts(data(found), 30) == prompts(data(found), 30) != prompts(data(found), 30, seed=1)


# Held out


def test_held_out_samples_are_never_trained_on(folder):
    found = find_shards([str(folder)])
    source = data(found, held_out=9)
    held = [seed for rank in range(2) for batch in source.held_out_batches(4, rank, 2) for seed in batch["seeds"]]
    assert len(held) == len(set(held)) == 9 and source.num_pairs == 25
    first_nine = Counter(row["caption"] for row in face_rows(34)[:9])
    assert Counter(p for b in source.held_out_batches(4, 0, 1) for p in b["prompts"]) == first_nine
    trained = Counter()
    for part in range(3):
        for run in part_of_epoch(found.counts, source.skip, 0, 0, part, 3):
            trained.update((run.shard, ordinal) for ordinal in range(run.first, run.last))
    assert not {(0, i) for i in range(7)} & set(trained) and not {(1, 0), (1, 1)} & set(trained)
    assert len(trained) == 25


# Where shards are


def test_folders_braces_wildcards_and_several_patterns(folder, tmp_path):
    expected = sorted(str(path) for path in folder.glob("*.tar"))
    assert list(find_shards([str(folder)]).urls) == expected
    assert list(find_shards([f"{folder}/train-{{00000..00004}}.tar"]).urls) == expected
    assert list(find_shards([f"{folder}/train-*.tar"]).urls) == expected
    two = find_shards([f"{folder}/train-{{00003..00004}}.tar", f"{folder}/train-00000.tar"])
    assert list(two.urls) == [expected[3], expected[4], expected[0]] and list(two.counts) == [7, 6, 7]
    assert list(find_shards([f"pipe:cat {folder}/train-{{00001..00002}}.tar"]).counts) == [7, 7]


def test_a_folder_of_several_splits_is_not_mixed(tmp_path):
    write_shards(tmp_path, face_rows(4), per_shard=2)
    (tmp_path / "validation-00000.tar").write_bytes((tmp_path / "train-00000.tar").read_bytes())
    with pytest.raises(ValueError, match="several splits, train, validation: name one, as in '.*/train-\\*.tar'"):
        find_shards([str(tmp_path)])
    assert find_shards([f"{tmp_path}/train-*.tar"]).counts.sum() == 4


def test_without_a_manifest_samples_are_counted(folder, tmp_path, caplog):
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert list(find_shards([str(tmp_path)]).counts) == [7, 7, 7, 7, 6]
    with caplog.at_level(logging.WARNING):
        assert list(find_shards([f"pipe:cat {tmp_path}/train-00004.tar"]).counts) == [6]
    assert "No manifest can be had" in caplog.text
    broken = tmp_path / "train-00002.tar"
    broken.write_bytes(broken.read_bytes()[:9000])
    with pytest.raises(ValueError, match="train-00002.tar can't be read to its end"):
        find_shards([str(tmp_path)])


def test_the_number_of_samples_is_checked_when_given(folder):
    assert find_shards([str(folder)], 34).counts.sum() == 34
    with pytest.raises(ValueError, match="--num_train_examples=35, but the shards hold 34"):
        find_shards([str(folder)], 35)


@pytest.mark.parametrize(
    "pattern, error",
    [
        ("{tmp}/nothing-here", "nothing-here"),
        ("{tmp}/train-{{00000..00002}}.tar", "train-00000.tar.*3 of 3 missing"),
        ("{tmp}", "without .*.tar"),
        ("{folder}/*.tgz", "tgz"),
        ("pipe:cat {tmp}/train-00000.tar", "exit"),
        ("pipe:echo hello", "names no .*.tar"),
    ],
)
def test_wrong_paths_are_errors_at_once(folder, tmp_path, pattern, error):
    with pytest.raises((ValueError, OSError), match=error):
        find_shards([pattern.format(tmp=tmp_path, folder=folder)])


def test_a_shard_that_the_manifest_does_not_know_is_an_error(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train-00009.tar").write_bytes((tmp_path / "train-00000.tar").read_bytes())
    with pytest.raises(ValueError, match="train-00009.tar is not in .*manifest.json"):
        find_shards([str(tmp_path)])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="no manifest of shards"):
        find_shards([str(tmp_path)])


def test_wds_secure_refuses_commands(folder, monkeypatch):
    monkeypatch.setattr(shards, "enforce_security", True)  # what WDS_SECURE=1 sets when webdataset is imported
    with pytest.raises(ValueError, match="WDS_SECURE.*refusing to run pipe:cat"):
        find_shards([f"pipe:cat {folder}/train-00000.tar"])
    assert find_shards([str(folder)]).counts.sum() == 34


def test_pipes_and_http_give_what_files_give(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    os.environ["no_proxy"] = "127.0.0.1"
    names = "train-{00000..00004}.tar"
    try:
        expected = prompts(data(find_shards([f"{folder}/{names}"])), 40)
        for prefix in (f"pipe:cat {folder}", f"http://127.0.0.1:{server.server_address[1]}"):
            assert prompts(data(find_shards([f"{prefix}/{names}"])), 40) == expected
        with pytest.raises(OSError, match="exit 22"):
            list(read_samples(f"http://127.0.0.1:{server.server_address[1]}/none.tar", 0, 1))
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    "command",
    [
        "cat {shard}; exit 3",
        "head -c 20000 {shard}; exit 3",
        "exit 3 # {shard}",
        "cat {shard}; exec >&-; sleep 0.5; exit 3",
    ],
)
def test_a_failing_command_is_an_error_not_an_end_of_data(folder, command):
    with pytest.raises(OSError, match="exit 3"):
        list(read_samples("pipe:" + command.format(shard=folder / "train-00000.tar"), 0, 7))


def test_a_command_that_is_no_longer_needed_is_ended(folder):
    url = f"pipe:cat {folder}/train-00000.tar; sleep 1000"
    assert [ordinal for ordinal, _ in read_samples(url, 1, 3)] == [1, 2]


# What is in them


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
    with pytest.raises(BadSample) as raised:
        to_pair(members(face_rows(2, ties=0)[1], **changes))
    assert raised.value.kind == kind


def damage(folder: Path, tmp_path: Path) -> Path:
    """Shard 1 breaks off in its fourth sample; in shard 2, sample 2 has half an image and sample 4 no label."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with tarfile.open(folder / "train-00001.tar") as tar:
        cut = [member for member in tar if member.name.endswith("jpg_1.jpg")][3].offset_data + 100
    shard = tmp_path / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    rows = face_rows(34)[14:21]
    rows[2]["jpg_0"] = rows[2]["jpg_0"][:700]
    write_shards(tmp_path, rows, per_shard=7, first_shard=2, leave_out={4: "label_0.txt"}, manifest=False)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_by_kind_and_logged_with_their_place(folder, tmp_path, caplog, workers):
    source = data(find_shards([str(damage(folder, tmp_path))]), bad=0.5, workers=workers)
    with caplog.at_level(logging.WARNING):
        stream = source.training_batches(1, 0, None, 0, 1)
        seeds = Counter(seed for batch in islice(stream, 24 * 3) for seed in batch["seeds"])
    assert set(seeds.values()) == {1}  # three epochs of the 24 good pairs, or almost
    assert stream.problems == {"bad": 6, "ties": 4}
    if workers == 0:
        text = caplog.text  # of three epochs
        assert text.count("unreadable") == 3 * 4
        assert text.count("undecodable image") == text.count("missing member") == 3
        assert "train-00002.tar, 2-000002: undecodable image" in text
        assert "train-00002.tar, 2-000004: missing member" in text
        assert "train-00001.tar, sample 3: unreadable" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_and_name_the_shards(folder, tmp_path, workers):
    source = data(find_shards([str(damage(folder, tmp_path))]), bad=0.1, workers=workers)
    with pytest.raises(ValueError, match=r"more than --max_bad_samples=0.1.*train-0000[12].tar: \d"):
        prompts(source, 60)


def test_held_out_samples_that_are_bad_or_ties_are_named_or_passed_over(tmp_path, caplog):
    rows = face_rows(6, ties=0)
    rows[0]["jpg_0"] = b"no image"
    rows[1]["label_0"] = 0.5
    source = data(find_shards([str(write_shards(tmp_path, rows, per_shard=6))]), held_out=3)
    (batch,) = source.held_out_batches(4, 0, 1)
    assert len(batch["seeds"]) == 1
    assert "train-00000.tar, 0-000000, held out: undecodable image" in caplog.text


def test_only_ties_are_an_error_and_not_an_endless_loop(tmp_path):
    folder = write_shards(tmp_path, face_rows(6, ties=6), per_shard=3)
    with pytest.raises(ValueError, match="No pairs to train on"):
        prompts(data(find_shards([str(folder)])), 1)
