"""Pairs per second against the earlier public training script, on the same model and data with the same flags.

    python benchmarks/performance/earlier.py --earlier_script path/to/train_diffusion_orpo_sdxl_lora.py

The script is not part of this project: its path is yours to give. It runs as it is, in this process, in a thread of its own; it and
`training.train` wait for one another, so that their steps take turns. Where torchvision is not installed, `transforms_stub.py`
stands for the few image transforms that the script takes from there. Its mirroring is switched off (--no_hflip), as ours is by default.
"""

import argparse
import importlib.util
import sys
import threading
from pathlib import Path

import torch

import transforms_stub
from interleaved import WARM_UP, Interleaved, Run, add_model_arguments, command_line, start
from measuring import clock, milliseconds, paired_ratio, print_table, store


class Finished(Exception):
    """Ends the earlier script when enough of its steps were timed."""


class EarlierScript:
    """The script in a thread, that makes a step each time it is told to.

    Args:
        path: of the script.
        flags: its command line.
    """

    def __init__(self, path: Path, flags: list[str]) -> None:
        transforms_stub.install()
        spec = importlib.util.spec_from_file_location("earlier_script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.times: list[float] = []
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.finished, self.error, paused = False, None, self._paused

        class Accelerator(module.Accelerator):
            def log(self, *args, **kwargs):  # the last thing that the script does in a step
                super().log(*args, **kwargs)
                paused()

        module.Accelerator = Accelerator
        self.thread = threading.Thread(target=self._run, args=(module, flags), daemon=True)

    def _run(self, module, flags: list[str]) -> None:
        torch.set_num_threads(torch.get_num_threads())
        self.go.acquire()
        self.started = clock()
        try:
            module.main(module.parse_args(flags))
        except Finished:
            pass
        except BaseException as error:
            self.error = error
        self.done.release()

    def _paused(self) -> None:
        self.times.append(clock() - self.started)
        self.done.release()
        self.go.acquire()
        if self.finished:
            raise Finished
        self.started = clock()

    def step(self) -> None:
        """Lets it make a step, the first time with all that comes before it."""
        if not self.thread.is_alive() and not self.times:
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise RuntimeError("The earlier script failed.") from self.error

    def finish(self) -> None:
        self.finished = True
        self.go.release()
        self.thread.join()


SHARED_FLAGS = (
    "pretrained_model_name_or_path",
    "dataset_name",
    "cache_dir",
    "resolution",
    "train_batch_size",
    "learning_rate",
    "seed",
    "report_to",
    "mixed_precision",
    "max_train_steps",
)


def earlier_flags(run: Run) -> list[str]:
    flags = {name: getattr(run.args, name) for name in SHARED_FLAGS}
    more = {
        "output_dir": f"{run.args.output_dir}-earlier",
        "dataset_split_name": "train",
        "no_hflip": True,
        "lr_warmup_steps": 0,
    }
    return command_line(flags | more | {"max_train_steps": 10**6, "checkpointing_steps": 10**6})


def measure(args) -> dict:
    with start(args) as run:
        script = EarlierScript(args.earlier_script, earlier_flags(run))
        sources = {"cached": run.cached, "not cached": run.data}
        last = list(sources)[-1]
        source = Interleaved(sources, lambda name, batch: script.step() if name == last else None)
        times = run.train(source, args.rounds)
        script.finish()
    times["earlier script"] = script.times[WARM_UP:]
    return {
        "pairs": args.train_batch_size,
        "resolution": args.resolution,
        "milliseconds": {name: milliseconds(values) for name, values in times.items()},
        **{f"pairs/s, {name}": paired_ratio(times["earlier script"], times[name]) for name in sources},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--earlier_script", type=Path, help="Path to the earlier script. Without one, nothing is measured."
    )
    add_model_arguments(parser, rounds=10)
    args = parser.parse_args()
    if args.earlier_script is None:
        print("No --earlier_script was given: the comparison with it is left out.")
        return
    if not args.earlier_script.is_file():
        sys.exit(f"--earlier_script={args.earlier_script} is not a file.")
    result = measure(args)
    print_table(["step", "ms"], [[name, value] for name, value in result["milliseconds"].items()])
    names = [name for name in result if name.startswith("pairs/s")]
    print_table(
        ["over the earlier script", "median", "95 % interval"],
        [[name, result[name]["median"], f"{result[name]['low']} to {result[name]['high']}"] for name in names],
    )
    store("earlier", result)


if __name__ == "__main__":
    main()
