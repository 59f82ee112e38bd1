"""A base model and a LoRA for it, told from others by all of their content, and drawn with one after the other."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from PIL.Image import Image

from diffusers import DDPMScheduler

from ..system.messages import printable
from .checks import build_empty, check_pipeline, is_absent, read_index
from .drawing import Drawing, draw, find_family, load_pipeline
from .encoding_identity import module_identity
from .lora_file import check_fit, lora_digest, modules_of, read_lora_file
from .options import ModelOptions
from .registry import Family
from .vae import vae_source


@dataclass(frozen=True)
class BaseAndLora:
    """The two models that `evaluate_lora.py` compares. No weights are loaded before `load`."""

    drawing: Drawing
    family: Family
    device: torch.device
    cache_dir: str | None = None

    @classmethod
    def from_flags(cls, args: argparse.Namespace, device: torch.device) -> "BaseAndLora":
        """Finds the family of the model that the flags name.

        Raises:
            ValueError: there is no such model, it belongs to no registered family, or the family can't do what the flags say.
        """
        family = find_family(args)
        return cls(Drawing.from_flags(args, family, device), family, device, args.cache_dir)

    def settings(self) -> tuple[dict, dict, list[str]]:
        """What decides the base's images, what else decides the LoRA's, and warnings where only a part of the LoRA fits.

        Raises:
            ValueError: the LoRA can't be read, or none of it fits.
        """
        flags = asdict(self.drawing)
        del flags["lora_weights"]  # known by its content
        lora = {"lora_scale": flags.pop("lora_scale")}
        base = flags | base_identity(self.drawing.options(self.cache_dir), self.family, self.drawing.prediction_type)
        lora["lora_sha256"], warning = lora_identity(self.drawing, self.drawing.options(self.cache_dir), self.family)
        return base, lora, [warning] if warning else []

    def load(self) -> dict[str, Callable[[list[str], list[int]], list[Image]]]:
        """Loads the pipeline; returns functions that draw images of prompts from seeds, as "base" and as "lora".

        Raises:
            ValueError: the LoRA doesn't fit the model.
        """
        pipeline = load_pipeline(self.drawing, self.family, self.device, self.cache_dir)

        def without_lora(prompts: list[str], seeds: list[int]) -> list[Image]:
            pipeline.disable_lora()
            return draw(self.drawing, pipeline, prompts, seeds)

        def with_lora(prompts: list[str], seeds: list[int]) -> list[Image]:
            pipeline.enable_lora()
            return draw(self.drawing, pipeline, prompts, seeds)

        return {"base": without_lora, "lora": with_lora}


def base_identity(options: ModelOptions, family: Family, prediction_type: str | None) -> dict[str, object]:
    """What the base model's images depend on, besides the flags: the content of its modules, and its sampler.

    Raises:
        ValueError: the model is not of this family, or has no such files.
    """
    model = family.load_class()
    index = read_index(options, family.pipeline)
    check_pipeline(options, index, family.pipeline, family.name)
    source = options.pretrained_model_name_or_path
    arguments = {"variant": options.variant, **options.source_options}
    encoders = [name for name in model.text_encoder_names if not is_absent(index, name)]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    identity = {
        name: module_identity(source, subfolder=name, **arguments)
        for name in (model.denoiser_name, *encoders, *tokenizers)
    }
    vae, vae_arguments = vae_source(options)
    scheduler = DDPMScheduler.load_config(source, subfolder="scheduler", **options.source_options)
    if prediction_type is not None:
        scheduler = {**scheduler, "prediction_type": prediction_type}
    scheduler = {name: value for name, value in scheduler.items() if name != "_diffusers_version"}
    return identity | {"vae": module_identity(vae, **vae_arguments), "scheduler": scheduler}


def lora_identity(drawing: Drawing, options: ModelOptions, family: Family) -> tuple[str, str | None]:
    """A LoRA's digest, and a warning where only a part of it fits the base model. Reads no weights but the LoRA's.

    Raises:
        ValueError: it can't be read, or none of it fits.
    """
    model = family.load_class()
    flag = f"--lora_weights={printable(drawing.lora_weights)}"
    denoiser = build_empty(options, read_index(options, family.pipeline), model.denoiser_name)
    try:
        content = read_lora_file(drawing.lora_weights, model.pipeline_class, denoiser.config)
    except Exception as error:  # of safetensors, of json, of the Hub, and of diffusers' conversions
        raise ValueError(f"{flag} can't be loaded: {printable(str(error))}") from error
    modules = modules_of(content[0], model.denoiser_name)
    warning = check_fit(flag, modules, denoiser, model.denoiser_name, drawing.pretrained_model_name_or_path)
    return lora_digest(*content), warning
