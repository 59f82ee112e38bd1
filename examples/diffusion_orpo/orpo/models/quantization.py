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

from ..config import ModelConfig


def quantization_options(options: ModelConfig, denoiser_name: str, dtype: torch.dtype) -> dict:
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
    if not is_bitsandbytes_available():
        raise ImportError("--bnb_quantization_config_path needs bitsandbytes: `pip install bitsandbytes`.")
    config = json.loads(options.bnb_quantization_config_path)
    if config.get("load_in_4bit") and config.get("bnb_4bit_compute_dtype") is None:
        config["bnb_4bit_compute_dtype"] = dtype
    mapping = {denoiser_name: BitsAndBytesConfig(**{key: value for key, value in config.items() if value is not None})}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}
