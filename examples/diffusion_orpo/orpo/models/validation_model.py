"""Validation images of another checkpoint, such as a distilled one, that takes the LoRA while it trains on the base."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from ..config import ModelConfig
from .checks import find_modules
from .lora import add_lora


if TYPE_CHECKING:
    from .latent_diffusion import LatentDiffusion


def validation_options(options: ModelConfig) -> ModelConfig:
    """The options of the model that generates: those of the one that trains, except those that belong to its checkpoint."""
    return replace(
        options,
        pretrained_model_name_or_path=options.validation_model_path,
        validation_model_path=None,
        source_flag="validation_model_path",
        revision=None,
        prediction_type=None,
        compile=False,
    )


def check_same_lora(trained: "LatentDiffusion", other: "LatentDiffusion") -> None:
    """Checks that a LoRA of one model is a LoRA of the other.

    Args:
        trained, other: model families whose denoisers may be on the meta device.

    Raises:
        ValueError: the other has other modules, or of other shapes.
    """
    shapes, others = (
        {
            name: tuple(module.weight.shape)
            for layer in trained.options.lora_layer_names
            for name, module in find_modules(model.empty_denoiser, layer).items()
        }
        for model in (trained, other)
    )
    different = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if different:
        name = different[0]
        found, needed = (f"of shape {of[name]}" if name in of else "missing" for of in (others, shapes))
        raise ValueError(
            f"{other.options.named_source} does not take this LoRA: {len(different)} of the modules that --lora_layers"
            f" names differ from those of {trained.options.pretrained_model_name_or_path}, such as {name}, which is {found}"
            f" there and {needed} in the model that trains. Generate with a checkpoint of the same architecture."
        )


@contextmanager
def loaded_with_lora(other: "LatentDiffusion", trained: "LatentDiffusion") -> Iterator[None]:
    """In the block, the model that generates has its denoiser, with the LoRA as it is in the one that trains.

    Args:
        other: a model family of which nothing is loaded; VAE and text encoders it loads in its own `generating`.
        trained: the model family that trains. Where its LoRA is off, so is the other.
    """
    other.load_modules(encoders=False)
    add_lora(other.denoiser, other.options)
    set_peft_model_state_dict(other.denoiser, get_peft_model_state_dict(trained.denoiser))
    if lora_is_off(trained.denoiser):
        other.denoiser.disable_adapters()
    other.denoiser.eval()
    try:
        yield
    finally:
        del other.pipeline
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def lora_is_off(denoiser: torch.nn.Module) -> bool:
    return next(module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)).disable_adapters
