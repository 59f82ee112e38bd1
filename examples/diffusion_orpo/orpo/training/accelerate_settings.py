"""Accelerate's own configuration (environment, `accelerate config`): what contradicts a flag or can't be served is refused."""

import os

from accelerate import Accelerator

from ..config import OptimizerConfig
from ..runtime.precision import DTYPES


# What shards the model, by accelerate's variable: LoRA saving and gradient clipping would be wrong.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def refuse_sharding() -> None:
    """Stops before accelerate begins to shard.

    Raises:
        ValueError: names what is configured, and what to use in its place.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ValueError(
                f"Accelerate is configured for {name} ({variable}), which these scripts don't support. Only the LoRA"
                " trains, so data parallelism is enough: `accelerate launch --multi_gpu`. If the base does not fit a GPU,"
                " use --bnb_quantization_config_path=nf4, --gradient_checkpointing and --cache_latents."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"Accelerate is configured to compile the model (ACCELERATE_DYNAMO_BACKEND={backend}), which is not supported:"
            " leave it out, and use --compile."
        )


def check_settings(config: OptimizerConfig, accelerator: Accelerator) -> None:
    """Compares what accelerate made of its configuration with the flags.

    Raises:
        ValueError: names both.
    """
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient_accumulation_steps={config.gradient_accumulation_steps}, but accelerate's configuration says"
            f" {accelerator.gradient_accumulation_steps} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS): give the same with the"
            " flag, or unset the variable."
        )
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(
            f"Accelerate is configured for mixed precision {accelerator.mixed_precision!r}, which is not one of"
            f" {', '.join(DTYPES)}: give --mixed_precision."
        )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "mps":
        raise ValueError("bf16 does not work on MPS: give --mixed_precision=fp16 or no.")
