"""A picture of some pairs: the preferred image left, in a green frame, the rejected one right, the prompt below."""

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..pairs.image import decode_image
from ..pairs.pair import PreferencePair
from ..runtime.messages import printable


SIDE = 256  # pixels of the square that an image is fitted into
COLUMNS = 3
FRAME, GAP, MARGIN = 6, 10, 28
PROMPT_LINES, LINE = 3, 22
BACKGROUND, TEXT, FAINT = "white", "#1f2328", "#6e7781"
GREEN, GREY = "#1a9c3e", "#c9cdd2"

CELL_WIDTH = 2 * (SIDE + 2 * FRAME) + GAP
HEAD = 2 * MARGIN + 34  # height of title and legend


def contact_sheet(pairs: list[tuple[str, PreferencePair]], title: str) -> Image.Image:
    """Draws pairs in rows of three.

    Args:
        pairs: each with its name.
        title: what they are from.
    """
    columns = min(COLUMNS, len(pairs))
    rows = [[_draw_pair(*pair) for pair in pairs[i : i + columns]] for i in range(0, len(pairs), columns)]
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    width = MARGIN + columns * (CELL_WIDTH + MARGIN)
    sheet = Image.new("RGB", (width, HEAD + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), _fit(title, width - 2 * MARGIN, _font(22)), fill=TEXT, font=_font(22))
    draw.text((MARGIN, MARGIN + 24), "left, in green: preferred", fill=GREEN, font=_font(16))
    y = HEAD
    for row, height in zip(rows, heights):
        for i, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + i * (CELL_WIDTH + MARGIN), y))
        y += height
    return sheet


def _draw_pair(name: str, pair: PreferencePair) -> Image.Image:
    """Both images, centred in squares of the same size, and below them the prompt and the pair's name."""
    lines = _wrap(printable(pair.prompt, 400) or "(empty prompt)", CELL_WIDTH, _font(16))
    square = SIDE + 2 * FRAME
    cell = Image.new("RGB", (CELL_WIDTH, square + GAP + (len(lines) + 1) * LINE), BACKGROUND)
    draw = ImageDraw.Draw(cell)
    for encoded, colour, left in ((pair.winner, GREEN, 0), (pair.loser, GREY, square + GAP)):
        image = ImageOps.contain(decode_image(encoded, name), (SIDE, SIDE), Image.Resampling.LANCZOS)
        framed = ImageOps.expand(image, FRAME, colour)
        cell.paste(framed, (left + (square - framed.width) // 2, (square - framed.height) // 2))
    for i, line in enumerate(lines):
        draw.text((0, square + GAP + i * LINE), line, fill=TEXT, font=_font(16))
    name = _fit(name, CELL_WIDTH, _font(13), keep_end=True)
    draw.text((0, square + GAP + len(lines) * LINE + 2), name, fill=FAINT, font=_font(13))
    return cell


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels; what doesn't fit PROMPT_LINES ends in dots."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width or not lines[-1]:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    if len(lines) > PROMPT_LINES:
        lines[PROMPT_LINES - 1] += " ..."
    return [_fit(line, width, font) for line in lines[:PROMPT_LINES]]


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont, keep_end: bool = False) -> str:
    """The text, shortened to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font with more than Latin letters where the machine has one; Pillow's own else."""
    for name in ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
