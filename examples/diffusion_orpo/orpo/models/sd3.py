"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5, and flow matching."""

from types import SimpleNamespace

import torch

from diffusers import StableDiffusion3Pipeline

from ..runtime.shapes import name_of
from .checks import Module
from .latent_diffusion import Batch, Denoiser, Embeds, FlowTransformer, twice
from .registry import SD3


class StableDiffusion3(FlowTransformer):
    pipeline_class = StableDiffusion3Pipeline
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_modules = ("text_encoder_3", "tokenizer_3")  # without T5, its hidden states are zeros
    name, slug = SD3.name, SD3.slug

    @property
    def tags(self) -> tuple[str, ...]:
        version = "sd3.5" if "3.5" in self.options.pretrained_model_name_or_path else "sd3"
        return version, f"{version}-diffusers"

    def check_denoiser(self, config: dict) -> None:
        super().check_denoiser(config)
        longest = config["pos_embed_max_size"] * config["patch_size"] * self.vae.downscale
        wrong = [name_of(shape) for shape in self.options.shapes if max(shape) > longest]
        if wrong:
            flag = "aspect_ratio_buckets" if self.options.aspect_ratio_buckets else "resolution"
            raise ValueError(
                f"--{flag}: {', '.join(wrong)} can't be trained at: {self.options.pretrained_model_name_or_path} knows positions"
                f" in an image up to {longest} pixels a side."
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """CLIP's and T5's hidden states one after the other (B, 77 + T5's tokens, 4096), and CLIP's pooled outputs (B, 2048)."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, **self.call_options
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _load_pipeline(self, **modules: Module | None) -> None:
        super()._load_pipeline(**modules)
        if self.denoiser is not None:  # for --compile; diffusers itself names the blocks of its other models
            self.denoiser._repeated_blocks = ["JointTransformerBlock"]
        elif self.absent_modules:  # the pipeline asks its denoiser how wide T5's hidden states, zeros here, would be
            self.pipeline.transformer = SimpleNamespace(config=self.empty_denoiser.config)

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=twice(embeds["prompt_embeds"]),
            pooled_projections=twice(embeds["pooled_prompt_embeds"]),
            return_dict=False,
        )[0]
