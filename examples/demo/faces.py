"""The demo's task: drawn faces, the prompts that name them, and the smile that the labels prefer.

A prompt names a face's colour, kind and background. It never names the mouth, whose curvature is free: that freedom
is what the preference pairs decide about.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


RESOLUTION = 64
COLORS = {"red": (232, 72, 60), "yellow": (244, 204, 48), "green": (76, 206, 96), "blue": (84, 136, 244)}
BACKGROUNDS = {"white": (250, 250, 250), "black": (16, 16, 16)}
KINDS = ("ball", "box", "cat")
INK = (20, 20, 20)


@dataclass(frozen=True)
class Kind:
    """What a prompt asks for."""

    color: str
    kind: str
    background: str

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.kind} with a face, {self.background} background"


ALL_KINDS = tuple(Kind(*names) for names in itertools.product(COLORS, KINDS, BACKGROUNDS))


def _outline(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill) -> None:
    if kind == "box":
        draw.rounded_rectangle((x - r, y - r, x + r, y + r), radius=0.25 * r, fill=fill)
        return
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    if kind == "cat":
        for side in (-1, 1):
            draw.polygon(
                [
                    (x + side * 0.98 * r, y - 0.1 * r),
                    (x + side * 0.9 * r, y - 1.3 * r),
                    (x + side * 0.1 * r, y - 0.9 * r),
                ],
                fill=fill,
            )


def draw_face(kind: Kind, curvature: float, size: float = 22.0, x: float = 32.0, y: float = 33.0) -> Image.Image:
    """Draws one face.

    Args:
        kind: colour, kind and background.
        curvature: of the mouth, from -1 (frown) over 0 (straight) to 1 (smile).
        size: half the face's width in pixels.
        x, y: the face's centre in pixels.

    Returns:
        An RGB image of `RESOLUTION` pixels a side.
    """
    scale = 4  # drawn large and reduced: smooth edges
    image = Image.new("RGB", (RESOLUTION * scale,) * 2, BACKGROUNDS[kind.background])
    draw = ImageDraw.Draw(image)
    cx, cy, r = x * scale, y * scale, size * scale
    _outline(draw, kind.kind, cx, cy, r, COLORS[kind.color])
    for side in (-1, 1):
        ex, ey, er = cx + side * 0.38 * r, cy - 0.28 * r, 0.13 * r
        draw.ellipse((ex - er, ey - er, ex + er, ey + er), fill=INK)
    pen = 0.07 * r
    for u in np.linspace(-1, 1, 81):
        mx, my = cx + 0.5 * r * u, cy + 0.4 * r - 0.36 * r * curvature * (u**2 - 1 / 3)
        draw.ellipse((mx - pen, my - pen, mx + pen, my + pen), fill=INK)
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)


def random_face(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """Draws a face whose kind, mouth, size and place are all left to chance; returns it with its prompt."""
    kind = ALL_KINDS[rng.integers(len(ALL_KINDS))]
    x, y = 32 + rng.uniform(-2, 2), 34 + rng.uniform(-2, 2)
    return draw_face(kind, rng.uniform(-1, 1), rng.uniform(20, 24), x, y), kind.prompt


@dataclass(frozen=True)
class Reading:
    """What `read_face` found in an image.

    Attributes:
        kind: the nearest kind, by colour, background and outline.
        fit: overlap of the face's outline with that kind's own, from 0 to 1 (intersection over union).
        smile: curvature of the mouth, in the units of `draw_face`; -1, the worst, where there is no mouth.
    """

    kind: Kind
    fit: float
    smile: float


def _mask_templates() -> dict[str, list[np.ndarray]]:
    templates = {}
    for kind in KINDS:
        drawn = (draw_face(Kind("red", kind, "black"), 0, size, 32, 32) for size in np.arange(18, 26, 0.5))
        templates[kind] = [_foreground(np.asarray(image, dtype=np.float64), "black") for image in drawn]
    return templates


def _foreground(pixels: np.ndarray, background: str) -> np.ndarray:
    """The face's area: what differs from the background, with eyes and mouth filled in."""
    from scipy.ndimage import binary_fill_holes, shift

    mask = np.abs(pixels - BACKGROUNDS[background]).max(axis=-1) > 70
    mask = binary_fill_holes(mask)
    if not mask.any():
        return mask
    rows, columns = np.nonzero(mask)
    middle = np.array(mask.shape) / 2 - 0.5
    extent = np.array([(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2])
    return shift(mask.astype(np.float64), middle - extent, order=0) > 0.5


_TEMPLATES: dict[str, list[np.ndarray]] = {}


def read_face(image: Image.Image) -> Reading:
    """Measures a face: which kind it is and how it smiles. Independent of how the image was made.

    The smile is the quadratic coefficient of a weighted least-squares parabola through the dark pixels below the
    eyes, the weights being their darkness. A larger face, a darker picture or a thicker line leaves it unchanged.
    """
    if not _TEMPLATES:
        _TEMPLATES.update(_mask_templates())
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)]).mean(axis=0)
    background = min(BACKGROUNDS, key=lambda name: np.abs(border - BACKGROUNDS[name]).sum())
    mask = np.abs(pixels - BACKGROUNDS[background]).max(axis=-1) > 70
    centred = _foreground(pixels, background)
    overlaps = {
        kind: max((centred & template).sum() / (centred | template).sum() for template in templates)
        for kind, templates in _TEMPLATES.items()
    }
    kind = max(overlaps, key=overlaps.get)
    bright = mask & (pixels.max(axis=-1) > 120)
    tint = np.median(pixels[bright], axis=0) if bright.any() else np.zeros(3)
    color = min(COLORS, key=lambda name: np.abs(tint - COLORS[name]).sum())
    return Reading(Kind(color, kind, background), float(overlaps[kind]), _smile(pixels, mask, tint))


def _smile(pixels: np.ndarray, mask: np.ndarray, tint: np.ndarray) -> float:
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return -1.0
    x, bottom = (columns.min() + columns.max()) / 2, rows.max()
    r = (columns.max() - columns.min() + 1) / 2
    y = bottom - r  # ears change the top of a face, never its bottom
    v, u = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    u, v = (u - x) / (0.5 * r), (v - y) / r
    darkness = np.clip(1 - pixels.max(axis=-1) / max(tint.max(), 1), 0, 1)
    weight = np.where((np.abs(u) <= 1.15) & (v > 0.02) & (v < 0.8), np.clip(darkness - 0.25, 0, None), 0)
    if weight.sum() < 4:
        return -1.0
    design = np.stack([np.ones_like(u), u, u**2], axis=-1).reshape(-1, 3)
    root = np.sqrt(weight).reshape(-1, 1)
    coefficients, *_ = np.linalg.lstsq(design * root, v.reshape(-1) * root[:, 0], rcond=None)
    return float(np.clip(-coefficients[2] / 0.36, -1.5, 1.5))
