#!/usr/bin/env python
"""Damaged images, shards, parquet files, manifests and samples against the code that reads them.

    python tests/faults/fuzz.py --inputs 100000 --seed 0

Inputs are mutations of real samples, each made from its number alone. Every input runs in a process that may crash, hang
or run out of memory without ending the campaign. On top come tables of rows by hypothesis. Exit status 1 if any promise
was broken; the inputs that did it are kept.
"""

import argparse
import json
import logging
import mmap
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "examples" / "diffusion_orpo"), str(REPOSITORY / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARES = {"image": 0.35, "tar": 0.35, "parquet": 0.1, "manifest": 0.08, "members": 0.12}
HANG_SECONDS = 120
MEMORY_BYTES = 3 << 30  # that an input may take, on top of what the libraries have


def damaged(target: str, seed: int, number: int) -> bytes:
    """Input `number` of a campaign."""
    from faults.mutations import mutate
    from faults.targets import seeds

    rng = random.Random(f"{seed} {target} {number}")
    originals = list(seeds()[target].values())
    return mutate(rng.choice(originals), rng.choice(originals), target, rng)


def run_mutations(target: str, seed: int, count: int) -> tuple[Counter, list[str]]:
    """Runs inputs in a child process, and goes on with a new one where it crashes or hangs.

    Returns:
        Inputs by outcome, and what went wrong, each with its number.
    """
    from faults.targets import seeds

    seeds()
    progress = mmap.mmap(-1, 8)
    report = tempfile.NamedTemporaryFile("r", suffix=".jsonl")
    problems, first = [], 0
    while first < count:
        child = os.fork()
        if child == 0:
            run_child(target, seed, first, count, progress, report.name)
        status, first = watch(child, progress, first)
        if first < count:
            problems.append(f"{target} {first}: {status}")
            first += 1
    outcomes = Counter()
    for line in map(json.loads, report):
        outcomes[line["outcome"]] += 1
        if "problem" in line:
            problems.append(f"{target} {line['number']}: {line['problem']}")
    outcomes["crashed or hung"] = count - outcomes.total()
    return +outcomes, problems


def run_child(target: str, seed: int, first: int, count: int, progress: mmap.mmap, report: str) -> None:
    """The child: runs the inputs from `first` on, notes each outcome, and ends."""
    logging.getLogger("orpo.store.tar").setLevel(logging.ERROR)  # a broken shard is logged for every input
    from faults.targets import TARGETS

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of image libraries
    try:
        with open(report, "a") as file:
            for number in range(first, count):
                progress[:] = number.to_bytes(8, "big")
                data = damaged(target, seed, number)
                line = {"number": number}
                try:
                    line["outcome"] = TARGETS[target](data)
                except BaseException as error:
                    line |= {"outcome": "wrong", "problem": f"{type(error).__name__}: {error}"[:500]}
                print(json.dumps(line), file=file, flush=True)
        progress[:] = count.to_bytes(8, "big")
    finally:
        os._exit(0)


def watch(child: int, progress: mmap.mmap, first: int) -> tuple[str, int]:
    """Waits for the child, and ends it where an input takes too long; returns how it ended, and at which input."""
    number, since = first, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = int.from_bytes(progress[:], "big")
        if ended:
            return f"the process died of signal {os.WTERMSIG(status)}", max(now, first)
        if now != number:
            number, since = now, time.monotonic()
        if time.monotonic() - since > HANG_SECONDS:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"no answer in {HANG_SECONDS} seconds", number
        time.sleep(0.02)


def campaign(inputs: int, seed: int) -> dict[str, tuple[Counter, list[str]]]:
    """Runs all targets; returns outcomes and problems by target."""
    found = {}
    for target, share in SHARES.items():
        found[target] = run_mutations(target, seed, round(inputs * share))
        print(f"{target}: {found[target][0].total()} inputs, {dict(found[target][0])}", flush=True)
    return found


def run_rows(seed: int, count: int) -> tuple[Counter, list[str]]:
    """Lets hypothesis make up tables with one damaged row."""
    from faults.row_properties import check_rows

    try:
        return Counter({"ran": check_rows(count, seed)}), []
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return Counter({"wrong": 1}), [f"rows, by hypothesis: {type(error).__name__}: {error} {notes}"[:1500]]


def main() -> None:
    logging.getLogger("orpo.store.tar").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="Over all targets together.")
    parser.add_argument("--seed", type=int, default=0, help="Decides all inputs.")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-output"), help="Folder for inputs that broke something."
    )
    parser.add_argument(
        "--show", nargs=2, metavar=("TARGET", "NUMBER"), help="Run one mutated input again, in the open."
    )
    args = parser.parse_args()
    if args.show:
        from faults.targets import TARGETS

        print(TARGETS[args.show[0]](damaged(args.show[0], args.seed, int(args.show[1]))))
        return
    start = time.monotonic()
    found = campaign(args.inputs, args.seed)
    found["rows"] = run_rows(args.seed, args.inputs // 200)
    print(f"rows: {args.inputs // 200} tables by hypothesis, {dict(found['rows'][0])}", flush=True)
    problems = [problem for _, listed in found.values() for problem in listed]
    for problem in problems:
        target, number = problem.split(": ")[0].rsplit(" ", 1)
        if number.isdigit():
            args.keep.mkdir(exist_ok=True)
            (args.keep / f"{target}-{number}").write_bytes(damaged(target, args.seed, int(number)))
    total = sum((counts for counts, _ in found.values()), Counter())
    print(
        f"{total.total()} inputs in {time.monotonic() - start:.0f} s: {dict(total)}. {len(problems)} broke a promise."
    )
    print(*problems[:50], sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
