"""Images of base and LoRA from the same prompts and seeds, in folders that know how they were drawn.

An image is complete or absent, so an evaluation that was stopped goes on where it was.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers


Draw = Callable[[list[str], list[int]], list[Image.Image]]


@dataclass(frozen=True)
class Request:
    """One image to draw."""

    prompt: str
    seed: int
    name: str


def make_requests(prompts: list[str], images_per_prompt: int, seed: int) -> list[Request]:
    """All images of an evaluation, prompt by prompt, each from a seed of its own."""
    return [
        Request(prompt, seed + i * images_per_prompt + j, f"{i:05d}-{j}.png")
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def open_folder(folder: Path, settings: dict) -> dict[str, str]:
    """Makes a folder for images of these settings, or makes sure that it is one.

    Returns:
        The versions of the libraries that began to fill it; others may draw slightly different images.

    Raises:
        ValueError: it holds images of other settings; names them.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise ValueError(
                f"{folder} holds images, and no settings.json to say how they were drawn. Choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        write_atomically(path, json.dumps(settings | {"versions": versions}, indent=2) + "\n")
        return versions
    stored = json.loads(path.read_text(encoding="utf-8"))
    versions = stored.pop("versions")
    changes = [
        f"{name}: {_short(stored.get(name))} there, {_short(settings.get(name))} now"
        for name in sorted(settings.keys() | stored.keys())
        if settings.get(name) != stored.get(name)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds images of other settings ({'; '.join(changes)}). Choose another folder, or remove it."
        )
    return versions


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def draw_images(draw: Draw, folder: Path, requests: list[Request], batch_size: int, name: str) -> None:
    """Draws what is missing in the folder, over all processes.

    Batches are the same however often the evaluation was stopped, so what is drawn is, too, bit for bit.

    Args:
        draw: makes an image of each prompt from its seed.
        folder: for the images.
        requests: all images that should be there.
        batch_size: images drawn at once.
        name: for the progress bar.
    """
    state = PartialState()
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    batches = [batch for batch in batches if missing(folder, batch)]
    state.wait_for_everyone()  # all processes have seen the same images before one draws more
    with state.split_between_processes(batches) as mine:
        for batch in tqdm(mine, desc=name, unit="batch", disable=not state.is_main_process):
            images = draw([request.prompt for request in batch], [request.seed for request in batch])
            absent = missing(folder, batch)
            for request, image in zip(batch, images):
                if request in absent:
                    save_image(image, folder / request.name)
    state.wait_for_everyone()


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG")
    os.replace(partial, path)


def read_image(path: Path) -> Image.Image:
    """Reads a drawn image.

    Raises:
        ValueError: it's broken.
    """
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error}). Remove it and start again: it is drawn anew.") from error
