"""Makes a base that often generates the wrong thing: the demo's model, trained further on captions of which two in five are wrong.

    python benchmarks/alignment/noisy_base.py --output_dir benchmarks/alignment/bases/noisy-base

Captions collected from the web are often wrong, and a model trained on them follows its prompt only so often. What its
pairs then prefer is the image that shows what the prompt says.
"""

import argparse

import numpy as np
import torch

import paths  # noqa: F401
from diffusers import StableDiffusionXLPipeline
from faces import ALL_KINDS
from train_base import draw_images, encode_images, train_unet


WRONG_CAPTIONS = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="noisy-base", help="Folder for the pipeline.")
    parser.add_argument("--num_images", type=int, default=6000, help="Faces to draw.")
    parser.add_argument("--unet_steps", type=int, default=1200)
    args = parser.parse_args()

    base = paths.REPOSITORY / "examples" / "demo" / "base"
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    images, prompts = draw_images(args.num_images, seed=7)
    rng = np.random.default_rng(7)
    prompts = [rng.choice(ALL_KINDS).prompt if rng.random() < WRONG_CAPTIONS else prompt for prompt in prompts]
    train_unet(pipeline, encode_images(pipeline.vae, images), prompts, args.unet_steps)
    pipeline.to(torch.float16).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
