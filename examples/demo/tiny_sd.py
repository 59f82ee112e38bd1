"""A tiny Stable Diffusion of the real classes, as 2.1 is made: one CLIP text encoder, and a U-Net that predicts velocity.

Everything that reads `stable-diffusion-2-1` reads this one. Its VAE is the demo's.
"""

import torch
from transformers import CLIPTextModel

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny_sdxl import build_text_config, build_tokenizer


def build_tiny_sd(
    words: list[str],
    vae: AutoencoderKL,
    channels: tuple[int, int] = (24, 48),
    prediction_type: str = "v_prediction",
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Builds the pipeline with random weights, without a safety checker.

    Args:
        words: get a token each; other text is spelled out.
        vae: with 4 latent channels.
        channels: of the U-Net's two resolutions.
        prediction_type: "v_prediction" as in 2.1, or "epsilon" as in 1.5.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(words)
    text_config = build_text_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=text_config.hidden_size,
        norm_num_groups=8,
        use_linear_projection=prediction_type == "v_prediction",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def predict(pipeline: StableDiffusionPipeline, noisy_latents, timesteps, prompts: list[str], rows) -> torch.Tensor:
    """Calls the U-Net; `rows` says which of the prompts each image has."""
    prompt_embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
    return pipeline.unet(noisy_latents, timesteps, prompt_embeds[rows]).sample
