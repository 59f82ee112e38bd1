"""Trains the demo's base model from scratch on drawn faces, first the VAE, then U-Net and text encoders together.

    python train_base.py --output_dir base

It knows nothing of preferences. Its weights ship with the demo in float16; this script rebuilds them.
"""

import argparse
import re

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from faces import ALL_KINDS, RESOLUTION, random_face
from tiny_sdxl import build_tiny_sdxl


WORDS = sorted({word for kind in ALL_KINDS for word in re.findall(r"\w+", kind.prompt)})


def draw_images(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Draws faces: images (count, 3, 64, 64) in uint8, and their prompts."""
    rng = np.random.default_rng(seed)
    faces = [random_face(rng) for _ in tqdm(range(count), desc="Drawing faces")]
    images = np.stack([np.asarray(image) for image, _ in faces])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [prompt for _, prompt in faces]


def train_vae(vae, images: torch.Tensor, steps: int, batch_size: int = 32) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0)
    schedule = OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in (bar := tqdm(range(steps), desc="VAE")):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = images[chosen] / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        loss = F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(psnr=f"{10 * torch.log10(4 / F.mse_loss(reconstruction, x)).item():.1f} dB")


@torch.no_grad()
def encode_images(vae, images: torch.Tensor) -> torch.Tensor:
    """Latents (count, 4, 8, 8) of unit variance; sets the VAE's scaling factor to get there."""
    batches = images.split(128)
    latents = torch.cat([vae.encode(x / 127.5 - 1).latent_dist.mode() for x in tqdm(batches, desc="Encoding")])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor


def train_unet(
    pipeline: StableDiffusionXLPipeline, latents, prompts: list[str], steps: int, batch_size: int = 64
) -> None:
    modules = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2])
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    average = EMAModel(modules.parameters(), decay=0.999)
    generator = torch.Generator().manual_seed(2)
    time_ids = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * batch_size)
    for _ in (bar := tqdm(range(steps), desc="U-Net")):
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1  # for guidance
        texts = ["" if drop else prompts[i] for i, drop in zip(chosen, dropped)]
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        prediction = pipeline.unet(
            noise_scheduler.add_noise(latents[chosen], noise, timesteps),
            timesteps,
            prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
        ).sample
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(modules.parameters())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    average.copy_to(modules.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="base", help="Folder for the pipeline.")
    parser.add_argument("--num_images", type=int, default=12000, help="Faces to draw.")
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--unet_steps", type=int, default=8000)
    args = parser.parse_args()

    pipeline = build_tiny_sdxl(WORDS)
    images, prompts = draw_images(args.num_images, seed=0)
    train_vae(pipeline.vae, images, args.vae_steps)
    train_unet(pipeline, encode_images(pipeline.vae, images), prompts, args.unet_steps)
    pipeline.to(torch.float16).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
