"""The flags that a model needs."""

import argparse
from dataclasses import dataclass, fields

from ..runtime.messages import printable
from ..runtime.shapes import Shape, parse_shapes


@dataclass(frozen=True)
class ModelOptions:
    """A base model, its LoRA, and how both are used; each field is the flag of its name.

    Families that lack a flag leave its field at the default.
    """

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None = None
    validation_model_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    resolution: int = 1024
    aspect_ratio_buckets: str | bool | None = None
    vae_encode_batch_size: int = 8
    # The LoRA, and the frozen weights that it is added to.
    rank: int = 4
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_layers: str = ""
    init_lora_weights: str | None = None
    quantize_base: str | None = None
    bnb_quantization_config_path: str | None = None  # what the file says, in JSON
    gradient_checkpointing: bool = False
    compile: bool = False
    allow_tf32: bool = False
    # What some families are told.
    max_sequence_length: int | None = None
    guidance_scale: float | None = None
    # Noise of SD and SDXL.
    prediction_type: str | None = None
    snr_gamma: float | None = None
    # Noise of flow matching.
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    # Of the validation images.
    validation_inference_steps: int = 25
    validation_guidance_scale: float = 5.0
    source_flag: str = "pretrained_model_name_or_path"  # which flag named the model

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "ModelOptions":
        """Takes the fields from the flags that a script has."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls) if field.name in args})

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Heights and widths of the images that it trains on, in pixels."""
        return parse_shapes(self.aspect_ratio_buckets, self.resolution)

    @property
    def named_source(self) -> str:
        """The model as a message names it."""
        return f"--{self.source_flag}={printable(self.pretrained_model_name_or_path)}"

    @property
    def alpha(self) -> float:
        """Of the LoRA, which is scaled by alpha / rank."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def lora_layer_names(self) -> list[str]:
        return [name.strip() for name in self.lora_layers.split(",")]

    @property
    def sampler_config(self) -> dict[str, str]:
        """Entries of the sampler's configuration that the flags override."""
        return {} if self.prediction_type is None else {"prediction_type": self.prediction_type}

    @property
    def source_options(self) -> dict[str, str | None]:
        """Arguments of diffusers' loaders that say which files of the model are meant."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}
