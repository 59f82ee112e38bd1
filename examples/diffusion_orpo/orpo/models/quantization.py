"""Frozen base weights in 8 or 4 bits, by bitsandbytes through diffusers' quantization config.

PEFT's `prepare_model_for_kbit_training`, which diffusers' scripts call here, is left out. It freezes the base, which is
frozen already; it makes inputs need gradients for checkpointing that is reentrant, and diffusers' is not; and it casts the
parts that stay in half precision (norms, biases, convolutions) to float32. These weights were rounded when they were loaded, autocast
computes norms in float32 in any case, and SDXL's would take 0.6 GiB more.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ModelConfig


if TYPE_CHECKING:  # the flag is read before torch is loaded
    import torch


FLOATS = ("float16", "float32", "bfloat16")
STORAGE = (*FLOATS, "int8", "uint8", "float64")
# The arguments of diffusers' BitsAndBytesConfig: the type of each, or the values that it may have.
KEYS: dict[str, type | tuple[str, ...]] = {
    "load_in_8bit": bool,
    "load_in_4bit": bool,
    "llm_int8_threshold": float,
    "llm_int8_skip_modules": list,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
    "bnb_4bit_compute_dtype": FLOATS,
    "bnb_4bit_quant_type": ("fp4", "nf4"),
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": STORAGE,
}
# LLM.int8 (arXiv 2208.07339), and QLoRA's normal float with double quantization (arXiv 2305.14314).
SHORT = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
WRITTEN_ALONG = ("quant_method", "_load_in_4bit", "_load_in_8bit")  # by BitsAndBytesConfig.to_dict


def read_bnb_config(path: str) -> str:
    """What the file says, or 8bit or nf4, as JSON with sorted keys: two files that say the same are the same flag.

    Raises:
        ValueError: it is missing or is not such a file.
    """
    if path in SHORT:
        return json.dumps(SHORT[path], sort_keys=True)
    path = f"--bnb_quantization_config_path={path}"
    try:
        config = json.loads(Path(path.partition("=")[2]).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    problem = find_problem(config)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return json.dumps({key: value for key, value in config.items() if key in KEYS}, sort_keys=True)


def find_problem(config: object) -> str | None:
    """What is wrong with a configuration, or None."""
    if not isinstance(config, dict):
        return 'it must hold an object, such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}.'
    unknown = sorted(config.keys() - KEYS.keys() - {*WRITTEN_ALONG})
    if unknown:
        return f"BitsAndBytesConfig has no {', '.join(unknown)}. It takes {', '.join(KEYS)}."
    for key, expected in KEYS.items():
        value = config.get(key)
        if value is None:
            continue
        if isinstance(expected, tuple) and value not in expected:
            return f"{key} must be one of {', '.join(expected)}; got {value!r}."
        if isinstance(expected, type) and type(value) is not expected:
            kind = "true or false" if expected is bool else "6.0 or another float" if expected is float else "a list"
            return f"{key} must be {kind}; got {value!r}."
    if bool(config.get("load_in_8bit")) == bool(config.get("load_in_4bit")):
        return "exactly one of load_in_8bit and load_in_4bit must be true, or nothing would be quantized."
    return None


def quantization_options(options: ModelConfig, denoiser_name: str, dtype: "torch.dtype") -> dict:
    """Arguments of a pipeline's `from_pretrained` that load its denoiser's linear layers quantized.

    Args:
        options: of the model; `bnb_quantization_config_path` is what `read_bnb_config` made of it.
        denoiser_name: in the pipeline.
        dtype: that quantized weights are multiplied in, and of all that is not quantized.

    Returns:
        Arguments for `from_pretrained`; empty if nothing is quantized.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if options.bnb_quantization_config_path is None:
        return {}
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
    from diffusers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError("--bnb_quantization_config_path needs bitsandbytes: `pip install bitsandbytes`.")
    config = json.loads(options.bnb_quantization_config_path)
    if config.get("load_in_4bit") and config.get("bnb_4bit_compute_dtype") is None:
        config["bnb_4bit_compute_dtype"] = dtype
    mapping = {denoiser_name: BitsAndBytesConfig(**{key: value for key, value in config.items() if value is not None})}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}
