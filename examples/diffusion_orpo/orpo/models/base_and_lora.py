"""A base model and a LoRA for it, told from others by all of their content, and drawn with one after the other."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from PIL.Image import Image

from diffusers import DDPMScheduler

from ..config import EvaluationConfig
from .drawing import Drawing, draw, identify_lora, load_model, open_model
from .identity import module_identity
from .pipeline import FamilyPipeline
from .registry import Family, find_family
from .vae import vae_source


@dataclass(frozen=True)
class BaseAndLora:
    """The two models that `evaluate_lora.py` compares. No weights are loaded before `load`."""

    drawing: Drawing
    family: Family
    device: torch.device
    cache_dir: str | None = None

    @classmethod
    def from_config(cls, config: EvaluationConfig, device: torch.device) -> "BaseAndLora":
        """Finds the family of the model that the flags name.

        Raises:
            ValueError: there is no such model, it belongs to no registered family, or the family can't do what the flags say.
        """
        family = find_family(config)
        return cls(Drawing.from_config(config, family, device), family, device, config.cache_dir)

    def settings(self) -> tuple[dict, dict, list[str]]:
        """What decides the base's images, what else decides the LoRA's, and warnings where only a part of the LoRA fits.

        Raises:
            ValueError: the model can't be used, the LoRA can't be read, or none of it fits.
        """
        flags = asdict(self.drawing)
        del flags["lora_weights"]  # known by its content
        lora = {"lora_scale": flags.pop("lora_scale")}
        model = open_model(self.drawing, self.family, self.device, self.cache_dir)
        base = flags | base_identity(model)
        lora["lora_sha256"], warnings = identify_lora(self.drawing, model)
        return base, lora, warnings

    def load(self) -> dict[str, Callable[[list[str], list[int]], list[Image]]]:
        """Loads the model; returns functions that draw images of prompts from seeds, as "base" and as "lora".

        Raises:
            ValueError: the LoRA doesn't fit the model.
        """
        model = load_model(self.drawing, self.family, self.device, self.cache_dir)

        def without_lora(prompts: list[str], seeds: list[int]) -> list[Image]:
            model.pipeline.disable_lora()
            return draw(self.drawing, model, prompts, seeds)

        def with_lora(prompts: list[str], seeds: list[int]) -> list[Image]:
            model.pipeline.enable_lora()
            return draw(self.drawing, model, prompts, seeds)

        return {"base": without_lora, "lora": with_lora}


def base_identity(model: FamilyPipeline) -> dict[str, object]:
    """What the base model's images depend on, besides the flags: the content of its modules, and its sampler.

    Raises:
        ValueError: the model has no such files.
    """
    options = model.options
    source, arguments = options.pretrained_model_name_or_path, {"variant": options.variant, **options.source_options}
    encoders = [name for name in model.text_encoder_names if name not in model.absent_modules]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    identity = {
        name: module_identity(source, subfolder=name, **arguments)
        for name in (model.denoiser_name, *encoders, *tokenizers)
    }
    vae, vae_arguments = vae_source(options)
    scheduler = DDPMScheduler.load_config(source, subfolder="scheduler", **options.source_options)
    scheduler = {name: value for name, value in scheduler.items() if name != "_diffusers_version"}
    vae_identity = module_identity(vae, **vae_arguments)
    return identity | {"vae": vae_identity, "scheduler": scheduler | options.sampler_config}
