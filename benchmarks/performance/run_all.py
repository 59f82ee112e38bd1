"""Runs every benchmark of this folder, one after the other: about ten minutes on an otherwise idle machine with two cores.

    python benchmarks/performance/run_all.py --earlier_script path/to/train_diffusion_orpo_sdxl_lora.py
    python benchmarks/performance/report.py

Flags that it does not know go to the benchmarks that train, such as --rounds=3 for a short run.
"""

import argparse
import subprocess
import sys
import time

from measuring import HERE


COUNTED = ("flops", "scaled_sdxl")
TRAINED = ("step", "profile_step", "reference_forward", "peak_memory", "growth")


def run(name: str, *flags: str) -> None:
    print(f"\n## {name}", flush=True)
    started = time.perf_counter()
    command = [sys.executable, str(HERE / f"{name}.py"), *flags]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"{result.stderr[-4000:]}\n{name} failed.")
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--earlier_script", help="Path to the earlier public script; without it, that comparison is left out."
    )
    args, flags = parser.parse_known_args()
    for name in COUNTED:
        run(name)
    for name in TRAINED:
        run(name, *flags)
    run("earlier", *([f"--earlier_script={args.earlier_script}"] if args.earlier_script else []), *flags)


if __name__ == "__main__":
    main()
