"""Pairs a second with mixed aspect-ratio buckets against squares of the same area, and how far the order is from a permutation.

    python benchmarks/performance/buckets.py

In one run, steps on squares and on each bucket take turns: forward, loss, backward and optimizer on the scaled SDXL, from
encodings. Buckets have up to a tenth less area than the square, so times are compared as they are and per pixel; what a step
costs whatever its area counts against the buckets in the second. The order is that of 10,000 pairs
in shapes of photographs.
"""

import tempfile
from itertools import islice


import measuring  # noqa: F401, isort: skip

import numpy as np
import torch
from orpo.config import ModelConfig
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.order import BatchOrder, permutation
from orpo.runtime.shapes import name_of, shapes_of_area
from orpo.training.step import compute_losses

from measuring import DEVICE, paired_ratio, print_table, seconds, store
from scaled_sdxl import RESOLUTION, save


PAIRS = 1  # of a batch
WARM_UP = 1
ROUNDS = 2  # over all buckets
# Width to height of what cameras and models make, and how often.
PHOTOGRAPHS = {4 / 3: 0.3, 3 / 2: 0.25, 1.0: 0.2, 2 / 3: 0.15, 16 / 9: 0.1}


def make_batch(model: StableDiffusionXL, shape: tuple[int, int]) -> dict:
    """A batch of encodings of a shape."""
    height, width = (side // model.vae.downscale for side in shape)
    moments = torch.randn(2 * PAIRS, 2 * model.latent_channels, height, width)
    sizes = torch.tensor([shape] * 2 * PAIRS)
    embeds = {name: rows.cpu() for name, rows in model.encode_prompts(["a photograph"] * PAIRS).items()}
    return {
        "moments": moments,
        "embeds": embeds,
        "original_sizes": sizes,
        "crop_top_lefts": torch.zeros_like(sizes),
        "seeds": list(range(PAIRS)),
    }


def time_steps(folder: str) -> dict:
    """Pairs a second in buckets over those in squares, as they are and per pixel."""
    model = StableDiffusionXL.load(
        ModelConfig(
            pretrained_model_name_or_path=folder, resolution=RESOLUTION, rank=8, lora_layers="to_k,to_q,to_v,to_out.0"
        ),
        DEVICE,
        torch.float32,
    )
    model.denoiser.train()
    optimizer = torch.optim.AdamW([p for p in model.denoiser.parameters() if p.requires_grad], lr=1e-4)
    shapes = [shape for shape in shapes_of_area(RESOLUTION) if shape[0] != shape[1]]
    square = make_batch(model, (RESOLUTION, RESOLUTION))

    def step(batch: dict) -> None:
        losses, _, _ = compute_losses(0.1, model, model.denoiser, batch)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    on_squares, on_buckets = [], []
    for number in range(WARM_UP + ROUNDS):
        for shape in shapes:
            batch = make_batch(model, shape)
            times = seconds(step, square), seconds(step, batch)
            if number >= WARM_UP:
                on_squares.append(times[0])
                on_buckets.append(times[1])
    areas = [height * width / RESOLUTION**2 for height, width in shapes] * ROUNDS
    return {
        "shapes": [name_of(shape) for shape in shapes],
        "pairs_a_second": paired_ratio(on_squares, on_buckets),
        "per_pixel": paired_ratio([time * area for time, area in zip(on_squares, areas)], on_buckets),
    }


def displacement(batch_size: int, num_pairs: int = 10_000) -> dict:
    """How far pairs come from their place in the permutation, as a share of an epoch, and what an epoch has more of them."""
    rng, shapes = np.random.default_rng(0), shapes_of_area(1024)
    ratios = rng.choice(list(PHOTOGRAPHS), num_pairs, p=list(PHOTOGRAPHS.values()))
    buckets = np.abs(np.log([[w / h / ratio for h, w in shapes] for ratio in ratios])).argmin(axis=1)
    order = BatchOrder(lambda epoch: buckets[permutation(0, epoch, num_pairs)], len(shapes), batch_size)
    places = [epoch * num_pairs + place for _, keys in islice(order, num_pairs // batch_size) for epoch, place in keys]
    moved = np.abs(np.array(places) - np.arange(len(places))) / num_pairs
    return {
        "batch_size": batch_size,
        "median_displacement": round(float(np.median(moved)), 5),
        "99_percent": round(float(np.quantile(moved, 0.99)), 5),
        "pairs_more": order.pairs_of(1) - num_pairs,
    }


def main() -> None:
    rows = [displacement(batch_size) for batch_size in (4, 16, 64)]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        found = time_steps(save(folder))
    print(found)
    store("buckets", {"step": found, "order": rows})


if __name__ == "__main__":
    main()
