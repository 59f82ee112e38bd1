"""Peak memory of a training run with and without cached latents.

    python benchmarks/performance/peak_memory.py

The training script runs as a process of its own, and the kernel says how large its resident set became. The cache is made by
a run before. What real SDXL's modules take is counted by `flops.py`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from interleaved import add_model_arguments, command_line, flags
from measuring import DEVICE, REPOSITORY, print_table, store


SCRIPT = REPOSITORY / "examples" / "diffusion_orpo" / "train_diffusion_orpo_sdxl_lora.py"


def peak_mib(line: list[str]) -> float:
    """Runs the training script; returns its peak resident set."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), *line], stderr=subprocess.PIPE, env=environment())
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"The training script failed:\n{errors[-3000:]}")
    return round(usage.ru_maxrss / 1024, 1)


def environment() -> dict[str, str]:
    more = {} if DEVICE.type == "cuda" else {"ACCELERATE_USE_CPU": "1"}
    return os.environ | {"PYTHONPATH": str(REPOSITORY)} | more


def measure(args) -> dict:
    with tempfile.TemporaryDirectory() as work:
        lines = {
            name: command_line(
                flags(args, work, max_train_steps=args.rounds, output_dir=str(Path(work, name)), **more)
            )
            for name, more in (
                ("not cached", {}),
                ("makes the cache", {"cache_latents": True}),
                ("cached", {"cache_latents": True}),
            )
        }
        peaks = {name: peak_mib(line) for name, line in lines.items()}
    return {
        "pairs": args.train_batch_size,
        "resolution": args.resolution,
        "imports": round(import_mib(), 1),
        "mib": peaks,
    }


def import_mib() -> float:
    """What a process takes that imports the script and does nothing."""
    code = "import resource, train_diffusion_orpo_sdxl_lora; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    path = os.pathsep.join((str(REPOSITORY), str(SCRIPT.parent)))
    output = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return int(output.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=3)
    result = measure(parser.parse_args())
    rows = [["imports alone", result["imports"]], *result["mib"].items()]
    print_table(["run", "peak resident set, MiB"], rows)
    store("peak_memory", result)


if __name__ == "__main__":
    main()
