"""The pipeline of a model family: which one it is, how it is loaded, and the one place where it generates an image.

Training's validation, `evaluate_lora.py` and `make_preferences.py` all generate here. What trains is in `latent_diffusion.py`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image

from ..config import ModelConfig
from ..runtime.shapes import Shape
from .checks import Module, build_empty, check_modules, check_pipeline, check_sequence_length, is_absent, read_index
from .quantization import quantization_options
from .vae import Vae


class FamilyPipeline:
    """A pipeline whose modules are frozen.

    A family sets the first seven, and overrides what it must of the others.

    Attributes:
        pipeline_class: of diffusers.
        denoiser_name: "unet" or "transformer".
        text_encoder_names: in the pipeline.
        name, slug, license: for the model card and the default names of folders.
        vae_class: `Vae`, or a class on top of it.
        optional_modules: of the pipeline, those that it works without.
        pipeline_options: more arguments for loading the pipeline.
        inference_dtype: that the model card recommends on a GPU.
        negative_prompt: that guidance leads away from, where the pipeline has to be given one.

        options: of the model.
        device: of all modules.
        dtype: of the denoiser and text encoders, and of a VAE that does not ask for float32.
        pipeline: has all modules that are loaded, on the device.
        vae: encodes and decodes images; its weights are in the pipeline.
        absent_modules: the optional ones that this model was saved without.
    """

    pipeline_class: type[Any]
    denoiser_name: str
    text_encoder_names: tuple[str, ...]
    name: str
    slug: str
    license: str
    vae_class: type[Vae] = Vae
    optional_modules: tuple[str, ...] = ()
    pipeline_options: dict = {}
    inference_dtype: str = "float16"
    pipeline: Any  # diffusers' classes of pipelines have little in common
    negative_prompt: str | None = None

    def __init__(self, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Reads the model's configuration files, and no weights.

        Raises:
            ValueError: the model is not one of this family, lacks a module, or has a VAE that the family does not know.
        """
        self.options, self.device, self.dtype = options, device, dtype
        self._prompt_memory = PromptMemory()
        report_first_truncation(self.pipeline_class.__module__)
        self._index = read_index(options, self.pipeline_class.__name__)
        check_pipeline(options, self._index, self.pipeline_class.__name__, self.name)
        self.absent_modules = tuple(name for name in self.optional_modules if is_absent(self._index, name))
        tokenizers = tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names)
        needed = (self.denoiser_name, *self.text_encoder_names, *tokenizers, "scheduler")
        needed += ("vae",) if options.pretrained_vae_model_name_or_path is None else ()
        check_modules(options, self._index, tuple(name for name in needed if name not in self.absent_modules))
        if options.max_sequence_length is not None and self.text_encoder_names[-1] not in self.absent_modules:
            check_sequence_length(options, self.text_encoder_names[-1])
        self.vae = self.vae_class(options)

    @property
    def tags(self) -> tuple[str, ...]:
        """For the model card."""
        return self.slug, f"{self.slug}-diffusers"

    @cached_property
    def empty_denoiser(self) -> Module:
        """The denoiser on the meta device, for its configuration and its modules' names."""
        return build_empty(self.options, self._index, self.denoiser_name)

    @property
    def denoiser(self) -> Module:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def encoder_names(self) -> tuple[str, ...]:
        return ("vae", *self.text_encoder_names)

    @property
    def has_encoders(self) -> bool:
        return self.pipeline.vae is not None

    def load_modules(self, denoiser: bool = True, encoders: bool = True) -> None:
        """Loads the pipeline, frozen: with its denoiser or without, and with VAE and text encoders or without."""
        absent = {} if denoiser else {self.denoiser_name: None}
        if encoders:
            self._load_pipeline(vae=self.vae.load(self.dtype), **absent)
        else:
            self._load_pipeline(**dict.fromkeys(self.encoder_names), **absent)
            self._prompt_memory.attach(self.pipeline)

    def _load_pipeline(self, **modules: Module | None) -> None:
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
        self.pipeline.scheduler.register_to_config(**options.sampler_config)
        names = self.encoder_names if is_denoiser_given else (self.denoiser_name, *self.encoder_names)
        for name in names:
            if getattr(self.pipeline, name) is not None:
                getattr(self.pipeline, name).requires_grad_(False)

    @contextmanager
    def generating(self, prompts: list[str]) -> Iterator[Callable[..., list[Image]]]:
        """In the block, which gets `generate`, images of these prompts can be generated.

        VAE and text encoders that are not loaded are loaded for it and freed after: the text encoders the first time
        only, since what they say of these prompts is remembered.
        """
        if self.has_encoders:
            yield self.generate
            return
        vae = self.vae.load(self.dtype)
        if self._prompt_memory.has(prompts):
            self.pipeline.register_modules(vae=vae.to(self.device))
        else:
            self._load_pipeline(vae=vae, **{self.denoiser_name: self.denoiser})
            self._prompt_memory.attach(self.pipeline)
        try:
            yield self.generate
            self._prompt_memory.add(prompts)
        finally:
            self.free_encoders()

    def free_encoders(self) -> None:
        """Frees the memory of VAE and text encoders."""
        self.pipeline.register_modules(**dict.fromkeys(self.encoder_names))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def generate(
        self, prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, shape: Shape | None = None
    ) -> list[Image]:
        """Generates an image of each prompt, from noise that neither the batch nor the device changes.

        Args:
            prompts: of the images.
            seeds: of the initial noise, one for each image.
            steps: of the sampler.
            guidance_scale: of classifier-free guidance.
            shape: height and width. Default: the model's resolution, a square.
        """
        height, width = shape or (self.options.resolution, self.options.resolution)
        negative = {} if self.negative_prompt is None else {"negative_prompt": [self.negative_prompt] * len(prompts)}
        latents = self.pipeline(
            prompt=list(prompts),  # Z-Image's pipeline writes into the list that it is handed
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **self.guidance_options(guidance_scale),
            **self.call_options,
            **negative,
        ).images
        latents = self.unpack_latents(latents, height // self.vae.downscale, width // self.vae.downscale)
        # The VAE may be float32 beside a denoiser in half precision, so it decodes here and not in the pipeline; image by
        # image, so that the batch does not decide how much memory that takes.
        images = [self.vae.decode(self.pipeline.vae, of_one).float() for of_one in latents.split(1)]
        return [self.pipeline.image_processor.postprocess(image)[0] for image in images]

    @property
    def call_options(self) -> dict:
        """More arguments for generating with the pipeline, so that it reads prompts as training does."""
        return {}

    @staticmethod
    def guidance_options(scale: float) -> dict:
        """The pipeline's arguments for classifier-free guidance."""
        return {"guidance_scale": scale}

    def unpack_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The pipeline's latents as (N, C, height, width), for families that arrange them differently."""
        return latents


class PromptMemory:
    """Remembers what pipelines' `encode_prompt` returned. Every pipeline of diffusers calls it to generate.

    Its content is on the device: 0.6 MB per prompt for SDXL.
    """

    def __init__(self) -> None:
        self._prompts: set[str] = set()
        self._embeddings: dict[str, object] = {}

    def has(self, prompts: list[str]) -> bool:
        return set(prompts) <= self._prompts

    def attach(self, pipeline: Any) -> None:
        """Makes the pipeline encode only prompts that are not remembered."""
        encode_prompt = pipeline.encode_prompt

        def remembered(*args: object, **kwargs: object) -> object:
            key = repr((args, sorted(kwargs.items())))
            if key not in self._embeddings:
                self._embeddings[key] = encode_prompt(*args, **kwargs)
            return self._embeddings[key]

        pipeline.encode_prompt = remembered

    def add(self, prompts: list[str]) -> None:
        """Notes that these were used with a pipeline that `attach` was called for."""
        self._prompts.update(prompts)


class FirstTruncation(logging.Filter):
    """Reports only the first prompt that is truncated, not one at every step.

    The tokenizer's own warning is dropped: it warns of errors with the full prompt, which no encoder sees.
    """

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "Token indices sequence length is longer" in message:
            return False
        if "truncated because" not in message:
            return True
        is_first, self.seen = not self.seen, True
        return is_first


first_truncation = FirstTruncation()


def report_first_truncation(*loggers: str) -> None:
    """Keeps these loggers, and those of tokenizers, from reporting more than the first truncated prompt."""
    for name in (f"{__package__}.sdxl", "transformers.tokenization_utils_base", *loggers):
        logging.getLogger(name).addFilter(first_truncation)
