"""Stable Diffusion 1.x and 2.x: one CLIP text encoder. 2.1 at 768 pixels predicts velocity, as its scheduler says."""

import torch

from diffusers import StableDiffusionPipeline

from .latent_diffusion import Batch, Denoiser, Embeds, LatentDiffusion, twice
from .noise import DDPM
from .registry import SD
from .vae import PlainVae


class StableDiffusion(LatentDiffusion):
    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    vae_class = PlainVae
    noise_process_class = DDPM
    name, slug = SD.name, SD.slug
    tags = ("stable-diffusion", "stable-diffusion-diffusers")
    license = "other"  # that of the checkpoint: 1.x and 2.x have different ones
    pipeline_options = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """The encoder's last hidden states (B, 77, 768 or 1024)."""
        prompt_embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        prompt_embeds = twice(embeds["prompt_embeds"])
        return denoiser(noisy_latents.to(self.dtype), timesteps, prompt_embeds, return_dict=False)[0]
