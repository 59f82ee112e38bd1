"""A LoRA to start from, by diffusers, PEFT, or kohya's scripts, whatever its alpha was."""

import re

import torch

from diffusers.utils import convert_unet_state_dict_to_peft

from ..runtime.messages import printable
from .lora_file import read_lora_file
from .options import ModelOptions


def read_initial_lora(
    options: ModelOptions, pipeline_class: type, denoiser_name: str, denoiser: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Reads --init_lora_weights.

    Args:
        options: of the model and the LoRA that trains.
        pipeline_class: of diffusers; knows other programs' names.
        denoiser_name: in the pipeline.
        denoiser: the model; may be on the meta device.

    Returns:
        PEFT's names, `module.lora_A.weight` (rank, in) and `module.lora_B.weight` (out, rank), to tensors in float32 whose
        strength is that of the file once they are scaled by this run's alpha / rank.

    Raises:
        ValueError: it can't be read, or is not for the modules and the rank of this run.
    """
    flag = f"--init_lora_weights={printable(options.init_lora_weights)}"
    try:
        state_dict, alphas, metadata = read_lora_file(
            options.init_lora_weights, pipeline_class, denoiser.config, options.cache_dir
        )
    except Exception as error:  # safetensors, json, the Hub and diffusers' conversions raise many kinds
        raise ValueError(f"{flag} can't be read as a LoRA: {printable(str(error))}") from error
    if any(name.startswith("text_encoder") for name in state_dict):
        raise ValueError(
            f"{flag} holds a LoRA for the text encoder too, which this script does not train: the result would draw other"
            " images than the file does. Start from one for the denoiser only."
        )
    state_dict, alphas, metadata = (_of_denoiser(values, denoiser_name) for values in (state_dict, alphas, metadata))
    layers = _layers(flag, state_dict)
    _check_modules(flag, options, denoiser_name, denoiser, layers)
    _check_rank(flag, options.rank, layers)
    of_module = {
        name.split(".lora_A.")[0].removesuffix(".alpha"): float(value)
        for name, value in convert_unet_state_dict_to_peft(alphas).items()
    }
    tensors = {}
    for module, layer in layers.items():
        scale = _alpha(module, of_module, metadata, options.rank) / options.alpha
        tensors[f"{module}.lora_A.weight"] = layer["A"]
        tensors[f"{module}.lora_B.weight"] = layer["B"] * scale
    return tensors


def _of_denoiser(values: dict, denoiser_name: str) -> dict:
    return {name.removeprefix(f"{denoiser_name}."): value for name, value in values.items()}


def _layers(flag: str, state_dict: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Module to its "A" and "B", in float32."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in convert_unet_state_dict_to_peft(state_dict).items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise ValueError(
                f"{flag} holds {printable(name)}: it is not a plain LoRA, but of a kind that can't be trained further."
            )
        layers.setdefault(match[1], {})[match[2]] = value.float()
    return layers


def _check_rank(flag: str, rank: int, layers: dict[str, dict[str, torch.Tensor]]) -> None:
    ranks = {len(layer["A"]) for layer in layers.values()}
    if ranks != {rank}:
        found = " and ".join(map(str, sorted(ranks)))
        advice = f"give --rank={found}" if len(ranks) == 1 else "this script trains one rank for all modules"
        raise ValueError(f"{flag} has rank {found}, and --rank={rank}: {advice}.")


def _check_modules(flag: str, options: ModelOptions, denoiser_name: str, denoiser, layers: dict) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    wanted, found = _matching(names, options.lora_layer_names), set(layers)
    unknown = sorted(found - set(names))
    if unknown or not found:
        example = f", such as {printable(unknown[0])}" if unknown else ""
        raise ValueError(
            f"{flag} is a LoRA for another model: {len(unknown)} of its {len(found)} modules are not in the"
            f" {denoiser_name} of {printable(options.pretrained_model_name_or_path)}{example}."
        )
    if found != wanted:
        raise ValueError(
            f"{flag} is for {len(found)} modules of the {denoiser_name}, and --lora_layers names {len(wanted)}:"
            f" {len(found - wanted)} of the file's are not among them, {len(wanted - found)} are missing from the file."
            f"{_advice(names, found)}"
        )
    for name, layer in layers.items():
        module = denoiser.get_submodule(name)
        shape = {side: layer[side].shape[1 if side == "A" else 0] for side in layer}
        if shape != {"A": module.weight.shape[1], "B": module.weight.shape[0]}:
            raise ValueError(f"{flag} does not fit the {denoiser_name}: {printable(name)} has another shape.")


def _matching(names: list[str], layers: list[str]) -> set[str]:
    return {name for name in names if any(f".{name}".endswith(f".{layer}") for layer in layers)}


def _advice(names: list[str], found: set[str]) -> str:
    """The --lora_layers that name exactly these modules, if a few names suffice."""
    ends: list[str] = []
    for name in sorted(found):
        parts = name.split(".")
        if not _matching([name], ends):
            candidates = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            ends.append(next(end for end in candidates if _matching(names, [end]) <= found))
    return f" Give --lora_layers={','.join(sorted(ends))}" if len(ends) <= 20 else ""


def _alpha(module: str, of_module: dict[str, float], metadata: dict, rank: int) -> float:
    """The file's alpha of a module, which is scaled by alpha / rank; the rank if the file doesn't say."""
    if module in of_module:
        return of_module[module]
    if "lora_alpha" not in metadata:
        return float(rank)
    patterns = metadata.get("alpha_pattern") or {}
    matching = (alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", module))  # as in PEFT
    alpha = float(next(matching, metadata["lora_alpha"]))
    return alpha * rank**0.5 if metadata.get("use_rslora") else alpha
