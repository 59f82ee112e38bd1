"""The time of ORPO's step against the same step with a forward pass of the reference model, as Diffusion-DPO needs it.

    python benchmarks/performance/reference_forward.py

Both by the step of `benchmarks/alignment/experiment.py`, on the same cached batch in turn. The reference is the U-Net with its LoRA
switched off, which costs no memory for a second model: the cheapest reference there is.
"""

import argparse
import sys
from collections import defaultdict

from orpo.training.optimizer import make_optimizer

from interleaved import WARM_UP, add_model_arguments, start
from measuring import REPOSITORY, milliseconds, paired_ratio, print_table, seconds, store


sys.path.append(str(REPOSITORY / "benchmarks" / "alignment"))
from experiment import train_step  # noqa: E402
from objectives import OBJECTIVES  # noqa: E402


def measure(args) -> dict:
    times: dict[str, list[float]] = defaultdict(list)
    with start(args) as run:
        run.model.denoiser.train()
        optimizer = make_optimizer(run.args, run.parameters)
        batch = next(iter(run.cached.training_batches(args.train_batch_size, 0, None, 0, 1)))
        for _ in range(args.rounds + WARM_UP):
            for name in ("orpo", "dpo"):
                objective = OBJECTIVES[name]
                with run.accelerator.autocast():
                    step = (run.model, batch, objective, objective.strengths[0], optimizer, run.parameters)
                    times[name].append(seconds(train_step, *step))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    return {
        "pairs": args.train_batch_size,
        "resolution": args.resolution,
        "milliseconds": {name: milliseconds(values) for name, values in times.items()},
        "orpo over dpo": paired_ratio(times["orpo"], times["dpo"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=10)
    result = measure(parser.parse_args())
    print_table(["step", "ms"], [[name, value] for name, value in result["milliseconds"].items()])
    ratio = result["orpo over dpo"]
    print(f"ORPO takes {ratio['median']} of the time ({ratio['low']} to {ratio['high']})")
    store("reference_forward", result)


if __name__ == "__main__":
    main()
