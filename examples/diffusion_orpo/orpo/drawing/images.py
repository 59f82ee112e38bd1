"""Images of prompts, each from a seed of its own, in folders that know how they were drawn.

An image is complete or absent, so a run that was stopped continues where it was.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers

from ..runtime.durable import write_text, written_whole


# Makes an image of each prompt, from its seed.
Draw = Callable[[list[str], list[int]], list[Image.Image]]

SHOWN = 80  # characters of a setting, in an error


@dataclass(frozen=True)
class Request:
    """An image to draw.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        name: of its file.
        group: which prompt it belongs to, counted from 0.
    """

    prompt: str
    seed: int
    name: str
    group: int


def make_requests(prompts: list[str], images_per_prompt: int, seed: int) -> list[Request]:
    """All images to draw, prompt by prompt, each from the seed after the last one's."""
    return [
        Request(prompt, seed + i * images_per_prompt + j, f"{i:05d}-{j}.png", i)
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def open_folder(folder: Path, settings: dict) -> dict[str, str]:
    """Makes a folder for images that are drawn with these settings, or checks that an existing one holds such images.

    Returns:
        The versions of the libraries that drew the first of them; others may draw slightly different images.

    Raises:
        ValueError: its images were drawn with other settings; names them.
    """
    path = folder / "settings.json"
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise ValueError(
                f"{folder} holds images, and no settings.json to say how they were drawn. Choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        write_text(path, json.dumps(settings | {"versions": versions}, indent=2) + "\n")
        return versions
    stored = json.loads(path.read_text(encoding="utf-8"))
    versions = stored.pop("versions")
    current = json.loads(json.dumps(settings))
    changes = [
        f"{name} was {_short(stored.get(name))} and is now {_short(current.get(name))}"
        for name in dict.fromkeys([*stored, *current])
        if stored.get(name) != current.get(name)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds images that were drawn differently: {'; '.join(changes)}. Choose another folder, or remove"
            " this one."
        )
    return versions


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def draw_images(draw: Draw, folder: Path, requests: list[Request], batch_size: int, name: str) -> None:
    """Draws the images that are missing in the folder, over all processes.

    Batches are the same however often the run was stopped, and so are the images, bit for bit.

    Args:
        draw: makes an image of each prompt from its seed.
        folder: for the images.
        requests: all images that should exist.
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
                    with written_whole(folder / request.name) as path:
                        image.save(path, "PNG")
    state.wait_for_everyone()


def read_image(path: Path) -> Image.Image:
    """Reads a drawn image.

    Raises:
        ValueError: it is broken.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} can't be read ({error}). Remove it and start again: it will be drawn again."
        ) from error
