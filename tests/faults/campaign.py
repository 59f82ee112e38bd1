"""Does damage to training jobs, so often, and demands that nothing is lost.

    python tests/faults/campaign.py kills=120 elastic=40 signals=40 disks=12 companions=1 --seed 0

Everything runs in one process, as importing takes longest. See README.md for what each campaign does and found.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import companions
import disk
import kill
import preempt
from jobs import Configuration, make_inputs


EVERY = [Configuration(source, processes) for source in ("map", "shards") for processes in (1, 2)]
CAMPAIGNS = {
    "kills": (kill.campaign, EVERY),
    "elastic": (partial(kill.campaign, elastic=True), [Configuration("shards", 1)]),
    "signals": (preempt.campaign, EVERY),
    "disks": (disk.campaign, [Configuration("map", 2), Configuration("shards", 1)]),
    "companions": (companions.campaign, [Configuration("map", 2)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", metavar="CAMPAIGN=COUNT", help=f"Of {', '.join(CAMPAIGNS)}.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", action="store_true", help="Each campaign on its first configuration alone.")
    args = parser.parse_args()
    counts = {name: int(count) for name, _, count in (text.partition("=") for text in args.counts)}
    if "disks" in counts:
        disk.become_root()
    for name, count in counts.items():
        campaign, configurations = CAMPAIGNS[name]
        rng, total = random.Random(args.seed), Counter()
        used = configurations[: 1 if args.first else None]
        for i, configuration in enumerate(used):
            share = count // len(used) + (i < count % len(used))
            if share:
                with tempfile.TemporaryDirectory() as folder:
                    make_inputs(Path(folder) / "inputs")
                    found = campaign(configuration, share, rng, Path(folder))
                print(json.dumps({"fault": name, "configuration": str(configuration)} | found), flush=True)
                total += found
        print(json.dumps({"survived": {name: total.total()}}), flush=True)


if __name__ == "__main__":
    main()
