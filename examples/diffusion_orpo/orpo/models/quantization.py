"""Frozen base weights in 8 or 4 bits, by bitsandbytes through diffusers' quantization config."""

import torch

from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from diffusers.utils import is_bitsandbytes_available


def quantization_options(quantize_base: str | None, denoiser_name: str, dtype: torch.dtype) -> dict:
    """What a pipeline's `from_pretrained` needs to load its denoiser's linear layers quantized.

    Args:
        quantize_base: "8bit" (LLM.int8, arXiv 2208.07339), "nf4" (QLoRA's normal float with double quantization, arXiv
            2305.14314), or None.
        denoiser_name: in the pipeline.
        dtype: that quantized weights are multiplied in, and of all that is not quantized.

    Returns:
        Arguments for `from_pretrained`, none without `quantize_base`.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if quantize_base is None:
        return {}
    if not is_bitsandbytes_available():
        raise ImportError("--quantize_base needs bitsandbytes: `pip install bitsandbytes`.")
    if quantize_base == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={denoiser_name: config})}
