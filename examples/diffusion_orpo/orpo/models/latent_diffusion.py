"""What all model families share: loading, the VAE, drawing, LoRA in and out. A family is a class on top of this one.

A family says which pipeline it is, how prompts become embeddings, and how its denoiser is called: see `sdxl.py`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft

from ..system.messages import printable
from ..system.transfer import draw_noise, to_device
from .encoding_identity import encoding_identity, vae_source
from .other_programs import COMFYUI_FILE, write_for_other_programs
from .quantization import quantization_options


logger = logging.getLogger(__name__)


class FirstTruncation(logging.Filter):
    """Lets it be said once, and not at every step, that a prompt is cut which is longer than the tokenizer takes.

    The tokenizer's own warning is not let through: it expects errors of the uncut prompt, which no encoder sees.
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


class LatentDiffusion:
    """A pipeline whose modules are frozen but for the LoRA in its denoiser.

    A family sets the first six, and overrides what it must of the others.

    Attributes:
        pipeline_class: of diffusers.
        denoiser_name: "unet" or "transformer".
        text_encoder_names: in the pipeline.
        noise_process_class: `DDPM` or `FlowMatching`.
        name, slug, tags, license: for the model card and the default names of folders.
        lora_layers: the default of --lora_layers.
        defaults: of other flags, where a family has its own.
        resolution_step: pixels that a side of an image is a multiple of.
        pipeline_options: more arguments for loading the pipeline.
        inference_dtype: that the model card recommends on a GPU.

        pipeline: has all modules that are loaded, on the device; images are drawn with it.
        noise_process: adds noise in training.
        dtype: of the frozen denoiser and text encoders.
        vae_config: complete, whether the VAE is loaded or not.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    text_encoder_names: tuple[str, ...]
    noise_process_class: type
    name: str
    slug: str
    tags: tuple[str, ...]
    license: str
    lora_layers = "to_k,to_q,to_v,to_out.0"
    defaults: dict = {}
    resolution_step = 8
    pipeline_options: dict = {}
    inference_dtype = "float16"
    lora_file = "pytorch_lora_weights.safetensors"

    def __init__(self, args, device: torch.device, dtype: torch.dtype) -> None:
        self.args, self.device, self.dtype = args, device, dtype
        for name in (__name__, self.pipeline_class.__module__, "transformers.tokenization_utils_base"):
            logging.getLogger(name).addFilter(first_truncation)
        self._check_pipeline()
        self.noise_process = self.noise_process_class.load(args)
        self._vae_source, self._vae_options = vae_source(args)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(self._vae_source, **self._vae_options))
        self.vae_config = vae.config

    @classmethod
    def add_arguments(cls, parser) -> None:
        """Adds the flags that this family alone has."""

    @classmethod
    def load(
        cls, args, device: torch.device, dtype: torch.dtype, denoiser: bool = True, encoders: bool = True
    ) -> "LatentDiffusion":
        """Loads the modules that the flags name, and adds a LoRA to the denoiser.

        Args:
            args: the flags.
            device: where the modules go.
            dtype: of the frozen weights. The LoRA is float32 in any case, and so is a VAE that asks for it.
            denoiser, encoders: whether to load the denoiser, and VAE and text encoders.

        Raises:
            ValueError: the model is of another family, predicts something that its noise process does not know, or has no
                such --lora_layers.
        """
        model = cls(args, device, dtype)
        absent = {} if denoiser else {cls.denoiser_name: None}
        if encoders:
            advise_tf32(model.vae_dtype, device, args.allow_tf32)
            model._load_pipeline(vae=model._load_vae(), **absent)
        else:
            model._load_pipeline(**dict.fromkeys(model.encoder_names), **absent)
        if denoiser:
            model.denoiser.requires_grad_(False)
            model._add_lora()
            if args.gradient_checkpointing:
                model.denoiser.enable_gradient_checkpointing()
            if device.type == "cuda" and cls.denoiser_name == "unet":
                model.denoiser.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
            if args.compile:
                model.denoiser.compile_repeated_blocks()
        return model

    @classmethod
    def encoding_identity(cls, args, dtype: torch.dtype) -> dict[str, str]:
        """What decides the moments and prompt embeddings of a run: see `encoding_identity.py`."""
        return encoding_identity(cls, args, dtype)

    def _check_pipeline(self) -> None:
        args = self.args
        config = DiffusionPipeline.load_config(
            args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
        )
        if config["_class_name"] != self.pipeline_class.__name__:
            raise ValueError(
                f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path} is a {config['_class_name']}:"
                f" this script trains {self.name}, a {self.pipeline_class.__name__}."
            )

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that trains."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def encoder_names(self) -> tuple[str, ...]:
        return ("vae", *self.text_encoder_names)

    @property
    def has_encoders(self) -> bool:
        return self.pipeline.vae is not None

    @property
    def vae_dtype(self) -> torch.dtype:
        """Float32 where the VAE's configuration asks for it: it would overflow in half precision."""
        return torch.float32 if self.vae_config["force_upcast"] else self.dtype

    @contextmanager
    def encoders(self) -> Iterator[None]:
        """VAE and text encoders are there in the block. If they were not before, they are loaded for it and freed after."""
        if self.has_encoders:
            yield
            return
        self._load_pipeline(vae=self._load_vae(), **{self.denoiser_name: self.denoiser})
        try:
            yield
        finally:
            self.free_encoders()

    def free_encoders(self) -> None:
        """Gives back the memory of VAE and text encoders."""
        self.pipeline.register_modules(**dict.fromkeys(self.encoder_names))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def call_options(self) -> dict:
        """More arguments for drawing with the pipeline, so that it reads prompts as training does."""
        return {}

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the VAE says of images: mean and log variance of the latents' distribution.

        Args:
            pixel_values: uint8 (N, 3, H, W).

        Returns:
            Moments (N, 2C, H/8, W/8), in the VAE's dtype.
        """
        vae, size = self.pipeline.vae, self.args.vae_encode_batch_size
        with torch.no_grad():
            moments = [
                vae.encode(to_device(pixels, self.device).to(vae.dtype) / 127.5 - 1).latent_dist.parameters
                for pixels in pixel_values.split(size)
            ]
        return torch.cat(moments)

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples latents, as the denoiser wants them, from what `encode_images` gave.

        Args:
            moments: (N, 2C, h, w).
            generators: one for each image.

        Returns:
            Shifted and scaled latents (N, C, h, w), float32.
        """
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = posterior.mean + posterior.std * draw_noise(generators, posterior.mean.shape[1:], moments.device)
        return (latents - (self.vae_config.get("shift_factor") or 0)) * self.vae_config["scaling_factor"]

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the text encoders say of B prompts, by name; every tensor has B rows."""
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
    def draw(self, prompt: str, seed: int, steps: int, guidance_scale: float):
        """Draws one image at the training resolution.

        Args:
            prompt: what to draw.
            seed: of the initial noise.
            steps: of the sampler.
            guidance_scale: of classifier-free guidance.

        Returns:
            A PIL image.
        """
        latents = self.pipeline(
            prompt,
            height=self.args.resolution,
            width=self.args.resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **self.call_options,
        ).images
        latents = self.unpack_latents(latents) / self.vae_config["scaling_factor"]
        latents = latents + (self.vae_config.get("shift_factor") or 0)
        vae = self.pipeline.vae  # may be float32 beside a denoiser in half precision, so it decodes here
        image = vae.decode(latents.to(vae.dtype)).sample
        return self.pipeline.image_processor.postprocess(image.float())[0]

    def unpack_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline's latents as (N, C, h, w), where it has them otherwise."""
        return latents

    def save_lora(self, directory: Path) -> None:
        """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata."""
        layers = get_peft_model_state_dict(self.denoiser)
        if self.denoiser_name == "unet":
            layers = convert_state_dict_to_diffusers(layers)
        self.pipeline_class.save_lora_weights(
            directory,
            **{f"{self.denoiser_name}_lora_layers": layers},
            **_collate_lora_metadata({self.denoiser_name: self.denoiser}),
        )

    def save_for_other_programs(self, directory: Path) -> None:
        """Writes the LoRA in `directory` once more, as ComfyUI and AUTOMATIC1111 read it."""
        write_for_other_programs(directory / self.lora_file, directory / COMFYUI_FILE)

    def load_lora(self, directory: Path) -> None:
        """Reads what `save_lora` wrote into the LoRA that is there.

        Raises:
            ValueError: the file's modules are not those of this LoRA.
        """
        state_dict = load_file(Path(directory) / self.lora_file)
        state_dict = {name.removeprefix(f"{self.denoiser_name}."): value for name, value in state_dict.items()}
        if self.denoiser_name == "unet":
            state_dict = convert_unet_state_dict_to_peft(state_dict)
        expected, found = get_peft_model_state_dict(self.denoiser).keys(), state_dict.keys()
        if expected != found:
            raise ValueError(
                f"{directory} holds a LoRA of other modules than --lora_layers names:"
                f" {len(expected - found)} are missing, {len(found - expected)} are not known."
            )
        set_peft_model_state_dict(self.denoiser, state_dict)

    def inference_snippet(self, lora: str, prompt: str) -> str:
        """Python code that draws an image with the trained LoRA."""
        args, pipeline_name = self.args, self.pipeline_class.__name__
        vae_import, vae_argument = "", ""
        if args.pretrained_vae_model_name_or_path is not None:
            vae_import = "AutoencoderKL, "
            vae_argument = (
                f"    vae=AutoencoderKL.from_pretrained({args.pretrained_vae_model_name_or_path!r}, dtype=dtype),\n"
            )
        config = ", ".join(f"{name}={value!r}" for name, value in self.noise_process.sampler_config.items())
        options = "".join(f", {name}={value!r}" for name, value in self.call_options.items())
        scheduler_line = f"pipeline.scheduler.register_to_config({config})\n" if config else ""
        return (
            "import torch\n"
            f"from diffusers import {vae_import}{pipeline_name}\n\n"
            f'device, dtype = ("cuda", torch.{self.inference_dtype}) if torch.cuda.is_available()'
            ' else ("cpu", torch.float32)\n'
            f"pipeline = {pipeline_name}.from_pretrained(\n"
            f"    {args.pretrained_model_name_or_path!r},\n{vae_argument}    dtype=dtype,\n"
            ").to(device)\n"
            f"{scheduler_line}pipeline.load_lora_weights({lora!r})\n"
            f"image = pipeline({prompt!r}{options}).images[0]\n"
            'image.save("image.png")\n'
        )

    def _load_pipeline(self, **modules) -> None:
        """Loads the pipeline's modules but for those given, which may be None."""
        args = self.args
        quantize = None if self.denoiser_name in modules else args.quantize_base
        self.pipeline = self.pipeline_class.from_pretrained(
            args.pretrained_model_name_or_path,
            dtype=self.dtype,
            variant=args.variant,
            revision=args.revision,
            cache_dir=args.cache_dir,
            **self.pipeline_options,
            **quantization_options(quantize, self.denoiser_name, self.dtype),
            **modules,
        ).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler.register_to_config(**self.noise_process.sampler_config)
        for name in self.encoder_names:
            if getattr(self.pipeline, name) is not None:
                getattr(self.pipeline, name).requires_grad_(False)

    def _load_vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self._vae_source, dtype=self.vae_dtype, **self._vae_options)

    def _add_lora(self) -> None:
        args = self.args
        layers = [name.strip() for name in args.lora_layers.split(",")]
        modules = [name for name, _ in self.denoiser.named_modules()]
        unknown = [layer for layer in layers if not any(f".{name}".endswith(f".{layer}") for name in modules)]
        if unknown:
            raise ValueError(f"--lora_layers: the {self.denoiser_name} has no module called {', '.join(unknown)}.")
        self.denoiser.add_adapter(
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=layers,
            )
        )
        cast_training_params(self.denoiser, dtype=torch.float32)


def advise_tf32(vae_dtype: torch.dtype, device: torch.device, allow_tf32: bool) -> None:
    """Says so where a VAE is to run in float32 on a GPU that could do it in TF32, several times as fast, and will not."""
    if vae_dtype == torch.float32 and device.type == "cuda" and not allow_tf32:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            logger.warning(
                "The VAE runs in float32, and its matrix products without TF32: --allow_tf32 speeds them up, a VAE that"
                " works in half precision (--pretrained_vae_model_name_or_path) more, and --cache_latents most."
            )


def clip_tokens(tokenizer, prompts: list[str], device: torch.device) -> torch.Tensor:
    """Tokens (B, 77) of B prompts, as pipelines make them, but copied without waiting for the device."""
    limit = tokenizer.model_max_length
    for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids):
        if len(tokens) > limit:
            logger.warning(
                f"A prompt of {len(tokens)} tokens is truncated because CLIP reads {limit}: {printable(prompt)}"
            )
    options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
    return to_device(tokenizer(prompts, **options).input_ids, device)
