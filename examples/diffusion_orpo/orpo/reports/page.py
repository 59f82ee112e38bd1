"""The page that shows an evaluation: one HTML file with all images in it, which makes no network requests."""

import base64
import hashlib
import io
from pathlib import Path

import jinja2
from PIL import Image

from .evaluation import FEW_PROMPTS


TEMPLATE = Path(__file__).with_name("evaluation.html")
MAX_SIDE = 512  # pixels of an image in the page; the files have the full size


def render_page(results: dict, images: list[tuple[Path, Path]]) -> str:
    """Renders the page.

    Args:
        results: as `make_results` returns them.
        images: base's and LoRA's image file of each pair.

    Returns:
        HTML. Prompts are escaped, and the page's policy lets no script run but its own.
    """
    source = TEMPLATE.read_text(encoding="utf-8")
    script = source.split("<script>")[1].split("</script>")[0]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    pairs = [
        pair | {"base_image": _data_uri(base), "lora_image": _data_uri(lora)}
        for pair, (base, lora) in zip(results["pairs"], images)
    ]
    return template.render(
        results=results | {"pairs": pairs},
        few_prompts=FEW_PROMPTS,
        enlarged=results["settings"]["resolution"] < 256,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
