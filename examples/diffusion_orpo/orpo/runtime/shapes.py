"""The shapes that images are cropped to: a square, or the aspect-ratio buckets that the flags name.

A shape is (height, width) in pixels. This module is read while flags are checked, so it imports nothing heavy.
"""

import re


Shape = tuple[int, int]

MAX_AREA = 1 << 26  # pixels, of a bucket and of an image
MAX_ASPECT = 32  # longer side to shorter

WIDEST = 2  # sides of the buckets that are made from --resolution, longer to shorter
SMALLEST = 0.9  # their area, in squares
STEP = 16  # pixels: every family takes multiples of it


def parse_shapes(buckets: str | bool | None, resolution: int) -> tuple[Shape, ...]:
    """The shapes that a value of --aspect_ratio_buckets stands for.

    Args:
        buckets: "height,width;height,width;..." as diffusers' scripts take it, and "height,width;" for one shape alone; True
            for shapes of the square's area; None or False for the square alone.
        resolution: pixels a side of the square.

    Raises:
        ValueError: it can't be read, is or makes an empty list, names a shape twice, or one that no image has.
    """
    if buckets is None or buckets is False:
        return square(resolution)
    if buckets is True:
        if not shapes_of_area(resolution):
            raise ValueError(
                f"--aspect_ratio_buckets: no shape with sides in multiples of {STEP} has nearly the area of"
                f" --resolution={resolution}. List the shapes, or raise the resolution."
            )
        return shapes_of_area(resolution)
    shapes = []
    for text in buckets.strip().removesuffix(";").split(";"):
        match = re.fullmatch(r"\s*0*([1-9]\d*)\s*,\s*0*([1-9]\d*)\s*", text)
        if match is None:
            raise ValueError(
                f"--aspect_ratio_buckets={buckets}: {text.strip() or 'an empty entry'} is not a height and a width. Write"
                ' "1024,1024;832,1216;1216,832", or leave the value out for shapes of the area of --resolution.'
            )
        shapes.append((int(match[1]), int(match[2])))
    if ";" not in buckets:
        raise ValueError(
            f"--aspect_ratio_buckets={buckets} is one shape alone: a shell ends a command at a semicolon that is not in"
            ' quotes. Write --aspect_ratio_buckets="1024,1024;832,1216;1216,832"; if one shape is meant, end it with a'
            f' semicolon: --aspect_ratio_buckets="{buckets.strip()};".'
        )
    twice = next((shape for shape in shapes if shapes.count(shape) > 1), None)
    if twice:
        raise ValueError(f"--aspect_ratio_buckets={buckets} names {name_of(twice)} twice.")
    for shape in shapes:
        if shape[0] * shape[1] > MAX_AREA or max(shape) > MAX_ASPECT * min(shape):
            raise ValueError(
                f"--aspect_ratio_buckets={buckets}: {name_of(shape)} is too large or too narrow. An image has at most"
                f" {MAX_AREA} pixels, and a side at most {MAX_ASPECT} times as long as the other."
            )
    return tuple(shapes)


def square(resolution: int) -> tuple[Shape, ...]:
    """The one shape that there is without buckets."""
    return ((resolution, resolution),)


def shapes_of_area(resolution: int) -> tuple[Shape, ...]:
    """Shapes whose area is at most that of a square and nearly as large, from 1 : 2 to 2 : 1.

    At 1024 these are shapes that SDXL was trained at: sides in steps of 64 pixels, and beside each the longest that the area
    allows.
    """
    step, area = max(STEP, resolution // 16 // STEP * STEP), resolution * resolution
    shapes = set()
    for shorter in range(step, resolution + 1, step):
        longer = min(area // shorter // step * step, WIDEST * shorter)
        if shorter * longer >= SMALLEST * area:
            shapes |= {(shorter, longer), (longer, shorter)}
    return tuple(sorted(shapes))


def name_of(shape: Shape) -> str:
    """The shape in messages and files: height x width."""
    return f"{shape[0]}x{shape[1]}"
