"""Data that is broken or hostile: the table of docs/data.md, by doing the damage."""

import gzip
import io
import json
import logging
import os
import re
import signal
import struct
import tarfile
import zlib
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, Value
from datasets import Image as ImageFeature
from faults import fuzz, samples
from faults.row_properties import check_rows
from faults.samples import picture, save
from helpers import arguments, encode, face_rows, train, write_parquet, write_shards
from launching import SHARDS_SCRIPT, assert_ok, two_processes
from orpo.pairs import table as table_module
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.dataset import DataOptions, PreferenceData, load_pairs
from orpo.pairs.image import MAX_FILE_BYTES, decode_image
from orpo.pairs.order import in_one_bucket
from orpo.pairs.pair import PairTransform, crop_image
from orpo.runtime.shapes import square
from orpo.store.convert import convert_unit
from orpo.store.index import Shard, find_shards
from orpo.store.plan import plan_job
from orpo.store.reader import PairReader, read_samples
from orpo.store.sample import to_pair
from orpo.store.stream import ShardData
from PIL import Image

from train_diffusion_orpo_sdxl_lora import parse_args


@pytest.fixture(autouse=True)
def no_hang():
    """Nothing here may hang, whatever the data say."""

    def stop(*_):
        raise TimeoutError("still busy after ten minutes")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# A seeded sample of the campaign


def test_a_sample_of_the_fuzzing_campaign():
    """Damaged images, shards, parquet files, manifests and samples: refused with their place, or right."""
    found = fuzz.campaign(800, seed=1)
    assert [problem for _, problems in found.values() for problem in problems] == []
    for target, (outcomes, _) in found.items():
        assert outcomes["refused"] > 0.3 * outcomes.total() > 0 < outcomes["accepted"], target


def test_a_sample_of_the_rows_campaign():
    """A table with one damaged row, in memory: its check names the row, or all pairs are right."""
    assert check_rows(inputs=30, seed=1) == 30


# What becomes of images


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(decode_image(encoded, "row 0")).astype(int)


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def solid(mode: str, colour) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


def palette(transparency) -> bytes:
    """One colour, orange; index 1 is not used."""
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 128, 0, 0, 0, 255])
    return save(image, "PNG", transparency=transparency)


INKS = (200, 30, 0, 50)
RGB_OF_INKS = [(255 - ink) * (255 - 50) / 255 for ink in INKS[:3]]

COLOURS = {
    "CMYK, inverted as Adobe does": (save(solid("CMYK", INKS), "JPEG", quality=100), RGB_OF_INKS),
    "CMYK without Adobe's marker": (
        without_adobe_marker(save(solid("CMYK", INKS), "JPEG", quality=100)),
        RGB_OF_INKS,
    ),
    "grey": (save(solid("L", 77), "PNG"), (77, 77, 77)),
    "16-bit grey, in the middle": (
        save(Image.fromarray(np.full((16, 16), 0x8000, np.uint16)), "PNG"),
        (128, 128, 128),
    ),
    "16-bit grey, just not black": (save(Image.fromarray(np.full((16, 16), 400, np.uint16)), "PNG"), (1, 1, 1)),
    "half transparent": (save(solid("RGBA", (255, 0, 0, 127)), "PNG"), (255, 128, 128)),
    "transparent, with a colour below": (save(solid("RGBA", (0, 0, 255, 0)), "PNG"), (255, 255, 255)),
    "transparent grey": (save(solid("LA", (0, 51)), "PNG"), (204, 204, 204)),
    "palette": (palette(1), (255, 128, 0)),
    "palette, transparent index": (palette(0), (255, 255, 255)),
    "palette, half transparent": (palette(b"\x80\xff"), (255, 191, 127)),
    "colour that stands for transparency": (
        save(solid("RGB", (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
        (255, 255, 255),
    ),
    "transparent GIF": (save(solid("P", 0), "GIF", transparency=0), (255, 255, 255)),
    "transparent WebP": (save(solid("RGBA", (0, 0, 255, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "a colour profile": (save(solid("RGB", (9, 99, 199)), "PNG", icc_profile=b"of no known kind"), (9, 99, 199)),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name):
    encoded, expected = COLOURS[name]
    np.testing.assert_allclose(pixels(encoded), np.broadcast_to(expected, (16, 16, 3)), atol=3)


@pytest.mark.parametrize("format, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {})])
def test_of_several_frames_the_first_is_taken(format, options):
    frames = [solid("RGB", (255, 0, 0)), solid("RGB", (0, 0, 255))]
    encoded = save(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(encoded)).n_frames == 2
    np.testing.assert_allclose(pixels(encoded), np.broadcast_to((255, 0, 0), (16, 16, 3)), atol=3)


UPRIGHT = {  # what EXIF's orientations ask for, as numpy does it
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientations(orientation):
    image, exif = picture(1), Image.Exif()
    exif[0x0112] = orientation
    expected = UPRIGHT[orientation](np.asarray(image))
    np.testing.assert_array_equal(pixels(save(image, "PNG", exif=exif)), expected)


def black_png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG with all its pixels, or with the first rows alone, in few bytes."""
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(1 + width)) for _ in range(rows or height)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    )


def scans(number: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    jpeg = save(picture(0, 64), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * number + jpeg[-2:]


REFUSED = {
    "1x1": (save(Image.new("RGB", (1, 1)), "PNG"), "1 x 1, a side is shorter than 8"),
    "20,000x10": (save(Image.new("RGB", (20_000, 10)), "PNG"), "20000 x 10, a side is more than 32 times"),
    "decompression bomb": (black_png(60_000, 60_000, rows=1), "more than 67108864 pixels|decompression bomb"),
    "a little too large": (black_png(8193, 8192), "8193 x 8192, more than 67108864 pixels"),
    "JPEG of 200 scans": (scans(200), "JPEG of more than 100 scans"),
    "TIFF": (save(picture(0), "TIFF"), "none of the formats AVIF, BMP, GIF, JPEG, PNG, WEBP"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "none of the formats"),
    "16-bit grey with a transparent colour": (
        save(Image.fromarray(np.full((16, 16), 9, np.uint16)), "PNG", transparency=9),
        "transparent colour",
    ),
    "text": (b"<html>404</html>", "none of the formats"),
    "nothing": (b"", "none of the formats"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused(name):
    encoded, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^row 0: not a readable image \(.*({reason}).*\)\. Replace"):
        decode_image(encoded, "row 0")


def test_files_of_more_than_the_limit_are_refused():
    with pytest.raises(ValueError, match=f"has {MAX_FILE_BYTES + 72} bytes, more than {MAX_FILE_BYTES}"):
        decode_image(save(solid("L", 0), "BMP").ljust(MAX_FILE_BYTES + 72, b"\0"), "row 0")


@pytest.mark.parametrize("name", ["decompression bomb", "a little too large", "20,000x10"])
def test_a_bomb_is_refused_before_memory_is_spent(name):
    """Peak memory of the attempt, in a process of its own; the pixels of the middle one would take 67 MB."""

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak()
        try:
            decode_image(REFUSED[name][0], "row 0")
        except ValueError:
            os.write(writer, str(peak() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert int(os.read(reader, 100)) < 30


@pytest.mark.parametrize("name", samples.images())
def test_truncated_images_are_refused_or_lack_no_pixel(name):
    encoded = samples.images()[name]
    whole, refused = pixels(encoded), 0
    for length in range(0, len(encoded), max(1, len(encoded) // 60)):
        try:
            found = pixels(encoded[:length])
        except ValueError:
            refused += 1
            continue
        np.testing.assert_array_equal(found, whole)
    assert refused > 20


@pytest.mark.parametrize("name", [name for name in samples.images() if "png" in name])
def test_no_bit_of_a_png_changes_a_pixel_unnoticed(name):
    encoded = samples.images()[name]
    whole = pixels(encoded)
    for at in range(len(encoded)):
        flipped = bytearray(encoded)
        flipped[at] ^= 4
        try:
            found = pixels(bytes(flipped))
        except ValueError:
            continue
        np.testing.assert_array_equal(found, whole)


def test_the_longest_shape_that_is_taken_is_cropped():
    wide = encode(Image.new("RGB", (512, 16), "red"), "PNG")
    image = crop_image(wide, "", (32, 32))[0]
    assert image.shape == (32, 32, 3)


# Rows of a dataset


def open_data(folder) -> PreferenceData:
    return load_pairs(DataOptions.from_config(parse_args(arguments("unused", str(folder), "unused"))))


@pytest.mark.parametrize("name", REFUSED)
def test_the_check_names_the_row_of_every_bad_image(tmp_path, name):
    data = face_rows(5, ties=0)
    data[3]["jpg_1"] = REFUSED[name][0]
    with pytest.raises(ValueError, match=r"train\), row 3, jpg_1: (not a readable image|it is empty)"):
        open_data(write_parquet(tmp_path, data))


CAPTIONS = ["", " \n\t", "word " * 2000, "x" * 10_000, "a\0b\x1b[31m\u202e", "🦊" * 50, "<|endoftext|>" * 3]


def test_captions_that_are_taken_train_from_rows_and_from_shards(tiny_sdxl, tmp_path, capfd):
    """Empty, of 10,000 characters, with control characters: what they are is passed on to the tokenizer."""
    data = [row | {"caption": caption} for row, caption in zip(face_rows(len(CAPTIONS), ties=0), CAPTIONS)]
    flags = {"max_train_steps": 1, "train_batch_size": len(CAPTIONS), "shuffle_buffer_size": None}
    folder = write_parquet(tmp_path / "rows", data)
    assert {open_data(folder).train[i].prompt for i in range(len(data))} == set(CAPTIONS)
    train(tiny_sdxl, folder, tmp_path / "lora", **flags)
    shards = write_shards(tmp_path / "shards", data, per_shard=4)
    weights = train(tiny_sdxl, None, tmp_path / "wds", dataset_path=shards, **flags)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert "bad=" not in capfd.readouterr().err


def text_column(values: list[bytes]) -> pa.Array:
    """Text that no one checked to be UTF-8, as other writers of parquet make it."""
    encoded = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(values), *encoded.buffers()[1:])


@pytest.mark.parametrize("column", ["caption", "label_0"])
def test_text_that_is_not_utf8_names_its_row(tmp_path, column):
    data = face_rows(4, ties=0)
    values = {name: [row[name] for row in data] for name in data[0]}
    values["label_0"] = [str(label) for label in values["label_0"]]
    values[column] = text_column([b"1", b"1", b"\xff\xfe", b"0"])
    pq.write_table(pa.table(values), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"row 2: {column} can't be read: 'utf-8' codec"):
        open_data(tmp_path)
    bad_rows = convert(tmp_path)[0].bad_rows
    assert [bad.row for bad in bad_rows] == [2] and column in bad_rows[0].reason


def test_a_path_in_a_table_is_not_followed(tmp_path):
    """It could name any file of this machine. Here it names an image, which nothing else would refuse."""
    canary = tmp_path / "private.png"
    canary.write_bytes(save(picture(0), "PNG"))
    images = [{"bytes": encode(picture(i)), "path": None} for i in range(4)]
    features = Features(jpg_0=ImageFeature(), jpg_1=ImageFeature(), label_0=Value("float64"), caption=Value("string"))
    table = pa.table(
        {
            "jpg_0": pa.array([*images[:3], {"bytes": None, "path": str(canary)}]),
            "jpg_1": pa.array(images),
            "label_0": [1.0] * 4,
            "caption": ["a"] * 4,
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table.cast(features.arrow_schema), tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"row 3, jpg_0 \(private.png\): it holds a path and no image"):
        open_data(tmp_path / "data")
    assert [bad.row for bad in convert(tmp_path / "data")[0].bad_rows] == [3]


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"rejected_file_name": "../private.png"}, "Invalid metadata file_name"),
        ({"rejected_file_name": "/etc/hostname"}, "Invalid metadata file_name"),
        ({"rejected_file_name": "none.png"}, r"row 0, rejected \(none.png\): .*No such file"),
        ({"prompt": "\ud83d"}, "surrogate"),
    ],
)
def test_an_imagefolder_that_cannot_be_read_is_named(tmp_path, entry, reason):
    (tmp_path / "private.png").write_bytes(save(picture(0), "PNG"))
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.png").write_bytes(save(picture(i), "PNG"))
    line = {"chosen_file_name": "0.png", "rejected_file_name": "1.png", "prompt": "a"} | entry
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/data.*{reason}"):
        open_data(tmp_path / "data")


def test_a_check_that_passed_is_remembered_until_other_images_are_refused(faces, monkeypatch):
    open_data(faces)

    def refuse(encoded, where):
        raise ValueError("checked again")

    monkeypatch.setattr(table_module, "decode_image", refuse)
    open_data(faces)
    monkeypatch.setattr(table_module, "DECODER", "another")
    with pytest.raises(ValueError, match="checked again"):
        open_data(faces)


@pytest.mark.parametrize("label", [10**400, "9" * 100_000, "yes\n\x1b[2J" * 1000])
def test_messages_about_labels_are_one_short_line(label):
    from orpo.pairs.labels import parse_label

    with pytest.raises(ValueError) as raised:
        parse_label(label, "row 3")
    assert "row 3" in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 400


# The converter


def convert(folder: Path) -> tuple[Shard, Path]:
    """Converts in this process; returns the shard's entry of the manifest, and its file."""
    output = Path(f"{folder}-shards")
    output.mkdir(exist_ok=True)
    job = plan_job(str(folder), str(output))
    shard = Shard.from_dict(json.loads(convert_unit({"item": 0}, job)["shard"]))
    return shard, output / shard.name


def test_the_converter_names_what_it_cannot_take_and_passes_on_the_rest(tmp_path):
    good = [*samples.images().values(), *(encoded for encoded, _ in COLOURS.values())]
    bad = [encoded for encoded, _ in REFUSED.values()]
    data = [
        {"jpg_0": image, "jpg_1": encode(picture(i)), "label_0": 1.0, "caption": f"{i} {CAPTIONS[i % len(CAPTIONS)]}"}
        for i, image in enumerate(good + bad)
    ]
    shard, path = convert(Path(write_parquet(tmp_path / "in", data)))
    assert [entry.row for entry in shard.bad_rows] == list(range(len(good), len(data)))
    for entry in shard.bad_rows:
        assert f"row {entry.row}, jpg_0: not a readable image" in entry.reason or "it is empty" in entry.reason
    pairs = [to_pair(members) for _, members in read_samples(str(path), 0, len(good), len(good))]
    assert [(p.winner, p.loser, p.prompt) for p in pairs] == [
        (row["jpg_0"], row["jpg_1"], row["caption"]) for row in data[: len(good)]
    ]


def test_no_bit_of_a_parquet_footer_ends_the_process(tmp_path):
    """Arrow ends it on some, where it is asked what they say of columns; a child plans with each of them."""
    data = samples.parquets()["zstd v2"]
    footer = pq.ParquetFile(io.BytesIO(data)).metadata.serialized_size
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        named, unnamed = 0, 0
        try:
            for at in range(len(data) - 8 - footer, len(data) - 8, 7):
                flipped = bytearray(data)
                flipped[at] ^= 1
                (tmp_path / "train.parquet").write_bytes(flipped)
                try:
                    plan_job(str(tmp_path), "")
                except ValueError as error:
                    named += "train.parquet" in str(error)
                    unnamed += "train.parquet" not in str(error)
            os.write(writer, f"{named} {unnamed}".encode())
            os._exit(0)
        finally:
            os._exit(1)  # an exception of another type must not run the rest of the tests in the child
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(writer)
    named, unnamed = map(int, os.read(reader, 100).split())
    assert named > 0 and unnamed == 0  # most bits say something of columns, which planning does not read


# Shards


@pytest.fixture(scope="module")
def canary(tmp_path_factory) -> Path:
    """A private image, that no shard may bring into training."""
    path = tmp_path_factory.mktemp("private") / "image.jpg"
    path.write_bytes(encode(picture(99)))
    return path


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sample(key: str, number: int = 0, **replaced) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members of one sample; `jpg_0=...` puts an entry in place of that one."""
    row = samples.rows()[number]
    members = {
        "original_prompt": entry(f"{key}.original_prompt.txt", row["caption"].encode()),
        "jpg_0": entry(f"{key}.jpg_0.jpg", row["jpg_0"]),
        "jpg_1": entry(f"{key}.jpg_1.png", row["jpg_1"]),
        "label_0": entry(f"{key}.label_0.txt", str(row["label_0"]).encode()),
    }
    return list((members | replaced).values())


def archive(*entries: tuple[tarfile.TarInfo, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format, errors="surrogateescape") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    """One header block alone, with a size that tarfile would not write."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[156:157] = kind
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else size.to_bytes(12, "big", signed=True)
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(block)


FIRST, LAST = sample("000", 0), sample("002", 2)


def between(*entries) -> bytes:
    return archive(*FIRST, *entries, *LAST)


def link(kind: bytes, target: str) -> bytes:
    return between(*sample("001", 1, jpg_0=entry("001.jpg_0.jpg", kind=kind, linkname=target)))


GOOD = between(*sample("001", 1))
CUT_AT = GOOD.index(b"001.label_0.txt") + 600

UNFINISHED = archive(*FIRST, *sample("001", 1))
UNFINISHED = UNFINISHED[: UNFINISHED.rindex(b"label_0") // 512 * 512 + 1024]  # no end marker

# Each shard has three samples, or says so: what becomes of the middle one, and of the last.
SHARDS = {
    "as it should be": (GOOD, None, None),
    "a name that leads out": (between(*sample("../../../../out", 1)), None, None),
    "an absolute name": (between(*sample("/tmp/out", 1)), None, None),
    "a symbolic link": (link(tarfile.SYMTYPE, "/etc/hostname"), "jpg_0.jpg is a link", None),
    "a symbolic link to another sample's image": (link(tarfile.SYMTYPE, "000.jpg_0.jpg"), "jpg_0.jpg is a link", None),
    "a hard link to another sample's image": (link(tarfile.LNKTYPE, "000.jpg_0.jpg"), "jpg_0.jpg is a link", None),
    "a device": (link(tarfile.CHRTYPE, ""), "jpg_0.jpg is a link", None),
    "a pipe": (link(tarfile.FIFOTYPE, ""), "jpg_0.jpg is a link", None),
    "a folder": (link(tarfile.DIRTYPE, ""), "jpg_0.jpg is a link", None),
    "a member twice": (between(*sample("001", 1), *sample("001", 3)[1:2]), "jpg_0.jpg is there twice", None),
    "an image in two formats": (
        between(*sample("001", 1), entry("001.jpg_0.png", samples.rows()[3]["jpg_1"])),
        "jpg_0.png is there twice",
        None,
    ),
    "a key again, further on": (archive(*FIRST, *sample("001", 1), *sample("000", 2)), None, "the same key"),
    "members of two samples, interleaved": (
        archive(*FIRST, *sample("001", 1)[:2], *LAST, *sample("001", 1)[2:]),
        "has only",
        "more than the 3 samples",
    ),
    "a caption that is not UTF-8": (
        between(*sample("001", 1, original_prompt=entry("001.original_prompt.txt", b"\xff\xfe"))),
        "invalid start byte",
        None,
    ),
    "a key that is not UTF-8, and of several lines": (between(*sample("\udcff\n\x1b[2J", 1)), None, None),
    "a label of 100,000 digits": (
        between(*sample("001", 1, label_0=entry("001.label_0.txt", b"9" * 100_000))),
        "label_0.txt is '999",
        None,
    ),
    "cut in the middle": (GOOD[:CUT_AT], "ends or is cut off", "ends or is cut off"),
    "nothing at all": (b"", "ends or is cut off", "ends or is cut off"),
    "an end marker alone": (bytes(10240), "ends or is cut off", "ends or is cut off"),
    "gzip": (gzip.compress(GOOD), "ends or is cut off", "is compressed (gzip)"),
    "a sparse file of 1 GB": (UNFINISHED + header(b"S", 1 << 30) + GOOD, None, "ends or is cut off"),
    "one sample too few": (archive(*FIRST, *LAST), None, "ends or is cut off"),
    "one sample too many": (
        archive(*FIRST, *sample("001", 1), *LAST, *sample("003", 3)),
        None,
        "more than the 3 samples",
    ),
}


def hostile_headers() -> dict[str, bytes]:
    """Shards that go bad after two samples: what follows would cost Python's tarfile memory, time or a crash."""
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    digits = b"9" * 16_000
    return {
        "negative size": UNFINISHED + header(b"0", -1024) + GOOD,
        "a name of 8 TB": UNFINISHED + header(b"L", 1 << 43) + GOOD,
        "records of 8 TB": UNFINISHED + header(b"x", 1 << 43) + GOOD,
        "a member of 512 GB": UNFINISHED + header(b"0", 1 << 39) + GOOD,
        "a member of 2**80 bytes": UNFINISHED + header(b"0", 1 << 80) + GOOD,
        "3,000 names for one member": UNFINISHED + (header(b"L", 4) + b"abc\0".ljust(512, b"\0")) * 3000 + GOOD,
        "records of digits": UNFINISHED + header(b"x", len(digits)) + digits.ljust(16_384, b"\0") + GOOD,
        "sparse records": UNFINISHED + header(b"x", len(records)) + records.ljust(512, b"\0") + GOOD,
        "one name for all": UNFINISHED + header(b"g", 19) + b"19 path=001.jpg_0.j\n".ljust(512, b"\0") + GOOD,
    }


@pytest.mark.parametrize("source", ["file", "pipe"])
@pytest.mark.parametrize("name", [*SHARDS, *hostile_headers()])
def test_shards_by_kind_of_damage(tmp_path, name, source):
    """Good neighbours are read; nothing is written anywhere, and no link is followed."""
    content, middle, last = SHARDS.get(name) or (hostile_headers()[name], "ends or is cut off", "ends or is cut off")
    path = tmp_path / "deep" / "er" / "train-00000.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    url = str(path) if source == "file" else f"pipe:cat {path}"
    found: dict[int, object] = dict.fromkeys(range(3), "ends or is cut off")
    try:
        for ordinal, members in read_samples(url, 0, 3, 3):
            try:
                found[ordinal] = to_pair(members)
            except BadPair as problem:
                found[ordinal] = f"{problem.kind}: {problem}"
                assert str(problem).isprintable() and len(str(problem)) < 400
    except ValueError as error:
        found[2] = str(error)
    row = samples.rows()[0]
    if name not in ("nothing at all", "an end marker alone", "gzip"):
        assert (found[0].winner, found[0].loser, found[0].prompt) == (row["jpg_0"], row["jpg_1"], row["caption"])
    for outcome, expected in zip((found[1], found[2]), (middle, last)):
        if expected is None:
            assert outcome is not None and not isinstance(outcome, str), outcome
        else:
            assert isinstance(outcome, str) and expected in outcome, outcome
    pairs = [pair for pair in found.values() if not isinstance(pair, str)]
    known = {row[image] for row in samples.rows() for image in ("jpg_0", "jpg_1")}
    for pair in pairs:  # no image of another sample, and none from outside
        assert {pair.winner, pair.loser} <= known
        number = [row["caption"] for row in samples.rows()].index(pair.prompt)
        assert {pair.winner, pair.loser} == {samples.rows()[number][image] for image in ("jpg_0", "jpg_1")}
    assert sorted(tmp_path.rglob("*")) == before and not list(Path("/tmp").glob("out.*"))


def test_a_symbolic_link_to_a_private_image_is_not_followed(tmp_path, canary):
    path = tmp_path / "train-00000.tar"
    path.write_bytes(link(tarfile.SYMTYPE, str(canary)))
    members = dict(read_samples(str(path), 0, 3, 3))[1]
    assert canary.read_bytes() not in members.values()
    with pytest.raises(BadPair, match="jpg_0.jpg is a link"):
        to_pair(members)


def test_keys_and_shards_in_messages_are_printable(tmp_path, caplog):
    path = tmp_path / "train-00000.tar"
    path.write_bytes(between(*sample("\udcff\n\x1b[2J", 1, label_0=entry("\udcff\n\x1b[2J.label_0.txt", b"?"))))
    source = ShardData(find_shards([str(path)]), 0, PairTransform(square(32)), 0, 1, 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in islice(source.training_batches(1, 0, None, 0, 1), 2):
            pass
    (line,) = [record.getMessage() for record in caplog.records if "bad label" in record.getMessage()]
    assert line.isprintable() and r"\udcff\n\x1b[2J: bad label" in line


@pytest.mark.parametrize("samples_said", ["-1", "2.5", "true", "null", '"7"', "1e9", str(10**12), "[]"])
def test_a_manifest_with_other_than_a_number_of_samples_is_refused(tmp_path, samples_said):
    (tmp_path / "train-00000.tar").write_bytes(GOOD)
    rest = f'"bytes": 1, "sha256": "{"0" * 64}", "ties": [], "sizes": []'
    manifest = f'{{"version": 1, "shards": [{{"name": "train-00000.tar", "samples": {samples_said}, {rest}}}]}}'
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="manifest.json is not a manifest of shards.*convert the data again"):
        find_shards([str(tmp_path)])


# Several processes


def test_processes_stay_in_step_when_one_of_them_meets_bad_samples(tiny_sdxl, tmp_path):
    """All bad samples are the first process's: other pairs take their places, and it has as many batches as the other."""
    signal.alarm(0)  # processes of their own, with a time limit of their own
    data = face_rows(24, ties=0)
    folder = write_shards(tmp_path / "shards", data, per_shard=6)
    shards = find_shards([str(folder)])
    buckets = [np.zeros(6, dtype=int)] * 4
    batches = PairReader(shards, shards.pairs(), buckets, 0, 1024).batches(in_one_bucket(24, 2), 0, 2)
    for arrival in islice(chain.from_iterable(batches), 5):
        row = data[6 * arrival.shard + arrival.ordinal]
        row["jpg_0"] = row["jpg_0"][:500]
    write_shards(folder, data, per_shard=6)
    flags = {"dataset_path": folder, "max_bad_samples": 0.5, "checkpointing_steps": 4, "max_train_steps": 4}
    result = two_processes(arguments(tiny_sdxl, None, tmp_path / "lora", **flags), script=SHARDS_SCRIPT)
    assert_ok(result)
    assert result.output.count("undecodable image") == 5
    for rank in (0, 1):
        position = json.loads((tmp_path / "lora" / "checkpoint-4" / f"data_position_{rank}.json").read_text())
        assert position["pairs_seen"] == 16
