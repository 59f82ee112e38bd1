"""Where shards are, how many samples they hold, which of these are ties, and what is refused before a model loads."""

import hashlib
import http.server
import io
import json
import logging
import os
import shutil
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread

import pytest
from helpers import face_rows, write_shards
from orpo.pairs.pair import PairTransform
from orpo.runtime.shapes import square
from orpo.store import index, locate
from orpo.store.index import Shards, find_shards
from orpo.store.reader import read_samples
from orpo.store.stream import ShardData


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 pairs and 4 ties in 5 shards of 7, 7, 7, 7 and 6 samples."""
    return write_shards(tmp_path_factory.mktemp("shards"), face_rows(34), per_shard=7)


def prompts(found: Shards, batches: int) -> list[str]:
    stream = ShardData(found, 0, PairTransform(square(32)), 0, 16, 0.0).training_batches(1, 0, None, 0, 1)
    return [prompt for batch in islice(stream, batches) for prompt in batch["prompts"]]


def test_folders_braces_wildcards_and_several_patterns(folder, tmp_path):
    expected = sorted(str(path) for path in folder.glob("*.tar"))
    assert list(find_shards([str(folder)]).urls) == expected
    assert list(find_shards([f"{folder}/train-{{00000..00004}}.tar"]).urls) == expected
    assert list(find_shards([f"{folder}/train-*.tar"]).urls) == expected
    two = find_shards([f"{folder}/train-{{00003..00004}}.tar", f"{folder}/train-00000.tar"])
    assert list(two.urls) == [expected[3], expected[4], expected[0]] and list(two.counts) == [7, 6, 7]
    assert list(find_shards([f"pipe:cat {folder}/train-{{00001..00002}}.tar"]).counts) == [7, 7]


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for pattern in (f"~/{folder.name}", f"~/{folder.name}/train-*.tar", f"~/{folder.name}/train-{{00000..00004}}.tar"):
        assert len(find_shards([pattern]).urls) == 5


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
    assert "No manifest can be read" in caplog.text
    broken = tmp_path / "train-00002.tar"
    broken.write_bytes(broken.read_bytes()[:9000])
    with pytest.raises(ValueError, match="train-00002.tar can't be read to its end"):
        find_shards([str(tmp_path)])


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
    with pytest.raises(ValueError, match="not a manifest of shards"):
        find_shards([str(tmp_path)])


def test_wds_secure_refuses_commands(folder, monkeypatch):
    monkeypatch.setattr(locate, "enforce_security", True)  # what WDS_SECURE=1 sets when webdataset is imported
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
        expected = prompts(find_shards([f"{folder}/{names}"]), 40)
        for prefix in (f"pipe:cat {folder}", f"http://127.0.0.1:{server.server_address[1]}"):
            assert prompts(find_shards([f"{prefix}/{names}"]), 40) == expected
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


# Twice


def test_a_shard_that_is_named_twice_is_refused(folder, tmp_path):
    shard = folder / "train-00001.tar"
    link, copied = tmp_path / "train-00001.tar", tmp_path / "copy"
    link.symlink_to(shard)
    copied.mkdir()
    url = "pipe:cat " + str(shard)
    for patterns in (
        [folder, shard],
        [shard, shard],
        [shard, link],
        [f"{folder}/train-0000{{0,1,1}}.tar"],
        [url, url],
    ):
        with pytest.raises(ValueError, match="same shard twice: .*train-00001.tar and .*train-00001.tar"):
            find_shards(list(map(str, patterns)))
    (copied / "train-00009.tar").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="same shard twice"):  # a copy, by its checksum
        find_shards([str(folder), str(copied)])


# Ties


def manifest_with(folder: Path, **entries) -> Path:
    """Changes what a folder's manifest says of its first shard."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= entries
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_what_is_in_a_shard_is_what_the_manifest_says_or_what_reading_finds(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "listed", face_rows(34), per_shard=7)
    unlisted = shutil.copytree(folder, tmp_path / "unlisted", ignore=shutil.ignore_patterns("*.json"))
    told, found = find_shards([str(folder)]), find_shards([str(unlisted)])
    assert [list(places) for places in told.ties] == [[], [], [], [], [2, 3, 4, 5]]
    assert sum(map(len, told.pairs())) == 30 and list(told.counts) == [7, 7, 7, 7, 6]
    digests = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar")))
    assert told.contents == digests
    with pytest.raises(ValueError, match="same shard twice"):
        find_shards([str(folder), str(unlisted)])
    assert found.contents == digests
    assert [list(a) == list(b) for a, b in zip(told.ties, found.ties)] == [True] * 5
    monkeypatch.setattr(index, "open_shard", lambda *args: pytest.fail("a shard was read again"))
    assert find_shards([str(unlisted)]).num_ties == 4  # the answer was kept
    assert find_shards([str(manifest_with(folder, ties=[0, 1]))]).num_ties == 6


def test_another_file_in_the_place_of_a_shard_is_looked_at_again(tmp_path):
    folder = write_shards(tmp_path, face_rows(6, ties=1), per_shard=6, manifest=False)
    assert find_shards([str(folder)]).num_ties == 1
    write_shards(tmp_path, face_rows(6, ties=2), per_shard=6, manifest=False)
    assert find_shards([str(folder)]).num_ties == 2


@pytest.mark.parametrize("said", [[6], [-1], [1, 1], [2, 1], [0.5], ["1"], "12", 3])
def test_ties_that_are_no_places_are_refused(tmp_path, said):
    folder = manifest_with(write_shards(tmp_path, face_rows(6), per_shard=6), ties=said)
    with pytest.raises(ValueError, match="not a manifest of shards"):
        find_shards([str(folder)])


# Shards that others made


def pack(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def members(key: str = "{:05d}", rename=lambda name: name) -> list[tuple[str, bytes]]:
    found = []
    for i, row in enumerate(face_rows(8, ties=0)):
        label = str(row["label_0"]).encode()
        sample = {"original_prompt.txt": row["caption"].encode(), "jpg_0.jpg": row["jpg_0"], "jpg_1.jpg": row["jpg_1"]}
        found += [
            (f"{key.format(i)}.{rename(name)}", data) for name, data in (sample | {"label_0.txt": label}).items()
        ]
    return found


def renamed(*changes: tuple[str, str]) -> list[tuple[str, bytes]]:
    def rename(name: str) -> str:
        for old, new in changes:
            name = name.replace(old, new)
        return name

    return members(rename=rename)


FOREIGN = {
    "other names": (
        renamed(("original_prompt", "prompt"), ("jpg_0", "chosen"), ("jpg_1", "rejected"), ("label_0", "score")),
        "00000, has only prompt.txt, chosen.jpg, rejected.jpg, score.txt; a sample needs original_prompt.txt, jpg_0"
        ".*Rename the members",
    ),
    "another caption": (renamed(("original_prompt", "caption")), "has only .*caption.txt.*needs original_prompt.txt"),
    "a class for a label": (renamed(("label_0.txt", "label_0.cls")), "label_0.cls.*label_0.txt"),
    "one image": ([("0.jpg", b"x"), ("0.txt", b"a"), ("0.json", b"{}")], "has only jpg, txt, json; a sample needs"),
    "dots in the key": (members("sdxl_v1.0_{:05d}"), "sdxl_v1, has only 0_00000.*keys hold no dot"),
    "sorted by member": (
        sorted(members(), key=lambda member: member[0].partition(".")[2]),
        "00000, has only jpg_0.jpg; .*must follow one another.*tar --sort=name",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_shards_of_other_conventions_say_what_they_hold_and_what_is_needed(tmp_path, name):
    content, message = FOREIGN[name]
    path = pack(tmp_path / "train-00000.tar", content)
    with pytest.raises(ValueError, match=f"train-00000.tar: none of its \\d+ samples is complete.*{message}"):
        find_shards([str(path)])


ADDED = {
    "macOS": lambda name, data: [(f"./._{name}", b"\0\5\x16\7"), (f"./{name}", data)],
    "upper case": lambda name, data: [(name.upper(), data)],
    "other members": lambda name, data: [(name, data), (f"{name.partition('.')[0]}.meta.json", b"{}")],
    "a list of files": lambda name, data: [(name, data), (".DS_Store", b"x"), ("README", b"x")],
}


@pytest.mark.parametrize("name", ADDED)
def test_what_other_programs_add_is_passed_over(tmp_path, name):
    content = [member for old, data in members() for member in ADDED[name](old, data)]
    found = find_shards([str(pack(tmp_path / "train-00000.tar", content))])
    assert list(found.counts) == [8] and found.num_ties == 0
    assert sorted(prompts(found, 8)) == sorted(row["caption"] for row in face_rows(8, ties=0))


def test_folders_in_an_archive_are_no_samples(tmp_path):
    for name, data in members():
        (tmp_path / "v1.0").mkdir(exist_ok=True)
        (tmp_path / "v1.0" / name).write_bytes(data)
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        tar.add(tmp_path / "v1.0", "v1.0")
    # `tar` lists a folder's files in any order, here by name.
    found = find_shards([str(tmp_path / "train-00000.tar")])
    assert list(found.counts) == [8] and len(prompts(found, 8)) == 8


@pytest.mark.parametrize("mode, suffix", [("w:gz", ".gz"), ("w:bz2", ".bz2"), ("w:xz", ".xz")])
def test_compressed_shards_say_how_to_unpack_them(tmp_path, mode, suffix):
    path = pack(tmp_path / "shards" / f"train-00000.tar{suffix}", members(), mode)
    for pattern in (path, path.parent, f"{path.parent}/*"):
        with pytest.raises(ValueError, match=f"compressed shards .*train-00000.tar{suffix}.*gunzip"):
            find_shards([str(pattern)])
    hidden = path.rename(tmp_path / "train-00000.tar")
    for pattern in (hidden, f"pipe:cat {hidden}"):
        with pytest.raises(ValueError, match="train-00000.tar is compressed .*plain tar archives: unpack it with"):
            find_shards([str(pattern)])


def test_brackets_in_a_path_are_not_a_pattern(tmp_path):
    folder = write_shards(tmp_path / "data [1]", face_rows(6), per_shard=3)
    assert len(find_shards([str(folder)]).urls) == len(find_shards([f"{folder}/train-{{00000..00001}}.tar"]).urls) == 2
