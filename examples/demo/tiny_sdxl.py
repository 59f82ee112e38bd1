"""A tiny SDXL of the real classes: two CLIP tokenizers and text encoders, U-Net with text_time conditioning, VAE.

Everything that reads `stabilityai/stable-diffusion-xl-base-1.0` reads this one. Its VAE reduces by 8 as SDXL's does,
so 64 pixels give 8x8 latents.
"""

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


PROMPT_LENGTH = 24  # tokens


def _merges(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in which each of the words is one token, and the merges that get there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        left = ""
        for i, letter in enumerate(word):
            right = letter + "</w>" if i == len(word) - 1 else letter
            if left and (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer that reads any text and gives each of `words` (lower case) a token of its own."""
    vocabulary, merges = _merges(words)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2"] + [" ".join(merge) for merge in merges]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer(
            str(Path(folder, "vocab.json")), str(Path(folder, "merges.txt")), model_max_length=PROMPT_LENGTH
        )


def build_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of a CLIP text encoder of two layers for the tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_tiny_sdxl(
    words: list[str], channels: tuple[int, int] = (32, 64), seed: int = 0
) -> StableDiffusionXLPipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        channels: of the U-Net's two resolutions.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_tokenizer(words), build_tokenizer(words)
    text_config = build_text_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * text_config.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text_config.projection_dim,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        force_upcast=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
