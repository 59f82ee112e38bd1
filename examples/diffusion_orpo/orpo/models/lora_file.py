"""Reads a LoRA's file, by whatever program it was written, into diffusers' names; no model is needed."""

import hashlib
import inspect
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers.utils import convert_unet_state_dict_to_peft

from ..runtime.messages import printable
from .lora import LORA_FILE


def read_lora_file(
    source: str, pipeline_class: type, denoiser_config: dict, cache_dir: str | None = None
) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """Reads a LoRA of diffusers, PEFT or kohya's scripts.

    Args:
        source: folder, file, or name on the Hub.
        pipeline_class: of diffusers; knows other programs' names.
        denoiser_config: of its denoiser; the names of kohya's U-Nets depend on it.
        cache_dir: of downloads.

    Returns:
        Tensors by diffusers' names; alphas by names like these, where the file has any; and PEFT's configuration, or {}.

    Raises:
        Exception: of safetensors, of json, of the Hub, or of diffusers' conversions.
    """
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():  # as PEFT writes it
        state_dict = load_file(folder / "adapter_model.safetensors")
        metadata = json.loads((folder / "adapter_config.json").read_text())
        return {name.removeprefix("base_model.model."): value for name, value in state_dict.items()}, {}, metadata
    file = folder / LORA_FILE if folder.is_dir() else folder
    if file.is_file():
        with safe_open(file, "pt") as opened:
            if any("dora_scale" in name for name in opened.keys()):  # diffusers would ignore it
                raise ValueError("it is a DoRA")
    parameters = inspect.signature(pipeline_class.lora_state_dict).parameters
    arguments = {"return_lora_metadata": True, "cache_dir": cache_dir}
    if "return_alphas" in parameters:
        arguments["return_alphas"] = True
    if "layers_per_block" in denoiser_config:
        arguments["unet_config"] = denoiser_config
    state_dict, *alphas, metadata = pipeline_class.lora_state_dict(source, **arguments)
    return dict(state_dict), (alphas[0] if alphas else None) or {}, metadata or {}


def lora_digest(state_dict: dict[str, torch.Tensor], alphas: dict, metadata: dict) -> str:
    """Identifies a LoRA by everything that decides its effect, not by its name."""
    numbers = {name: float(value) for name, value in sorted(alphas.items())}
    digest = hashlib.sha256(json.dumps([numbers, metadata], sort_keys=True, default=sorted).encode())
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def modules_of(state_dict: dict[str, torch.Tensor], denoiser_name: str) -> set[str]:
    """The denoiser's modules that a LoRA is for."""
    own = {
        name.removeprefix(f"{denoiser_name}."): value
        for name, value in state_dict.items()
        if not name.startswith("text_encoder")
    }
    return {name.split(".lora_")[0] for name in convert_unet_state_dict_to_peft(own) if ".lora_" in name}


def check_fit(flag: str, modules: set[str], denoiser: torch.nn.Module, denoiser_name: str, model: str) -> str | None:
    """Compares a LoRA's modules with those of the model that draws.

    Args:
        flag: for messages, as in `--lora_weights=x`.
        modules: from `modules_of`.
        denoiser: may be on the meta device.
        denoiser_name, model: for messages.

    Returns:
        A warning if a part of the LoRA has no place in the model, or None.

    Raises:
        ValueError: none of it fits.
    """
    unknown = sorted(modules - {name for name, _ in denoiser.named_modules()})
    if not unknown and modules:
        return None
    example = f", such as {printable(unknown[0])}" if unknown else ""
    found = (
        f"{len(unknown)} of its {len(modules)} modules are not in the {denoiser_name} of {printable(model)}{example}"
    )
    if len(unknown) == len(modules):
        raise ValueError(f"{flag} does not fit the model: {found}.")
    return f"{flag} fits only in part: {found}. The images show only the rest, which was not trained to work alone."
