"""Shared by all benchmarks here: the examples on the import path, a clock that waits for the device, stored rows."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RESULTS = HERE / "results"
sys.path[:0] = [
    str(REPOSITORY),
    str(REPOSITORY / "examples" / "diffusion_orpo"),
    str(REPOSITORY / "examples" / "demo"),
]
# Before torch, datasets and tokenizers are imported. The models and the data are made here: nothing is downloaded.
for _name, _value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_name, _value)

import numpy as np  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# On a shared machine, CPU time is more reliable than wall time. For development only: it does not include waiting.
CPU_TIME = DEVICE.type == "cpu" and os.environ.get("CPU_TIME") == "1"


def clock() -> float:
    """Seconds, once the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if CPU_TIME else time.perf_counter()


def seconds(function: Callable, *args) -> float:
    """Duration of a call."""
    started = clock()
    function(*args)
    return clock() - started


def paired_ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Ratio of two things that were timed in turn.

    Returns:
        The median of the pairs' ratios, its 95 % interval by bootstrap, and the smallest and the largest ratio.
    """
    ratios = np.array(numerators) / np.array(denominators)
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    summary = {"median": np.median(ratios), "low": low, "high": high, "min": ratios.min(), "max": ratios.max()}
    return {name: round(float(value), 4) for name, value in summary.items()} | {"rounds": len(ratios)}


def milliseconds(times: list[float]) -> float:
    return round(1e3 * median(times), 2)


def machine() -> dict:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "device": gpu or model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if CPU_TIME else "wall",
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder for the result, as JSON.")


def store(output_dir: Path, name: str, result: dict) -> None:
    """Writes a benchmark's result, with the machine, to `<name>.json`."""
    output_dir.mkdir(exist_ok=True)
    (output_dir / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def stored(name: str) -> dict:
    """What `store` wrote; empty where nothing is."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def print_table(header: list[str], rows: list[list]) -> None:
    """Prints a Markdown table with aligned columns."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines), flush=True)
