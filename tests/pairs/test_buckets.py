"""Which shape a pair gets, and what that costs it."""

import numpy as np
import pytest
from orpo.pairs.buckets import assign, cut_away
from orpo.pairs.pair import crop_image
from orpo.runtime.shapes import parse_shapes, shapes_of_area
from PIL import Image

from tests.helpers import encode


SHAPES = ((64, 64), (48, 80), (80, 48))


def cropped_area(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """Share of an image's area that a crop drops, measured on an image that counts its own pixels."""
    height, width = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    pixels = crop_image(encode(Image.fromarray(ramps), "PNG"), "", shape)[0].double()
    kept = [(pixels[..., c].amax() - pixels[..., c].amin()).item() / 255 for c in (0, 1)]
    return 1 - kept[0] * kept[1]


@pytest.mark.parametrize("size", [(256, 256), (200, 400), (450, 150), (321, 500)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_cut_away_is_what_the_crop_drops(size, shape):
    told = cut_away(np.array([[size]]), np.array(shape))[0, 0]
    assert told == pytest.approx(cropped_area(size, shape), abs=0.06)  # edges are blurred by resizing


def test_a_pair_takes_the_shape_at_which_the_worse_off_image_loses_least():
    """By trying all shapes, for random pairs."""
    sizes, shapes = np.random.default_rng(0).integers(64, 900, (300, 2, 2)), shapes_of_area(512)
    found = assign(sizes, shapes)
    for pair, bucket, cut in zip(sizes, found.buckets, found.cut):
        worst = [cut_away(pair[None], np.array(shape)).max() for shape in shapes]
        assert worst[bucket] == pytest.approx(min(worst)) and cut.max() == pytest.approx(worst[bucket])
    swapped = assign(sizes[:, ::-1], shapes)
    assert np.array_equal(swapped.buckets, found.buckets)  # whoever won


def test_images_of_unlike_shapes_meet_in_between_and_are_told():
    sizes = np.array([[(64, 64), (64, 64)], [(48, 80), (80, 48)], [(480, 800), (48, 80)]])
    found = assign(sizes, SHAPES)
    assert found.buckets.tolist() == [0, 0, 1] and found.of_unlike_shapes.tolist() == [False, True, False]
    assert found.cut[1] == pytest.approx([0.4, 0.4])


def test_of_shapes_alike_the_largest_that_enlarges_nothing_is_taken():
    shapes = ((128, 128), (64, 64), (256, 256))
    sizes = np.array([[(n, n), (m, m)] for n, m in [(1000, 300), (200, 1000), (128, 128), (40, 1000)]])
    assert assign(sizes, shapes).buckets.tolist() == [2, 0, 0, 1]


def test_the_shapes_of_sdxl():
    """Of each height in appendix I of arXiv 2307.01952, within 1:2, the one with the largest width."""
    published = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    assert set(shapes_of_area(1024)) == published | {(width, height) for height, width in published}


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1000, 1024])
def test_shapes_have_nearly_the_area_of_the_square(resolution):
    for height, width in shapes_of_area(resolution):
        assert height % 16 == width % 16 == 0 and height * width <= resolution**2
        assert height * width > 0.75 * resolution**2 and max(height, width) <= 2 * min(height, width)


@pytest.mark.parametrize(
    "text", ["", ";", "64", "64,64", "64,64;;", "64x64", "64,0", "-64,64", "64,64;64,64", "64.0,64"]
)
def test_a_list_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--aspect_ratio_buckets"):
        parse_shapes(text, 64)


@pytest.mark.parametrize("resolution", [8, 24])
def test_a_resolution_that_makes_no_shapes_is_refused(resolution):
    with pytest.raises(ValueError, match="no shape with sides in multiples of 16"):
        parse_shapes(True, resolution)


def test_a_list_is_read_as_diffusers_reads_it():
    from diffusers.training_utils import parse_buckets_string

    text = "64,64; 48 , 80;80,48"
    assert list(parse_shapes(text, 1024)) == parse_buckets_string(text)
