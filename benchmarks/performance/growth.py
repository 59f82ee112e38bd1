"""How the time of a step grows with batch, resolution and processes, and the time to start and load with the data set.

    python benchmarks/performance/growth.py

Batch and resolution: one run of `training.train` in which sizes take turns, on random latents. Processes: the same run under
torchrun, with one process and with two (gloo on CPU, NCCL on CUDA), a core each. Data set: synthetic rows and manifests from a
thousand to a million pairs, each size in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter


import measuring  # noqa: F401, isort: skip

import numpy as np
import torch
from orpo.pairs.dataset import PairKeys
from orpo.pairs.encoding_cache import Encodings
from orpo.pairs.order import in_one_bucket
from orpo.pairs.pair import PairTransform
from orpo.runtime.shapes import square
from orpo.store.listing import find_shards
from orpo.store.manifest import MANIFEST, VERSION
from orpo.store.order import EpochOrder, Share, count_lanes

from interleaved import Interleaved, add_model_arguments, start
from measuring import DEVICE, HERE, milliseconds, print_table, store


BATCHES = (1, 2, 4)
SIDES = (64, 128, 192, 256)
SMALL = 64  # pixels, where the batch grows
DATA_SIZES = (1_000, 10_000, 100_000, 1_000_000)
PER_SHARD = 1000


@dataclass(frozen=True)
class RandomLatents:
    """Endless cached batches of random content."""

    pairs: int
    side: int
    text_width: int
    pooled_width: int

    def training_batches(self, *args):
        for i in count():
            yield {
                "moments": torch.randn(2 * self.pairs, 8, self.side // 8, self.side // 8),
                "embeds": {
                    "prompt_embeds": torch.randn(self.pairs, 77, self.text_width),
                    "pooled_prompt_embeds": torch.randn(self.pairs, self.pooled_width),
                },
                "original_sizes": torch.full((2 * self.pairs, 2), self.side),
                "crop_top_lefts": torch.zeros(2 * self.pairs, 2, dtype=torch.long),
                "seeds": list(range(i * self.pairs, (i + 1) * self.pairs)),
            }


def random_source(run, pairs: int, side: int) -> RandomLatents:
    pipeline = run.model.pipeline
    pooled = pipeline.text_encoder_2.config.projection_dim
    return RandomLatents(pairs, side, pipeline.unet.config.cross_attention_dim, pooled)


def step_times(args) -> dict:
    """Milliseconds of a step by batch and by resolution."""
    with start(args) as run:
        sources = {f"batch {pairs}": random_source(run, pairs, SMALL) for pairs in BATCHES}
        sources |= {f"side {side}": random_source(run, 1, side) for side in SIDES}
        times = run.train(Interleaved(sources), args.rounds)
    return {
        "batch": [[pairs, milliseconds(times[f"batch {pairs}"])] for pairs in BATCHES],
        "resolution": [[side, milliseconds(times[f"side {side}"])] for side in SIDES],
    }


def worker(args) -> None:
    """What torchrun starts: a run of its own data, whose rank 0 writes its times."""
    with start(args, output_dir=args.worker + ".run", cache_dir=args.worker + f".cache-{os.environ['RANK']}") as run:
        times = run.train(Interleaved({"step": random_source(run, 1, 128)}), args.rounds)
        if run.accelerator.is_main_process:
            Path(args.worker).write_text(json.dumps(times["step"]))


def process_times(args) -> list[list[float]]:
    """Milliseconds of a step by number of processes, each with a batch of its own."""
    rows = []
    available = torch.cuda.device_count() if DEVICE.type == "cuda" else os.cpu_count()
    for processes in (1, 2):
        if processes > available:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder, "times.json"))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command += [str(HERE / "growth.py"), f"--worker={output}", f"--rounds={2 * args.rounds}"]
            more = {} if DEVICE.type == "cuda" else {"ACCELERATE_USE_CPU": "1"}
            path = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
            result = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path} | more, capture_output=True, text=True
            )
            if result.returncode != 0:
                raise RuntimeError(f"{processes} processes failed:\n{result.stdout}\n{result.stderr}"[-4000:])
            rows.append([processes, milliseconds(json.loads(Path(output).read_text()))])
    return rows


class SyntheticRows:
    """As many rows as one likes, with an image and a prompt for each twenty of them, as Pick-a-Pic's proportions are."""

    def __init__(self, pairs: int) -> None:
        images = np.arange(pairs, dtype=np.uint64)
        self.digests = np.zeros((pairs, 2), dtype="V16")
        view = self.digests.view(np.uint64).reshape(pairs, 2, 2)
        view[:, 0, 0], view[:, 1, 0] = images, images // 2
        self.buckets = np.zeros(pairs, dtype=int)
        self.captions = [f"prompt {i // 17}" for i in range(pairs)]

    def prompts(self) -> list[str]:
        return self.captions


def data_row(pairs: int) -> dict[str, float]:
    """Of one size of data: seconds to start, milliseconds a batch, MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = perf_counter()
    order = iter(PairKeys(in_one_bucket(pairs, 4), seed=0, num_pairs=pairs, rank=0, world_size=1))
    next(order)
    order_s = perf_counter() - started
    batches = []
    for _ in range(200):
        started = perf_counter()
        next(order)
        batches.append(perf_counter() - started)

    rows = SyntheticRows(pairs)
    image_rows = {
        (digest, 0): row for row, digest in enumerate(dict.fromkeys(d for pair in rows.digests.tolist() for d in pair))
    }
    prompt_rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(rows.prompts()))}
    started = perf_counter()
    Encodings({}, image_rows, None, prompt_rows).samples(rows, PairTransform(square(64)), 0)
    index_s = perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), pairs // PER_SHARD)
        started = perf_counter()
        shards = find_shards([folder])
        manifest_s = perf_counter() - started
        started = perf_counter()
        order = EpochOrder(shards.pairs(), seed=0, epoch=0, buffer_size=1024)
        Share(pairs, count_lanes(len(shards.urls)), 4, rank=0, world_size=2, start=0).slots(0)
        for lane in range(0, order.lanes, 2):
            order.runs(lane), order.turns(lane)
        plan_s = perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "pairs": pairs,
        "order, ms": round(1e3 * order_s, 2),
        "batch of 4, ms": round(1e3 * median(batches), 4),
        "index of the cache, ms": round(1e3 * index_s, 2),
        "manifest, ms": round(1e3 * manifest_s, 2),
        "plan of an epoch, ms": round(1e3 * plan_s, 3),
        "memory, MiB": round((peak - before) / 1024, 1),
    }


def write_manifest(folder: Path, num_shards: int) -> None:
    """A manifest of shards of a thousand pairs, and empty files in their places."""
    shards = [
        {
            "name": f"train-{i:05d}.tar",
            "split": "train",
            "samples": PER_SHARD,
            "bytes": 0,
            "sha256": f"{i:064x}",
            "labels": {"jpg_0": 500, "jpg_1": 500, "tie": 0},
            "source": [{"file": "train.parquet", "first_row": i * PER_SHARD, "rows": PER_SHARD}],
            "bad_rows": [],
        }
        for i in range(num_shards)
    ]
    for shard in shards:
        (folder / shard["name"]).touch()
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "shards": shards, "plans": {}}))


def data_sizes() -> list[dict[str, float]]:
    rows = []
    for pairs in DATA_SIZES:
        with get_context("fork").Pool(1) as pool:
            rows.append(pool.apply(data_row, (pairs,)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--data_only", action="store_true", help="Measure data-set sizes alone, and print them.")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    sizes = data_sizes()
    print_table(list(sizes[0]), [list(row.values()) for row in sizes])
    if args.data_only:
        return
    result = step_times(args) | {"processes": process_times(args), "data": sizes}
    for name in ("batch", "resolution", "processes"):
        print_table([name, "ms a step"], result[name])
    store("growth", result)


if __name__ == "__main__":
    main()
