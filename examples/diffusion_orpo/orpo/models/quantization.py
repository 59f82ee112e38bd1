"""Frozen base weights in 8 or 4 bits, by bitsandbytes through diffusers' quantization config.

PEFT's `prepare_model_for_kbit_training`, which diffusers' scripts call here, is left out. It freezes the base, which is
frozen already; it makes inputs need gradients for checkpointing that is reentrant, and diffusers' is not; and it casts the
parts that stay in half precision (norms, biases, convolutions) to float32. These weights were rounded when they were loaded, autocast
computes norms in float32 in any case, and SDXL's would take 0.6 GiB more.
"""

import json

import torch

from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from diffusers.utils import is_bitsandbytes_available

from .options import ModelOptions


def quantization_options(options: ModelOptions, denoiser_name: str, dtype: torch.dtype) -> dict:
    """Arguments of a pipeline's `from_pretrained` that load its denoiser's linear layers quantized.

    Args:
        options: of the model; `quantize_base` is "8bit" (LLM.int8, arXiv 2208.07339) or "nf4" (QLoRA's normal float with
            double quantization, arXiv 2305.14314), and `bnb_quantization_config_path` says the same in detail.
        denoiser_name: in the pipeline.
        dtype: that quantized weights are multiplied in, and of all that is not quantized.

    Returns:
        Arguments for `from_pretrained`; empty if nothing is quantized.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if options.bnb_quantization_config_path is not None:
        flag, config = "--bnb_quantization_config_path", json.loads(options.bnb_quantization_config_path)
    elif options.quantize_base == "8bit":
        flag, config = "--quantize_base", {"load_in_8bit": True}
    elif options.quantize_base == "nf4":
        flag = "--quantize_base"
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    else:
        return {}
    if not is_bitsandbytes_available():
        raise ImportError(f"{flag} needs bitsandbytes: `pip install bitsandbytes`.")
    if config.get("load_in_4bit") and config.get("bnb_4bit_compute_dtype") is None:
        config["bnb_4bit_compute_dtype"] = dtype
    mapping = {denoiser_name: BitsAndBytesConfig(**{key: value for key, value in config.items() if value is not None})}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}
