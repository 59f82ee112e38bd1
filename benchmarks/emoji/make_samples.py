"""Shows the base's images beside the drawings, and prints how well they are read: seeds and subjects in order, none picked.

python benchmarks/emoji/make_samples.py --output samples.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from drawings import ARTISTS, SIZE, load_emoji
from instruments import load_instruments
from make_base import encode, load_base
from preferences import SEEDS, generate, measure, subjects_of


ROWS, SUBJECTS = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="Of the picture.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    emoji, pipeline = load_emoji(), load_base()
    instruments = load_instruments(emoji)
    subjects = subjects_of(emoji, "tuning")[:SUBJECTS]
    images = generate(pipeline, emoji, subjects, SEEDS["tuning"])
    tiles = torch.cat([images[:, None], emoji.images[subjects]], dim=1)  # (subjects, 1 + artists, 3, SIZE, SIZE)
    grid = tiles.view(ROWS, -1, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(ROWS * SIZE, -1, 3)
    Image.fromarray(grid.numpy()).save(args.output)

    with torch.no_grad():
        drawings = emoji.images[subjects].flatten(0, 1)
        again = pipeline.vae.decode(encode(pipeline.vae, drawings) / pipeline.vae.config.scaling_factor).sample
    error = (again.clamp(-1, 1) + 1) / 2 - drawings / 255
    read = measure("adherence", emoji, instruments, images, subjects)
    artists = instruments["judge_artist"].log_probs(images).argmax(dim=1).bincount(minlength=len(ARTISTS))
    print(
        f"reconstruction: {-10 * error.square().mean().log10():.1f} dB, mean absolute error {error.abs().mean():.4f}"
    )
    print(f"subject among the judge's first five: {np.mean(read['adherence']):.3f} of {SUBJECTS}")
    print(f"artists: {dict(zip(ARTISTS, artists.tolist()))}")


if __name__ == "__main__":
    main()
