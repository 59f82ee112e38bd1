"""Images of prompts, each from a seed of its own, in folders that know how they were generated.

An image is complete or absent, so a run that was stopped continues where it was. More prompts, or more images of each, are
generated beside those that are there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers

from ..runtime.durable import write_text, written_whole
from .model import Generator


SETTINGS_FILE = "settings.json"
SHOWN = 80  # characters of a setting, in an error


@dataclass(frozen=True)
class Request:
    """An image to generate.

    Attributes:
        prompt: of the image.
        seed: of its noise.
        name: of its file.
        group: the number of its prompt in the folder, from 0.
    """

    prompt: str
    seed: int
    name: str
    group: int


def make_requests(
    prompts: Sequence[str], images_per_prompt: int, seed: int, known: Sequence[Request] = ()
) -> list[Request]:
    """The images of all prompts, prompt by prompt.

    Without known ones, each image has the seed after the last one's. Known images of a prompt come first; what they lack gets the
    seeds after all that are known. A prompt that is given twice is two prompts.

    Args:
        prompts: of the images.
        images_per_prompt: of each prompt.
        seed: of the first image.
        known: all that a folder has, or was to have.
    """
    by_group: dict[int, list[Request]] = {}
    for request in known:
        by_group.setdefault(request.group, []).append(request)
    unused: dict[str, list[list[Request]]] = {}
    for requests in by_group.values():
        unused.setdefault(requests[0].prompt, []).append(requests)
    next_group = max(by_group, default=-1) + 1
    next_seed = max((request.seed for request in known), default=seed - 1) + 1
    planned = []
    for prompt in prompts:
        requests = unused[prompt].pop(0)[:images_per_prompt] if unused.get(prompt) else []
        group = requests[0].group if requests else next_group
        next_group = max(next_group, group + 1)
        for i in range(len(requests), images_per_prompt):
            requests.append(Request(prompt, next_seed, f"{group:05d}-{i}.png", group))
            next_seed += 1
        planned += requests
    return planned


def known_requests(folder: Path) -> list[Request]:
    """All images that a folder has, or was to have, by its settings.json.

    Raises:
        ValueError: it has images, and no such file, or the file can't be read.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            return [Request(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or was written by another program. Choose another folder."
            ) from error
    if folder.exists() and any(folder.glob("*.png")):
        raise ValueError(
            f"{folder} holds images, and no {SETTINGS_FILE} to say how they were generated. Choose another folder."
        )
    return []


def open_folder(folder: Path, settings: dict, requests: list[Request]) -> dict[str, str]:
    """Makes a folder for images that are generated with these settings, or adds to one that holds such images.

    Returns:
        The versions of the libraries that generated the first of them; others may generate slightly different images.

    Raises:
        ValueError: its images were generated with other settings, from other seeds, or of other prompts; names them.
    """
    path, known = folder / SETTINGS_FILE, {request.name: request for request in known_requests(folder)}
    current = json.loads(json.dumps(settings))
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        versions = stored.pop("versions")
        stored.pop("images")
    else:
        stored, versions = current, {"diffusers": diffusers.__version__, "torch": torch.__version__}
    changes = [
        f"{name} was {_short(stored.get(name))} and is now {_short(current.get(name))}"
        for name in dict.fromkeys([*stored, *current])
        if stored.get(name) != current.get(name)
    ]
    for request in requests:
        other = known.setdefault(request.name, request)
        if other != request and not changes:
            changes.append(f"{request.name} was {_short(asdict(other))} and is now {_short(asdict(request))}")
    if changes:
        raise ValueError(
            f"{folder} holds images that were generated differently: {'; '.join(changes)}. Choose another folder, or remove"
            " this one."
        )
    images = [asdict(request) for request in known.values()]
    text = json.dumps(current | {"versions": versions, "images": images}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return versions


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@dataclass(frozen=True)
class GeneratedImages:
    """What `generate_missing` has made sure of.

    Attributes:
        requests: the images of each folder, prompt by prompt.
        settings: that decide the base's images, and what else decides the LoRA's.
        versions: of the libraries that generated the first of them.
        warnings: reasons to doubt that the images show what the LoRA does.
    """

    requests: list[Request]
    settings: dict
    versions: dict[str, str]
    warnings: list[str]


def generate_missing(
    generator: Generator,
    folders: dict[str, Path],
    prompts: list[str],
    images_per_prompt: int,
    seed: int,
    batch_size: int,
) -> GeneratedImages:
    """Generates what folders lack of the images of the prompts, over all processes.

    Args:
        generator: not loaded yet, nor afterwards: what scores the images needs the memory.
        folders: "lora" for the images of the generator as it is, and perhaps "base" for the same without its LoRA.
        prompts, images_per_prompt, seed: see `make_requests`.
        batch_size: images generated at once.

    Raises:
        ValueError: the model can't be used, or a folder holds images that were generated differently.
    """
    state = PartialState()
    base, lora, warnings = generator.identity()
    base["seed"] = seed
    settings = {"base": base, "lora": base | lora}
    with state.main_process_first():
        known = next(filter(None, map(known_requests, folders.values())), [])
        requests = make_requests(prompts, images_per_prompt, seed, known)
        versions = [open_folder(folder, settings[side], requests) for side, folder in folders.items()]
    if any(missing(folder, requests) for folder in folders.values()):
        generator.load()
        for side, folder in folders.items():
            generate = partial(generator.generate, with_lora=side == "lora")
            _fill(folder, requests, generate, batch_size, name=f"Generating: {side if len(folders) > 1 else 'images'}")
    return GeneratedImages(requests, settings["lora"], versions[0], warnings)


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def _fill(folder: Path, requests: list[Request], generate, batch_size: int, name: str) -> None:
    """Batches are the same however often the run was stopped, and so are the images, bit for bit."""
    state = PartialState()
    requests = sorted(requests, key=lambda request: request.seed)  # in the order in which they were first asked for
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    batches = [batch for batch in batches if missing(folder, batch)]
    state.wait_for_everyone()  # all processes have seen the same images before one generates more
    with state.split_between_processes(batches) as mine:
        for batch in tqdm(mine, desc=name, unit="batch", disable=not state.is_main_process):
            images = generate([request.prompt for request in batch], [request.seed for request in batch])
            absent = missing(folder, batch)
            for request, image in zip(batch, images):
                if request in absent:
                    with written_whole(folder / request.name) as path:
                        image.save(path, "PNG")
    state.wait_for_everyone()


def read_image(path: Path) -> Image.Image:
    """Reads a generated image.

    Raises:
        ValueError: it is broken.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} can't be read ({error}). Remove it and start again: it will be generated again."
        ) from error
