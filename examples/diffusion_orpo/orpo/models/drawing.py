"""Drawing with a model of any registered family, with a LoRA or without, as the flags of a script say."""

from dataclasses import dataclass, fields

import torch
from PIL.Image import Image

from ..config import GenerationConfig, ModelConfig
from ..runtime.messages import printable
from .lora_files import LoraFile, check_all_loaded, find_misfit, read_lora_file
from .pipeline import FamilyPipeline
from .registry import Family


SHORT = {"float16": "fp16", "bfloat16": "bf16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Drawing:
    """Everything that decides an image besides prompt and seed; each field is the flag of its name."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    lora_weights: str | None
    lora_scale: float
    prediction_type: str | None
    dtype: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None

    @classmethod
    def from_config(cls, config: GenerationConfig, family: Family, device: torch.device) -> "Drawing":
        """Takes the flags, and the defaults of family and device for those that were not given.

        Raises:
            ValueError: the family can't draw at the resolution, or doesn't know a flag.
        """
        given = {field.name: getattr(config, field.name) for field in fields(cls)}
        defaults = {
            "resolution": family.defaults.get("resolution", 1024),
            "guidance_scale": family.defaults.get("validation_guidance_scale", 5.0),
            "dtype": "fp32" if device.type == "cpu" else SHORT[family.load_class().inference_dtype],
        }
        for name in ("max_sequence_length", "prediction_type"):
            if given[name] is not None and name not in family.own:
                raise ValueError(f"--{name} has no effect with {family.name}.")
            defaults[name] = family.own.get(name)
        given = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        if given["resolution"] % family.resolution_step != 0:
            raise ValueError(f"--resolution must be a multiple of {family.resolution_step}; got {config.resolution}.")
        return cls(**given)

    @property
    def lora_flag(self) -> str:
        """The LoRA as a message names it."""
        return f"--lora_weights={printable(self.lora_weights)}"

    @property
    def model_name(self) -> str:
        """Of the model, as the pairs name it."""
        lora = f" + {self.lora_weights}" if self.lora_weights else ""
        scale = f" x {self.lora_scale:g}" if lora and self.lora_scale != 1 else ""
        return f"{self.pretrained_model_name_or_path}{lora}{scale}"

    def options(self, cache_dir: str | None = None) -> ModelConfig:
        """Of the base model."""
        return ModelConfig(
            pretrained_model_name_or_path=self.pretrained_model_name_or_path,
            pretrained_vae_model_name_or_path=self.pretrained_vae_model_name_or_path,
            revision=self.revision,
            variant=self.variant,
            cache_dir=cache_dir,
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            prediction_type=self.prediction_type,
        )


def open_model(drawing: Drawing, family: Family, device: torch.device, cache_dir: str | None = None) -> FamilyPipeline:
    """Reads the configuration files of the model that a user draws with, and no weights.

    Raises:
        ValueError: the model can't be used.
    """
    return family.load_class()(drawing.options(cache_dir), device, DTYPES[drawing.dtype])


def load_model(drawing: Drawing, family: Family, device: torch.device, cache_dir: str | None = None) -> FamilyPipeline:
    """Loads the model that a user draws with, and the LoRA if there is one.

    Raises:
        ValueError: the model can't be used, or the LoRA can't be loaded or doesn't fit it.
    """
    model = open_model(drawing, family, device, cache_dir)
    model.load_modules()
    if drawing.lora_weights is not None:
        content = read_lora(drawing, model)
        try:
            model.pipeline.load_lora_weights(drawing.lora_weights, adapter_name="orpo", cache_dir=cache_dir)
            model.pipeline.set_adapters(["orpo"], [drawing.lora_scale])
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{drawing.lora_flag} does not fit {printable(drawing.pretrained_model_name_or_path)}:"
                f" {printable(str(error))}"
            ) from error
        check_all_loaded(drawing.lora_flag, content, model.denoiser)
        model.denoiser.eval()  # a LoRA whose file names a dropout is loaded with that switched on
    return model


def read_lora(drawing: Drawing, model: FamilyPipeline) -> LoraFile:
    """Reads the LoRA that the flags name; no weights of the model are needed.

    Raises:
        ValueError: it can't be read, or is not a plain LoRA.
    """
    cache_dir = model.options.cache_dir
    return read_lora_file(
        drawing.lora_flag, drawing.lora_weights, model.pipeline_class, model.empty_denoiser, cache_dir
    )


def identify_lora(drawing: Drawing, model: FamilyPipeline) -> tuple[str | None, list[str]]:
    """The digest of the LoRA that the flags name, None without one, and warnings where only a part of it fits.

    Raises:
        ValueError: it can't be read, is not a plain LoRA, or none of it fits.
    """
    if drawing.lora_weights is None:
        return None, []
    lora = read_lora(drawing, model)
    base = drawing.pretrained_model_name_or_path
    warning = find_misfit(drawing.lora_flag, lora, model.denoiser_name, base)
    return lora.digest, [warning] if warning else []


def draw(drawing: Drawing, model: FamilyPipeline, prompts: list[str], seeds: list[int]) -> list[Image]:
    """Draws an image of each prompt as the flags say."""
    return model.draw(prompts, seeds, drawing.num_inference_steps, drawing.guidance_scale)
