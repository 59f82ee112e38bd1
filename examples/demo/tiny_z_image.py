"""A tiny Z-Image of the real classes: Qwen3, a single-stream transformer that takes lists, and flow matching.

Everything that reads `Tongyi-MAI/Z-Image` reads this one. Its VAE is the demo's, with a shift; its text encoder is not
trained.
"""

from functools import lru_cache

import torch
from transformers import Qwen3Model

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_qwen import PROMPT_LENGTH, build_qwen3_config, build_qwen_tokenizer


def build_tiny_z_image(
    words: list[str], vae: AutoencoderKL, num_layers: int = 4, num_heads: int = 4, seed: int = 0
) -> ZImagePipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        num_layers: of the transformer, besides one refiner each of image and prompt.
        num_heads: of its attention, 16 channels each.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer(words)
    config = build_qwen3_config(tokenizer, num_layers=2)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16 * num_heads,
        n_layers=num_layers,
        n_refiner_layers=1,
        n_heads=num_heads,
        n_kv_heads=num_heads,
        cap_feat_dim=config.hidden_size,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # empty memory until it is loaded
            torch.nn.init.normal_(parameter, std=0.02)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


@lru_cache(maxsize=1)
@torch.no_grad()
def _encode(pipeline: ZImagePipeline, prompts: tuple[str, ...]) -> list[torch.Tensor]:
    embeds, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=PROMPT_LENGTH
    )
    return embeds


def predict(pipeline: ZImagePipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the transformer; `rows` says which of the prompts each image has."""
    embeds = _encode(pipeline, tuple(prompts))
    outputs = pipeline.transformer(
        list(noisy_latents.unsqueeze(2)), (1000 - timesteps) / 1000, [embeds[row] for row in rows.tolist()]
    ).sample
    return -torch.stack(outputs).squeeze(2)
