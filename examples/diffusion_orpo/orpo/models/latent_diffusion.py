"""The base of all model families: a frozen pipeline with a LoRA in its denoiser. A family is a subclass.

A family says which pipeline it is, how prompts become embeddings, and how its denoiser is called: see `sdxl.py`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from PIL.Image import Image

from ..config import ModelConfig
from ..runtime.transfer import to_device
from .checks import Module, check_lora_layers, warn_of_distillation
from .identity import base_identity, encoding_identity
from .lora import (
    LORA_FILE,
    add_lora,
    as_loaded,
    check_same_lora,
    load_lora,
    loaded_with_lora,
    save_lora,
    validation_options,
)
from .lora_files import COMFYUI_FILE, read_initial_lora, write_for_other_programs
from .noise import DDPM, FlowMatching
from .pipeline import FamilyPipeline
from .vae import sample_latents


logger = logging.getLogger(__name__)

Embeds = dict[str, torch.Tensor]  # by name, what a family makes of B prompts: every tensor has B rows
Batch = dict[str, Any]  # as `collate_pairs` makes it
Denoiser = Callable[..., Any]  # the module, which may be wrapped for distributed training


def twice(rows: torch.Tensor) -> torch.Tensor:
    """What both images of B pairs share (2B, ...), from one row for each pair (B, ...)."""
    return torch.cat([rows, rows])


class LatentDiffusion(FamilyPipeline):
    """A pipeline whose modules are frozen but for the LoRA in its denoiser.

    A family also sets:

    Attributes:
        noise_process_class: `DDPM` or `FlowMatching`.
        patch_size: side of the squares of latents that the denoiser takes as one.
    """

    noise_process_class: type[DDPM] | type[FlowMatching]
    patch_size = 1
    lora_file = LORA_FILE

    @cached_property
    def noise_process(self) -> DDPM | FlowMatching:
        """Adds noise in training."""
        return self.noise_process_class.load(self.options)

    @cached_property
    def validation_model(self) -> "LatentDiffusion | None":
        """The model that generates, where that is another one; loaded while it generates, and only then."""
        if self.options.validation_model_path is None:
            return None
        return type(self)(validation_options(self.options), self.device, self.dtype)

    @classmethod
    def load(
        cls,
        options: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        denoiser: bool = True,
        encoders: bool = True,
    ) -> "LatentDiffusion":
        """Loads the modules that are asked for, and adds a LoRA to the denoiser. `check` says before whether that will work.

        Args:
            options: of the model.
            device: where the modules go.
            dtype: of the frozen weights. The LoRA is float32 in any case, and so is a VAE that asks for it.
            denoiser, encoders: whether to load the denoiser, and VAE and text encoders.

        Raises:
            ValueError: see `check`.
        """
        model = cls(options, device, dtype)
        if encoders:
            advise_tf32(model.vae.dtype(dtype), device)
        model.load_modules(denoiser, encoders)
        if denoiser:
            model.check_trainable(model.denoiser)
            warn_of_distillation(options, model.pipeline.scheduler)
            add_lora(model.denoiser, options)
            if options.gradient_checkpointing:
                model.denoiser.enable_gradient_checkpointing()
            if device.type == "cuda" and cls.denoiser_name == "unet":
                model.denoiser.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
            if options.compile:
                model.denoiser.compile_repeated_blocks()
        return model

    @classmethod
    def check(cls, options: ModelConfig, is_resumed: bool = False) -> None:
        """Reads the model's configuration files and --init_lora_weights, and no weights of the model.

        Args:
            options: of the model.
            is_resumed: whether the LoRA will come from a checkpoint.

        Raises:
            ValueError: the model is not one of this family, lacks a module, has a VAE or noise that the family does not
                know, or has no modules for --lora_layers or for the LoRA to start from; or --validation_model_path does
                not take the LoRA.
        """
        model = cls(options, torch.device("cpu"), torch.float32)
        model.check_trainable(model.empty_denoiser)
        if model.validation_model is not None:
            model.validation_model.check_trainable(model.validation_model.empty_denoiser)
            check_same_lora(model, model.validation_model)
        if options.init_lora_weights is not None and not is_resumed:
            read_initial_lora(options, cls.pipeline_class, cls.denoiser_name, model.empty_denoiser)

    def check_trainable(self, denoiser: Module) -> None:
        """Checks what training needs besides generating.

        Args:
            denoiser: the model's, which may be on the meta device.

        Raises:
            ValueError: the noise or the denoiser can't be trained, or --lora_layers names no modules of it.
        """
        self.noise_process  # checks the model's scheduler, from which it is made
        self.check_denoiser(denoiser.config)
        check_lora_layers(denoiser, self.denoiser_name, self.options.lora_layer_names)

    @classmethod
    def encoding_identity(cls, options: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
        """What decides the moments and prompt embeddings of a run: see `identity.py`."""
        return encoding_identity(cls, options, dtype)

    def base_identity(self) -> dict[str, str]:
        """What a LoRA of this run is trained for: see `identity.py`."""
        config = self.noise_process.scheduler.config
        predicts = config.get("prediction_type", self.noise_process_class.__name__)
        return base_identity(type(self), self.options, predicts)

    def check_denoiser(self, config: dict) -> None:
        """Checks the denoiser's configuration.

        Raises:
            ValueError: it takes other latents than the VAE makes, or a condition that training does not give it.
        """
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"The {self.denoiser_name} of {self.options.pretrained_model_name_or_path} is told the guidance scale, as"
                " latent consistency models are. Train the model that it was distilled from; the LoRA may fit both."
            )
        expected, found = self.latent_channels, config["in_channels"]
        if found != expected:
            raise ValueError(
                f"The {self.denoiser_name} of {self.options.pretrained_model_name_or_path} takes {found} channels, and the"
                f" VAE in {self.vae.source} makes {expected}: it is an inpainting or editing model, or the VAE is another"
                " model's. Use the text-to-image model with its own VAE."
            )

    @property
    def latent_channels(self) -> int:
        """Channels that the denoiser takes."""
        return self.patch_size**2 * self.vae.channels

    @contextmanager
    def generating(self, prompts: list[str]) -> Iterator[Callable[..., list[Image]]]:
        """In the block, which gets `generate` of the model that generates, these prompts can be used, as users will use them."""
        if self.validation_model is None:
            with as_loaded(self.denoiser, self.dtype), super().generating(prompts) as generate:
                yield generate
        else:
            with loaded_with_lora(self.validation_model, self), self.validation_model.generating(prompts) as generate:
                yield generate

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images with the VAE: mean and log variance of the distribution of normalised latents.

        Args:
            pixel_values: uint8 (N, 3, H, W).

        Returns:
            Moments (N, 2C, h, w), in the VAE's dtype.
        """
        module = self.pipeline.vae
        moments = [
            self.vae.encode(module, (to_device(pixels, self.device).float() / 127.5 - 1).to(module.dtype))
            for pixels in pixel_values.split(self.options.vae_encode_batch_size)
        ]
        return torch.cat(moments)

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples latents, as the denoiser wants them, from what `encode_images` gave: see `vae.sample_latents`."""
        return sample_latents(moments, generators)

    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """Embeddings of B prompts, by name; every tensor has B rows."""
        raise NotImplementedError

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        """Calls the denoiser on both images of B pairs, the winners first.

        Args:
            denoiser: may be wrapped for distributed training.
            noisy_latents: (2B, C, h, w).
            timesteps: (2B,).
            embeds: what `encode_prompts` gave for the B prompts.
            batch: as `collate_pairs` makes it.

        Returns:
            Its prediction, in the shape of the latents.
        """
        raise NotImplementedError

    def save_lora(self, directory: Path) -> None:
        """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata."""
        save_lora(self.pipeline_class, self.denoiser_name, self.denoiser, directory)

    def load_lora(self, directory: Path) -> None:
        """Reads the file of `save_lora` into the existing LoRA.

        Raises:
            ValueError: the file's modules are not those of this LoRA.
        """
        load_lora(self.denoiser_name, self.denoiser, directory)

    def start_from_initial_lora(self) -> None:
        """Reads --init_lora_weights into the existing LoRA.

        Raises:
            ValueError: see `read_initial_lora`.
        """
        tensors = read_initial_lora(self.options, self.pipeline_class, self.denoiser_name, self.empty_denoiser)
        set_peft_model_state_dict(self.denoiser, tensors)

    def save_for_other_programs(self, directory: Path) -> None:
        """Writes the LoRA in `directory` once more, as ComfyUI and AUTOMATIC1111 read it."""
        write_for_other_programs(directory / LORA_FILE, directory / COMFYUI_FILE)

    def inference_snippet(self, lora: str, prompt: str, steps: int, guidance_scale: float) -> str:
        """Python code that generates an image with the trained LoRA."""
        return inference_snippet(self, lora, prompt, steps, guidance_scale)


class FlowTransformer(LatentDiffusion):
    """What the families with a transformer share.

    Attributes:
        is_told_guidance: whether the pipeline tells a guidance scale to a transformer that takes one.
    """

    denoiser_name = "transformer"
    noise_process_class = FlowMatching
    license = "other"
    inference_dtype = "bfloat16"
    is_told_guidance = False

    @property
    def call_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.options.max_sequence_length}

    def embedded_guidance(self, count: int) -> torch.Tensor | None:
        """The guidance scale that the transformer is told of each image (N,), where it is told one."""
        if not (self.is_told_guidance and self.denoiser.config.guidance_embeds):
            return None
        return torch.tensor([self.options.guidance_scale] * count, device=self.device)


def inference_snippet(trained: LatentDiffusion, lora: str, prompt: str, steps: int, guidance_scale: float) -> str:
    """Python code that generates an image as training's validation does.

    Args:
        trained: the model family, which may have another one for validation.
        lora: its folder, or name on the Hub.
        prompt: of the image.
        steps, guidance_scale: of the validation, with another model.
    """
    model = trained.validation_model or trained
    options, pipeline = model.options, model.pipeline_class.__name__
    source, call_options = f"{options.pretrained_model_name_or_path!r},", dict(model.call_options)
    if model.negative_prompt is not None:
        call_options["negative_prompt"] = model.negative_prompt
    if model is not trained:
        source += f"  # trained on {trained.options.pretrained_model_name_or_path!r}, which takes the LoRA, too"
        call_options["num_inference_steps"] = steps
        call_options |= model.guidance_options(guidance_scale)
    lines = [source]
    imports = pipeline
    if options.pretrained_vae_model_name_or_path is not None:
        vae = model.vae.module_class.__name__
        imports = f"{vae}, {pipeline}"
        lines.append(f"vae={vae}.from_pretrained({options.pretrained_vae_model_name_or_path!r}, dtype=dtype),")
    lines += [f"{name}=None," for name in model.absent_modules]
    loading = "".join(f"    {line}\n" for line in (*lines, "dtype=dtype,"))
    config = ", ".join(f"{name}={value!r}" for name, value in options.sampler_config.items())
    more = "".join(f", {name}={value!r}" for name, value in call_options.items())
    scheduler_line = f"pipeline.scheduler.register_to_config({config})\n" if config else ""
    return (
        "import torch\n"
        f"from diffusers import {imports}\n\n"
        f'device, dtype = ("cuda", torch.{model.inference_dtype}) if torch.cuda.is_available() else ("cpu", torch.float32)\n'
        f"pipeline = {pipeline}.from_pretrained(\n{loading}).to(device)\n"
        f"{scheduler_line}pipeline.load_lora_weights({lora!r})\n"
        f"image = pipeline(prompt={prompt!r}{more}).images[0]\n"
        'image.save("image.png")\n'
    )


def advise_tf32(vae_dtype: torch.dtype, device: torch.device) -> None:
    """Advises TF32 if a VAE will run in float32 on a GPU that could use TF32, several times as fast."""
    if vae_dtype == torch.float32 and device.type == "cuda" and not torch.backends.cuda.matmul.allow_tf32:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            logger.warning(
                "The VAE runs in float32, and its matrix products without TF32: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment speeds them up, a VAE that"
                " works in half precision (--pretrained_vae_model_name_or_path) more, and --cache_latents most."
            )
