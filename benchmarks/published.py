"""Published models from their configurations alone: on the meta device without memory, elsewhere with random weights."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)


REPOSITORIES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "z_image": "Tongyi-MAI/Z-Image",
    "flux2": "black-forest-labs/FLUX.2-klein-base-4B",
    "qwen_image": "Qwen/Qwen-Image",
}
# Where nothing is said, the class has the published values as its defaults.
DENOISERS: dict[str, tuple[type, dict]] = {
    "sdxl": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd3": (
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "z_image": (ZImageTransformer2DModel, {}),
    "flux2": (
        Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "qwen_image": (QwenImageTransformer2DModel, {}),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
T5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN2_5_VL_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
SHALLOW_QWEN2_5_VL = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 1}}


def denoiser(name: str, **changes) -> torch.nn.Module:
    """The denoiser; `changes` are made to its configuration, as for a copy with fewer layers."""
    model_class, config = DENOISERS[name]
    return model_class(**config | changes)


def vae(name: str) -> torch.nn.Module:
    if name == "qwen_image":
        return AutoencoderKLQwenImage()
    if name == "flux2":
        return AutoencoderKLFlux2()
    return AutoencoderKL(**VAE, latent_channels=4 if name == "sdxl" else 16)


def text_encoders(name: str, shallow: bool = False) -> list[torch.nn.Module]:
    """The text encoders; shallow, with few of their layers: one, or as many as FLUX.2 reads hidden states of."""
    if name in ("z_image", "flux2"):
        depth = {"num_hidden_layers": 28 if name == "flux2" else 2} if shallow else {}
        return [Qwen3Model(Qwen3Config(**QWEN3_4B | depth))]
    if name == "qwen_image":
        config = QWEN2_5_VL_7B
        if shallow:
            config = {part: config[part] | depth for part, depth in SHALLOW_QWEN2_5_VL.items()}
        return [Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))]
    encoders = [CLIPTextModel(CLIPTextConfig(**CLIP_L, num_hidden_layers=2 if shallow else 12))]
    if name != "flux":
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, num_hidden_layers=2 if shallow else 32)))
    if name != "sdxl":
        encoders.append(
            T5EncoderModel(T5Config(**T5 | ({"num_layers": 1} if shallow else {}), feed_forward_proj="gated-gelu"))
        )
    return encoders
