"""Qwen-Image: prompts with a mask from Qwen2.5-VL, a VAE of one video frame, and latents packed in 2x2 tokens."""

import torch
import torch.nn.functional as F

from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

from .checks import Module
from .latent_diffusion import Batch, Denoiser, Embeds, FlowTransformer, twice
from .registry import QWEN_IMAGE
from .vae import VaeWithMeans


class QwenImageVae(VaeWithMeans):
    """A VAE of videos, for which an image is one frame, (N, C, 1, h, w)."""

    module_class = AutoencoderKLQwenImage
    applied_statistics = ("latents_mean", "latents_std")

    @property
    def channels(self) -> int:
        return self.config["z_dim"]

    @property
    def downscale(self) -> int:
        return 2 ** len(self.config["temperal_downsample"])

    def moments(self, module: Module, images: torch.Tensor) -> torch.Tensor:
        return super().moments(module, images.unsqueeze(2)).squeeze(2)

    def decode(self, module: Module, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self.statistics(module)
        return module.decode((latents * scale + shift).to(module.dtype).unsqueeze(2)).sample.squeeze(2)


class QwenImage(FlowTransformer):
    pipeline_class = QwenImagePipeline
    text_encoder_names = ("text_encoder",)
    name, slug = QWEN_IMAGE.name, QWEN_IMAGE.slug
    vae_class = QwenImageVae
    license = "apache-2.0"
    patch_size = 2
    negative_prompt = " "  # Without one, the pipeline generates without guidance.

    def check_denoiser(self, config: dict) -> None:
        super().check_denoiser(config)
        if config.get("guidance_embeds"):
            raise ValueError(
                f"The transformer of {self.options.pretrained_model_name_or_path} is told a guidance scale (guidance_embeds in"
                " its config.json), which Qwen-Image's training here doesn't do. Train the model that it was distilled from."
            )

    @staticmethod
    def guidance_options(scale: float) -> dict:
        return {"true_cfg_scale": scale}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """Hidden states (B, max_sequence_length, 3584), zero where the mask (B, max_sequence_length) is."""
        prompt_embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.options.max_sequence_length
        )
        if mask is None:  # the pipeline returns None for prompts of one length
            mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=self.device)
        missing = self.options.max_sequence_length - mask.shape[1]
        return {
            "prompt_embeds": F.pad(prompt_embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": F.pad(mask, (0, missing)),
        }

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        count, channels, height, width = noisy_latents.shape
        model_pred = denoiser(
            hidden_states=QwenImagePipeline._pack_latents(
                noisy_latents.to(self.dtype), count, channels, height, width
            ),  # (2B, h/2 * w/2, 4C)
            timestep=timesteps / 1000,
            encoder_hidden_states=twice(embeds["prompt_embeds"]),
            encoder_hidden_states_mask=twice(embeds["prompt_embeds_mask"]),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return self.unpack_latents(model_pred, height, width)

    def unpack_latents(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (N, h/2 * w/2, 4C) as latents (N, C, h, w)."""
        return QwenImagePipeline._unpack_latents(tokens, height, width, vae_scale_factor=1)[:, :, 0]
