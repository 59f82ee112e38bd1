#!/usr/bin/env python
"""Damaged images, shards, parquet files, manifests and samples against the code that reads them.

    python tests/faults/fuzz.py --inputs 100000 --seed 0

Two thirds of the inputs are mutations of real samples, each made from its number alone; a third is found by a
coverage-guided fuzzer (`pip install atheris`; without it, mutations take its share). Every input runs in a process
that may crash, hang or run out of memory without ending the campaign. On top come tables of rows by hypothesis. Exit
status 1 if any promise was broken; the inputs that did it are kept.
"""

import argparse
import json
import logging
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "examples" / "diffusion_orpo"), str(REPOSITORY / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARES = {"image": 0.35, "tar": 0.35, "parquet": 0.1, "manifest": 0.08, "members": 0.12}
GUIDED = {"image": 0.4, "tar": 0.4, "manifest": 0.1, "members": 0.1}
GUIDED_SHARE = 1 / 3

HANG_SECONDS = 20
MEMORY_BYTES = 3 << 30  # that an input may take, on top of what the libraries have

INSTRUMENTED = ["images", "schema", "pairs", "shards", "tar_samples", "manifest", "tarfile", "PIL", "webdataset"]


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
    logging.getLogger("orpo.store.listing").setLevel(logging.ERROR)  # a broken shard is logged for every input
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


def run_guided(target: str, seed: int, count: int, keep: Path) -> tuple[Counter, list[str]]:
    """Lets atheris look for inputs that reach new code, in a process of its own."""
    command = [sys.executable, __file__, f"--guided={target}", f"--inputs={count}", f"--seed={seed}", f"--keep={keep}"]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode == 0:
        return Counter({"ran": count}), []
    return Counter({"wrong": 1}), [f"{target}, guided: {result.stderr[-1500:]}"]


def guided_main(target: str, seed: int, count: int, keep: Path) -> None:
    """The process of `run_guided`: never returns."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import PIL.Image

        PIL.Image.init()  # the formats' plugins, too
        from faults.targets import TARGETS, seeds
    corpus = keep / f"corpus-{target}"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, data in seeds()[target].items():
        (corpus / name.replace(" ", "-")).write_bytes(data)
    flags = [f"-runs={count}", f"-seed={seed + 1}", f"-timeout={HANG_SECONDS}", "-rss_limit_mb=6000", "-max_len=20000"]
    flags += [f"-artifact_prefix={keep}/{target}-"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda data: TARGETS[target](data) and None)
    atheris.Fuzz()


def campaign(inputs: int, seed: int, guided: bool, keep: Path) -> dict[str, tuple[Counter, list[str]]]:
    """Runs all targets; returns outcomes and problems by target."""
    found = {}
    for target, share in SHARES.items():
        count = round(inputs * share * (1 - GUIDED_SHARE if guided else 1))
        found[target] = run_mutations(target, seed, count)
        print(f"{target}: {count} mutated inputs, {dict(found[target][0])}", flush=True)
    for target, share in GUIDED.items() if guided else ():
        count = round(inputs * share * GUIDED_SHARE)
        found[f"{target}, guided"] = run_guided(target, seed, count, keep)
        print(f"{target}: {count} guided inputs, {dict(found[f'{target}, guided'][0])}", flush=True)
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
    logging.getLogger("orpo.store.listing").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="Over all targets together.")
    parser.add_argument("--seed", type=int, default=0, help="Decides all mutated inputs, and guides the guided ones.")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-output"), help="Folder for inputs that broke something."
    )
    parser.add_argument("--guided", choices=list(GUIDED), help="Run only the coverage-guided fuzzer, on this target.")
    parser.add_argument(
        "--show", nargs=2, metavar=("TARGET", "NUMBER"), help="Run one mutated input again, in the open."
    )
    args = parser.parse_args()
    if args.guided:
        guided_main(args.guided, args.seed, args.inputs, args.keep)
    if args.show:
        from faults.targets import TARGETS

        print(TARGETS[args.show[0]](damaged(args.show[0], args.seed, int(args.show[1]))))
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: mutations take the share of the coverage-guided fuzzer.")
    start = time.monotonic()
    found = campaign(args.inputs, args.seed, "atheris" in sys.modules, args.keep)
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
