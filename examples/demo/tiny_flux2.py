"""A tiny FLUX.2 klein of the real classes: three layers of Qwen3, and latents in patches that batch statistics normalise.

Everything that reads `FLUX.2-klein-base-4B` reads this one. Its VAE has the weights of the demo's; its text encoder is not
trained.
"""

from functools import lru_cache

import torch
from transformers import Qwen3ForCausalLM

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tiny_qwen import PROMPT_LENGTH, build_qwen3_config, build_qwen_tokenizer


LAYERS = 27  # of the text encoder: the pipeline reads the 9th, the 18th and the 27th


def to_flux2_vae(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """The same weights in the class of FLUX.2, whose batch statistics are those of no data yet."""
    names = "block_out_channels layers_per_block latent_channels norm_num_groups sample_size mid_block_add_attention"
    flux2_vae = AutoencoderKLFlux2(**{name: vae.config[name] for name in names.split()})
    missing, unexpected = flux2_vae.load_state_dict(vae.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("bn.") for name in missing), (missing, unexpected)
    return flux2_vae.eval()


def set_statistics(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Sets the VAE's batch statistics to those of latents (N, C, h, w); returns them in patches, normalised."""
    patches = Flux2KleinPipeline._patchify_latents(latents)
    vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (patches - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def build_tiny_flux2(
    words: list[str],
    vae: AutoencoderKLFlux2,
    num_layers: int = 2,
    num_single_layers: int = 4,
    num_heads: int = 4,
    seed: int = 0,
) -> Flux2KleinPipeline:
    """Builds the pipeline with random weights.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        num_layers, num_single_layers: blocks of two streams and of one.
        num_heads: of the transformer's attention, 16 channels each.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer(words)
    config = build_qwen3_config(tokenizer, LAYERS)
    transformer = Flux2Transformer2DModel(
        in_channels=16,  # of 2x2 patches of 4 channels
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=num_heads,
        joint_attention_dim=3 * config.hidden_size,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


@lru_cache(maxsize=1)
@torch.no_grad()
def _encode(pipeline: Flux2KleinPipeline, prompts: tuple[str, ...]) -> torch.Tensor:
    return pipeline.encode_prompt(list(prompts), max_sequence_length=PROMPT_LENGTH)[0]


def predict(pipeline: Flux2KleinPipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the transformer; `rows` says which of the prompts each image has."""
    embeds = _encode(pipeline, tuple(prompts))[rows]
    tokens = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy_latents),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=pipeline._prepare_text_ids(embeds),
        img_ids=pipeline._prepare_latent_ids(noisy_latents),
    ).sample
    return tokens.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])
