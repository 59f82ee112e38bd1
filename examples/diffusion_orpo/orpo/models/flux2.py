"""FLUX.2: hidden states of three layers of a language model, and latents in 2x2 patches that batch statistics normalise.

FLUX.2 klein reads prompts with Qwen3, FLUX.2 dev with Mistral and is told a guidance scale.
"""

import torch

from diffusers import Flux2KleinPipeline, Flux2Pipeline

from .flow_matching import FlowMatching
from .latent_diffusion import LatentDiffusion


class Flux2Klein(LatentDiffusion):
    pipeline_class = Flux2KleinPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    noise_process_class = FlowMatching
    name, slug = "FLUX.2 klein", "flux2-klein"
    tags = ("flux2-klein", "flux2-klein-diffusers")
    license = "apache-2.0"
    lora_layers = "to_k,to_q,to_v,to_out.0,to_qkv_mlp_proj,single_transformer_blocks.*.attn.to_out"
    defaults = {"weighting_scheme": "none", "validation_guidance_scale": 4.0}
    resolution_step = 16
    inference_dtype = "bfloat16"

    @property
    def call_options(self) -> dict:
        return {"max_sequence_length": self.args.max_sequence_length}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Hidden states of three layers, side by side (B, max_sequence_length, 3 * hidden size)."""
        prompt_embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device, **self.call_options)
        return {"prompt_embeds": prompt_embeds}

    def predict(
        self, denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: dict, batch: dict
    ) -> torch.Tensor:
        count, _, height, width = noisy_latents.shape
        prompt_embeds = embeds["prompt_embeds"].repeat(2, 1, 1)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.args.guidance_scale, device=self.device)
        with self.device:  # or the positions would be made on the CPU, and the step would wait for their copy
            text_ids = self.pipeline_class._prepare_text_ids(prompt_embeds)  # (2B, tokens, 4)
            image_ids = self.pipeline_class._prepare_latent_ids(noisy_latents)  # (2B, h * w, 4)
        model_pred = denoiser(
            hidden_states=self.pipeline_class._pack_latents(noisy_latents.to(self.dtype)),  # (2B, h * w, C)
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return model_pred.transpose(1, 2).unflatten(2, (height, width))


class Flux2(Flux2Klein):
    pipeline_class = Flux2Pipeline
    name, slug = "FLUX.2", "flux2"
    tags = ("flux2", "flux2-diffusers")
    license = "other"
