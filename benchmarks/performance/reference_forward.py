"""The time of ORPO's step against the same step with a forward pass of the reference model, as Diffusion-DPO needs it.

    python benchmarks/performance/reference_forward.py

Both by the step of `benchmarks/alignment/experiment.py`, on the same cached batch in turn. The reference is the U-Net with its LoRA
switched off, which costs no memory for a second model: the cheapest reference there is.
"""

import argparse
import sys
from collections import defaultdict
from functools import partial


import measuring  # noqa: F401, isort: skip

from orpo.training.optimizer import make_optimizer

from interleaved import WARM_UP, add_model_arguments, start
from measuring import REPOSITORY, milliseconds, paired_ratio, print_table, seconds, store


sys.path.append(str(REPOSITORY / "benchmarks" / "alignment"))
from experiment import reference_errors, train_step  # noqa: E402
from objectives import OBJECTIVES  # noqa: E402
from settings import Experiment  # noqa: E402


def measure(args) -> dict:
    times: dict[str, list[float]] = defaultdict(list)
    setting = Experiment("", "", strength=0.4, learning_rate=0.0, steps=1, seed=0)
    with start(args) as run:
        run.model.denoiser.train()
        optimizer = make_optimizer(run.args, run.parameters)
        batch = next(iter(run.cached.training_batches(args.train_batch_size, 0, None, 0, 1)))

        def step(name: str) -> None:
            reference = reference_errors(run.model, batch) if OBJECTIVES[name].has_reference else None
            loss = partial(OBJECTIVES[name].loss, setting=setting)
            train_step(run.model, batch, loss, optimizer, reference=reference)

        for _ in range(args.rounds + WARM_UP):
            for name in ("even", "dpo"):
                with run.accelerator.autocast():
                    times[name].append(seconds(step, name))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    return {
        "pairs": args.train_batch_size,
        "resolution": args.resolution,
        "milliseconds": {name: milliseconds(values) for name, values in times.items()},
        "orpo over dpo": paired_ratio(times["even"], times["dpo"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=10)
    args = parser.parse_args()
    result = measure(args)
    print_table(["step", "ms"], [[name, value] for name, value in result["milliseconds"].items()])
    ratio = result["orpo over dpo"]
    print(f"ORPO takes {ratio['median']} of the time ({ratio['low']} to {ratio['high']})")
    store(args.output_dir, "reference_forward", result)


if __name__ == "__main__":
    main()
