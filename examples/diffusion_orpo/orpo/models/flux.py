"""FLUX.1: CLIP's pooled output, T5, flow matching on packed latents, and a guidance scale that the model is told."""

import torch

from diffusers import FluxPipeline

from .latent_diffusion import LatentDiffusion
from .noise import FlowMatching
from .registry import FLUX


class Flux(LatentDiffusion):
    pipeline_class = FluxPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    noise_process_class = FlowMatching
    name, slug = FLUX.name, FLUX.slug
    tags = ("flux", "flux-diffusers")
    license = "other"
    inference_dtype = "bfloat16"

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels  # of patches of 2x2

    @property
    def call_options(self) -> dict:
        return {"max_sequence_length": self.options.max_sequence_length}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """T5's hidden states (B, T5's tokens, 4096), and CLIP's pooled output (B, 768)."""
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, **self.call_options
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self, denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: dict, batch: dict
    ) -> torch.Tensor:
        count, channels, height, width = noisy_latents.shape
        prompt_embeds = embeds["prompt_embeds"].repeat(2, 1, 1)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.options.guidance_scale, device=self.device)
        # Tokens of 2x2 latents: (2B, h/2 * w/2, 4C), with their places in the image; all of a prompt's are at the origin.
        with self.device:  # otherwise the places would be made on the CPU, and the step would wait for their copy
            image_ids = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, self.device, self.dtype)
            text_ids = torch.zeros(prompt_embeds.shape[1], 3, dtype=self.dtype)
        model_pred = denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy_latents.to(self.dtype), count, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=embeds["pooled_prompt_embeds"].repeat(2, 1),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return self.unpack_latents(model_pred, height, width)

    def unpack_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)
