#!/usr/bin/env python
"""Damaged images, shards, parquet files, manifests and samples against the code that reads them.

    python tests/faults/fuzz.py --inputs 100000 --seed 0
    python tests/faults/fuzz.py --show tar 1234      # one input again, in the open

Inputs are mutations of real samples, each made from its number alone. Those of a target run in one process, which must neither
crash nor hang nor run out of memory. On top come tables of rows by hypothesis. Exit status 1 if a promise was broken.
"""

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "examples" / "diffusion_orpo"), str(REPOSITORY / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARES = {"image": 0.35, "tar": 0.35, "parquet": 0.1, "manifest": 0.08, "members": 0.12}
HANG_SECONDS = 120
MEMORY_BYTES = 3 << 30  # that an input may take, on top of what the libraries have


def damaged(target: str, seed: int, number: int) -> bytes:
    """Input `number` of a target."""
    from faults.mutations import mutate
    from faults.targets import seeds

    rng = random.Random(f"{seed} {target} {number}")
    originals = list(seeds()[target].values())
    return mutate(rng.choice(originals), rng.choice(originals), target, rng)


def run_target(target: str, seed: int, count: int) -> tuple[Counter, list[str]]:
    """Runs inputs in a child process; returns them by outcome, and what went wrong, each with its number."""
    report = tempfile.NamedTemporaryFile("r", suffix=".jsonl")
    child = os.fork()
    if child == 0:
        try:
            run_child(target, seed, count, report.name)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in report]
    problems = [f"{target} {number}: {line['problem']}" for number, line in enumerate(lines) if "problem" in line]
    if len(lines) < count:
        problems.append(f"{target} {len(lines)}: the process ended, wait status {status}")
    return Counter(line["outcome"] for line in lines), problems


def run_child(target: str, seed: int, count: int, report: str) -> None:
    logging.getLogger("orpo.store.tar").setLevel(logging.ERROR)  # a broken shard is logged for every input
    from faults.targets import TARGETS

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of image libraries
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(report, "a") as file:
        for number in range(count):
            signal.alarm(HANG_SECONDS)
            try:
                line = {"outcome": TARGETS[target](damaged(target, seed, number))}
            except BaseException as error:
                line = {"outcome": "wrong", "problem": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps(line), file=file, flush=True)


def campaign(inputs: int, seed: int) -> dict[str, tuple[Counter, list[str]]]:
    """Runs all targets; returns outcomes and problems by target."""
    found = {}
    for target, share in SHARES.items():
        found[target] = run_target(target, seed, round(inputs * share))
        print(f"{target}: {found[target][0].total()} inputs, {dict(found[target][0])}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="Over all targets together.")
    parser.add_argument("--seed", type=int, default=0, help="Decides all inputs.")
    parser.add_argument("--show", nargs=2, metavar=("TARGET", "NUMBER"), help="Run one input again, in the open.")
    args = parser.parse_args()
    from faults.row_properties import check_rows
    from faults.targets import TARGETS

    if args.show:
        print(TARGETS[args.show[0]](damaged(args.show[0], args.seed, int(args.show[1]))))
        return
    problems = [problem for _, listed in campaign(args.inputs, args.seed).values() for problem in listed]
    print(f"{check_rows(args.inputs // 200, args.seed)} tables by hypothesis")
    print(f"{len(problems)} broke a promise.", *problems[:50], sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
