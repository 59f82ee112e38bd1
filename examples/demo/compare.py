"""Base against LoRA on the same prompts and seeds: win rate of the smiles, wrong kinds, and a picture of both.

python compare.py --base base --lora lora --output grid.png
"""

import argparse
import json
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np
from PIL.Image import Image
from scipy.stats import binomtest

from faces import ALL_KINDS, Reading, read_face
from sampling import generate, load_pipeline


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


SEEDS_PER_PROMPT = 10


@dataclass
class Comparison:
    """What `compare` measured.

    Attributes:
        images: per model.
        win_rate: share of images in which the LoRA smiles more than the base; a tie counts half.
        win_rate_low, win_rate_high: its 95 % Wilson interval.
        smile_base, smile_lora: mean smile, from -1 to 1.
        wrong_base, wrong_lora: images whose colour, kind or background are not the prompt's, or that show no face.
        new_wrong: images that the LoRA gets wrong where the base did not.
    """

    images: int
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    smile_base: float
    smile_lora: float
    wrong_base: int
    wrong_lora: int
    new_wrong: int


def compare(
    base: str, lora: str, output: str, seeds_per_prompt: int = SEEDS_PER_PROMPT, steps: int = 20
) -> Comparison:
    """Draws with both models, measures, and writes the before/after picture.

    Args:
        base: folder of the base pipeline.
        lora: folder of `pytorch_lora_weights.safetensors`.
        output: the picture's file.
        seeds_per_prompt: images of each prompt.
        steps: of the sampler.
    """
    kinds = [kind for kind in ALL_KINDS for _ in range(seeds_per_prompt)]
    prompts, seeds = [kind.prompt for kind in kinds], list(range(len(kinds)))
    pipeline = load_pipeline(base)
    before = generate(pipeline, prompts, seeds, desc="Base model", steps=steps)
    pipeline.load_lora_weights(lora)
    after = generate(pipeline, prompts, seeds, desc="With the LoRA", steps=steps)
    save_grid(before[::seeds_per_prompt], after[::seeds_per_prompt], output)

    readings = [(read_face(a), read_face(b)) for a, b in zip(before, after)]
    smiles = np.array([(a.smile, b.smile) for a, b in readings])
    wrong = np.array([(is_wrong(a, kind), is_wrong(b, kind)) for (a, b), kind in zip(readings, kinds)])
    wins = (smiles[:, 1] > smiles[:, 0]).sum() + 0.5 * (smiles[:, 1] == smiles[:, 0]).sum()
    interval = binomtest(int(wins), len(kinds)).proportion_ci(method="wilson")
    return Comparison(
        images=len(kinds),
        win_rate=float(wins / len(kinds)),
        win_rate_low=float(interval.low),
        win_rate_high=float(interval.high),
        smile_base=float(smiles[:, 0].mean()),
        smile_lora=float(smiles[:, 1].mean()),
        wrong_base=int(wrong[:, 0].sum()),
        wrong_lora=int(wrong[:, 1].sum()),
        new_wrong=int((wrong[:, 1] & ~wrong[:, 0]).sum()),
    )


def is_wrong(reading: Reading, asked) -> bool:
    """Whether an image shows another kind than asked for, or an outline that is none."""
    return reading.kind != asked or reading.fit < 0.8


def save_grid(before: list[Image], after: list[Image], output: str, columns: int = 12) -> None:
    """Writes the images of both models: rows of the base's images, each above a row of the LoRA's."""
    rows = len(before) // columns
    figure, axes = plt.subplots(2 * rows, columns, figsize=(columns, 2.15 * rows), dpi=100)
    for i in range(rows * columns):
        row, column = 2 * (i // columns), i % columns
        for offset, images, label in ((0, before, "base"), (1, after, "ORPO")):
            axis = axes[row + offset, column]
            axis.imshow(images[i])
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(label)
    figure.subplots_adjust(0.03, 0.01, 0.995, 0.99, wspace=0.04, hspace=0.04)
    figure.savefig(output)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="base", help="Folder of the base model.")
    parser.add_argument("--lora", required=True, help="Folder of the trained LoRA.")
    parser.add_argument("--output", default="grid.png", help="File for the before/after picture.")
    args = parser.parse_args()
    print(json.dumps(asdict(compare(args.base, args.lora, args.output)), indent=2))


if __name__ == "__main__":
    main()
