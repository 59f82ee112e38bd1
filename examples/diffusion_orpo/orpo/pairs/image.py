"""Which encoded images are accepted, and how they become RGB pixels. The data is scraped: nothing is taken on trust."""

import io
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from ..runtime.messages import printable
from ..runtime.shapes import MAX_AREA, MAX_ASPECT, Shape
from .bad_pair import BadPair


# Pillow knows forty more, among them one that starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")

MAX_FILE_BYTES = 1 << 28  # 256 MiB: more than MAX_PIXELS take uncompressed
MAX_PIXELS = MAX_AREA  # 8192 x 8192; Pillow takes 4 bytes for each
MIN_SIDE = 8  # pixels; the VAE makes one latent of 8 x 8
MAX_SCANS = 100  # of a JPEG: a progressive one has about 10, and each costs a pass over all pixels

# Part of the key of cached checks. The number changes whenever other images are refused.
DECODER = f"2, Pillow {PIL.__version__}"

EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations of an image that lies on its side

OTHER_MODES = {"I", "F", "LAB", "HSV"}  # the range of their values is unknown


def open_image(encoded: bytes, where: str) -> Image.Image:
    """Reads an image's header; its pixels are not decoded yet.

    A PNG's checksums are compared, too. Other formats have none.

    Args:
        encoded: the image file's bytes.
        where: names the image in the error.

    Raises:
        BadPair: it is in none of FORMATS, is damaged, or lies outside the limits above.
    """
    try:
        image = _open(encoded)
        problem = _beyond_limits(encoded, image)
        if problem is None and image.format == "PNG":
            image.verify()
            image = _open(encoded)
    except UnidentifiedImageError:
        problem = f"it is in none of the formats {', '.join(FORMATS)}, or damaged at its beginning"
    except Exception as error:  # Pillow raises half a dozen types, SyntaxError among them
        problem = printable(str(error))
    if problem is not None:
        raise BadPair("undecodable image", f"not a readable image ({problem})", where)
    return image


class Decoded(NamedTuple):
    """An upright RGB image, perhaps smaller than its file's.

    Attributes:
        image: its pixels; where a side of the original is not a multiple of `scale`, its last pixels are missing.
        original_size: height and width in the file, upright.
        scale: pixels of the file for each of the image's, 1, 2, 4 or 8.
    """

    image: Image.Image
    original_size: tuple[int, int]
    scale: int


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """Decodes an image to RGB, upright: the first frame of an animation, and transparent areas over white.

    Colours are taken as sRGB, whatever profile the file carries; CMYK is converted without one.

    Args:
        encoded: the image file's bytes.
        where: names the image in the error.

    Raises:
        BadPair: `open_image` refuses it, or it can't be decoded to its end.
    """
    return _decode(encoded, where, None).image


def decode_at_least(encoded: bytes, where: str, shape: Shape) -> Decoded:
    """The same, but a JPEG is decoded at the smallest scale at which it still covers `shape`.

    From each block of 8 x 8 pixels, which a JPEG stores as frequencies, 4 x 4, 2 x 2 or 1 x 1 pixels are made using the
    lowest frequencies only: half, a quarter or an eighth of its size, in less time than decoding and resizing take.

    Args:
        encoded, where: as for `decode_image`, and the same is raised.
        shape: height and width, of the upright image.
    """
    return _decode(encoded, where, shape)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image of `open_image`, once it is upright."""
    width, height = image.size
    return (width, height) if image.getexif().get(EXIF_ORIENTATION, 1) in TURNED else (height, width)


def _decode(encoded: bytes, where: str, shape: Shape | None) -> Decoded:
    image = open_image(encoded, where)
    width, height = image.size
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        # After rotation or mirroring, missing pixels would be at the left or the top.
        can_shrink = shape is not None and (orientation == 1 or width % 8 == height % 8 == 0)
        lying = shape and (shape if orientation in TURNED else shape[::-1])  # width and height, as the file has them
        drafted = image.draft(None, lying) if can_shrink else None  # None for other formats too
        scale = round(width / drafted[1][2]) if drafted else 1
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        original_size = (width, height) if orientation in TURNED else (height, width)
        return Decoded(_to_rgb(image), original_size, scale)
    except Exception as error:
        raise BadPair("undecodable image", f"not a readable image ({printable(str(error))})", where) from error


def _open(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _beyond_limits(encoded: bytes, image: Image.Image) -> str | None:
    width, height = image.size
    if len(encoded) > MAX_FILE_BYTES:
        return f"it has {len(encoded)} bytes, more than {MAX_FILE_BYTES}"
    if width * height > MAX_PIXELS:
        return f"it is {width} x {height}, more than {MAX_PIXELS} pixels"
    if min(width, height) < MIN_SIDE:
        return f"it is {width} x {height}, a side is shorter than {MIN_SIDE} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"it is {width} x {height}, a side is more than {MAX_ASPECT} times the other"
    if image.format in ("JPEG", "MPO") and _count_scans(encoded) > MAX_SCANS:
        return f"it is a JPEG of more than {MAX_SCANS} scans"
    if image.mode in OTHER_MODES:
        return f"its pixels have Pillow's mode {image.mode}, whose range of values is unknown"
    return None


def _count_scans(encoded: bytes) -> int:
    """Counts a JPEG's scans by their marker FF DA, at even and at odd offsets: ten times faster than bytes.count."""
    pairs = (np.frombuffer(encoded, "<u2", (len(encoded) - offset) // 2, offset) for offset in (0, 1))
    return sum(np.count_nonzero(words == 0xDAFF) for words in pairs)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        if "transparency" in image.info:
            raise ValueError("it is 16-bit grey with a transparent colour")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
