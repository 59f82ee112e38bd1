"""Trains the demo's base models from scratch on drawn faces, first the VAE, then the denoiser, CLIP and T5 with it.

    python train_base.py                # SDXL, and the VAE that all share
    python train_base.py --family=sd3   # or sd, flux, z_image, flux2: with that VAE; or qwen_image, with its own

They know nothing of preferences. Their weights ship with the demo in float16; this script rebuilds them.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd
import tiny_sd3
import tiny_z_image
from bases import OWN_VAE, SHARED_VAE, base_folder
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from faces import ALL_KINDS, RESOLUTION, random_face
from tiny_sdxl import build_tiny_sdxl


STEPS = {"sdxl": 8000, "sd": 3000, "sd3": 5000, "flux": 3000, "z_image": 4000, "flux2": 4000, "qwen_image": 4000}
MODULES = {
    "sd": tiny_sd,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "z_image": tiny_z_image,
    "flux2": tiny_flux2,
    "qwen_image": tiny_qwen_image,
}
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


def add_noise(scheduler, latents: torch.Tensor, generator: torch.Generator):
    """Noisy latents, their timesteps (B,), and what the denoiser is to predict, as the pipeline's scheduler has it."""
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(1000, (len(latents),), generator=generator)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = scheduler.sigmas[steps].view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise, scheduler.timesteps[steps], noise - latents
    scheduler = DDPMScheduler.from_config(scheduler.config)
    return scheduler.add_noise(latents, noise, steps), steps, scheduler.get_velocity(latents, noise, steps)


def train_denoiser(pipeline, predict, latents: torch.Tensor, prompts: list[str], steps: int) -> None:
    """Trains denoiser and text encoders of a pipeline that predicts velocity, as all here but SDXL do.

    Args:
        pipeline: with random weights but for the VAE.
        predict: (pipeline, noisy latents, timesteps, different prompts, which of them each image has) -> prediction.
        latents: (count, 4, 8, 8).
        prompts: of these.
        steps: of 32 images.
    """
    names = [name for name in pipeline.components if name.startswith(("unet", "transformer", "text_encoder"))]
    modules = torch.nn.ModuleList([getattr(pipeline, name) for name in names])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    average = EMAModel(modules.parameters(), decay=0.998)
    generator = torch.Generator().manual_seed(2)
    different = ["", *sorted(set(prompts))]
    rows = torch.tensor([different.index(prompt) for prompt in prompts])
    for _ in (bar := tqdm(range(steps), desc="Denoiser")):
        chosen = torch.randint(len(latents), (32,), generator=generator)
        dropped = torch.rand(32, generator=generator) < 0.1  # for guidance
        noisy_latents, timesteps, target = add_noise(pipeline.scheduler, latents[chosen], generator)
        prediction = predict(pipeline, noisy_latents, timesteps, different, rows[chosen].where(~dropped, 0))
        loss = F.mse_loss(prediction, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(modules.parameters())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    average.copy_to(modules.parameters())


def train_sdxl(images: torch.Tensor, prompts: list[str], vae_steps: int, steps: int) -> StableDiffusionXLPipeline:
    pipeline = build_tiny_sdxl(WORDS)
    train_vae(pipeline.vae, images, vae_steps)
    train_unet(pipeline, encode_images(pipeline.vae, images), prompts, steps)
    return pipeline


def train_family(family: str, images: torch.Tensor, prompts: list[str], vae_steps: int, steps: int):
    """Trains another family's pipeline, Qwen-Image with a VAE of its own and the others with SDXL's."""
    latents, vae = qwen_latents(images, vae_steps) if family == "qwen_image" else shared_latents(family, images)
    module = MODULES[family]
    pipeline = getattr(module, f"build_tiny_{family}")(WORDS, vae)
    train_denoiser(pipeline, module.predict, latents, prompts, steps)
    return pipeline


def shared_latents(family: str, images: torch.Tensor) -> tuple:
    """Normalised latents of SDXL's VAE, and that VAE as the family has it: with a shift or batch statistics, or without."""
    vae = AutoencoderKL.from_pretrained(SHARED_VAE, torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="base/vae")
    latents = encode_images(vae, images)
    if family == "flux2":
        flux2_vae = tiny_flux2.to_flux2_vae(vae)
        return tiny_flux2.set_statistics(flux2_vae, latents / vae.config.scaling_factor), flux2_vae
    if family != "sd":
        shift = round(latents.mean().item() / vae.config.scaling_factor, 5)
        vae.register_to_config(shift_factor=shift)
        latents = latents - shift * vae.config.scaling_factor
    return latents, vae


def qwen_latents(images: torch.Tensor, vae_steps: int) -> tuple:
    """Normalised latents of a VAE of one video frame, trained here, and that VAE."""
    vae = tiny_qwen_image.build_tiny_qwen_vae()
    frames = images.unsqueeze(2)
    with tiny_qwen_image.one_frame_in_2d():
        train_vae(vae, frames, vae_steps)
        with torch.no_grad():
            batches = tqdm(frames.split(128), desc="Encoding")
            latents = [vae.encode(x / 127.5 - 1).latent_dist.mode() for x in batches]
    return tiny_qwen_image.set_statistics(vae, torch.cat(latents).squeeze(2)), vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(STEPS), default="sdxl", help="Which model.")
    parser.add_argument("--output_dir", help="Folder for the pipeline. Default: that of the demo.")
    parser.add_argument("--num_images", type=int, default=12000, help="Faces to draw.")
    parser.add_argument("--vae_steps", type=int, default=2000, help="SDXL and Qwen-Image train a VAE.")
    parser.add_argument("--denoiser_steps", type=int, help="Default: as many as the demo's bases had.")
    args = parser.parse_args()

    images, prompts = draw_images(args.num_images, seed=0)
    steps = args.denoiser_steps or STEPS[args.family]
    torch.manual_seed(0)
    if args.family == "sdxl":
        pipeline = train_sdxl(images, prompts, args.vae_steps, steps)
    else:
        pipeline = train_family(args.family, images, prompts, args.vae_steps, steps)
    folder = Path(args.output_dir or base_folder(args.family))
    pipeline.to(torch.float16).save_pretrained(folder)
    if args.family not in OWN_VAE:
        next(folder.glob("vae/*.safetensors")).unlink()  # it is in SDXL's folder, and `bases.py` brings it


if __name__ == "__main__":
    main()
