"""What becomes of one pair: label, decoding, the transform both images share, collation."""

import io

import numpy as np
import pytest
import torch
from helpers import encode
from orpo.pairs.image import decode_image
from orpo.pairs.labels import parse_label
from orpo.pairs.pair import PairTransform, PreferencePair, collate_pairs, sample_seed
from orpo.runtime.shapes import square
from PIL import Image


def gradient(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom, 0 to 255."""
    x = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8))


def pair_of(winner: Image.Image, loser: Image.Image, prompt: str = "a prompt") -> PreferencePair:
    return PreferencePair(encode(winner, "PNG"), encode(loser, "PNG"), prompt)


@pytest.mark.parametrize("label, value", [(1.0, 1.0), (0, 0.0), (0.5, 0.5), ("1.0", 1.0), ("0", 0.0), (" 0.5\n", 0.5)])
def test_labels_are_numbers_or_text_of_numbers(label, value):
    assert parse_label(label, "row 3") == value


@pytest.mark.parametrize("label", [None, float("nan"), 0.7, -1, 2, "yes", "", b"x", [1.0], "nan"])
def test_other_labels_name_row_and_value(label):
    with pytest.raises(ValueError) as raised:
        parse_label(label, "row 3")
    assert "row 3" in str(raised.value) and repr(label) in str(raised.value)


@pytest.mark.parametrize("size", [(64, 64), (100, 50), (50, 100), (37, 91), (640, 65)])
def test_aspect_ratio_is_kept(size):
    """The shorter side becomes the resolution; a stretched image would show the whole gradient along both sides."""
    width, height = size
    sample = PairTransform(square(32))(pair_of(gradient(*size), gradient(64, 64)), 0, 0, "row 0")
    red = sample["pixel_values"][0, :, :, 0].float().mean(dim=0)
    green = sample["pixel_values"][0, :, :, 1].float().mean(dim=1)
    shown = min(size) / width, min(size) / height  # of the gradient, horizontally and vertically
    assert (red[-1] - red[0]).item() == pytest.approx(255 * shown[0], abs=14)
    assert (green[-1] - green[0]).item() == pytest.approx(255 * shown[1], abs=14)
    assert sample["original_sizes"][0].tolist() == [height, width]


def test_each_image_keeps_its_own_size_and_crop():
    sample = PairTransform(square(32))(pair_of(gradient(96, 48), gradient(40, 120)), 0, 0, "row 0")
    assert sample["original_sizes"].tolist() == [[48, 96], [120, 40]]
    assert sample["crop_top_lefts"].tolist() == [[0, 16], [32, 0]]  # centres of 64x32 and 32x96


def test_centre_crop_and_no_flip_by_default():
    pair = pair_of(gradient(96, 48), gradient(48, 48))
    samples = [PairTransform(square(32))(pair, 0, seed, "row 0") for seed in range(20)]
    assert all(torch.equal(sample["pixel_values"], samples[0]["pixel_values"]) for sample in samples)
    red = samples[0]["pixel_values"][0, :, :, 0].float().mean(dim=0)
    assert red[0] < red[-1]
    assert red.mean().item() == pytest.approx(127.5, abs=2)


def test_flip_mirrors_both_images_or_neither():
    pair = pair_of(gradient(48, 48), gradient(48, 48))
    rises = []
    for seed in range(40):
        red = (
            PairTransform(square(32), random_flip=True)(pair, 0, seed, "row 0")["pixel_values"][:, :, :, 0]
            .float()
            .mean(dim=1)
        )
        rises.append((red[:, -1] > red[:, 0]).tolist())
    assert all(winner == loser for winner, loser in rises)
    assert 8 < sum(winner for winner, _ in rises) < 32


def test_random_crop_falls_on_the_same_part_of_both_images():
    """A wide and a wider image: the crops differ in pixels, not in the fraction of the room that they have."""
    pair = pair_of(gradient(64, 32), gradient(128, 32))
    lefts = [
        PairTransform(square(32), random_crop=True)(pair, 0, seed, "row 0")["crop_top_lefts"] for seed in range(40)
    ]
    fractions = np.array([(corner[0, 1].item() / 32, corner[1, 1].item() / 96) for corner in lefts])
    assert np.abs(fractions[:, 0] - fractions[:, 1]).max() < 0.03
    assert fractions.min() < 0.15 and fractions.max() > 0.85


def test_crop_corner_is_where_the_pixels_come_from():
    image = gradient(128, 32)
    sample = PairTransform(square(32), random_crop=True)(pair_of(image, image), 0, 5, "row 0")
    left = sample["crop_top_lefts"][0, 1].item()
    np.testing.assert_array_equal(sample["pixel_values"][0], np.asarray(image)[:, left : left + 32])


def test_share_of_empty_prompts():
    pair = pair_of(gradient(32, 32), gradient(32, 32))
    prompts = [
        PairTransform(square(32), proportion_empty_prompts=0.3)(pair, 0, seed, "row 0")["prompt"]
        for seed in range(200)
    ]
    assert set(prompts) == {"", "a prompt"}
    assert 40 <= prompts.count("") <= 80
    assert {PairTransform(square(32))(pair, 0, seed, "row 0")["prompt"] for seed in range(50)} == {"a prompt"}


def test_a_sample_depends_on_its_seed_alone():
    pair = pair_of(gradient(96, 48), gradient(64, 48))
    transform = PairTransform(square(32), random_crop=True, random_flip=True)
    first, again, other = (transform(pair, 0, seed, "row 0") for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_seeds_differ_between_seed_epoch_and_pair():
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(5) for i in range(50)}
    assert len(seeds) == 4 * 5 * 50


def test_upright_by_exif_and_rgb_from_any_mode():
    upright = gradient(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(file.getvalue(), "row 0")), np.asarray(upright))
    for mode, format in (("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")):
        assert decode_image(encode(upright.convert(mode), format), "row 0").mode == "RGB"


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not an image", lambda b: b[9:]]
)
def test_broken_images_name_their_place(damage):
    with pytest.raises(ValueError, match="row 7, winner"):
        decode_image(damage(encode(gradient(64, 64))), "row 7, winner")


def test_batches_hold_winners_before_losers():
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (48, 32), "blue")
    samples = [PairTransform(square(32))(pair_of(red, blue, f"prompt {i}"), 0, i, f"row {i}") for i in range(3)]
    batch = collate_pairs(samples)
    assert batch["pixel_values"].shape == (6, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"][:3, 0].eq(255).all() and batch["pixel_values"][3:, 2].eq(255).all()
    assert batch["original_sizes"].tolist() == [[32, 32]] * 3 + [[32, 48]] * 3
    assert batch["prompts"] == ["prompt 0", "prompt 1", "prompt 2"]
    assert batch["seeds"] == [0, 1, 2]
