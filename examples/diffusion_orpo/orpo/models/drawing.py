"""Drawing with a model of any registered family, with a LoRA or without, as its users do."""

import argparse
from dataclasses import dataclass, fields

import torch
from PIL.Image import Image

from diffusers import DiffusionPipeline

from ..system.messages import printable
from .checks import is_absent, read_index
from .options import ModelOptions
from .registry import FAMILIES, Family


SHORT = {"float16": "fp16", "bfloat16": "bf16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def find_family(args: argparse.Namespace) -> Family:
    """The registered family of the base model that the flags name.

    Raises:
        ValueError: there is no such model, or it belongs to no registered family.
    """
    index = read_index(ModelOptions.from_flags(args))
    if index.get("_class_name") not in FAMILIES:
        raise ValueError(
            f"--pretrained_model_name_or_path={printable(args.pretrained_model_name_or_path)} is a"
            f" {index.get('_class_name')}. It must be one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[index["_class_name"]]


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
    def from_flags(cls, args: argparse.Namespace, family: Family, device: torch.device) -> "Drawing":
        """Takes the flags, and the defaults of family and device for those that were not given.

        Raises:
            ValueError: the family can't draw at the resolution, or doesn't know a flag.
        """
        given = {field.name: getattr(args, field.name) for field in fields(cls)}
        defaults = {
            "resolution": family.defaults.get("resolution", 1024),
            "guidance_scale": family.defaults.get("validation_guidance_scale", 5.0),
            "dtype": "fp32" if device.type == "cpu" else SHORT[family.load_class().inference_dtype],
        }
        known = {flag.name: flag.default for group in family.flags for flag in group.flags}
        for name in ("max_sequence_length", "prediction_type"):
            if given[name] is not None and name not in known:
                raise ValueError(f"--{name} means nothing for {family.name}.")
            defaults[name] = known.get(name)
        given = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        if given["resolution"] % family.resolution_step != 0:
            raise ValueError(f"--resolution must be a multiple of {family.resolution_step}; got {args.resolution}.")
        return cls(**given)

    @property
    def model_name(self) -> str:
        """Of the model, as the pairs name it."""
        lora = f" + {self.lora_weights}" if self.lora_weights else ""
        scale = f" x {self.lora_scale:g}" if lora and self.lora_scale != 1 else ""
        return f"{self.pretrained_model_name_or_path}{lora}{scale}"

    def options(self, cache_dir: str | None = None) -> ModelOptions:
        """Of the base model."""
        return ModelOptions(
            self.pretrained_model_name_or_path,
            self.pretrained_vae_model_name_or_path,
            self.revision,
            self.variant,
            cache_dir,
            resolution=self.resolution,
        )


def load_pipeline(
    drawing: Drawing, family: Family, device: torch.device, cache_dir: str | None = None
) -> DiffusionPipeline:
    """Loads the pipeline that a user draws with, and the LoRA if there is one.

    Raises:
        ValueError: the LoRA can't be loaded, or doesn't fit the model.
    """
    model, dtype, modules = family.load_class(), DTYPES[drawing.dtype], {}
    if drawing.pretrained_vae_model_name_or_path is not None:
        modules["vae"] = model.vae_class.module_class.from_pretrained(
            drawing.pretrained_vae_model_name_or_path, dtype=dtype, cache_dir=cache_dir
        )
    index = read_index(drawing.options(cache_dir), family.pipeline)
    absent = [name for name in model.optional_modules if is_absent(index, name)]
    pipeline = model.pipeline_class.from_pretrained(
        drawing.pretrained_model_name_or_path,
        dtype=dtype,
        revision=drawing.revision,
        variant=drawing.variant,
        cache_dir=cache_dir,
        **model.pipeline_options,
        **dict.fromkeys(absent),
        **modules,
    ).to(device)
    pipeline.watermark = None  # SDXL's: or what is installed would decide about the pixels
    pipeline.set_progress_bar_config(disable=True)
    if drawing.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=drawing.prediction_type)
    if hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()  # image by image: less memory, and the batch makes no difference
    if drawing.lora_weights is not None:
        try:
            pipeline.load_lora_weights(drawing.lora_weights, adapter_name="orpo", cache_dir=cache_dir)
            pipeline.set_adapters(["orpo"], [drawing.lora_scale])
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"--lora_weights={printable(drawing.lora_weights)} does not fit"
                f" {printable(drawing.pretrained_model_name_or_path)}: {printable(str(error))}"
            ) from error
    return pipeline


def draw(drawing: Drawing, pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int]) -> list[Image]:
    """Draws an image of each prompt, each with a generator of its own on the CPU.

    Neither batch size nor device changes an image's noise.
    """
    options = FAMILIES[type(pipeline).__name__].load_class().guidance_options(drawing.guidance_scale)
    if drawing.max_sequence_length is not None:
        options["max_sequence_length"] = drawing.max_sequence_length
    if "true_cfg_scale" in options:  # Qwen-Image is guided away from a prompt that is given, or not at all
        options["negative_prompt"] = [" "] * len(prompts)
    return pipeline(
        prompt=prompts,
        height=drawing.resolution,
        width=drawing.resolution,
        num_inference_steps=drawing.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images
