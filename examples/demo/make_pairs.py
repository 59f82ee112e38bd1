"""Makes the demo's preference set: pairs drawn by the base model, labelled by who smiles more, with noise.

    python make_pairs.py --base base --output_dir pairs

Columns are those of `kashif/pickascore`. Of two faces for one prompt, an annotator prefers the first with probability
sigmoid((smile_0 - smile_1) / TEMPERATURE), as Bradley and Terry model it, and calls it a tie where the smiles differ
by less than TIE. Smiles run from -1 to 1.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from PIL.Image import Image
from scipy.special import expit

from faces import ALL_KINDS, read_face
from sampling import draw, load_pipeline


TEMPERATURE = 0.2
TIE = 0.03
FEATURES = Features(jpg_0=Value("binary"), jpg_1=Value("binary"), label_0=Value("float64"), caption=Value("string"))


def make_pairs(base: str, output_dir: Path, num_pairs: int, seed: int = 0) -> dict[str, float]:
    """Draws, labels and writes the pairs.

    Args:
        base: folder of the pipeline.
        output_dir: gets `train.parquet`.
        num_pairs: rows, ties included.
        seed: of images and labels.

    Returns:
        `ties`, and `noise`: the share of labels, ties aside, that go against the smile.
    """
    rng = np.random.default_rng(seed)
    kinds = [ALL_KINDS[i % len(ALL_KINDS)] for i in range(num_pairs)]
    prompts = [kind.prompt for kind in kinds for _ in range(2)]
    seeds = [1_000_000 * (seed + 1) + i for i in range(2 * num_pairs)]
    images = draw(load_pipeline(base), prompts, seeds, desc="Drawing pairs")
    smiles = np.array([read_face(image).smile for image in images]).reshape(num_pairs, 2)
    difference = smiles[:, 0] - smiles[:, 1]
    labels = (rng.random(num_pairs) < expit(difference / TEMPERATURE)).astype(float)
    labels[np.abs(difference) < TIE] = 0.5
    rows = [
        {
            "jpg_0": to_jpeg(images[2 * i]),
            "jpg_1": to_jpeg(images[2 * i + 1]),
            "label_0": labels[i],
            "caption": kind.prompt,
        }
        for i, kind in enumerate(kinds)
    ]
    output_dir.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(output_dir / "train.parquet")
    decided = labels != 0.5
    against = (labels[decided] == 1) != (difference[decided] > 0)
    return {"ties": int((~decided).sum()), "noise": float(against.mean())}


def to_jpeg(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="base", help="Folder of the base model.")
    parser.add_argument("--output_dir", type=Path, default="pairs", help="Folder for train.parquet.")
    parser.add_argument("--num_pairs", type=int, default=1152, help="Pairs to draw.")
    args = parser.parse_args()
    print(make_pairs(args.base, args.output_dir, args.num_pairs))


if __name__ == "__main__":
    main()
