"""Trains a tiny SDXL on real images that others made: the 1,797 handwritten digits that scikit-learn ships.

    python benchmarks/alignment/digits_base.py --output_dir benchmarks/alignment/bases/digits-base

Source of the digits: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

import paths  # noqa: F401
from tiny_sdxl import build_tiny_sdxl
from train_base import encode_images, train_unet, train_vae


NAMES = "zero one two three four five six seven eight nine".split()
PROMPTS = tuple(f"a handwritten {name}" for name in NAMES)


def digit_images() -> tuple[torch.Tensor, np.ndarray]:
    """The digits, dark on white, at the size that the tiny SDXL generates: uint8 (1797, 3, 64, 64), and their classes."""
    digits = load_digits()
    ink = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    ink = interpolate(ink, size=64, mode="bicubic").clamp(0, 1)
    return (255 * (1 - ink)).round().byte().repeat(1, 3, 1, 1), digits.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="digits-base", help="Folder for the pipeline.")
    parser.add_argument("--vae_steps", type=int, default=600)
    parser.add_argument("--unet_steps", type=int, default=3000)
    args = parser.parse_args()

    pipeline = build_tiny_sdxl(["a", "handwritten", *NAMES])
    images, classes = digit_images()
    train_vae(pipeline.vae, images, args.vae_steps)
    train_unet(pipeline, encode_images(pipeline.vae, images), [PROMPTS[c] for c in classes], args.unet_steps)
    pipeline.to(torch.float16).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
