"""Pages that show pairs of images side by side: one HTML file with all images in it, which makes no network requests."""

import base64
import hashlib
import io
import re
from pathlib import Path

import jinja2
from PIL import Image


FOLDER = Path(__file__).parent
MAX_SIDE = 512  # pixels of an image in a page


def render_page(template: str, **values: object) -> str:
    """Renders a page.

    Args:
        template: one of this folder's files that extend `page.html`.
        values: by their names in the template.

    Returns:
        HTML. Text is escaped, and the page's policy lets no script run but the templates' own.
    """
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", template)]
    scripts = [script for source in sources for script in re.findall(r"<script>(.*?)</script>", source, re.DOTALL)]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(values, script_source=" ".join(f"'sha256-{x}'" for x in hashes))


def data_uri(image: Image.Image) -> str:
    """The image, shrunk to MAX_SIDE, for a page's `src`."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
