"""The LoRA: into the denoiser, to a file, back, and into another checkpoint that validation generates with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from diffusers.training_utils import cast_training_params

from ..config import ModelConfig
from ..runtime.durable import make_readable
from .checks import Module, find_modules


if TYPE_CHECKING:
    from .latent_diffusion import LatentDiffusion

LORA_FILE = "pytorch_lora_weights.safetensors"
# The fields that a LoRA's output depends on. PEFT refuses fields that it does not know, so no others go into the file.
METADATA_FIELDS = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "rank_pattern", "alpha_pattern")


def add_lora(denoiser: Module, options: ModelConfig) -> None:
    """Adds a LoRA that changes nothing yet, in float32, to the modules that the options name."""
    denoiser.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=_target_modules(denoiser, options.lora_layer_names),
        )
    )
    cast_training_params(denoiser, dtype=torch.float32)


def _target_modules(denoiser: Module, layers: list[str]) -> list[str]:
    """Names for PEFT, which has no wildcards."""
    return [name for layer in layers for name in (find_modules(denoiser, layer) if "*" in layer else [layer])]


def save_lora(pipeline_class: type[Any], denoiser_name: str, denoiser: Module, directory: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata.

    Args:
        pipeline_class: of diffusers; decides the file's format.
        denoiser_name: in the pipeline.
        denoiser: with a LoRA.
        directory: gets the file.
    """
    layers = get_peft_model_state_dict(denoiser)  # PEFT's names for all: load_lora_weights expects one naming scheme
    config = denoiser.peft_config["default"].to_dict()
    metadata = {name: config[name] for name in METADATA_FIELDS}
    # A pipeline that loads a LoRA with a dropout switches it on, and generates with it.
    metadata["lora_dropout"] = 0.0
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order differs from run to run
    pipeline_class.save_lora_weights(
        directory,
        **{f"{denoiser_name}_lora_layers": layers, f"{denoiser_name}_lora_adapter_metadata": metadata},
    )
    make_readable(Path(directory) / LORA_FILE)


def load_lora(denoiser_name: str, denoiser: Module, directory: Path) -> None:
    """Reads the file of `save_lora` into the existing LoRA.

    Raises:
        ValueError: the file's modules are not those of this LoRA.
    """
    state_dict = load_file(Path(directory) / LORA_FILE)
    state_dict = {name.removeprefix(f"{denoiser_name}."): value for name, value in state_dict.items()}
    expected, found = get_peft_model_state_dict(denoiser).keys(), state_dict.keys()
    if expected != found:
        raise ValueError(
            f"{directory} holds a LoRA for other modules than --lora_layers names:"
            f" {len(expected - found)} tensors are missing, {len(found - expected)} are unknown."
        )
    set_peft_model_state_dict(denoiser, state_dict)


@contextmanager
def as_loaded(denoiser: Module, dtype: torch.dtype) -> Iterator[None]:
    """In the block, a denoiser that trains computes what it would in a pipeline that its LoRA was loaded into.

    That is, with the LoRA in the precision of the other weights, and without the autocast that accelerate wraps it in.
    """
    trained = {parameter: parameter.data for parameter in denoiser.parameters() if parameter.requires_grad}
    is_wrapped = hasattr(denoiser, "_original_forward")
    wrapped = denoiser.__dict__.pop("forward", None)
    try:
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        if is_wrapped:
            denoiser.forward = wrapped
        for parameter, data in trained.items():
            parameter.data = data


def validation_options(options: ModelConfig) -> ModelConfig:
    """The options of --validation_model_path: those of the model that trains, except those that belong to its checkpoint."""
    return options.replace(
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
    """In the block, the model of the validation images has its denoiser, with the LoRA as it is in the one that trains.

    Args:
        other: a model family of which nothing is loaded; it loads VAE and text encoders in its own `generating`.
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


def lora_is_off(denoiser: Module) -> bool:
    return next(module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)).disable_adapters
