"""FLUX.1: CLIP's pooled output, T5, flow matching on packed latents, and a guidance scale that the model is told."""

import torch

from diffusers import FluxPipeline

from .latent_diffusion import Batch, Denoiser, Embeds, FlowTransformer, twice
from .registry import FLUX


class Flux(FlowTransformer):
    pipeline_class = FluxPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    name, slug = FLUX.name, FLUX.slug
    patch_size = 2
    is_told_guidance = True

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """T5's hidden states (B, T5's tokens, 4096), and CLIP's pooled output (B, 768)."""
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, **self.call_options
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        count, channels, height, width = noisy_latents.shape
        prompt_embeds = twice(embeds["prompt_embeds"])
        # Tokens of 2x2 latents: (2B, h/2 * w/2, 4C), with their places in the image; all of a prompt's are at the origin.
        with self.device:  # otherwise the places would be made on the CPU, and the step would wait for their copy
            image_ids = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, self.device, self.dtype)
            text_ids = torch.zeros(prompt_embeds.shape[1], 3, dtype=self.dtype)
        model_pred = denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy_latents.to(self.dtype), count, channels, height, width),
            timestep=timesteps / 1000,
            guidance=self.embedded_guidance(count),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=twice(embeds["pooled_prompt_embeds"]),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return self.unpack_latents(model_pred, height, width)

    def unpack_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)
