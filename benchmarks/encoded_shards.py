"""Pairs per second from encoded shards to batches, on one core, against decoding the images at the same resolution.

    python benchmarks/encoded_shards.py

Samples are those of SDXL at 1024 pixels in float16: moments 8 x 128 x 128 of both images, prompt embeddings 77 x 2048 and
1280, in the layout that the converter writes. The decoded loader is this project's own, on photograph-like JPEGs of 1024
pixels. Both read their shard in turn, in one process; medians of the process's own time. The bar: 10 times the pairs a
second of the decoded loader.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from loader import PAIRS, write_shard
from safetensors.torch import save


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "diffusion_orpo"))

from orpo.pairs.pair import PairTransform  # noqa: E402
from orpo.runtime.shapes import square  # noqa: E402
from orpo.store.listing import find_shards  # noqa: E402
from orpo.store.manifest import Encoding  # noqa: E402
from orpo.store.stream import ShardData  # noqa: E402


def write_encoded_shard(path: Path) -> float:
    """Writes the shard and its manifest; returns the size of a sample in kB."""
    half = {"dtype": torch.float16, "generator": torch.Generator().manual_seed(0)}
    tensors = {
        "moments_0": torch.randn(8, 128, 128, **half),
        "moments_1": torch.randn(8, 128, 128, **half),
        "original_sizes": torch.full((2, 2), 1024),
        "crop_top_lefts": torch.zeros(2, 2, dtype=torch.int64),
        "embeds.prompt_embeds": torch.randn(77, 2048, **half),
        "embeds.pooled_prompt_embeds": torch.randn(1280, **half),
    }
    members = {"original_prompt.txt": b"a photograph", "label_0.txt": b"1", "label_1.txt": b"0"}
    members["encoded.safetensors"] = save(tensors)
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(PAIRS):
            for name, content in members.items():
                entry = tarfile.TarInfo(f"{i:06d}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    layout = {name: (str(value.dtype).removeprefix("torch."), value.shape) for name, value in tensors.items()}
    manifest = {
        "version": 1,
        "shards": [{"name": path.name, "split": "train", "samples": PAIRS}],
        "encodings": {"train": asdict(Encoding({}, {}, layout))},
    }
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return len(members["encoded.safetensors"]) / 1e3


def read(shard: Path, batch_size: int) -> None:
    data = ShardData(find_shards([str(shard)]), 0, PairTransform(square(1024)), 0, 1, 0.0)
    for _ in islice(data.training_batches(batch_size, 0, None, 0, 1), PAIRS // batch_size):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="Timed runs of each.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pairs.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = {name: Path(folder) / name / "train-00000.tar" for name in ("decoded", "encoded")}
        kilobytes = {
            "decoded": 2 * write_shard(shards["decoded"], 1024),
            "encoded": write_encoded_shard(shards["encoded"]),
        }
        seconds = {name: [] for name in shards}
        for i in range(args.runs + 1):
            for name, shard in shards.items():
                start = time.process_time()
                read(shard, args.batch_size)
                seconds[name] += [time.process_time() - start] if i else []
        rates = {name: PAIRS / median(times) for name, times in seconds.items()}
        for name, rate in rates.items():
            print(f"{name}: {kilobytes[name]:.0f} kB a pair, {rate:.1f} pairs/s")
        print(f"encoded shards: {rates['encoded'] / rates['decoded']:.1f} times the decoded loader")


if __name__ == "__main__":
    main()
