"""Scorers of images: callables that take images and their prompts and return a score for each, the higher the better.

    def my_scorer(images: list[PIL.Image.Image], prompts: list[str]) -> list[float]: ...

A scorer is named by a built-in name, or as `my_module:my_function` or `path/to/file.py:my_function`.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, new
from tqdm.auto import tqdm

from ..config import BUILT_IN
from ..runtime.messages import printable
from .image_statistics import STATISTICS
from .reward_models import REWARD_MODELS


Scorer = Callable[[list[Image], list[str]], list[float]]


def scorer_label(name: str) -> str:
    """A scorer's name in results: a built-in one, or the function's."""
    return name.rpartition(":")[2]


def load_scorer(name: str, device: torch.device | str) -> Scorer:
    """Loads a scorer's weights from the Hub or its cache, or imports it.

    Args:
        name: of the scorer, as the module's docstring says.
        device: where a built-in scorer runs.

    Raises:
        ValueError: there is no such scorer, or its weights can't be loaded; says what to do.
    """
    if name in STATISTICS:
        return STATISTICS[name][0]
    if name in REWARD_MODELS:
        load, repositories = REWARD_MODELS[name]
        try:
            return load(device)
        except (OSError, ValueError) as error:  # raised by transformers and huggingface_hub for a missing file
            commands = ", ".join(f"`hf download {repository}`" for repository in repositories)
            raise ValueError(
                f"Scorer {name}: its weights can't be loaded. They are downloaded from the Hub when needed; for a machine without"
                f" a network, fetch them beforehand with {commands}. The reason: {error}"
            ) from error
    if ":" not in name:
        raise ValueError(
            f"Unknown scorer {name!r}. Built in are {', '.join(BUILT_IN)}; name your own as"
            " my_module:my_function or path/to/file.py:my_function."
        )
    return _import_scorer(name)


def score_images(
    name: str, scorer: Scorer, images: Iterable[Image], prompts: Sequence[str], batch_size: int = 16
) -> list[float]:
    """Calls a scorer, batch by batch, and checks what it returns.

    Raises:
        ValueError: it fails, or does not return one finite number for each image.
    """
    images, scores = iter(images), []
    for i in range(0, len(prompts), batch_size):
        of_batch = list(prompts[i : i + batch_size])
        batch = list(islice(images, len(of_batch)))
        try:
            found = [float(score) for score in scorer(batch, of_batch)]
        except Exception as error:
            where = _where_it_fails(scorer, batch, of_batch)
            raise ValueError(f"Scorer {name} fails on {where}: {type(error).__name__}: {error}") from error
        if len(found) != len(of_batch):
            raise ValueError(f"Scorer {name} returned {len(found)} scores for {len(of_batch)} images.")
        for score, prompt in zip(found, of_batch):
            if not math.isfinite(score):
                raise ValueError(f"Scorer {name} returned {score} for an image of the prompt {prompt!r}.")
        scores += found
    return scores


def _where_it_fails(scorer: Scorer, images: list[Image], prompts: list[str]) -> str:
    """Names the first image on which a scorer fails, or, where it fails on none alone, all of them."""
    sizes = [f"{image.width} x {image.height}" for image in images]
    for image, prompt, size in zip(images, prompts, sizes):
        try:
            scorer([image], [prompt])
        except Exception:
            return f"an image of {size} pixels, prompt {printable(repr(prompt))}"
    return f"{len(images)} images of {', '.join(dict.fromkeys(sizes))} pixels at once, but on none of them alone"


def score_together(
    name: str, read: Callable[[int], Image], prompts: Sequence[str], batch_size: int = 16
) -> np.ndarray:
    """A scorer's scores of images (N,). All processes share the work, and all get the result.

    Args:
        name: of the scorer.
        read: gives the image at a place.
        prompts: of the images.
        batch_size: images scored at once.

    Raises:
        ValueError: the scorer fails, or a score is not finite.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    scorer = load_scorer(name, state.device)
    mine = range(state.process_index, len(prompts), state.num_processes)
    bar = tqdm(mine, desc=f"Scoring: {scorer_label(name)}", unit="image", disable=not state.is_main_process)
    scores = score_images(name, scorer, map(read, bar), [prompts[i] for i in mine], batch_size)
    return np.array([score for _, score in sorted(gather_object(list(zip(mine, scores))))])


def check_scorer(name: str, resolution: int) -> None:
    """Loads a scorer, and lets it score two grey images, so that anything missing or broken is found at the start.

    Args:
        name: of the scorer.
        resolution: pixels per side of the images that it will get.

    Raises:
        ValueError: the scorer can't be used.
    """
    scorer = load_scorer(name, "cpu")
    try:
        score_images(name, scorer, [new("RGB", (resolution, resolution), "gray")] * 2, ["a grey square", "nothing"])
    except ValueError as error:
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else error
        raise ValueError(f"Scorer {name} fails on two grey images of {resolution} pixels: {reason}") from error


def _import_scorer(name: str) -> Scorer:
    source, _, attribute = name.rpartition(":")
    try:
        if source.endswith(".py"):
            module = _import_file(Path(source).resolve())
        else:
            sys.path.insert(0, "")  # the folder where the command was started, as `python -m` has it
            module = importlib.import_module(source)
        scorer = getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"Scorer {name} can't be imported: {error}") from error
    if not callable(scorer):
        raise ValueError(f"Scorer {name} is {type(scorer).__name__}, not a function.")
    return scorer


def _import_file(path: Path):
    sys.path.insert(0, str(path.parent))  # so that it can import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
