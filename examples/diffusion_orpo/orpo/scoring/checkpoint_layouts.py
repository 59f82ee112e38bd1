"""Loads published checkpoints with other libraries' layouts into transformers' modules: open_clip, BLIP, linear heads."""

import math
import re

import torch
from torch import nn
from transformers import BlipVisionConfig, BlipVisionModel


def weights_under(prefix: str, state_dict: dict) -> dict[str, torch.Tensor]:
    """The weights whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_linear_head(state_dict: dict, prefix: str) -> nn.Sequential:
    """Linear layers without activations, as both authors trained them; the dropout between them is left out."""
    weights = weights_under(prefix, state_dict)
    layers = sorted({int(name.split(".")[0]) for name in weights})
    head = nn.Sequential(*(nn.Linear(*weights[f"{i}.weight"].shape[::-1]) for i in layers))
    head.load_state_dict(
        {f"{new}.{kind}": weights[f"{old}.{kind}"] for new, old in enumerate(layers) for kind in ("weight", "bias")}
    )
    return head.float().eval()


OPEN_CLIP_NAMES = (
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


def convert_open_clip(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the weights of an open_clip ViT to those of transformers' `CLIPModel`."""
    converted = {}
    for name, value in state_dict.items():
        name = _rename(name, OPEN_CLIP_NAMES)
        if name.endswith("projection.weight"):
            value = value.T
        if ".in_proj_" in name:  # queries, keys and values in one
            for part, chunk in zip("qkv", value.chunk(3)):
                converted[name.replace("in_proj_", f"{part}_proj.")] = chunk
        else:
            converted[name] = value
    return converted


BLIP_NAMES = (
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks", "encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


def load_blip_vision(weights: dict[str, torch.Tensor]) -> BlipVisionModel:
    """The ViT of salesforce/BLIP: 64 channels per head, epsilon 1e-6, and sizes that follow from the weights."""
    hidden_size, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    patches = weights["pos_embed"].shape[1] - 1
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=len(weights["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(name.endswith(".norm1.bias") for name in weights),
            num_attention_heads=hidden_size // 64,
            image_size=math.isqrt(patches) * patch_size,
            patch_size=patch_size,
            layer_norm_eps=1e-6,
        )
    )
    model.load_state_dict({_rename(name, BLIP_NAMES): value for name, value in weights.items()})
    return model


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
