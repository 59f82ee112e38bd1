"""Checks from a model's configuration files, before any weights are loaded, whether a family can train it."""

import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

import diffusers
from diffusers import DiffusionPipeline

from ..config import CheckpointConfig, ModelConfig
from ..runtime.messages import printable
from .model_files import check_folder, has_variant


logger = logging.getLogger(__name__)

Module = Any  # one of diffusers' or transformers', with attributes that torch's class doesn't declare
DISTILLED = r"(turbo|lightning|hyper-?sd|lcm|schnell|distilled|\bdmd)"  # in names of models
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def read_index(options: CheckpointConfig, pipeline: str = "StableDiffusionXLPipeline") -> dict:
    """Reads a pipeline's `model_index.json`.

    Args:
        options: of the model.
        pipeline: its probable class, for the advice on single files.

    Raises:
        ValueError: it is a single file, or not a pipeline.
    """
    source = options.pretrained_model_name_or_path
    flag = options.named_source
    if source.lower().endswith(SINGLE_FILES):
        raise ValueError(
            f"{flag} is a single file, and a folder in diffusers' format is needed. Convert it once: `python -c \"from"
            f" diffusers import {pipeline} as P; P.from_single_file({source!r}).save_pretrained('converted')\"`, and give"
            " the folder `converted`."
        )
    try:
        return DiffusionPipeline.load_config(source, **options.source_options)
    except OSError as error:
        raise ValueError(
            f"{flag} is not a pipeline in diffusers' format: its model_index.json can't be read"
            f" ({printable(str(error).splitlines()[0])})."
        ) from error


def check_pipeline(options: ModelConfig, index: dict, pipeline: str, name: str) -> None:
    """Checks that a model is of the family.

    Raises:
        ValueError: its pipeline is another one.
    """
    found = index.get("_class_name")
    if found != pipeline:
        raise ValueError(f"{options.named_source} is a {found}: this script trains {name}, a {pipeline}.")


def is_absent(index: dict, module: str) -> bool:
    """Whether a pipeline was saved without a module."""
    return index.get(module, [None, None])[0] is None


def check_modules(options: ModelConfig, index: dict, needed: tuple[str, ...]) -> None:
    """Checks that a pipeline has its modules, and a local one all of their files.

    Raises:
        ValueError: one is left out of `model_index.json`, or lacks a file, or a file is not whole.
    """
    folder = Path(options.pretrained_model_name_or_path)
    flag, vae = options.named_source, options.pretrained_vae_model_name_or_path
    absent = [name for name in needed if is_absent(index, name)]
    if absent:
        raise ValueError(f"{flag} was saved without {', '.join(absent)}, which is needed: use the whole model.")
    if vae is not None and Path(vae).is_dir():
        check_folder("--pretrained_vae_model_name_or_path", Path(vae), "VAE")
    if folder.is_dir():
        # As diffusers does: what has no files of the variant is loaded without it, unless nothing has.
        of_variant = [name for name in needed if options.variant and has_variant(folder / name, options.variant)]
        for name in needed:
            check_folder(flag, folder / name, name, options.variant if name in of_variant or not of_variant else None)


def build_empty(options: ModelConfig, index: dict, module: str) -> Module:
    """One of diffusers' models, built from its configuration without memory for weights.

    Raises:
        ValueError: its configuration can't be read, or names a class that diffusers lacks.
    """
    library, class_name = index[module]
    source = options.pretrained_model_name_or_path
    module_class = getattr(diffusers, class_name, None)
    if library != "diffusers" or module_class is None:
        raise ValueError(f"The {module} of {printable(source)} is a {library}.{class_name}, which diffusers lacks.")
    try:
        config = module_class.load_config(source, subfolder=module, **options.source_options)
    except OSError as error:
        raise ValueError(f"The {module} of {printable(source)} can't be read: {printable(str(error))}") from error
    with torch.device("meta"):
        return module_class.from_config(config)


def check_sequence_length(options: ModelConfig, encoder: str) -> None:
    """Checks that a text encoder has a place for every token of --max_sequence_length.

    Args:
        options: of the model.
        encoder: the text encoder that the flag is for.

    Raises:
        ValueError: it has fewer.
    """
    source = options.pretrained_model_name_or_path
    config, _ = PretrainedConfig.get_config_dict(source, subfolder=encoder, **options.source_options)
    longest = config.get("text_config", config).get("max_position_embeddings")  # T5 has none: its places are relative
    if longest is not None and options.max_sequence_length > longest:
        raise ValueError(
            f"--max_sequence_length={options.max_sequence_length}: the {encoder} of {printable(source)} reads {longest}"
            f" tokens, as its config.json says. Give --max_sequence_length={longest} or less."
        )


def matches_layer(name: str, layer: str) -> bool:
    """Whether an entry of --lora_layers stands for a module: it is the end of its name, and * stands for anything."""
    return bool(name) and fnmatch(f".{name}", f"*.{layer}")


def find_modules(denoiser: Module, layer: str) -> dict[str, Module]:
    """The modules, by name, that an entry of --lora_layers stands for."""
    return {name: module for name, module in denoiser.named_modules() if matches_layer(name, layer)}


def check_lora_layers(denoiser: Module, denoiser_name: str, layers: list[str]) -> None:
    """Checks that each name of --lora_layers stands for modules that can have a LoRA.

    Args:
        denoiser: the model that trains; may be on the meta device.
        denoiser_name: for messages.
        layers: names, or ends of names, of its modules.

    Raises:
        ValueError: one stands for no module, or for modules that can't have a LoRA.
    """
    if layers == [""]:
        raise ValueError("--lora_layers is empty: name modules of the denoiser, as in --lora_layers=to_q,to_k,to_v.")
    for layer in layers:
        matches = list(find_modules(denoiser, layer).values())
        if not matches:
            raise ValueError(
                f"--lora_layers: the {denoiser_name} has no module called {printable(layer) or 'nothing (two commas)'}."
            )
        wrong = [module for module in matches if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
        if wrong:
            raise ValueError(
                f"--lora_layers: {printable(layer)} in the {denoiser_name} is a {type(wrong[0]).__name__}, which can't have a"
                " LoRA. Name linear layers and convolutions, such as to_q or to_out.0."
            )


def warn_of_distillation(options: ModelConfig, scheduler: object) -> None:
    """Warns if a model is distilled to generate in a few steps, which training on ordinary noise does not preserve."""
    source = options.pretrained_model_name_or_path
    by_name = re.search(DISTILLED, Path(source).name if Path(source).exists() else source, re.IGNORECASE)
    if by_name or type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"):
        logger.warning(
            f"{printable(source)} seems to be distilled to generate in few steps. Training on it unlearns some of that: train the"
            " model that it was distilled from, and load the LoRA into both: --validation_model_path generates with this one."
        )
