"""A row as a sample of a shard: its checks, its members, and their place in the archive."""

import io
import tarfile
from collections.abc import Mapping

import pyarrow as pa

from ..pairs.bad_pair import BadPair
from ..pairs.columns import Columns
from ..pairs.image import MIN_SIDE, decode_at_least, open_image, place_of_image, upright_size
from ..pairs.labels import LOW_AGREEMENT, TIE


IMAGE_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}  # others: Pillow's name of the format


def read_pair(
    columns: Columns, cells: Mapping[str, pa.Scalar], where: str, keep_ties: bool = False
) -> tuple[float, dict[str, bytes]]:
    """Checks a row as training does; images are decoded at a small scale, to see whether they can be.

    Args:
        columns: of the table.
        cells: of the columns that are used.
        where: names the row in errors.
        keep_ties: whether a tie becomes a sample, too. Else it has no members, as a pair of low agreement has none, and
            is not looked at.

    Returns:
        The label, and the sample's members by extension: images as they are, labels and prompt as text.

    Raises:
        BadPair: label, image or prompt is bad; says which and why.
    """
    row = columns.read(cells, where, ties_too=keep_ties)
    if row.problems:
        raise row.problems[0]
    if row.label == LOW_AGREEMENT or row.label == TIE and not keep_ties:
        return row.label, {}
    members = {"original_prompt.txt": row.prompt.encode()}
    for name, column, image in zip(("jpg_0", "jpg_1"), columns.images, row.images):
        place = place_of_image(cells[column].as_py(), column, where)
        decode_at_least(image, place, (MIN_SIDE, MIN_SIDE))
        format = open_image(image, place).format
        members[f"{name}.{IMAGE_EXTENSIONS.get(format, format.lower())}"] = image
    members["label_0.txt"] = str(row.label).encode()
    members["label_1.txt"] = str(1 - row.label).encode()
    return row.label, members


def add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Appends a sample. Neither time nor owner is recorded, so the same rows give the same bytes."""
    for extension, content in members.items():
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def sizes_of(members: dict[str, bytes]) -> tuple[int, ...]:
    """Heights and widths of a sample's images, upright."""
    images = [members[name] for name in sorted(members) if name.startswith("jpg_")]
    return tuple(side for image in images for side in upright_size(open_image(image, "")))


def attempt(function, *args):
    """The result, or the BadPair that was raised."""
    try:
        return function(*args)
    except BadPair as bad:
        return bad
