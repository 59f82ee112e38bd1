"""Images of a model, each from a seed of its own, in a folder that knows how they were drawn.

An image is complete or absent, so that a run that was killed goes on where it was.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers
from diffusers import DiffusionPipeline

from ..models import drawing as models
from ..system.durable import rename, sync
from ..system.messages import differences


LORA_FILE = "pytorch_lora_weights.safetensors"


class Drawing(models.Drawing):
    """What decides an image beside prompt and seed, in a folder of images."""

    def settings(self, requests: list["Request"]) -> dict:
        """What a folder of images stores, to know later whether others are asked for."""
        images = hashlib.sha256(repr(requests).encode()).hexdigest()[:16]
        return asdict(self) | {"lora_file": _lora_digest(self.lora_weights), "images": f"{len(requests)} ({images})"}


@dataclass(frozen=True)
class Request:
    """An image to draw.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        name: of its file.
        group: which prompt or winner it belongs to, counted from 0.
    """

    prompt: str
    seed: int
    name: str
    group: int


def make_requests(prompts: list[str], images_per_prompt: int, seed: int) -> list[Request]:
    """All images to draw, prompt by prompt."""
    return [
        Request(prompt, seed + i * images_per_prompt + j, f"{i:05d}-{j}.png", i)
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def _lora_digest(lora: str | None) -> str | None:
    """Of a LoRA in a folder or file, which may change under its name."""
    path = Path(lora or "")
    path = path / LORA_FILE if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if lora and path.is_file() else None


def open_folder(folder: Path, current: dict) -> None:
    """Makes a folder for images of these settings, or makes sure that it is one.

    Raises:
        ValueError: it holds images of other settings; says which.
    """
    path = folder / "settings.json"
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise ValueError(
                f"{folder} holds images, and no settings.json to say how they were drawn: name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(current | {"versions": versions}, indent=2) + "\n")
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("versions")
    changes = differences(stored, json.loads(json.dumps(current)))
    if changes:
        raise ValueError(
            f"{folder} holds images that were drawn differently: {'; '.join(changes)}. Name another --output_dir, or"
            " remove this one."
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    rename(partial, path)


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def draw_images(
    drawing: Drawing, pipeline: DiffusionPipeline, folder: Path, requests: list[Request], batch_size: int
) -> None:
    """Draws what is missing in the folder, over all processes.

    Each image has a generator of its own, on the CPU: neither batch size nor device changes its noise. Batches are the
    same however often the run was stopped, so what is drawn is, too.
    """
    state = PartialState()
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    batches = [batch for batch in batches if missing(folder, batch)]
    state.wait_for_everyone()  # all processes have seen the same images before one draws more
    with state.split_between_processes(batches) as mine:
        for batch in tqdm(mine, desc="Drawing", unit="batch", disable=not state.is_main_process):
            images = models.draw(
                drawing, pipeline, [request.prompt for request in batch], [request.seed for request in batch]
            )
            absent = missing(folder, batch)
            for request, image in zip(batch, images):
                if request in absent:
                    _save(image, folder / request.name)
    state.wait_for_everyone()


def _save(image: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG")
    rename(partial, path)
