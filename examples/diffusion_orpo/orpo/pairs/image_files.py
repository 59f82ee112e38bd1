"""Cells that hold images: encoded bytes, a struct of bytes and a path, or the path of a file as text."""

import os
import stat
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from ..runtime.messages import printable
from .bad_pair import BadPair


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
