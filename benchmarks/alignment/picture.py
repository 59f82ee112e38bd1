"""Draws what the numbers mean: the same test prompts and seeds, by the base and by each objective at its best setting.

    python benchmarks/alignment/picture.py --work work

Trains each objective once more and writes `docs/results/images-<world>.png`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

import paths
from comparison import Comparison
from experiment import TEST_SEEDS, Training
from objectives import OBJECTIVES
from plan import SEEDS, WORLDS
from run_all import prepare


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


COLUMNS = 12


def draw_world(name: str, work: Path) -> None:
    world, pairs, _ = prepare(name, work)
    c = Comparison(name)
    tested = [world.classes["test"][position] for position in np.unique(c.prompts[c.tested])]
    classes = world.cycle(tested, COLUMNS)
    rows = {}
    for objective in OBJECTIVES:
        if choice := c.choices[objective]:
            experiment = replace(choice.experiment, split="test", seed=SEEDS[0])
            training = Training(experiment, world, pairs, work / "states", from_start=True)
            for _ in training.train_to(choice.step):
                pass
            model = training.model
            model.denoiser.eval()
            rows[OBJECTIVES[objective].label] = world.draw(model.pipeline, classes, TEST_SEEDS["test"], objective)
    if not rows:
        raise SystemExit(f"Nothing is chosen on {name} yet: run run_all.py first.")
    model.denoiser.disable_adapters()
    rows = {"base": world.draw(model.pipeline, classes, TEST_SEEDS["test"], "base"), **rows}

    figure, axes = plt.subplots(len(rows), 1, figsize=(COLUMNS * 0.62, len(rows) * 0.66), layout="constrained")
    for axis, (label, images) in zip(axes, rows.items()):
        axis.imshow(np.concatenate(list(images.permute(0, 2, 3, 1).numpy()), axis=1))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    target = paths.REPOSITORY / "docs" / "results" / f"images-{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="Folder of the pairs.")
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    args = parser.parse_args()
    for name in args.worlds:
        draw_world(name, args.work)


if __name__ == "__main__":
    main()
