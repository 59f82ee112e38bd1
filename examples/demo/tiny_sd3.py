"""A tiny Stable Diffusion 3 of the real classes: two CLIP text encoders, T5, and an MMDiT, with flow matching.

Everything that reads `stable-diffusion-3.5-medium` reads this one. Its VAE is the demo's, with a shift.
"""

import torch
from transformers import CLIPTextModelWithProjection

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_sdxl import build_text_config, build_tokenizer
from tiny_t5 import T5_LENGTH, build_t5, build_t5_tokenizer


def build_tiny_sd3(
    words: list[str], vae: AutoencoderKL, num_layers: int = 4, num_heads: int = 4, seed: int = 0
) -> StableDiffusion3Pipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        num_layers: of the transformer.
        num_heads: of its attention, 16 channels each.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer, tokenizer_2, tokenizer_3 = build_tokenizer(words), build_tokenizer(words), build_t5_tokenizer(words)
    text_config = build_text_config(tokenizer)
    both_clips = 2 * text_config.hidden_size
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=num_heads,
        joint_attention_dim=both_clips,
        caption_projection_dim=16 * num_heads,
        pooled_projection_dim=2 * text_config.projection_dim,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer_2,
        text_encoder_3=build_t5(tokenizer_3, both_clips),
        tokenizer_3=tokenizer_3,
    )


def predict(pipeline: StableDiffusion3Pipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the transformer; `rows` says which of the prompts each image has."""
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return pipeline.transformer(
        hidden_states=noisy_latents,
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds[rows],
        pooled_projections=pooled_prompt_embeds[rows],
    ).sample
