"""Stable Diffusion XL: two text encoders, and micro-conditioning on each image's original size and crop."""

import logging

import torch
from transformers import PreTrainedTokenizerBase

from diffusers import StableDiffusionXLPipeline

from ..runtime.messages import printable
from ..runtime.transfer import to_device
from .latent_diffusion import Batch, Denoiser, Embeds, LatentDiffusion, twice
from .noise import DDPM
from .registry import SDXL
from .vae import VaeWithMeans


logger = logging.getLogger(__name__)


class StableDiffusionXL(LatentDiffusion):
    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    vae_class = VaeWithMeans
    noise_process_class = DDPM
    name, slug = SDXL.name, SDXL.slug
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    license = "openrail++"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """Both encoders' penultimate hidden states (B, 77, 2048), and the second one's pooled output (B, 1280)."""
        pipeline, hidden_states = self.pipeline, []
        for tokenizer, text_encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            output = text_encoder(clip_tokens(tokenizer, prompts, self.device), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        return {"prompt_embeds": torch.cat(hidden_states, dim=-1), "pooled_prompt_embeds": output.text_embeds}

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        # Each image keeps its own original size and crop: (height, width, top, left, target height, target width).
        target_size = [side * self.vae.downscale for side in noisy_latents.shape[2:]]
        target_sizes = torch.tensor(target_size).expand_as(batch["original_sizes"])
        time_ids = torch.cat([batch["original_sizes"], batch["crop_top_lefts"], target_sizes], dim=1)
        added_conditions = {
            "text_embeds": twice(embeds["pooled_prompt_embeds"]),
            "time_ids": to_device(time_ids.float(), self.device),  # bfloat16 would round 1023 to 1024
        }
        return denoiser(
            noisy_latents.to(self.dtype),
            timesteps,
            twice(embeds["prompt_embeds"]),
            added_cond_kwargs=added_conditions,
            return_dict=False,
        )[0]


def clip_tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str], device: torch.device) -> torch.Tensor:
    """Tokens (B, 77) of B prompts, as pipelines make them, but copied without waiting for the device."""
    limit = tokenizer.model_max_length
    for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids):
        if len(tokens) > limit:
            logger.warning(
                f"A prompt of {len(tokens)} tokens is truncated because CLIP reads {limit}: {printable(prompt)}"
            )
    options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
    return to_device(tokenizer(prompts, **options).input_ids, device)
