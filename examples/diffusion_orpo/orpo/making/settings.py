"""What a folder of images stores, to know later whether other images are asked for."""

import hashlib
from dataclasses import asdict

from ..drawing.images import Request
from ..models.drawing import Drawing


def settings(drawing: Drawing, lora_digest: str | None, requests: list[Request]) -> dict:
    """Everything that decides the images of a folder; the LoRA by its content, which may change under its name."""
    images = hashlib.sha256(repr(requests).encode()).hexdigest()[:16]
    return asdict(drawing) | {"lora_sha256": lora_digest, "images": f"{len(requests)} ({images})"}
