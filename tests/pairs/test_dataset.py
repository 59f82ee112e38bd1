"""The map-style source: opening and checking datasets, held-out pairs, and the order of pairs."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from helpers import arguments, encode, face_rows, write_parquet
from orpo.pairs.dataset import DataOptions, PairKeys, PreferenceData, load_pairs
from orpo.pairs.order import in_one_bucket
from orpo.pairs.sources import choose_split
from PIL import Image as PILImage

from train_diffusion_orpo_sdxl_lora import parse_args


def open_data(folder: str, **flags) -> PreferenceData:
    return load_pairs(DataOptions.from_config(parse_args(arguments("unused", folder, "unused", **flags))))


def winners_smile(data: PreferenceData) -> bool:
    from orpo.pairs.image import decode_image

    from faces import read_face

    pairs = [data.train[i] for i in range(len(data.train))]
    smile = [
        [read_face(decode_image(image, "").resize((64, 64))).smile for image in (p.winner, p.loser)] for p in pairs
    ]
    return all(winner > loser for winner, loser in smile)


def test_labels_decide_and_ties_are_dropped_and_counted(faces):
    data = open_data(faces)
    assert data.num_pairs == 24
    assert winners_smile(data)
    assert "24 pairs" in str(data) and "4 ties" in str(data)


def test_trl_columns(tmp_path):
    rows = [
        {"chosen": row["jpg_0"], "rejected": row["jpg_1"], "prompt": row["caption"]}
        for row in face_rows(12, ties=0)
        if row["label_0"] == 1
    ]
    features = Features(chosen=Image(), rejected=Image(), prompt=Value("string"))
    data = open_data(write_parquet(tmp_path, rows, features=features))
    assert data.num_pairs == 6
    assert winners_smile(data)


def test_imagefolder(tmp_path):
    (tmp_path / "train").mkdir()
    lines = []
    for i, row in enumerate(face_rows(6, ties=0)):
        for name in ("jpg_0", "jpg_1"):
            (tmp_path / "train" / f"{i}_{name}.jpg").write_bytes(row[name])
        lines.append(
            {f"{n}_file_name": f"{i}_{n}.jpg" for n in ("jpg_0", "jpg_1")}
            | {"label_0": row["label_0"], "caption": row["caption"]}
        )
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = open_data(str(tmp_path))
    assert data.num_pairs == 6
    assert winners_smile(data)


def test_the_only_split_else_train_else_an_error(tmp_path):
    only, both, neither = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    rows = face_rows(4, ties=0)
    write_parquet(only, rows, "validation")
    for folder, names in ((both, ("train", "validation")), (neither, ("test", "validation"))):
        for name in names:
            write_parquet(folder, rows, name)
    assert choose_split(str(only), None, None) == "validation"
    assert choose_split(str(both), None, None) == "train"
    assert choose_split(str(both), None, "validation") == "validation"
    with pytest.raises(ValueError, match="test.*validation|validation.*test"):
        choose_split(str(neither), None, None)
    with pytest.raises(ValueError, match="'dev'.*train, validation"):
        choose_split(str(both), None, "dev")


def test_the_split_asked_for_is_the_one_trained_on(tmp_path):
    write_parquet(tmp_path, face_rows(6, ties=0), "train")
    write_parquet(tmp_path, face_rows(4, ties=0), "validation")
    assert open_data(str(tmp_path)).num_pairs == 6
    assert open_data(str(tmp_path), dataset_split_name="validation").num_pairs == 4


def test_configurations_by_name(tmp_path):
    write_parquet(tmp_path / "small", face_rows(4, ties=0))
    write_parquet(tmp_path / "large", face_rows(6, ties=0))
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/train.parquet" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert open_data(str(tmp_path), dataset_config_name="small").num_pairs == 4
    assert open_data(str(tmp_path), dataset_config_name="large").num_pairs == 6


def bad(row: int, column: str, value):
    def change(rows: list[dict]) -> list[dict]:
        rows[row][column] = value
        return rows

    return change


CAPTION_FEATURES = Features(
    jpg_0=Value("binary"), jpg_1=Value("binary"), label_0=Value("string"), caption=Value("string")
)


@pytest.mark.parametrize(
    "change, features, parts",
    [
        (bad(3, "label_0", 0.7), None, ["row 3", "0.7", "label_0"]),
        (bad(3, "label_0", None), None, ["row 3", "None", "label_0"]),
        (bad(5, "label_0", float("nan")), None, ["row 5", "nan", "label_0"]),
        (lambda rows: [r | {"label_0": "yes" if i == 2 else "1"} for i, r in enumerate(rows)], CAPTION_FEATURES, ["row 2", "'yes'"]),
        (bad(4, "jpg_1", b"no image"), None, ["row 4", "jpg_1"]),
        (lambda rows: bad(4, "jpg_0", rows[4]["jpg_0"][:900])(rows), None, ["row 4", "jpg_0", "truncated"]),
        (bad(4, "jpg_0", None), None, ["row 4", "jpg_0", "empty"]),
        (bad(1, "caption", None), None, ["row 1", "caption", "None"]),
        (lambda rows: [r | {"label_0": 0.5} for r in rows], None, ["no pairs left", "8 rows are ties"]),
        (lambda rows: [{"image": r["jpg_0"], "text": r["caption"]} for r in rows], None, ["image, text", "jpg_0", "chosen"]),
        (lambda rows: [r | {"jpg_0": 7} for r in rows], None, ["jpg_0", "int64"]),
        (lambda rows: [r | {"jpg_0": "a path"} for r in rows], None, ["1 image files can't be read: a path (No such file"]),
    ],
)  # fmt: skip
def test_bad_data_names_the_row(tmp_path, change, features, parts):
    folder = write_parquet(tmp_path, change(face_rows(8, ties=0)), features=features)
    with pytest.raises(ValueError) as raised:
        open_data(folder)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_bad_data_is_found_by_worker_processes_too(tmp_path):
    rows = [face_rows(2, ties=0)[i % 2] for i in range(1200)]
    folder = write_parquet(tmp_path, bad(1100, "jpg_1", b"no image")(rows))
    with pytest.raises(ValueError, match="row 1100, jpg_1"):
        open_data(folder)


def test_rows_that_are_not_used_are_not_checked(tmp_path):
    rows = face_rows(8, ties=1)
    rows[7]["jpg_0"] = rows[5]["jpg_0"] = b"no image"
    folder = write_parquet(tmp_path, rows)
    assert open_data(folder, max_train_samples=4).num_pairs == 4
    with pytest.raises(ValueError, match="row 5"):
        open_data(folder)


def test_large_binary_columns(tmp_path):
    features = Features(
        jpg_0=Value("large_binary"), jpg_1=Value("large_binary"), label_0=Value("float64"), caption=Value("string")
    )
    assert winners_smile(open_data(write_parquet(tmp_path, face_rows(6, ties=0), features=features)))


def test_max_train_samples_truncates_and_may_exceed_the_data(faces):
    assert open_data(faces, max_train_samples=5).num_pairs == 5
    assert open_data(faces, max_train_samples=1000).num_pairs == 24


def test_no_more_pairs_than_asked_for_where_few_can_be_held_out(tmp_path):
    """Ten pairs that share an image can't be held out, four others can."""
    rows = face_rows(14, ties=0)
    for row in rows[:10]:
        row["jpg_1" if row["label_0"] == 1 else "jpg_0"] = rows[0]["jpg_1" if rows[0]["label_0"] == 1 else "jpg_0"]
    folder = write_parquet(tmp_path, rows)
    data = open_data(folder, max_train_samples=4, run_validation=True, num_validation_pairs=8)
    assert data.num_pairs == 4 and 0 < len(data.held_out) <= 8


def test_nothing_is_written_into_a_saved_data_set(tmp_path):
    """`save_to_disk` is the user's folder: what is found out about it is kept in the cache, and used again."""
    rows = face_rows(6, ties=0)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    for file in (tmp_path / "saved").iterdir():
        file.chmod(0o444)
    first = open_data(str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    (kept,) = (tmp_path / "cache" / "results_on_saved").glob("*.arrow")
    changed = kept.stat().st_mtime_ns
    again = open_data(str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    assert kept.stat().st_mtime_ns == changed
    assert (again.train.digests == first.train.digests).all() and len(again.train) == 6
    Dataset.from_list(rows[:5]).save_to_disk(tmp_path / "other")
    assert open_data(str(tmp_path / "other"), cache_dir=str(tmp_path / "cache")).num_pairs == 5


def test_cache_dir_holds_the_data_set(tmp_path):
    folder, cache = write_parquet(tmp_path / "data", face_rows(4, ties=0)), tmp_path / "cache"
    open_data(folder, cache_dir=cache)
    assert list(cache.rglob("*.arrow"))


def test_held_out_pairs_are_never_trained_on(faces):
    data = open_data(faces, run_validation=True, num_validation_pairs=6)
    train, held_out = set(data.train.numbers), set(data.held_out.numbers)
    assert len(train) == 18 and len(held_out) == 6 and not train & held_out
    again = open_data(faces, run_validation=True, num_validation_pairs=6, seed=7)
    assert set(again.held_out.numbers) == held_out
    assert open_data(faces, num_validation_pairs=6).held_out is None
    assert open_data(faces, run_validation=True, num_validation_pairs=0).held_out is None


def test_held_out_pairs_must_leave_some_to_train_on(faces):
    with pytest.raises(ValueError, match="--num_validation_pairs=24 leaves none of the 24 pairs"):
        open_data(faces, run_validation=True, num_validation_pairs=24)


def test_held_out_pairs_are_shared_out_once_and_judged_under_fixed_noise(faces):
    data = open_data(faces, run_validation=True, num_validation_pairs=7, random_crop=True, random_flip=True)
    seeds = [seed for rank in range(3) for batch in data.held_out_batches(2, rank, 3) for seed in batch["seeds"]]
    alone = [seed for batch in data.held_out_batches(4, 0, 1) for seed in batch["seeds"]]
    assert len(seeds) == 7 and sorted(seeds) == sorted(alone)
    plain = open_data(faces, run_validation=True, num_validation_pairs=7)
    for one, other in zip(data.held_out_batches(4, 0, 1), plain.held_out_batches(4, 0, 1), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["prompts"] == other["prompts"]


def test_pairs_that_share_an_image_stay_on_one_side(tmp_path):
    """A chain of rows as people make them: the winner of one comparison meets a new image in the next."""
    images = [encode(PILImage.new("RGB", (16, 16), (i, 2 * i, 3))) for i in range(60)]
    rows = [
        {"jpg_0": images[i], "jpg_1": images[i + 1], "label_0": 1.0, "caption": "a"} for i in range(59) if i % 4 != 3
    ]
    data = open_data(write_parquet(tmp_path, rows), run_validation=True, num_validation_pairs=10)
    sides = [
        {image for i in range(len(side)) for image in (side[i].winner, side[i].loser)}
        for side in (data.train, data.held_out)
    ]
    assert len(data.held_out) == 9 and data.num_pairs == 36 and not sides[0] & sides[1]
    with pytest.raises(ValueError, match="--num_validation_pairs=2 is too small"):
        open_data(str(tmp_path), run_validation=True, num_validation_pairs=2)


def keys(n: int, batch_size: int, world_size: int, batches: int, start: int = 0, seed: int = 0) -> list:
    """What all ranks see, micro-batch by micro-batch."""
    streams = [
        iter(PairKeys(in_one_bucket(n, batch_size, start), seed, n, rank, world_size)) for rank in range(world_size)
    ]
    return [key for _ in range(batches) for stream in streams for key in next(stream)]


@pytest.mark.parametrize("n, batch_size, world_size", [(12, 2, 3), (7, 2, 1), (13, 4, 3), (5, 8, 2), (1, 1, 1)])
def test_every_pair_once_per_epoch_over_all_ranks(n, batch_size, world_size):
    batches = 5 * n
    seen = keys(n, batch_size, world_size, batches)
    for epoch in range(batches * batch_size * world_size // n):
        assert Counter(seen[epoch * n : (epoch + 1) * n]) == Counter({(epoch, i): 1 for i in range(n)})


def test_order_does_not_depend_on_ranks_or_batch_size():
    assert keys(13, 4, 3, 10) == keys(13, 12, 1, 10) == keys(13, 2, 6, 10) == keys(13, 1, 1, 120)


def test_order_depends_on_seed_and_epoch():
    one, other = keys(50, 50, 1, 2), keys(50, 50, 1, 2, seed=1)
    order = [[index for _, index in part] for part in (one[:50], one[50:], other[:50])]
    assert order[0] != order[1] and order[0] != order[2] and order[0] != list(range(50))


@pytest.mark.parametrize("start", [1, 12, 13, 40])
def test_a_resumed_stream_goes_on_with_the_next_pair(start):
    assert keys(13, 1, 1, 60, start=start) == keys(13, 1, 1, 60 + start)[start:]
    assert keys(13, 2, 2, 15, start=start) == keys(13, 1, 1, 60 + start)[start:]


def test_resuming_decodes_nothing_that_was_seen(faces, monkeypatch):
    from orpo.pairs import pair as pairs

    decoded = []
    original = pairs.decode_at_least
    data = open_data(faces)
    monkeypatch.setattr(pairs, "decode_at_least", lambda *a: decoded.append(a[1]) or original(*a))
    next(iter(data.training_batches(2, 0, {"pairs_seen": 10_000}, rank=0, world_size=1)))
    assert len(decoded) == 4


def test_workers_change_nothing(faces):
    def batches(workers: int) -> list[dict]:
        data = open_data(faces, random_crop=True, random_flip=True, dataloader_num_workers=workers)
        return list(islice(data.training_batches(3, 1, {"pairs_seen": 5}, rank=0, world_size=1), 12))

    for alone, parallel in zip(batches(0), batches(2)):
        assert torch.equal(alone["pixel_values"], parallel["pixel_values"])
        assert alone["seeds"] == parallel["seeds"]


def test_ranks_see_different_pairs_under_different_seeds(faces):
    data = open_data(faces)
    batches = [
        next(iter(data.training_batches(4, seed=0, position=None, rank=rank, world_size=3))) for rank in range(3)
    ]
    seeds = [seed for batch in batches for seed in batch["seeds"]]
    assert len(set(seeds)) == 12


def test_a_loading_script_is_no_data_set(tmp_path):
    """Such as HPDv2's on the Hub."""
    (tmp_path / f"{tmp_path.name}.py").write_text("import datasets")
    with pytest.raises(
        ValueError, match="scripts are no longer supported.*Download it, and name its JSON, CSV or parquet"
    ):
        open_data(str(tmp_path))


def test_large_images_are_read_as_they_are(tmp_path):
    """Original sizes come from the file, not from what the transform made of it."""
    image = encode(PILImage.fromarray(np.zeros((70, 300, 3), dtype=np.uint8)))
    rows = [{"jpg_0": image, "jpg_1": image, "label_0": 1.0, "caption": "wide"}]
    data = open_data(write_parquet(tmp_path, rows))
    batch = next(iter(data.training_batches(1, 0, None, 0, 1)))
    assert batch["original_sizes"].tolist() == [[70, 300]] * 2
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
