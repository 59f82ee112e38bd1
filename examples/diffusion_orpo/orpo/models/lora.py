"""The LoRA: into the denoiser, to a file, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from diffusers.training_utils import cast_training_params

from ..config import ModelConfig
from ..runtime.durable import make_readable
from .checks import find_modules


LORA_FILE = "pytorch_lora_weights.safetensors"
# The fields that a LoRA's output depends on. PEFT refuses fields that it does not know, so no others go into the file.
METADATA_FIELDS = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "rank_pattern", "alpha_pattern")


def add_lora(denoiser: torch.nn.Module, options: ModelConfig) -> None:
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


def _target_modules(denoiser: torch.nn.Module, layers: list[str]) -> list[str]:
    """Names for PEFT, which has no wildcards."""
    return [name for layer in layers for name in (find_modules(denoiser, layer) if "*" in layer else [layer])]


def save_lora(pipeline_class: type, denoiser_name: str, denoiser: torch.nn.Module, directory: Path) -> None:
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
    # A pipeline that loads a LoRA with a dropout switches it on, and draws with it.
    metadata["lora_dropout"] = 0.0
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order differs from run to run
    pipeline_class.save_lora_weights(
        directory,
        **{f"{denoiser_name}_lora_layers": layers, f"{denoiser_name}_lora_adapter_metadata": metadata},
    )
    make_readable(Path(directory) / LORA_FILE)


def load_lora(denoiser_name: str, denoiser: torch.nn.Module, directory: Path) -> None:
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
def as_loaded(denoiser: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In the block, a denoiser that trains computes what it would in a pipeline that its LoRA was loaded into.

    That is, with the LoRA in the precision of the other weights, and without the autocast that accelerate wraps it in.
    """
    trained = {parameter: parameter.data for parameter in denoiser.parameters() if parameter.requires_grad}
    is_wrapped = hasattr(denoiser, "_original_forward")
    wrapped = denoiser.__dict__.pop("forward") if is_wrapped else None
    try:
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        if is_wrapped:
            denoiser.forward = wrapped
        for parameter, data in trained.items():
            parameter.data = data
