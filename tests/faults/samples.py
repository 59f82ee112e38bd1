"""Real samples for the fuzzer to damage: images of every kind, shards of every tar format, parquet files, manifests."""

import io
import json
import tarfile
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, side: int = 16) -> Image.Image:
    """Smooth enough to be compressed, and no two alike."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side + 3), Image.Resampling.BICUBIC)


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def images() -> dict[str, bytes]:
    """One of every kind that is taken, by name."""
    image, second = picture(0), picture(1)
    upright = Image.Exif()
    upright[0x0112] = 6
    half = image.copy()
    half.putalpha(second.convert("L"))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [second]}
    return {
        "jpeg": save(image, "JPEG"),
        "jpeg progressive": save(image, "JPEG", progressive=True),
        "jpeg grey": save(image.convert("L"), "JPEG"),
        "jpeg cmyk": save(image.convert("CMYK"), "JPEG"),
        "jpeg exif": save(image, "JPEG", exif=upright),
        "mpo": save(image, "MPO", **frames),
        "png": save(image, "PNG"),
        "png alpha": save(half, "PNG"),
        "png palette": save(image.quantize(8), "PNG", transparency=3),
        "png 16 bit": save(deep, "PNG"),
        "png 1 bit": save(image.convert("1"), "PNG"),
        "apng": save(image, "PNG", **frames),
        "gif": save(image.quantize(8), "GIF", transparency=3),
        "gif animated": save(image.quantize(8), "GIF", save_all=True, append_images=[second.quantize(8)]),
        "webp": save(image, "WEBP"),
        "webp lossless": save(half, "WEBP", lossless=True),
        "webp animated": save(image, "WEBP", **frames),
        "bmp": save(image, "BMP"),
        "bmp palette": save(image.quantize(8), "BMP"),
        "avif": save(image, "AVIF", speed=10),
    }


@cache
def rows(count: int = 4) -> tuple[dict, ...]:
    """Preference rows that share no byte string; labels 1 and 0 in turn, and short captions."""
    return tuple(
        {
            "jpg_0": save(picture(2 * i), "JPEG"),
            "jpg_1": save(picture(2 * i + 1), "PNG"),
            "label_0": float(i % 2 == 0),
            "caption": f"caption {i} of a käse",
        }
        for i in range(10, 10 + count)
    )


def shard(tar_format: int = tarfile.USTAR_FORMAT, folder: str = "", only: tuple[dict, ...] | None = None) -> bytes:
    """The rows as a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for i, row in enumerate(only or rows()):
            members = {
                "original_prompt.txt": row["caption"].encode(),
                "jpg_0.jpg": row["jpg_0"],
                "jpg_1.png": row["jpg_1"],
                "label_0.txt": str(row["label_0"]).encode(),
                "label_1.txt": str(1 - row["label_0"]).encode(),
            }
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{folder}{i:04d}.{extension}")
                entry.size = len(content)
                if tar_format == tarfile.PAX_FORMAT:
                    entry.pax_headers = {"mtime": "1700000000.5"}
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@cache
def shards() -> dict[str, bytes]:
    return {
        "ustar": shard(),
        "pax": shard(tarfile.PAX_FORMAT, "käse/" * 3),
        "gnu": shard(tarfile.GNU_FORMAT, "a-long-folder/" * 9),
    }


@cache
def parquets() -> dict[str, bytes]:
    """The rows as parquet files, all with page checksums."""
    table = pa.Table.from_pylist(list(rows()))
    wrap = [pa.array([{"bytes": row[name], "path": None} for row in rows()]) for name in ("jpg_0", "jpg_1")]
    as_datasets = table.set_column(0, "jpg_0", wrap[0]).set_column(1, "jpg_1", wrap[1])
    files = {}
    for name, options in {
        "snappy": {},
        "plain": {"compression": "none", "use_dictionary": False, "row_group_size": 2},
        "zstd v2": {"compression": "zstd", "data_page_version": "2.0"},
    }.items():
        file = io.BytesIO()
        pq.write_table(as_datasets if name == "snappy" else table, file, write_page_checksum=True, **options)
        files[name] = file.getvalue()
    return files


@cache
def manifests() -> dict[str, bytes]:
    entry = {
        "name": "train-00000.tar",
        "split": "train",
        "samples": 4,
        "bytes": 10240,
        "sha256": "0" * 64,
        "ties": [],
        "sizes": ["4 * 64 48 64 48"],
        "labels": {"jpg_0": 2, "jpg_1": 2, "tie": 0},
        "source": [{"file": "train.parquet", "first_row": 0, "rows": 5}],
        "bad_rows": [{"file": "train.parquet", "row": 4, "reason": "it is bad"}],
    }
    return {"manifest": json.dumps({"version": 1, "shards": [entry], "plans": {"train": "abc"}}).encode()}
