"""The cost of the loss: time of `orpo_loss`, forward and backward, as a share of a training step at the same shapes.

    python benchmarks/loss_overhead.py

The step is a U-Net with SDXL's conditioning, forward and backward, for both images of each pair. Step and loss are
timed in turn, and the medians compared. It runs on CUDA where there is one.
"""

import argparse
import time
from statistics import median

import torch
from diffusion_orpo_loss import orpo_loss
from tqdm.auto import tqdm

from diffusers import UNet2DConditionModel


PAIRS, LATENT = 4, 32  # pairs a step, and side of the latents


def build_unet() -> UNet2DConditionModel:
    """SDXL's layout of blocks, 33 million parameters instead of 2.6 billion."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=256,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 128,
        use_linear_projection=True,
    )


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="Timed runs of each.")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = build_unet().to(device)
    latents, noise = (torch.randn(2 * PAIRS, 4, LATENT, LATENT, device=device) for _ in range(2))
    timesteps = torch.randint(1000, (2 * PAIRS,), device=device)
    text = torch.randn(2 * PAIRS, 77, 256, device=device)
    added = {
        "text_embeds": torch.randn(2 * PAIRS, 128, device=device),
        "time_ids": torch.ones(2 * PAIRS, 6, device=device),
    }
    predictions = torch.randn_like(noise, requires_grad=True)

    def step() -> None:
        unet(latents, timesteps, text, added_cond_kwargs=added).sample.square().mean().backward()

    def loss() -> None:
        pred_w, pred_l = predictions.chunk(2)
        orpo_loss(pred_w, pred_l, noise[:PAIRS], return_metrics=True)[0].backward()

    step(), loss()
    times = [(seconds(step), seconds(loss)) for _ in tqdm(range(args.runs))]
    step_time, loss_time = (median(column) for column in zip(*times))
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    print(f"{device}, U-Net of {parameters:.1f} M parameters, {PAIRS} pairs of {LATENT}x{LATENT} latents")
    print(f"step {step_time * 1e3:.1f} ms, loss {loss_time * 1e3:.2f} ms: {loss_time / step_time:.2%} of the step")


if __name__ == "__main__":
    main()
