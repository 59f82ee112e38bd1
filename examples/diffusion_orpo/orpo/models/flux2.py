"""FLUX.2: hidden states of three layers of a language model, and latents in 2x2 patches that batch statistics normalise.

FLUX.2 klein reads prompts with Qwen3, FLUX.2 dev with Mistral and is told a guidance scale.
"""

import torch

from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline

from .checks import Module
from .latent_diffusion import Batch, Denoiser, Embeds, FlowTransformer, twice
from .registry import FLUX2, FLUX2_KLEIN
from .vae import Vae


class Flux2Vae(Vae):
    """Its latents are the patches, with four times the VAE's channels at half of its height and width."""

    module_class = AutoencoderKLFlux2
    applied_statistics = ()

    @property
    def downscale(self) -> int:
        return 2 * super().downscale

    def moments(self, module: Module, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([patchify(part) for part in super().moments(module, images).chunk(2, dim=1)], dim=1)

    def statistics(self, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = (
            buffer.float().view(1, -1, 1, 1) for buffer in (module.bn.running_mean, module.bn.running_var)
        )
        return mean, (variance + self.config["batch_norm_eps"]).sqrt()

    def decode(self, module: Module, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self.statistics(module)
        return module.decode(Flux2Pipeline._unpatchify_latents(latents * scale + shift).to(module.dtype)).sample


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) as 2x2 patches (N, 4C, h/2, w/2)."""
    return Flux2Pipeline._patchify_latents(latents)


class Flux2Klein(FlowTransformer):
    pipeline_class = Flux2KleinPipeline
    text_encoder_names = ("text_encoder",)
    name, slug = FLUX2_KLEIN.name, FLUX2_KLEIN.slug
    vae_class = Flux2Vae
    patch_size = 2

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """Hidden states of three layers, side by side (B, max_sequence_length, 3 * hidden size)."""
        prompt_embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device, **self.call_options)
        return {"prompt_embeds": prompt_embeds}

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        count, _, height, width = noisy_latents.shape
        prompt_embeds = twice(embeds["prompt_embeds"])
        with self.device:  # otherwise the positions would be made on the CPU, and the step would wait for their copy
            text_ids = self.pipeline_class._prepare_text_ids(prompt_embeds)  # (2B, tokens, 4)
            image_ids = self.pipeline_class._prepare_latent_ids(noisy_latents)  # (2B, h * w, 4)
        model_pred = denoiser(
            hidden_states=self.pipeline_class._pack_latents(noisy_latents.to(self.dtype)),  # (2B, h * w, C)
            timestep=timesteps / 1000,
            guidance=self.embedded_guidance(count),
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return model_pred.transpose(1, 2).unflatten(2, (height, width))

    def unpack_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The pipeline gives latents as the VAE makes them, neither in patches nor normalised."""
        shift, scale = self.vae.statistics(self.pipeline.vae)
        return (patchify(latents) - shift) / scale


class Flux2(Flux2Klein):
    pipeline_class = Flux2Pipeline
    is_told_guidance = True
    name, slug = FLUX2.name, FLUX2.slug
