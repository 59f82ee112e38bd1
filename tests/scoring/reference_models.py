"""Tiny random checkpoints in the layouts that open_clip and BLIP publish, and their forward passes in plain torch.

The names and the arithmetic are spelled from the authors' code; nothing here uses transformers.
"""

import math

import torch
from torch.nn import functional as F


class Weights(dict):
    """A state dict of random weights, that also applies the layers in it."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int) -> None:
        self[name] = 0.2 * torch.randn(shape, generator=self.generator)

    def add_linear(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def add_norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=self.generator)
        self.add(f"{name}.bias", width)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)


def attend(query, key, value, heads: int, mask=None):
    """Softmax attention. (B, L, D) each; `mask`, added to the logits, broadcasts to (B, heads, L, L)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)


def open_clip_checkpoint(vocabulary: int, width: int = 32, vision_width: int = 48, out: int = 16, length: int = 77):
    """A ViT CLIP of two layers each, patches of 14 in images of 28 pixels."""
    w = Weights()
    w.add("visual.class_embedding", vision_width)
    w.add("visual.positional_embedding", 5, vision_width)
    w.add("visual.conv1.weight", vision_width, 3, 14, 14)
    w.add("visual.proj", vision_width, out)
    w.add("positional_embedding", length, width)
    w.add("token_embedding.weight", vocabulary, width)
    w.add("text_projection", width, out)
    w["logit_scale"] = torch.tensor(3.0)
    for name, size in (("visual.ln_pre", vision_width), ("visual.ln_post", vision_width), ("ln_final", width)):
        w.add_norm(name, size)
    for tower, size in (("visual.transformer", vision_width), ("transformer", width)):
        for i in range(2):
            block = f"{tower}.resblocks.{i}"
            w.add(f"{block}.attn.in_proj_weight", 3 * size, size)
            w.add(f"{block}.attn.in_proj_bias", 3 * size)
            w.add_linear(f"{block}.attn.out_proj", size, size)
            w.add_linear(f"{block}.mlp.c_fc", size, 4 * size)
            w.add_linear(f"{block}.mlp.c_proj", 4 * size, size)
            w.add_norm(f"{block}.ln_1", size)
            w.add_norm(f"{block}.ln_2", size)
    return w


def open_clip_cosines(w: Weights, pixels: torch.Tensor, tokens: list[list[int]], heads: int) -> torch.Tensor:
    """Cosine of each image and its text; texts end with their highest token."""

    def tower(name, x, mask=None):
        for i in range(2):
            block = f"{name}.resblocks.{i}"
            qkv = F.linear(
                w.norm(f"{block}.ln_1", x, 1e-5), w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]
            )
            x = x + w.linear(f"{block}.attn.out_proj", attend(*qkv.chunk(3, dim=-1), heads, mask))
            hidden = F.gelu(w.linear(f"{block}.mlp.c_fc", w.norm(f"{block}.ln_2", x, 1e-5)))
            x = x + w.linear(f"{block}.mlp.c_proj", hidden)
        return x

    patches = F.conv2d(pixels, w["visual.conv1.weight"], stride=14).flatten(2).mT
    x = torch.cat([w["visual.class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    x = tower("visual.transformer", w.norm("visual.ln_pre", x + w["visual.positional_embedding"], 1e-5))
    image_features = w.norm("visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]

    text_features = []
    for text in tokens:
        x = w["token_embedding.weight"][text] + w["positional_embedding"][: len(text)]
        causal = torch.full((len(text), len(text)), -torch.inf).triu(1)
        x = w.norm("ln_final", tower("transformer", x[None], causal), 1e-5)[0]
        text_features.append(x[max(range(len(text)), key=text.__getitem__)] @ w["text_projection"])
    return F.cosine_similarity(image_features, torch.stack(text_features))


MED_CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "add_cross_attention": True,
}


def image_reward_checkpoint(vocabulary: int) -> Weights:
    """ImageReward's weights: a ViT of two heads of 64 channels, patches of 16 in images of 32 pixels; text; head."""
    w, vit, text = Weights(1), "blip.visual_encoder", "blip.text_encoder"
    w.add(f"{vit}.cls_token", 1, 1, 128)
    w.add(f"{vit}.pos_embed", 1, 5, 128)
    w.add(f"{vit}.patch_embed.proj.weight", 128, 3, 16, 16)
    w.add(f"{vit}.patch_embed.proj.bias", 128)
    w.add_norm(f"{vit}.norm", 128)
    for i in range(2):
        block = f"{vit}.blocks.{i}"
        w.add_linear(f"{block}.attn.qkv", 128, 384)
        w.add_linear(f"{block}.attn.proj", 128, 128)
        w.add_linear(f"{block}.mlp.fc1", 128, 96)
        w.add_linear(f"{block}.mlp.fc2", 96, 128)
        w.add_norm(f"{block}.norm1", 128)
        w.add_norm(f"{block}.norm2", 128)
    w.add(f"{text}.embeddings.word_embeddings.weight", vocabulary, 32)
    w.add(f"{text}.embeddings.position_embeddings.weight", 40, 32)
    w[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    w.add_norm(f"{text}.embeddings.LayerNorm", 32)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for attention, width in (("attention", 32), ("crossattention", 128)):
            w.add_linear(f"{layer}.{attention}.self.query", 32, 32)
            w.add_linear(f"{layer}.{attention}.self.key", width, 32)
            w.add_linear(f"{layer}.{attention}.self.value", width, 32)
            w.add_linear(f"{layer}.{attention}.output.dense", 32, 32)
            w.add_norm(f"{layer}.{attention}.output.LayerNorm", 32)
        w.add_linear(f"{layer}.intermediate.dense", 32, 48)
        w.add_linear(f"{layer}.output.dense", 48, 32)
        w.add_norm(f"{layer}.output.LayerNorm", 32)
    w.add_linear("blip.vision_proj", 128, 8)  # trained with, and not used
    for i, (inputs, outputs) in {0: (32, 64), 2: (64, 16), 4: (16, 8), 6: (8, 4), 7: (4, 1)}.items():
        w.add_linear(f"mlp.layers.{i}", inputs, outputs)
    return w


def image_rewards(w: Weights, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards of images and texts (B, 35), padded where the mask is 0."""
    vit, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, w[f"{vit}.patch_embed.proj.weight"], w[f"{vit}.patch_embed.proj.bias"], stride=16)
    x = (
        torch.cat([w[f"{vit}.cls_token"].expand(len(pixels), 1, -1), patches.flatten(2).mT], dim=1)
        + w[f"{vit}.pos_embed"]
    )
    for i in range(2):
        block = f"{vit}.blocks.{i}"
        qkv = w.linear(f"{block}.attn.qkv", w.norm(f"{block}.norm1", x, 1e-6))
        x = x + w.linear(f"{block}.attn.proj", attend(*qkv.chunk(3, dim=-1), heads=2))
        hidden = F.gelu(w.linear(f"{block}.mlp.fc1", w.norm(f"{block}.norm2", x, 1e-6)))
        x = x + w.linear(f"{block}.mlp.fc2", hidden)
    image = w.norm(f"{vit}.norm", x, 1e-6)

    positions = w[f"{text}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = w[f"{text}.embeddings.word_embeddings.weight"][tokens] + positions
    x = w.norm(f"{text}.embeddings.LayerNorm", x, 1e-12)
    padding = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for attention, memory, bias in (("attention", None, padding), ("crossattention", image, None)):
            source = x if memory is None else memory
            query, key, value = (
                w.linear(f"{layer}.{attention}.self.{name}", y)
                for name, y in (("query", x), ("key", source), ("value", source))
            )
            seen = w.linear(f"{layer}.{attention}.output.dense", attend(query, key, value, 4, bias))
            x = w.norm(f"{layer}.{attention}.output.LayerNorm", x + seen, 1e-12)
        hidden = F.gelu(w.linear(f"{layer}.intermediate.dense", x))
        x = w.norm(f"{layer}.output.LayerNorm", x + w.linear(f"{layer}.output.dense", hidden), 1e-12)
    reward = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        reward = w.linear(f"mlp.layers.{i}", reward)
    return (reward[:, 0] - 0.16717362830052426) / 1.0333394966054072
