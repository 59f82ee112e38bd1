"""A preference pair: two images, the transform that both go through together, and collation."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import ImagesConfig
from ..runtime.shapes import Shape
from .image import decode_at_least


# Part of the key of cached encodings. The number changes whenever an image would give other pixels.
TRANSFORM = 2

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class PreferencePair:
    """Two encoded images for one prompt, of which people preferred the first.

    Attributes:
        winner, loser: the images as encoded files, in a format that `image.py` takes.
        prompt: the caption of both.
        agreement: share of the votes that are for the winner; None if it is unknown.
    """

    winner: bytes
    loser: bytes
    prompt: str
    agreement: float | None = None


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of everything random about one pair in one epoch: 64 bits from (seed, epoch, index)."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class PairTransform:
    """Turns an encoded pair into tensors. Both images share everything random.

    Attributes:
        shapes: height and width in pixels of the buckets; a square alone is the default.
        random_crop: crop at a random place instead of the centre; both images at the same relative position.
        random_flip: mirror with probability 1/2.
        proportion_empty_prompts: probability that the prompt becomes the empty string.
        max_crop: share of an image's area that may be cut away; pairs that would lose more are left out.
    """

    shapes: tuple[Shape, ...]
    random_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    max_crop: float = 1.0

    @classmethod
    def from_config(cls, config: ImagesConfig) -> "PairTransform":
        return cls(
            config.shapes, config.random_crop, config.random_flip, config.proportion_empty_prompts, config.max_crop
        )

    @property
    def depends_on_sizes(self) -> bool:
        """Whether the sizes of a pair's images decide about its shape, or whether it is trained on."""
        return len(self.shapes) > 1 or self.max_crop < 1

    @property
    def plain(self) -> "PairTransform":
        """The same without anything random, for held-out pairs."""
        return PairTransform(self.shapes, max_crop=self.max_crop)

    def __call__(self, pair: PreferencePair, bucket: int, seed: int, where: str) -> dict:
        """Decodes and transforms one pair.

        Args:
            pair: the encoded pair.
            bucket: number of the shape (H, W) that both images get.
            seed: decides flip, crop and empty prompt; also passed on, for the noise.
            where: names the pair in errors.

        Returns:
            `pixel_values` uint8 (2, H, W, 3), winner first; `original_sizes` (2, 2) height and width; `crop_top_lefts`
            (2, 2) in pixels after resizing; `prompt`; `seed`.
        """
        flipped, crop, is_empty = self.sample(seed)
        sides = [(pair.winner, f"{where}, winner"), (pair.loser, f"{where}, loser")]
        shape = self.shapes[bucket]
        pixels, original_sizes, corners = zip(*(crop_image(*side, shape, flipped, crop) for side in sides))
        return {
            "pixel_values": torch.stack(pixels),
            "original_sizes": torch.tensor(original_sizes),
            "crop_top_lefts": torch.tensor(corners),
            "prompt": "" if is_empty else pair.prompt,
            "seed": seed,
        }

    def sample(self, seed: int) -> tuple[bool, tuple[float, float], bool]:
        """Samples whether a pair is mirrored, its relative crop position (y, x), and whether its prompt is empty."""
        flip, crop_y, crop_x, empty = np.random.default_rng(seed).random(4)
        crop = (crop_y, crop_x) if self.random_crop else CENTRE
        return bool(self.random_flip and flip < 0.5), crop, bool(empty < self.proportion_empty_prompts)


def crop_image(
    encoded: bytes, where: str, shape: Shape, flipped: bool = False, crop: tuple[float, float] = CENTRE
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Decodes an image, resizes it until it covers a shape, keeping the aspect ratio, and crops what stands out.

    Args:
        encoded: the image file.
        where: names it in errors.
        shape: height and width of the result.
        flipped: whether to mirror it.
        crop: place of the crop, (y, x), relative to the possible ones.

    Returns:
        Pixels uint8 (*shape, 3), original (height, width), and the crop's (top, left).
    """
    image, original_size, scale = decode_at_least(encoded, where, shape)
    fits = 0 if shape[0] * original_size[1] >= shape[1] * original_size[0] else 1  # the side that needs no crop
    size = [max(new, round(old * shape[fits] / original_size[fits])) for new, old in zip(shape, original_size)]
    pixels = torch.from_numpy(np.array(image))
    factors = [scale * new / old for new, old in zip(size, original_size)]
    if factors != [1, 1]:
        pixels = resize(pixels, size, factors)
    top, left = (round(u * (side - new)) for u, side, new in zip(crop, size, shape))
    if flipped:
        pixels = pixels.flip(1)
    pixels = pixels[top : top + shape[0], left : left + shape[1]]
    return pixels, original_size, (top, left)


def resize(pixels: torch.Tensor, size: list[int], factors: list[float]) -> torch.Tensor:
    """Resizes an image by antialiased bicubic interpolation.

    Args:
        pixels: uint8 (H, W, 3).
        size: height and width of the result.
        factors: new pixels for each old one, vertically and horizontally. H and W times these may exceed `size` by a
            pixel, which is cut off.

    Returns:
        Pixels uint8 (*size, 3): as Pillow's `resize` makes them, in a fifth of its time.
    """
    height, width = size
    never_less = [factor * (1 + 1e-9) for factor in factors]  # rounding would cost the last pixel
    planes = pixels.permute(2, 0, 1)[None]
    planes = F.interpolate(planes, scale_factor=never_less, mode="bicubic", antialias=True)[0, :, :height, :width]
    return planes.permute(1, 2, 0)


def collate_pairs(samples: list[dict]) -> dict:
    """Stacks B pairs of one shape into a batch, the B winners before the B losers.

    Args:
        samples: as `PairTransform` makes them, or, already encoded, with `moments` (2, 2C, h, w) in place of
            `pixel_values`, and `embeds`, tensors by name, in place of `prompt`.

    Returns:
        `pixel_values` (2B, 3, H, W) or `moments` (2B, 2C, h, w); `original_sizes` and `crop_top_lefts` (2B, 2); `prompts`,
        or `embeds` with tensors of B rows; `seeds`.
    """
    images = "moments" if "moments" in samples[0] else "pixel_values"
    batch = {
        name: torch.stack([sample[name] for sample in samples], dim=1).flatten(0, 1)
        for name in (images, "original_sizes", "crop_top_lefts")
    }
    if images == "pixel_values":
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        batch["prompts"] = [sample["prompt"] for sample in samples]
    else:
        batch["embeds"] = {
            name: torch.stack([sample["embeds"][name] for sample in samples]) for name in samples[0]["embeds"]
        }
    batch["seeds"] = [sample["seed"] for sample in samples]
    return batch
