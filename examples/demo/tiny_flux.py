"""A tiny FLUX.1 of the real classes: CLIP and T5, packed latents, and a transformer that is told a guidance scale.

Everything that reads `FLUX.1-dev` reads this one. Its VAE is the demo's, with a shift. FLUX.1-dev was distilled from a
guided model; this one was not. It is told a guidance scale between 1 and 5 at random, so that it generates at any of them.
"""

import torch
from transformers import CLIPTextModel

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_sdxl import build_text_config, build_tokenizer
from tiny_t5 import T5_LENGTH, build_t5, build_t5_tokenizer


def build_tiny_flux(
    words: list[str],
    vae: AutoencoderKL,
    num_layers: int = 2,
    num_single_layers: int = 4,
    num_heads: int = 4,
    guidance_embeds: bool = True,
    seed: int = 0,
) -> FluxPipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        num_layers, num_single_layers: blocks of two streams and of one.
        num_heads: of the transformer's attention, 16 channels each.
        guidance_embeds: as in FLUX.1-dev; FLUX.1-schnell has none.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_tokenizer(words), build_t5_tokenizer(words)
    text_config = build_text_config(tokenizer)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # of 2x2 latents of 4 channels
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=num_heads,
        joint_attention_dim=64,
        pooled_projection_dim=text_config.hidden_size,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        text_encoder_2=build_t5(tokenizer_2, 64),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def predict(pipeline: FluxPipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the transformer, at a random guidance scale; `rows` says which of the prompts each image has."""
    count, channels, height, width = noisy_latents.shape
    prompt_embeds, pooled_prompt_embeds, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=T5_LENGTH)
    prediction = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy_latents, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=1 + 4 * torch.rand(count),
        encoder_hidden_states=prompt_embeds[rows],
        pooled_projections=pooled_prompt_embeds[rows],
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, pipeline.device, torch.float32),
    ).sample
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(prediction, height * factor, width * factor, factor)
