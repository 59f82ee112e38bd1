"""Which encoded images are accepted, and how they become RGB pixels; and which cells of a table hold them.

The data is scraped: nothing is taken on trust.
"""

import io
import os
import stat
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import PIL
import pyarrow as pa
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


# Cells that hold images: encoded bytes, a struct of bytes and a path, or the path of a file as text.


@dataclass(frozen=True)
class ImageFiles:
    """The image files that a table may name. A table from elsewhere could name any file of this machine.

    Attributes:
        listed: whether the paths of structs without bytes may be opened, since they come from listing a folder.
        root: the folder that paths as text start from, and must stay in. None: text is not accepted.
    """

    listed: bool = False
    root: Path | None = None

    def find(self, name: str) -> Path:
        """The file that a path as text stands for. Windows' separators, and file:// before an absolute path, are understood.

        Raises:
            ValueError: it is outside the folder, by `..` or by a link; or a URL, or something other than a file.
            OSError: it does not exist, or can't be looked at.
        """
        root = _real(str(self.root))
        if name.startswith("file://"):
            name = unquote(urlsplit(name).path)
        elif "://" in name:
            raise ValueError("it is a URL: download the images first")
        if PureWindowsPath(name).drive:
            raise ValueError(
                "it starts with a drive of Windows: write paths relative to the images' folder, and name that by --image_root"
            )
        spellings = dict.fromkeys([name, name.replace("\\", "/")])
        spellings |= {unicodedata.normalize(form, spelling): None for spelling in spellings for form in ("NFC", "NFD")}
        name = next((spelling for spelling in spellings if os.path.lexists(os.path.join(root, spelling))), name)
        folder, file = os.path.split(os.path.join(root, name))
        path = os.path.join(_real(folder), file)
        if file in ("", os.curdir, os.pardir) or os.path.islink(path):
            path = os.path.realpath(path)
        if not is_inside(path, root):
            raise ValueError(f"it is outside {root}: name a folder that holds all images by --image_root")
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("it is not a file")
        return Path(path)


@lru_cache(10_000)
def _real(folder: str) -> str:
    """A folder with its links resolved. Cached, since a million images may be in it."""
    return os.path.realpath(folder)


def is_inside(path: str, root: str) -> bool:
    """Whether a resolved path lies in a resolved folder, or, if that is in the Hub's cache, among the files its links lead to."""
    roots = [root]
    parts = Path(root).parts
    if "snapshots" in parts:  # .../datasets--OWNER--NAME/snapshots/REVISION/..., with all files in .../blobs
        roots.append(str(Path(*parts[: len(parts) - parts[::-1].index("snapshots") - 1], "blobs")))
    return any(os.path.commonpath([folder, path]) == folder for folder in roots)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def names_files(kind: pa.DataType) -> bool:
    """Whether a column of images holds paths as text."""
    return is_text(kind.value_type if is_list(kind) else kind)


def read_image(cell: pa.Scalar, column: str, where: str = "", files: ImageFiles = ImageFiles()) -> bytes:
    """The bytes of an image file.

    Args:
        cell: holds them, is a struct of them and a path, or is a path.
        column: its name.
        where: names the row in errors.
        files: those that may be read.

    Raises:
        BadPair: there are none, or the file can't be read or is not allowed.
    """
    try:
        image = cell.as_py()
    except (ValueError, OverflowError) as error:  # a UnicodeDecodeError is a ValueError
        raise BadPair("missing image", f"{column} can't be read: {printable(str(error))}", where) from error
    where = place_of_image(image, column, where)
    content = image.get("bytes") if isinstance(image, dict) else image
    path = image.get("path") if isinstance(image, dict) else content if isinstance(content, str) else None
    if content and content is not path:
        return content
    if not path:
        raise BadPair("missing image", "it is empty", where)
    try:
        if content is path and files.root is not None:
            return files.find(path).read_bytes()
        if files.listed and content is not path:
            return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise BadPair("missing image", printable(str(error)), where, MISSING_ADVICE) from error
    raise BadPair("missing image", "it holds a path and no image", where)


MISSING_ADVICE = "Put the file there, or remove the pair."


def place_of_image(image: object, column: str, where: str) -> str:
    """Names an image in messages: by row, column and, where that is known, file.

    Args:
        image: the cell's value.
        column: its name.
        where: names the row.
    """
    path = image.get("path") if isinstance(image, dict) else image
    file = f" ({printable(Path(path).name)})" if isinstance(path, str) else ""
    return ", ".join(filter(None, (where, f"{column}{file}")))


def check_image_column(kind: pa.DataType, column: str, where: str, paths: bool, lists: bool) -> None:
    """
    Args:
        kind: of the column.
        lists: whether a cell holds all the images of a prompt.
        column, where: name it and the table in the error.
        paths: whether it may hold paths as text.

    Raises:
        ValueError: the column holds neither encoded images nor structs of them and their paths, nor lists of these.
    """
    image = kind.value_type if lists and is_list(kind) else kind
    content = image.field("bytes").type if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 else image
    if pa.types.is_binary(content) or pa.types.is_large_binary(content) or paths and is_text(image):
        return
    advice = ""
    if is_text(image):
        advice = " If these are paths of files on this machine, name the folder that they start from: --image_root."
    raise ValueError(f"{where}: column {column} holds {kind}, not images or their encoded bytes.{advice}")
