"""What a folder of images stores, to know later whether other images are asked for."""

import hashlib
from dataclasses import asdict
from pathlib import Path

from ..drawing.images import Request
from ..models.drawing import Drawing
from ..models.lora import LORA_FILE


def settings(drawing: Drawing, requests: list[Request]) -> dict:
    """Everything that decides the images of a folder."""
    images = hashlib.sha256(repr(requests).encode()).hexdigest()[:16]
    return asdict(drawing) | {"lora_file": _lora_digest(drawing.lora_weights), "images": f"{len(requests)} ({images})"}


def _lora_digest(lora: str | None) -> str | None:
    """Of a LoRA in a folder or file, which may change under its name."""
    path = Path(lora or "")
    path = path / LORA_FILE if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if lora and path.is_file() else None
