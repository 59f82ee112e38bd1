"""Qwen-Image: prompts with a mask from Qwen2.5-VL, a VAE of one video frame, and latents packed in 2x2 tokens."""

import torch
import torch.nn.functional as F

from diffusers import QwenImagePipeline

from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion


class QwenImage(LatentDiffusion):
    pipeline_class = QwenImagePipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    noise_process_class = FlowMatching
    name, slug = "Qwen-Image", "qwen-image"
    tags = ("qwen-image", "qwen-image-diffusers")
    license = "apache-2.0"
    defaults = {"weighting_scheme": "none", "validation_guidance_scale": 4.0}
    resolution_step = 16
    inference_dtype = "bfloat16"

    @property
    def call_options(self) -> dict:
        return {"max_sequence_length": self.args.max_sequence_length}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Hidden states (B, max_sequence_length, 3584), zero where the mask (B, max_sequence_length) is."""
        prompt_embeds, mask = self.pipeline.encode_prompt(prompts, device=self.device, **self.call_options)
        if mask is None:  # the pipeline's word for prompts of one length
            mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=self.device)
        missing = self.args.max_sequence_length - mask.shape[1]
        return {
            "prompt_embeds": F.pad(prompt_embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": F.pad(mask, (0, missing)),
        }

    def predict(
        self, denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: dict, batch: dict
    ) -> torch.Tensor:
        count, channels, height, width = noisy_latents.shape
        model_pred = denoiser(
            hidden_states=QwenImagePipeline._pack_latents(
                noisy_latents.to(self.dtype), count, channels, height, width
            ),  # (2B, h/2 * w/2, 4C)
            timestep=timesteps / 1000,
            encoder_hidden_states=embeds["prompt_embeds"].repeat(2, 1, 1),
            encoder_hidden_states_mask=embeds["prompt_embeds_mask"].repeat(2, 1),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return self.unpack_latents(model_pred, height, width)

    def unpack_latents(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (N, h/2 * w/2, 4C) as latents (N, C, h, w)."""
        return QwenImagePipeline._unpack_latents(tokens, height, width, vae_scale_factor=1)[:, :, 0]
