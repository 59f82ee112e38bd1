"""The gain from passing encoded images through: the converter against one that decodes and encodes every image.

    python benchmarks/convert.py

Both read the same parquet files of photograph-like JPEGs, 1024 pixels a side, in as many processes as there are cores,
in turn; medians are compared. Then the converter's peak memory, over all of its processes, on growing input.
Input and output lie in memory where the system has a folder for that, or the disk would be what is measured.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tqdm.auto import tqdm


SCRIPT = Path(__file__).parent.parent / "examples" / "diffusion_orpo" / "convert_to_webdataset.py"
sys.path.insert(0, str(SCRIPT.parent))

from orpo.store.converting import ray_session  # noqa: E402

from convert_to_webdataset import main as convert  # noqa: E402


SIDE, IMAGES = 1024, 24
ROWS_PER_FILE = ROWS_PER_GROUP = 100
CORES = len(os.sched_getaffinity(0))


def photograph(seed: int) -> bytes:
    """A JPEG of noise with as much power in each octave, and a camera's grain."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), 128.0)
    for side in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += 0.3 * (np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) - 128.0)
    pixels += rng.normal(0, 5, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_files(folder: Path, files: int) -> int:
    """Writes parquet files of 100 rows each; returns their bytes. Images repeat, as no one looks at them twice."""
    images = [photograph(seed) for seed in tqdm(range(IMAGES), desc="Drawing")]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in tqdm(range(files), desc="Writing parquet"):
        picks = rng.integers(IMAGES, size=(2, ROWS_PER_FILE))
        columns = {f"jpg_{side}": [images[i] for i in picks[side]] for side in range(2)}
        columns |= {
            "label_0": [float(i % 2) for i in range(ROWS_PER_FILE)],
            "caption": ["a photograph"] * ROWS_PER_FILE,
        }
        file = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=ROWS_PER_GROUP, use_dictionary=False)
    return sum(file.stat().st_size for file in folder.iterdir())


def convert_by_decoding(file: Path, shard: Path) -> None:
    """The straightforward converter, for one parquet file: Pillow decodes both images, webdataset encodes them."""
    with webdataset.TarWriter(str(shard)) as tar:
        batches = pq.ParquetFile(file).iter_batches(8)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
            images = {f"{name}.jpg": Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1")}
            labels = {"label_0.txt": str(row["label_0"]), "label_1.txt": str(1 - row["label_0"])}
            key = f"{file.stem}-{number:08d}"
            tar.write({"__key__": key, "original_prompt.txt": row["caption"], **images, **labels})


def compare_speed(source: Path, work: Path, runs: int) -> None:
    """Times both converters alternately, with Ray and the process pool already running; then the converter as a command."""
    files = sorted(source.iterdir())
    pairs = ROWS_PER_FILE * len(files)
    rates = {"decoding": [], "pass-through": [], "pass-through with start-up": []}

    def timed(name: str, function) -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").mkdir()
        start = time.perf_counter()
        function()
        if name in rates:
            rates[name].append(pairs / (time.perf_counter() - start))

    flags = [f"--dataset_path={source}", f"--output_dir={work / 'out'}", "--shard_size_mb=200"]
    shards = [work / "out" / f"{file.stem}.tar" for file in files]
    quiet = open(os.devnull, "w")
    with ray_session(None), ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        for run in tqdm(range(runs + 1), desc="Timing"):
            with redirect_stdout(quiet), redirect_stderr(quiet):
                timed("pass-through" if run else "warm-up", lambda: convert(flags))
                if run == 0:
                    list(pool.map(photograph, range(CORES)))
                else:
                    timed("decoding", lambda: list(pool.map(convert_by_decoding, files, shards)))
    for _ in range(runs):
        command = [sys.executable, str(SCRIPT), *flags]
        timed("pass-through with start-up", lambda: subprocess.run(command, check=True, capture_output=True))
    print(f"{pairs} pairs, {CORES} cores, medians of {runs} runs")
    for name, values in rates.items():
        ratio = median(values) / median(rates["decoding"])
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name}: {median(values):.1f} pairs/s ({spread}), {ratio:.1f} times the straightforward converter")


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns the peaks, in MB, of all its processes' memory: resident, and with shared pages once."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resident = proportional = 0.0
    while process.poll() is None:
        rss = pss = 0
        try:
            for member in [process, *process.children(recursive=True)]:
                try:
                    memory = member.memory_full_info()
                    rss, pss = rss + memory.rss, pss + memory.pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
        except psutil.NoSuchProcess:
            pass
        resident, proportional = max(resident, rss / 1e6), max(proportional, pss / 1e6)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}: run it alone to see why.")
    return resident, proportional


def measure_memory(source: Path, work: Path, share: float) -> None:
    """Converts the first files of the input, and prints size and peaks."""
    files = sorted(source.iterdir())
    part = work / "part"
    for folder in (part, work / "out"):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir()
    for file in files[: round(share * len(files))]:
        os.link(file, part / file.name)
    size = sum(file.stat().st_size for file in part.iterdir())
    command = [f"--dataset_path={part}", f"--output_dir={work / 'out'}", "--shard_size_mb=50"]
    resident, proportional = peak_memory([sys.executable, str(SCRIPT), *command])
    print(
        f"{size / 1e9:.2f} GB: peak {resident:.0f} MB resident, {proportional:.0f} MB with shared pages counted once"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="Timed runs of each converter.")
    parser.add_argument("--timed_files", type=int, default=24, help="Files of 100 pairs that speed is measured on.")
    parser.add_argument("--files", type=int, default=16, help="Files of 100 pairs that memory is measured on.")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser.add_argument("--work_dir", default=memory, help="Folder for input and output: 4 GB. Default: /dev/shm.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        work = Path(folder)
        timed_bytes = write_files(work / "timed", args.timed_files)
        print(f"images of {timed_bytes / args.timed_files / ROWS_PER_FILE / 2e3:.0f} kB")
        compare_speed(work / "timed", work, args.runs)
        write_files(work / "large", args.files)
        for share in (0.25, 0.5, 1.0):
            measure_memory(work / "large", work, share)


if __name__ == "__main__":
    main()
