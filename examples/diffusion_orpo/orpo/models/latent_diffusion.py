"""The base of all model families: a frozen pipeline with a LoRA in its denoiser. A family is a subclass.

A family says which pipeline it is, how prompts become embeddings, and how its denoiser is called: see `sdxl.py`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import set_peft_model_state_dict

from diffusers import DiffusionPipeline

from ..system.shapes import Shape
from ..system.transfer import to_device
from .checks import (
    build_empty,
    check_lora_layers,
    check_modules,
    check_pipeline,
    check_sequence_length,
    is_absent,
    read_index,
    warn_of_distillation,
)
from .encoding_identity import base_identity, encoding_identity
from .inference_snippet import inference_snippet
from .initial_lora import read_initial_lora
from .lora import LORA_FILE, add_lora, load_lora, save_lora
from .options import ModelOptions
from .other_programs import COMFYUI_FILE, write_for_other_programs
from .prompt_memory import PromptMemory
from .prompts import report_first_truncation
from .quantization import quantization_options
from .vae import Vae, sample_latents
from .validation_model import check_same_lora, loaded_with_lora, validation_options


logger = logging.getLogger(__name__)


class LatentDiffusion:
    """A pipeline whose modules are frozen but for the LoRA in its denoiser.

    A family sets the first eight, and overrides what it must of the others.

    Attributes:
        pipeline_class: of diffusers.
        denoiser_name: "unet" or "transformer".
        text_encoder_names: in the pipeline.
        noise_process_class: `DDPM` or `FlowMatching`.
        name, slug, tags, license: for the model card and the default names of folders.
        vae_class: `Vae`, or a class on top of it.
        optional_modules: of the pipeline, those that it works without.
        pipeline_options: more arguments for loading the pipeline.
        inference_dtype: that the model card recommends on a GPU.

        options: of the model.
        device: of all modules.
        dtype: of the frozen denoiser and text encoders.
        pipeline: has all modules that are loaded, on the device; images are drawn with it.
        noise_process: adds noise in training.
        vae: encodes and decodes images; its weights are in the pipeline.
        empty_denoiser: the denoiser on the meta device, for its configuration and its modules' names.
        absent_modules: the optional ones that this model was saved without.
        validation_model: the model that draws, where that is another one; loaded while it draws, and only then.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    text_encoder_names: tuple[str, ...]
    noise_process_class: type
    name: str
    slug: str
    tags: tuple[str, ...]
    license: str
    vae_class: type[Vae] = Vae
    optional_modules: tuple[str, ...] = ()
    pipeline_options: dict = {}
    inference_dtype = "float16"
    lora_file = LORA_FILE

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        self.options, self.device, self.dtype = options, device, dtype
        self._prompt_memory = PromptMemory()
        report_first_truncation(self.pipeline_class.__module__)
        index = read_index(options, self.pipeline_class.__name__)
        check_pipeline(options, index, self.pipeline_class.__name__, self.name)
        self.absent_modules = tuple(name for name in self.optional_modules if is_absent(index, name))
        needed = (self.denoiser_name, *self._conditioning_names, "scheduler")
        check_modules(options, index, tuple(name for name in needed if name not in self.absent_modules))
        if options.max_sequence_length is not None and self.text_encoder_names[-1] not in self.absent_modules:
            check_sequence_length(options, self.text_encoder_names[-1])
        self.vae = self.vae_class(options)
        self.noise_process = self.noise_process_class.load(options)
        self.empty_denoiser = build_empty(options, index, self.denoiser_name)
        self.check_denoiser(self.empty_denoiser.config)
        check_lora_layers(self.empty_denoiser, self.denoiser_name, options.lora_layer_names)
        self.validation_model = None
        if options.validation_model_path is not None:
            self.validation_model = type(self)(validation_options(options), device, dtype)
            check_same_lora(self, self.validation_model)

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        device: torch.device,
        dtype: torch.dtype,
        denoiser: bool = True,
        encoders: bool = True,
    ) -> "LatentDiffusion":
        """Loads the modules that are asked for, and adds a LoRA to the denoiser.

        Args:
            options: of the model.
            device: where the modules go.
            dtype: of the frozen weights. The LoRA is float32 in any case, and so is a VAE that asks for it.
            denoiser, encoders: whether to load the denoiser, and VAE and text encoders.

        Raises:
            ValueError: see `check`.
        """
        model = cls(options, device, dtype)
        absent = {} if denoiser else {cls.denoiser_name: None}
        if encoders:
            advise_tf32(model.vae.dtype(dtype), device, options.allow_tf32)
            model._load_pipeline(vae=model.vae.load(dtype), **absent)
        else:
            model._load_pipeline(**dict.fromkeys(model.encoder_names), **absent)
        if denoiser:
            warn_of_distillation(options, model.pipeline.scheduler)
            model.denoiser.requires_grad_(False)
            add_lora(model.denoiser, options)
            if options.gradient_checkpointing:
                model.denoiser.enable_gradient_checkpointing()
            if device.type == "cuda" and cls.denoiser_name == "unet":
                model.denoiser.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
            if options.compile:
                model.denoiser.compile_repeated_blocks()
        return model

    @classmethod
    def check(cls, options: ModelOptions, is_resumed: bool = False) -> None:
        """Reads the model's configuration files and --init_lora_weights, and no weights of the model.

        Args:
            options: of the model.
            is_resumed: whether the LoRA will come from a checkpoint.

        Raises:
            ValueError: the model is not one of this family, lacks a module, has a VAE or noise that the family does not
                know, or has no modules for --lora_layers or for the LoRA to start from.
        """
        model = cls(options, torch.device("cpu"), torch.float32)
        if options.init_lora_weights is not None and not is_resumed:
            read_initial_lora(options, cls.pipeline_class, cls.denoiser_name, model.empty_denoiser)

    @classmethod
    def encoding_identity(cls, options: ModelOptions, dtype: torch.dtype) -> dict[str, str]:
        """What decides the moments and prompt embeddings of a run: see `encoding_identity.py`."""
        return encoding_identity(cls, options, dtype)

    def base_identity(self) -> dict[str, str]:
        """What a LoRA of this run is trained for: see `encoding_identity.py`."""
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
        return self.vae.config["latent_channels"]

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that trains."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def encoder_names(self) -> tuple[str, ...]:
        return ("vae", *self.text_encoder_names)

    @property
    def _conditioning_names(self) -> tuple[str, ...]:
        """Text encoders and their tokenizers."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names)
        return (*self.text_encoder_names, *tokenizers)

    @property
    def has_encoders(self) -> bool:
        return self.pipeline.vae is not None

    @contextmanager
    def drawing(self, prompts: list[str]) -> Iterator[None]:
        """In the block, these prompts can be drawn.

        VAE and text encoders that training does without are loaded for it and freed after: the text encoders the first
        time only, since what they say of these prompts is remembered.
        """
        if self.validation_model is not None:
            with loaded_with_lora(self.validation_model, self), self.validation_model.drawing(prompts):
                yield
            return
        if self.has_encoders:
            yield
            return
        vae = self.vae.load(self.dtype)
        if self._prompt_memory.has(prompts):
            self.pipeline.register_modules(vae=vae.to(self.device))
        else:
            self._load_pipeline(vae=vae, **{self.denoiser_name: self.denoiser})
            self._prompt_memory.attach(self.pipeline)
        try:
            yield
            self._prompt_memory.add(prompts)
        finally:
            self.free_encoders()

    def free_encoders(self) -> None:
        """Frees the memory of VAE and text encoders."""
        self.pipeline.register_modules(**dict.fromkeys(self.encoder_names))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def call_options(self) -> dict:
        """More arguments for drawing with the pipeline, so that it reads prompts as training does."""
        return {}

    @staticmethod
    def guidance_options(scale: float) -> dict:
        """The pipeline's arguments for classifier-free guidance."""
        return {"guidance_scale": scale}

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
            self.vae.encode(module, to_device(pixels, self.device).to(module.dtype) / 127.5 - 1)
            for pixels in pixel_values.split(self.options.vae_encode_batch_size)
        ]
        return torch.cat(moments)

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples latents, as the denoiser wants them, from what `encode_images` gave.

        Args:
            moments: (N, 2C, h, w).
            generators: one for each image.

        Returns:
            Latents (N, C, h, w), float32.
        """
        return sample_latents(moments, generators)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of B prompts, by name; every tensor has B rows."""
        raise NotImplementedError

    def predict(
        self, denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: dict, batch: dict
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

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int, guidance_scale: float, shape: Shape | None = None):
        """Draws one image.

        Args:
            prompt: what to draw.
            seed: of the initial noise.
            steps: of the sampler.
            guidance_scale: of classifier-free guidance.
            shape: height and width. Default: the training resolution, a square.

        Returns:
            A PIL image.
        """
        if self.validation_model is not None:
            return self.validation_model.draw(prompt, seed, steps, guidance_scale, shape)
        height, width = shape or (self.options.resolution, self.options.resolution)
        latents = self.pipeline(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **self.guidance_options(guidance_scale),
            **self.call_options,
        ).images
        height, width = height // self.vae.downscale, width // self.vae.downscale
        # The VAE may be float32 beside a denoiser in half precision, so it decodes here and not in the pipeline.
        image = self.vae.decode(self.pipeline.vae, self.unpack_latents(latents, height, width))
        return self.pipeline.image_processor.postprocess(image.float())[0]

    def unpack_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The pipeline's latents as (N, C, height, width), for families that arrange them differently."""
        return latents

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

    def inference_snippet(self, lora: str, prompt: str) -> str:
        """Python code that draws an image with the trained LoRA."""
        return inference_snippet(self, lora, prompt)

    def load_denoiser(self) -> None:
        """Loads the denoiser alone, frozen. Prompts that were drawn before need no text encoders."""
        self._load_pipeline(**dict.fromkeys(self.encoder_names))
        self._prompt_memory.attach(self.pipeline)
        self.denoiser.requires_grad_(False)

    def _load_pipeline(self, **modules) -> None:
        """Loads the pipeline's modules but for those given, which may be None."""
        options = self.options
        is_denoiser_given = self.denoiser_name in modules
        self.pipeline = self.pipeline_class.from_pretrained(
            options.pretrained_model_name_or_path,
            dtype=self.dtype,
            variant=options.variant,
            **options.source_options,
            **self.pipeline_options,
            **({} if is_denoiser_given else quantization_options(options, self.denoiser_name, self.dtype)),
            **dict.fromkeys(self.absent_modules) | modules,
        ).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler.register_to_config(**self.noise_process.sampler_config)
        for name in self.encoder_names:
            if getattr(self.pipeline, name) is not None:
                getattr(self.pipeline, name).requires_grad_(False)


def advise_tf32(vae_dtype: torch.dtype, device: torch.device, allow_tf32: bool) -> None:
    """Advises --allow_tf32 if a VAE will run in float32 on a GPU that could use TF32, several times as fast."""
    if vae_dtype == torch.float32 and device.type == "cuda" and not allow_tf32:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            logger.warning(
                "The VAE runs in float32, and its matrix products without TF32: --allow_tf32 speeds them up, a VAE that"
                " works in half precision (--pretrained_vae_model_name_or_path) more, and --cache_latents most."
            )
