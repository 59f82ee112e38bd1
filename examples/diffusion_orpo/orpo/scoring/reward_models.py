"""The published reward models of images, on transformers' own classes: CLIP score, PickScore, HPSv2, ImageReward, aesthetics.

Each computes in float32 what its authors' code computes: the same preprocessing, text length, scale and weights. Their
packages are not needed, nor torchvision.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from .checkpoint_layouts import convert_open_clip, load_blip_vision, load_linear_head, weights_under


CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, and BLIP's


def crop_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """Shorter side to `size`, bicubic, as 8-bit pixels; centre crop; normalization.

    Source: `_transform` of openai/CLIP, and of THUDM/ImageReward.

    Returns:
        (N, 3, size, size).
    """
    pixels = []
    for image in images:
        width, height = (size * side // min(image.size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels.append(_normalized(image.crop((left, top, left + size, top + size))))
    return torch.stack(pixels)


def pad_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """Longer side to `size`, bicubic with antialiasing, as floats that are not clipped; black bars; normalization.

    Source: `image_transform` of tgxs002/HPSv2 as its `score` calls it, with `resize_longest_max`.

    Returns:
        (N, 3, size, size).
    """
    pixels = []
    for image in images:
        scale = size / max(image.size)
        width, height = (round(scale * side) for side in image.size)
        resized = _pixels(image)[None]
        if scale != 1:
            resized = F.interpolate(resized, (height, width), mode="bicubic", antialias=True, align_corners=False)
        left, top = (size - width) // 2, (size - height) // 2
        padded = F.pad(resized[0], (left, size - width - left, top, size - height - top))
        pixels.append(_normalize(padded))
    return torch.stack(pixels)


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _normalize(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _normalized(image: Image.Image) -> torch.Tensor:
    return _normalize(_pixels(image))


@dataclass
class ClipSimilarity:
    """Cosine between the embeddings of image and prompt, times a scale.

    Attributes:
        model: a CLIP.
        tokenizer: its own; prompts are cut to 77 tokens.
        prepare: (images, size) -> pixels, the authors' preprocessing.
        scale: of the score.
    """

    model: CLIPModel
    tokenizer: object
    prepare: Callable
    scale: float

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        pixels = self.prepare(images, self.model.config.vision_config.image_size)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        output = self.model(pixel_values=pixels.to(self.model.device), **tokens.to(self.model.device))
        return (self.scale * (output.image_embeds * output.text_embeds).sum(dim=-1)).tolist()


def load_clip_score(device) -> ClipSimilarity:
    """100 times the cosine of OpenAI's CLIP ViT-L/14: whether the image shows the prompt."""
    model = CLIPModel.from_pretrained(CLIP_L, dtype=torch.float32).to(device).eval()
    return ClipSimilarity(model, AutoTokenizer.from_pretrained(CLIP_L), crop_pixels, 100.0)


def load_pickscore(device) -> ClipSimilarity:
    """PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on Pick-a-Pic. Source: yuvalkirstain/PickScore's README."""
    model = CLIPModel.from_pretrained("yuvalkirstain/PickScore_v1", dtype=torch.float32).to(device).eval()
    return ClipSimilarity(model, AutoTokenizer.from_pretrained(CLIP_H), crop_pixels, model.logit_scale.exp().item())


def load_hpsv2(device) -> ClipSimilarity:
    """HPS v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 trained on HPD. Source: `score` of tgxs002/HPSv2.

    Its checkpoint has the layout of open_clip. Its authors' tokenizer also straightens curly quotes in prompts.
    """
    path = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    state_dict = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = CLIPModel(CLIPConfig.from_pretrained(CLIP_H))
    model.load_state_dict(convert_open_clip(state_dict))
    return ClipSimilarity(
        model.float().to(device).eval(), AutoTokenizer.from_pretrained(CLIP_H), pad_pixels, scale=1.0
    )


@dataclass
class Aesthetic:
    """A linear head on the normalized image embedding of CLIP ViT-L/14; the prompt is ignored."""

    clip: CLIPVisionModelWithProjection
    head: nn.Sequential

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        pixels = crop_pixels(images, self.clip.config.image_size)
        embeds = self.clip(pixel_values=pixels.to(self.clip.device)).image_embeds
        return self.head(F.normalize(embeds, dim=-1))[:, 0].tolist()


def load_aesthetic(device) -> Aesthetic:
    """LAION's aesthetic predictor, sac+logos+ava1, from 1 to 10. Source: christophschuhmann/improved-aesthetic-predictor."""
    clip = CLIPVisionModelWithProjection.from_pretrained(CLIP_L, dtype=torch.float32).to(device).eval()
    path = hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    return Aesthetic(clip, load_linear_head(state_dict, prefix="layers.").to(device))


@dataclass
class ImageReward:
    """A BLIP whose text encoder, looking at the image, is read out at the first token."""

    vision: BlipVisionModel
    text: BlipTextModel
    tokenizer: object
    head: nn.Sequential

    mean, std = 0.16717362830052426, 1.0333394966054072  # of the rewards, in the authors' code

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        device = self.vision.device
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(
            device
        )
        image_embeds = self.vision(crop_pixels(images, self.vision.config.image_size).to(device)).last_hidden_state
        hidden_states = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return ((self.head(hidden_states[:, 0])[:, 0] - self.mean) / self.std).tolist()


def load_image_reward(device) -> ImageReward:
    """ImageReward v1.0 (arXiv 2304.05977). Source: THUDM/ImageReward. Its checkpoint has the layout of salesforce/BLIP."""
    path = hf_hub_download("THUDM/ImageReward", "ImageReward.pt")
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    with open(hf_hub_download("THUDM/ImageReward", "med_config.json")) as file:
        text_config = json.load(file)
    vision = load_blip_vision(weights_under("blip.visual_encoder.", state_dict))
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
        " hidden_act layer_norm_eps"
    ).split()
    text = BlipTextModel(
        BlipTextConfig(
            **{name: text_config[name] for name in names},
            encoder_hidden_size=vision.config.hidden_size,
            is_decoder=True,  # gives it the layers that look at the image; `forward` still masks nothing
        ),
        add_pooling_layer=False,
    )
    weights = weights_under("blip.text_encoder.", state_dict)
    weights.pop("embeddings.position_ids", None)
    text.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    head = load_linear_head(state_dict, prefix="mlp.layers.")
    return ImageReward(vision.to(device).eval(), text.to(device).eval(), tokenizer, head.to(device))


# Name: how it is loaded, and which files of the Hub it needs, as `hf download` takes them.
TOKENIZER = '--include "*.json"'
REWARD_MODELS = {
    "pickscore": (load_pickscore, ("yuvalkirstain/PickScore_v1", f"{CLIP_H} {TOKENIZER}")),
    "hpsv2": (load_hpsv2, ("xswu/HPSv2 HPS_v2.1_compressed.pt", f"{CLIP_H} {TOKENIZER}")),
    "imagereward": (load_image_reward, ("THUDM/ImageReward", f"google-bert/bert-base-uncased {TOKENIZER}")),
    "aesthetic": (load_aesthetic, (CLIP_L, "trl-lib/ddpo-aesthetic-predictor")),
    "clip": (load_clip_score, (CLIP_L,)),
}
