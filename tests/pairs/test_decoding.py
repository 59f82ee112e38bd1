"""Decoding at a smaller scale, resizing and cropping, against float64 arithmetic on the fully decoded image."""

import io

import numpy as np
import pytest
import torch
from helpers import encode
from orpo.pairs.image import decode_at_least, decode_image
from orpo.pairs.pair import crop_image
from PIL import Image


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes of every size, and no symmetry: a shift, a stretch or a turn by anything shows."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128.0)
    for side in (3, 9, 27, 81):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += (
            (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128.0) * (3 / side) ** 0.5 / 2
        )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of bicubic interpolation (Keys, a = -0.5), its kernel widened where it shrinks."""
    ratio = old / new
    x = np.abs((np.arange(old) + 0.5) - (np.arange(new)[:, None] + 0.5) * ratio) / max(ratio, 1)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def expected(encoded: bytes, resolution: int) -> np.ndarray:
    """Decoded in full, resized in float64, cropped at the centre."""
    pixels = np.asarray(decode_image(encoded, "row 0"), dtype=np.float64)
    sides = pixels.shape[:2]
    height, width = (max(resolution, round(side * resolution / min(sides))) for side in sides)
    vertical, horizontal = bicubic(sides[0], height), bicubic(sides[1], width)
    resized = np.einsum("ih,hwc,jw->ijc", vertical, pixels, horizontal, optimize=True)
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    return resized[top : top + resolution, left : left + resolution].clip(0, 255)


def psnr(a: torch.Tensor | np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of values up to 255."""
    return 10 * np.log10(255**2 / (np.mean((np.asarray(a, dtype=np.float64) - b) ** 2) + 1e-12))


def shift(pixels: torch.Tensor, reference: np.ndarray) -> np.ndarray:
    """By how many pixels, down and right, an image lies beside another: least squares over the slopes of both sides."""
    inner = reference[1:-1, 1:-1]
    slopes = np.stack([reference[2:, 1:-1] - reference[:-2, 1:-1], reference[1:-1, 2:] - reference[1:-1, :-2]]) / 2
    difference = inner - pixels.numpy().astype(np.float64)[1:-1, 1:-1]
    return np.linalg.lstsq(slopes.reshape(2, -1).T, difference.ravel(), rcond=None)[0]


SIZES = [(512, 512), (513, 511), (517, 389), (400, 611), (1029, 517), (255, 255), (96, 96), (100, 128), (128, 700)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive", "CMYK", "L"])
def test_a_jpeg_at_a_smaller_scale_shows_the_same_in_the_same_place(size, kind):
    options = {"4:4:4": {"subsampling": 0}, "progressive": {"progressive": True}}.get(kind, {})
    encoded = jpeg(picture(*size, kind if kind in ("CMYK", "L") else "RGB"), **options)
    pixels, original_size, _ = crop_image(encoded, "row 0", (128, 128))
    reference = expected(encoded, 128)
    assert original_size == size[::-1]
    assert psnr(pixels, reference) > 40
    assert np.abs(shift(pixels, reference)).max() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(520, 400), (517, 389)])
def test_turned_and_mirrored_jpegs_are_upright_and_in_place(orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = jpeg(picture(*size), exif=exif)
    pixels, original_size, corner = crop_image(encoded, "row 0", (128, 128), crop=(0.5, 0.5))
    upright = decode_image(encoded, "row 0")
    assert original_size == (upright.height, upright.width)
    assert corner == crop_image(encode(upright, "PNG"), "row 0", (128, 128))[2]
    reference = expected(encoded, 128)
    assert psnr(pixels, reference) > 40
    assert np.abs(shift(pixels, reference)).max() < 0.02


@pytest.mark.parametrize("size, side", [((512, 512), 128), ((512, 512), 512), ((515, 2000), 128), ((127, 127), 128)])
def test_the_smallest_scale_that_is_large_enough_is_decoded(size, side):
    """Not below `side`, and the next smaller of 1, 1/2, 1/4 and 1/8 would be."""
    image, original_size, scale = decode_at_least(jpeg(picture(*size)), "row 0", (side, side))
    assert image.size == tuple(-(-pixels // scale) for pixels in size)
    assert scale == max(s for s in (1, 2, 4, 8) if s == 1 or min(size) // s >= side)


@pytest.mark.parametrize("size", [(100, 100), (64, 96), (301, 200), (900, 33), (40, 40)])
def test_other_formats_are_resized_as_float64_says_and_as_pillow_does(size):
    image = picture(*size)
    for resolution in (32, 64):
        encoded = encode(image, "PNG")
        pixels = crop_image(encoded, "row 0", (resolution, resolution))[0]
        assert np.abs(pixels.numpy() - expected(encoded, resolution)).max() < 1.5  # rounded after either direction
        height, width = (max(resolution, round(side * resolution / min(size))) for side in image.size[::-1])
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
        pillow = image.resize((width, height), Image.Resampling.BICUBIC)
        pillow = np.asarray(pillow)[top : top + resolution, left : left + resolution].astype(int)
        assert np.abs(pixels.numpy() - pillow).max() <= 1


def test_an_image_of_the_right_size_passes_unchanged():
    image = picture(128, 128)
    assert np.array_equal(crop_image(encode(image, "PNG"), "row 0", (128, 128))[0], np.asarray(image))
    encoded = jpeg(image)
    assert np.array_equal(crop_image(encoded, "row 0", (128, 128))[0], np.asarray(decode_image(encoded, "row 0")))


@pytest.mark.parametrize("size", [(128, 128), (300, 200)])
def test_mirrored_pixels_are_those_of_the_mirrored_image(size):
    encoded = encode(picture(*size), "PNG")
    mirrored = encode(picture(*size).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG")
    a = crop_image(encoded, "row 0", (64, 64), flipped=True, crop=(0.2, 0.7))[0].int()
    b = crop_image(mirrored, "row 0", (64, 64), crop=(0.2, 0.7))[0].int()
    assert (a - b).abs().max() <= 1


def test_a_broken_tail_is_found_at_any_scale():
    encoded = jpeg(picture(1024, 1024))
    for decode in (decode_image, lambda *a: decode_at_least(*a, (64, 64))):
        with pytest.raises(ValueError, match="row 7"):
            decode(encoded[: len(encoded) * 9 // 10], "row 7")
