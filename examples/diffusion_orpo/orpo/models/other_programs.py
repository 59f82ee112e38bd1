"""A trained LoRA for ComfyUI, AUTOMATIC1111 and other programs that don't read diffusers' adapter metadata.

U-Nets get kohya's names, `lora_unet_down_blocks_1_...`, with an `.alpha` for each module: the only ones that all of these
programs know. Transformers keep diffusers' names, which ComfyUI reads; alpha / rank is multiplied into their weights, since
diffusers' own loaders of some families refuse an `.alpha` beside such names. So both files load in diffusers too.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers.utils import convert_state_dict_to_kohya

from ..runtime.durable import make_readable
from ..runtime.messages import printable


COMFYUI_FILE = "comfyui_lora.safetensors"  # diffusers must not take it for pytorch_lora_weights.safetensors
METADATA = "lora_adapter_metadata"
# These two modules are read by their name in SDXL's original code only, which the others may have as well.
SDXL_EMBEDDING = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


def write_for_other_programs(lora: Path, target: Path) -> None:
    """Writes a LoRA in the names and with the strength that other programs read.

    Args:
        lora: a `pytorch_lora_weights.safetensors` of these scripts.
        target: the file to write.

    Raises:
        ValueError: `lora` is not such a file, or holds other modules than those of a U-Net or a transformer.
    """
    try:
        state_dict = load_file(lora)
        with safe_open(lora, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except Exception as error:  # safetensors' own type, OSError, or one of json
        raise ValueError(f"{lora} can't be read as a LoRA: {printable(str(error))}") from error
    prefixes = {name.split(".")[0] for name in state_dict}
    if prefixes == {"unet"}:
        converted = for_unet(state_dict, metadata)
    elif prefixes == {"transformer"}:
        converted = for_transformer(state_dict, metadata)
    else:
        raise ValueError(
            f"{lora} holds {printable(', '.join(sorted(prefixes))) or 'nothing'}: only LoRAs for unet or transformer, as the"
            " training scripts write them, can be converted."
        )
    save_file({name: value.contiguous() for name, value in converted.items()}, target)
    make_readable(target)


def for_unet(state_dict: dict[str, torch.Tensor], metadata: dict) -> dict[str, torch.Tensor]:
    """kohya's names: `lora_down.weight` (rank, in), `lora_up.weight` (out, rank) and `alpha` () of each module."""
    converted = convert_state_dict_to_kohya(state_dict)
    for name, others in SDXL_EMBEDDING.items():
        converted = {key.replace(name, others): value for key, value in converted.items()}
    for name, value in converted.items():
        if name.endswith(".alpha"):  # diffusers has written the rank there, whatever alpha was
            converted[name] = torch.tensor(float(metadata.get("unet.lora_alpha", value.item())))
    return converted


def for_transformer(state_dict: dict[str, torch.Tensor], metadata: dict) -> dict[str, torch.Tensor]:
    """diffusers' names; alpha / rank is multiplied into `lora_B.weight` (out, rank)."""
    converted = dict(state_dict)
    for name, value in state_dict.items():
        if name.endswith(".lora_B.weight"):
            rank = value.shape[1]
            converted[name] = value * (metadata.get("transformer.lora_alpha", rank) / rank)
    return converted
