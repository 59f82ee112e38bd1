"""A tiny Qwen-Image of the real classes: Qwen2.5-VL, a VAE of one video frame, and packed latents.

Everything that reads `Qwen/Qwen-Image` reads this one. It has a VAE of its own; its text encoder is not trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from tiny_qwen import build_qwen_tokenizer


def build_tiny_qwen_vae() -> AutoencoderKLQwenImage:
    """A VAE with random weights that reduces by 8 and leaves 4 channels, neither shifted nor scaled."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


@contextmanager
def one_frame_in_2d() -> Iterator[None]:
    """While it lasts, the VAE's causal convolutions see one frame as an image: the same numbers, many times faster here.

    The frames before the first are zeros, so that only the last of a kernel's frames counts.
    """

    def forward(self: QwenImageCausalConv3d, x: torch.Tensor, cache_x=None) -> torch.Tensor:
        padded = F.pad(x.squeeze(2), self._padding[:4])
        return F.conv2d(padded, self.weight[:, :, -1], self.bias, self.stride[1:]).unsqueeze(2)

    original = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = forward
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = original


def set_statistics(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Sets the VAE's mean and deviation of each channel to those of latents (N, C, h, w); returns them normalised."""
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in std.tolist()],
    )
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def build_tiny_qwen_image(
    words: list[str], vae: AutoencoderKLQwenImage, num_layers: int = 4, num_heads: int = 4, seed: int = 0
) -> QwenImagePipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        num_layers: of the transformer.
        num_heads: of its attention, 16 channels each.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer(words)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # it stays as it is made, so its words must differ from the start
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,  # of 2x2 latents of 4 channels
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=num_heads,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


@lru_cache(maxsize=1)
@torch.no_grad()
def _encode(pipeline: QwenImagePipeline, prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return pipeline.encode_prompt(list(prompts))


def predict(pipeline: QwenImagePipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the transformer; `rows` says which of the prompts each image has."""
    embeds, mask = _encode(pipeline, tuple(prompts))
    count, channels, height, width = noisy_latents.shape
    tokens = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy_latents, count, channels, height, width),
        timestep=timesteps / 1000,
        encoder_hidden_states=embeds[rows],
        encoder_hidden_states_mask=None if mask is None else mask[rows],
        img_shapes=[[(1, height // 2, width // 2)]] * count,
    ).sample
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(tokens, height * factor, width * factor, factor)[:, :, 0]
