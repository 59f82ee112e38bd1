"""Pairs per second from shards to tensors, on one core: this project's reader, the earlier public pipeline, and the limit.

    python benchmarks/loader.py

The earlier script's pipeline is rebuilt from webdataset's own parts: decode to PIL, tensors at full resolution, resize,
crop, normalize. The limit is decoding the two JPEGs in full and nothing else, which a reader may pass that needs them
smaller. All three read the same shard of photograph-like JPEGs in turn, in one process; medians of the process's own time,
so that other work on the machine counts less. The bar: from 1024 to 512 pixels, 6 times the earlier pipeline.
"""

import argparse
import io
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image


PAIRS = 24


def photograph(size: int, rng: np.random.Generator) -> bytes:
    """A JPEG with detail at every scale, about 0.3 bytes a pixel, as photographs have."""
    pixels = np.zeros((size, size, 3), dtype=np.float32)
    for scale in (4, 16, 64, 256, 512, size):
        noise = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / scale**0.35
    pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shard(path: Path, size: int) -> float:
    """Writes a shard and its manifest as the converter does; returns the mean size of its images in kB."""
    rng, total = np.random.default_rng(0), 0
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(PAIRS):
            images = [photograph(size, rng) for _ in range(2)]
            total += sum(map(len, images))
            members = {"original_prompt.txt": b"a photograph", "jpg_0.jpg": images[0], "jpg_1.jpg": images[1]}
            for name, content in (members | {"label_0.txt": b"1", "label_1.txt": b"0"}).items():
                entry = tarfile.TarInfo(f"{i:06d}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    from orpo.store.folder import write_manifest
    from orpo.store.index import Manifest, scan

    write_manifest(str(path.parent), Manifest([scan(str(path), str(path.parent / "cache"))]))
    return total / PAIRS / 2 / 1e3


def ours(shard: Path, resolution: int):
    from orpo.pairs.pair import PairTransform
    from orpo.runtime.shapes import square
    from orpo.store.index import find_shards
    from orpo.store.stream import ShardData

    data = ShardData(find_shards([str(shard)]), 0, PairTransform(square(resolution)), 0, 1, 0.0)
    for _ in islice(data.training_batches(1, 0, None, 0, 1), PAIRS):
        pass


def earlier(shard: Path, resolution: int):
    def to_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    dataset = wds.WebDataset(str(shard), shardshuffle=False).decode("pil")
    dataset = dataset.rename(jpg_0="jpg_0.jpg", jpg_1="jpg_1.jpg", label="label_0.txt", caption="original_prompt.txt")
    for sample in dataset:
        first, second = sample["jpg_0"].convert("RGB"), sample["jpg_1"].convert("RGB")
        pair = torch.cat([to_tensor(first), to_tensor(second.resize(first.size))])
        if min(pair.shape[1:]) != resolution:
            scale = resolution / min(pair.shape[1:])
            size = [round(side * scale) for side in pair.shape[1:]]
            pair = F.interpolate(pair[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        top, left = ((side - resolution) // 2 for side in pair.shape[1:])
        pair = pair[:, top : top + resolution, left : left + resolution]
        pair.sub(0.5).div(0.5)


def limit(shard: Path, resolution: int):
    for sample in wds.WebDataset(str(shard), shardshuffle=False):
        for name in ("jpg_0.jpg", "jpg_1.jpg"):
            Image.open(io.BytesIO(sample[name])).load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="Timed runs of each.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for size, resolution in ((1024, 1024), (768, 1024), (1024, 512)):
            shard = Path(folder) / f"{size}-{resolution}" / "train-00000.tar"
            kilobytes = write_shard(shard, size)
            seconds = {function: [] for function in (ours, earlier, limit)}
            for i in range(args.runs + 1):
                for function, times in seconds.items():
                    start = time.process_time()
                    function(shard, resolution)
                    times += [time.process_time() - start] if i else []
            rates = {function: PAIRS / median(times) for function, times in seconds.items()}
            print(
                f"{size} to {resolution} pixels, {kilobytes:.0f} kB an image: {rates[ours]:.1f} pairs/s, earlier pipeline"
                f" {rates[earlier]:.1f}, decoding alone {rates[limit]:.1f}: {rates[ours] / rates[earlier]:.2f} times the"
                f" earlier, {rates[ours] / rates[limit]:.0%} of the limit"
            )


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "diffusion_orpo"))
    main()
