"""Runs the emoji benchmark as `PROTOCOL.md` says: every run of `protocol.py` that has no stored result. Stop it at any time.

    python benchmarks/emoji/run_all.py --work work
    python benchmarks/emoji/verdicts.py

Each run is a line of `results/<task>.jsonl`. `work` keeps the pairs.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from diffusers.utils.logging import disable_progress_bar
from protocol import TASKS, next_run
from runs import Benchmark, append, load_results, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="Folder of the pairs.")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    benchmark = Benchmark(args.work)
    stored = {task: load_results(task) for task in args.tasks}
    tuning = {task: benchmark.base(task, "tuning", bases) for task, (_, bases) in stored.items()}
    while run := next_run({k: v for runs, _ in stored.values() for k, v in runs.items()}, tuning, args.tasks):
        started, (runs, bases) = time.perf_counter(), stored[run.task]
        benchmark.base(run.task, run.split, bases)
        pipeline = train(benchmark.emoji, benchmark.pairs(run.task, run.draw), run.setting, run.seed, run.steps)
        runs[run] = benchmark.measure(run.task, pipeline, run.split)
        append(run.task, {"run": asdict(run), "measured": runs[run]})
        means = {name: round(float(np.mean(value)), 3) for name, value in runs[run].items()}
        print(time.strftime("%H:%M:%S"), run, means, f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
