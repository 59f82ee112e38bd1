"""LoRA files: of any program, read into the denoiser's own names; and a trained one, written for other programs."""

import hashlib
import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft

from ..config import ModelConfig, looks_like_a_path
from ..runtime.durable import make_readable
from ..runtime.messages import printable
from .checks import Module, matches_layer
from .lora import LORA_FILE


COMFYUI_FILE = "comfyui_lora.safetensors"  # diffusers must not take it for pytorch_lora_weights.safetensors
METADATA = "lora_adapter_metadata"
TEXT_ENCODER = ("text_encoder", "lora_te")
# What programs write before the name of a module, with its dots or with underscores in place of them.
DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "lora_mid": "a LoCon with a Tucker decomposition",
    "oft_": "an OFT",
    "boft": "a BOFT",
    ".diff": "a difference of whole weights",
    "lora_B.bias": "a LoRA with biases",
    "lora_embedding": "a LoRA of an embedding",
}
# These two modules are read by their name in SDXL's original code only, which the others may have as well.
SDXL_EMBEDDING = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


@dataclass
class Layer:
    """The LoRA of one module, which adds alpha / rank * b @ a to its weight.

    Attributes:
        a: (rank, in), or (rank, in, height, width) of a convolution.
        b: (out, rank), or (out, rank, 1, 1).
        alpha: None where the file doesn't say, which means the rank.
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float | None


@dataclass(frozen=True)
class LoraFile:
    """A plain LoRA.

    Attributes:
        layers: module to its LoRA; by the denoiser's own names where it has such a module, else by the file's.
        unknown: those that the denoiser lacks.
        trains_text_encoder: whether it holds a LoRA for a text encoder, too.
        digest: identifies it by everything that decides its effect, not by its name.
    """

    layers: dict[str, Layer]
    unknown: list[str]
    trains_text_encoder: bool
    digest: str


def read_lora_file(
    flag: str, source: str, pipeline_class: type[Any], denoiser: Module, cache_dir: str | None = None
) -> LoraFile:
    """Reads a LoRA of diffusers, PEFT, kohya's scripts, ComfyUI, ai-toolkit or another program that writes plain LoRAs.

    Args:
        flag: for messages, as in `--lora_weights=x`.
        source: folder, file, or name on the Hub.
        pipeline_class: of diffusers; knows the names of modules in the models' original code.
        denoiser: the model that it is for; may be on the meta device.
        cache_dir: of downloads.

    Raises:
        ValueError: it can't be read, or is not a plain LoRA.
    """
    if looks_like_a_path(source) and not Path(source).exists():
        raise ValueError(f"{flag} does not exist.")
    try:
        tensors, metadata = _fetch(source, cache_dir)
    except Exception as error:  # of safetensors, of json, of pickle, or of the Hub
        raise ValueError(f"{flag} can't be read as a LoRA: {printable(str(error))}") from error
    kinds = sorted({kind for part, kind in OTHER_KINDS.items() if any(part in name for name in tensors)})
    if kinds:
        raise ValueError(
            f"{flag} is {' and '.join(kinds)}: only plain LoRAs can be used here. Train or export it as one."
        )
    digest = lora_digest(tensors, metadata)
    own = {name: value for name, value in tensors.items() if not name.startswith(TEXT_ENCODER)}
    layers = _layers(flag, own, pipeline_class, denoiser)
    _add_alphas(layers, {name.removeprefix("unet.").removeprefix("transformer."): x for name, x in metadata.items()})
    names = {name for name, _ in denoiser.named_modules()}
    return LoraFile(layers, sorted(layers.keys() - names), len(own) < len(tensors), digest)


def _fetch(source: str, cache_dir: str | None) -> tuple[dict[str, torch.Tensor], dict]:
    """A file's tensors by the names that it has, and PEFT's configuration, or {}."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():  # as PEFT writes it
        return load_file(folder / "adapter_model.safetensors"), json.loads(
            (folder / "adapter_config.json").read_text()
        )
    arguments = dict.fromkeys(inspect.signature(_fetch_state_dict).parameters) | {"allow_pickle": True}
    arguments |= {"use_safetensors": True, "cache_dir": cache_dir, "user_agent": {}, "return_file_metadata": False}
    if (folder / LORA_FILE).is_file():
        arguments["weight_name"] = LORA_FILE
    tensors, metadata = _fetch_state_dict(**arguments | {"pretrained_model_name_or_path_or_dict": source})
    return tensors, metadata or {}


def lora_digest(tensors: dict[str, torch.Tensor], metadata: dict) -> str:
    """Identifies a LoRA by its tensors, alphas among them, and PEFT's configuration."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, default=sorted).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _layers(flag: str, tensors: dict, pipeline_class: type[Any], denoiser: Module) -> dict[str, Layer]:
    """The LoRA of each module, by the names of the denoiser; those of original code are left to diffusers."""
    names = {name: name for name, _ in denoiser.named_modules()}
    flat = {prefix + name.replace(".", "_"): name for name in names for prefix in FLAT}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rest = _sort(flag, parts, tensors, names | flat)
    if rest:
        try:
            rest = _from_original_names(rest, pipeline_class, denoiser)
        except Exception:  # diffusers' conversions raise many kinds: it knows no such names
            pass
        rest = _sort(flag, parts, rest, names)
    _sort(flag, parts, rest, {})
    if not parts:
        example = f", but {printable(next(iter(tensors)))}" if tensors else ""
        raise ValueError(f"{flag} holds no LoRA of the denoiser{example}.")
    wrong = [name for name, part in parts.items() if not part.keys() >= {"A", "B"}]
    if wrong:
        raise ValueError(
            f"{flag} is damaged: of {printable(wrong[0])} only a part is there. Save or download it again."
        )
    return {
        name: Layer(part["A"].float(), part["B"].float(), float(part["alpha"]) if "alpha" in part else None)
        for name, part in parts.items()
    }


def _sort(flag: str, parts: dict[str, dict[str, torch.Tensor]], tensors: dict, names: dict[str, str]) -> dict:
    """Adds tensors to the "A", "B" and "alpha" of their modules, those that have a name, or all where there are no names.

    Returns:
        The other tensors.
    """
    rest = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))", _peft_name(key))
        if match is None:
            raise ValueError(
                f"{flag} holds {printable(key)}: it is not a plain LoRA, the only kind that can be used here."
            )
        module, part = match[1], match[2] or match[3]
        for prefix in DOTTED:
            module = module.removeprefix(prefix)
        if names and module not in names:
            rest[key] = value
            continue
        part = {"down": "A", "up": "B"}.get(part, part)
        parts.setdefault(names.get(module, module), {})[part] = value
    return rest


def _peft_name(key: str) -> str:
    """A key in PEFT's scheme, if it was in one of diffusers' older ones."""
    return next(iter(convert_unet_state_dict_to_peft({key: None})))


def _from_original_names(tensors: dict, pipeline_class: type[Any], denoiser: Module) -> dict[str, torch.Tensor]:
    """Renames modules of a model's original code to diffusers' names."""
    parameters = inspect.signature(pipeline_class.lora_state_dict).parameters
    arguments: dict[str, object] = {"return_alphas": True} if "return_alphas" in parameters else {}
    if "layers_per_block" in denoiser.config:  # a U-Net
        arguments["unet_config"] = denoiser.config
        tensors = {_kohya_name(name): value for name, value in tensors.items()}
    converted = pipeline_class.lora_state_dict(dict(tensors), **arguments)
    if not isinstance(converted, tuple):
        return converted
    alphas = {re.sub(r"\.lora_A\..*|\.alpha$", "", _peft_name(name)): x for name, x in (converted[1] or {}).items()}
    return converted[0] | {f"{module}.alpha": alpha for module, alpha in alphas.items()}


def _kohya_name(key: str) -> str:
    """ComfyUI's `diffusion_model.input_blocks.1.1.x.lora_up.weight` as kohya's `lora_unet_input_blocks_1_1_x.lora_up.weight`."""
    match = re.fullmatch(r"(?:model\.)?diffusion_model\.(.+)(\.lora_\w+\.weight|\.alpha)", key)
    if match is None:
        return key
    end = match[2].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    return f"lora_unet_{match[1].replace('.', '_')}{end}"


def _add_alphas(layers: dict[str, Layer], metadata: dict) -> None:
    """The alphas of PEFT's configuration, where the file has no others."""
    patterns = metadata.get("alpha_pattern") or {}
    for name, layer in layers.items():
        if layer.alpha is None and "lora_alpha" in metadata:
            matching = (alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", name))  # as in PEFT
            layer.alpha = float(next(matching, metadata["lora_alpha"]))
            if metadata.get("use_rslora"):
                layer.alpha *= len(layer.a) ** 0.5


def find_misfit(flag: str, lora: LoraFile, denoiser_name: str, model: str) -> str | None:
    """Compares a LoRA's modules with those of the model that generates.

    Args:
        flag: for messages, as in `--lora_weights=x`.
        lora: from `read_lora_file`.
        denoiser_name, model: for messages.

    Returns:
        A warning if a part of the LoRA has no place in the model, or None.

    Raises:
        ValueError: none of it fits.
    """
    if not lora.unknown:
        return None
    found = (
        f"{len(lora.unknown)} of its {len(lora.layers)} modules are not in the {denoiser_name} of {printable(model)},"
        f" such as {printable(lora.unknown[0])}"
    )
    if len(lora.unknown) == len(lora.layers):
        raise ValueError(f"{flag} does not fit the model: {found}.")
    return f"{flag} fits only in part: {found}. The images show only the rest, which was not trained to work alone."


def check_all_loaded(flag: str, lora: LoraFile, denoiser: Module) -> None:
    """Checks that a pipeline has loaded all modules of a LoRA that its denoiser has.

    Args:
        flag: for messages, as in `--lora_weights=x`.
        lora: from `read_lora_file`.
        denoiser: of the pipeline, after `load_lora_weights`.

    Raises:
        ValueError: some are missing. diffusers drops names that it doesn't know, without a word.
    """
    loaded = {name for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    missing = sorted(lora.layers.keys() - {*lora.unknown} - loaded)
    if missing:
        raise ValueError(
            f"{flag}: diffusers' load_lora_weights takes only {len(loaded)} of its {len(lora.layers)} modules, and drops"
            f" {printable(missing[0])}, for instance, as it doesn't know the file's names: the images would not be those of"
            " this LoRA. Use the file that the LoRA was first saved to, or convert it to diffusers' names."
        )


def read_initial_lora(
    options: ModelConfig, pipeline_class: type[Any], denoiser_name: str, denoiser: Module
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
    source = str(options.init_lora_weights)
    flag = f"--init_lora_weights={printable(source)}"
    lora = read_lora_file(flag, source, pipeline_class, denoiser, options.cache_dir)
    if lora.trains_text_encoder:
        raise ValueError(
            f"{flag} holds a LoRA for the text encoder too, which this script does not train: the result would generate"
            " other images than the file does. Start from one for the denoiser only."
        )
    if lora.unknown:
        raise ValueError(
            f"{flag} is a LoRA for another model: {len(lora.unknown)} of its {len(lora.layers)} modules are not in the"
            f" {denoiser_name} of {printable(options.pretrained_model_name_or_path)}, such as"
            f" {printable(lora.unknown[0])}."
        )
    _check_layers(flag, options.lora_layer_names, denoiser_name, denoiser, set(lora.layers))
    tensors = {}
    for module, layer in lora.layers.items():
        layer.a, layer.b = _fitted(flag, layer, module, denoiser.get_submodule(module).weight.shape)
        alpha = len(layer.a) if layer.alpha is None else layer.alpha
        tensors[f"{module}.lora_A.weight"] = layer.a
        tensors[f"{module}.lora_B.weight"] = layer.b * (alpha / options.alpha)
    _check_rank(flag, options.rank, lora.layers)
    return tensors


def _fitted(flag: str, layer: Layer, name: str, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the shapes that PEFT gives them; some programs store those of linear layers as convolutions' of 1x1."""
    shape_a = (len(layer.a), *shape[1:])
    shape_b = (shape[0], len(layer.a), *[1] * (len(shape) - 2))
    for factor, wanted in ((layer.a, shape_a), (layer.b, shape_b)):
        if tuple(factor.shape[:2]) != wanted[:2] or factor.numel() != math.prod(wanted):
            raise ValueError(
                f"{flag} does not fit the model: {printable(name)} has a weight of shape {tuple(shape)}, and the file's"
                f" factors are of {tuple(layer.b.shape)} and {tuple(layer.a.shape)}. It is for another model."
            )
    return layer.a.reshape(shape_a), layer.b.reshape(shape_b)


def _check_rank(flag: str, rank: int, layers: dict[str, Layer]) -> None:
    ranks = {len(layer.a) for layer in layers.values()}
    if ranks != {rank}:
        found = " and ".join(map(str, sorted(ranks)))
        advice = f"give --rank={found}" if len(ranks) == 1 else "this script trains one rank for all modules"
        raise ValueError(f"{flag} has rank {found}, and --rank={rank}: {advice}.")


def _check_layers(flag: str, layers: list[str], denoiser_name: str, denoiser: Module, found: set[str]) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    wanted = {name for layer in layers for name in names if matches_layer(name, layer)}
    if found != wanted:
        raise ValueError(
            f"{flag} is for {len(found)} modules of the {denoiser_name}, and --lora_layers names {len(wanted)}:"
            f" {len(found - wanted)} of the file's are not among them, {len(wanted - found)} are missing from the file."
            f"{_advice(names, found)}"
        )


def _advice(names: list[str], found: set[str]) -> str:
    """The --lora_layers that name exactly these modules, if a few names suffice."""
    ends: list[str] = []
    for name in sorted(found):
        parts = name.split(".")
        if not any(matches_layer(name, end) for end in ends):
            candidates = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            ends.append(next(end for end in candidates if {x for x in names if matches_layer(x, end)} <= found))
    return f" Give --lora_layers={','.join(sorted(ends))}" if len(ends) <= 20 else ""


def write_for_other_programs(lora: Path, target: Path) -> None:
    """Writes a LoRA for ComfyUI, AUTOMATIC1111 and other programs that don't read diffusers' adapter metadata.

    U-Nets get kohya's names, `lora_unet_down_blocks_1_...`, with an `.alpha` for each module: the only ones that all of
    these programs know. Transformers keep diffusers' names, which ComfyUI reads; alpha / rank is multiplied into their
    weights, since diffusers' own loaders of some families refuse an `.alpha` beside such names. So both load in diffusers.

    Args:
        lora: the `pytorch_lora_weights.safetensors` of a run.
        target: the file to write.
    """
    with safe_open(lora, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = json.loads(file.metadata()[METADATA])
    convert = for_unet if next(iter(tensors)).startswith("unet.") else for_transformer
    save_file({name: value.contiguous() for name, value in convert(tensors, metadata).items()}, target)
    make_readable(target)


def for_unet(tensors: dict[str, torch.Tensor], metadata: dict) -> dict[str, torch.Tensor]:
    """kohya's names: `lora_down.weight` (rank, in), `lora_up.weight` (out, rank) and `alpha` () of each module."""
    converted = convert_state_dict_to_kohya(tensors)
    for name, others in SDXL_EMBEDDING.items():
        converted = {key.replace(name, others): value for key, value in converted.items()}
    alpha = torch.tensor(float(metadata["unet.lora_alpha"]))  # diffusers has written the rank
    return {name: alpha.clone() if name.endswith(".alpha") else value for name, value in converted.items()}


def for_transformer(tensors: dict[str, torch.Tensor], metadata: dict) -> dict[str, torch.Tensor]:
    """diffusers' names; alpha / rank is multiplied into `lora_B.weight` (out, rank)."""
    scale = metadata["transformer.lora_alpha"] / metadata["transformer.r"]
    return {name: value * scale if ".lora_B." in name else value for name, value in tensors.items()}
