"""Judges of images: callables that take images and their prompts and return a score for each, the higher the better.

    def my_scorer(images: list[PIL.Image.Image], prompts: list[str]) -> list[float]: ...

A scorer is named by a built-in name, or as `my_module:my_function` or `path/to/file.py:my_function`.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image, new

from .image_statistics import STATISTICS
from .names import BUILT_IN
from .reward_models import REWARD_MODELS


Scorer = Callable[[list[Image], list[str]], list[float]]


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


def score_images(name: str, scorer: Scorer, images: list[Image], prompts: list[str]) -> list[float]:
    """Calls a scorer, and checks what it returns.

    Raises:
        ValueError: it is not one finite number for each image.
    """
    scores = [float(score) for score in scorer(images, prompts)]
    if len(scores) != len(images):
        raise ValueError(f"Scorer {name} returned {len(scores)} scores for {len(images)} images.")
    for score, prompt in zip(scores, prompts):
        if not math.isfinite(score):
            raise ValueError(f"Scorer {name} returned {score} for an image of the prompt {prompt!r}.")
    return scores


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
    except Exception as error:
        raise ValueError(
            f"Scorer {name} fails on two grey images of {resolution} pixels: {type(error).__name__}: {error}"
        ) from error


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
