"""The VAE: images to the moments of normalised latents, and latents to images.

The denoiser sees normalised latents, (latents - shift) / scale. What is kept of an image is the mean and log variance of
these, so that neither training nor a cache needs the VAE's statistics afterwards.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusers import AutoencoderKL

from ..config import ModelConfig
from ..runtime.transfer import draw_noise
from .checks import SINGLE_FILES, Module
from .model_files import has_variant


class Vae:
    """A family's VAE. One of another class, or with other statistics, is a class on top of this one.

    Attributes:
        module_class: of diffusers.
        applied_statistics: fields of the VAE's configuration that the family's pipeline normalises latents by.
        config: of the VAE, complete, whether its weights are loaded or not.
        downscale: pixels, along a side, that become one latent.
    """

    module_class: type[Any] = AutoencoderKL
    applied_statistics: tuple[str, ...] = ("shift_factor", "scaling_factor")

    def __init__(self, options: ModelConfig) -> None:
        self.source, self._options = vae_source(options)
        if self.source.lower().endswith(SINGLE_FILES):
            raise ValueError(
                f"--pretrained_vae_model_name_or_path={self.source} is a single file, and a folder in diffusers' format is"
                f' needed. Convert it once: `python -c "from diffusers import {self.module_class.__name__} as V;'
                f" V.from_single_file({self.source!r}).save_pretrained('vae')\"`, and give the folder `vae`."
            )
        stored = self.module_class.load_config(self.source, **self._options)
        if stored.get("_class_name", self.module_class.__name__) != self.module_class.__name__:
            raise ValueError(
                f"The VAE in {self.source} is an {stored['_class_name']}: an {self.module_class.__name__} is needed."
            )
        with torch.device("meta"):
            self.config = self.module_class.from_config(stored).config
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if self.config.get(name) and name not in self.applied_statistics:
                raise ValueError(
                    f"The VAE in {self.source} has {name}, which the pipeline of this family does not apply: it belongs to"
                    " another model."
                )
        if options.pretrained_vae_model_name_or_path is not None:
            self._check_downscale(options)

    def _check_downscale(self, options: ModelConfig) -> None:
        try:
            own = type(self)(replace(options, pretrained_vae_model_name_or_path=None))
        except OSError:  # the model was saved without
            return
        if self.downscale != own.downscale:
            raise ValueError(
                f"The VAE in {self.source} makes one latent of {self.downscale} pixels along a side, and that of"
                f" {options.pretrained_model_name_or_path} one of {own.downscale}: it belongs to another model."
            )

    @property
    def channels(self) -> int:
        """Of its latents."""
        return self.config["latent_channels"]

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Float32 where the VAE's configuration asks for it: it would overflow in half precision. Else as given."""
        return torch.float32 if self.config.get("force_upcast") else dtype

    def load(self, dtype: torch.dtype) -> Module:
        """Loads the weights."""
        return self.module_class.from_pretrained(self.source, dtype=self.dtype(dtype), **self._options)

    def encode(self, module: Module, images: torch.Tensor) -> torch.Tensor:
        """The moments of images' normalised latents.

        Args:
            module: from `load`.
            images: (N, 3, H, W), from -1 to 1, in the module's dtype.

        Returns:
            Mean and log variance (N, 2C, h, w), in the module's dtype.
        """
        mean, log_variance = self.moments(module, images).float().chunk(2, dim=1)
        shift, scale = self.statistics(module)
        log_scale = scale.log() if torch.is_tensor(scale) else math.log(scale)
        log_variance = log_variance.clamp(-30, 20) - 2 * log_scale  # diffusers' limits, for raw latents
        return torch.cat([(mean - shift) / scale, log_variance], dim=1).to(module.dtype)

    def decode(self, module: Module, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W), from -1 to 1 or a little beyond, of normalised latents (N, C, h, w)."""
        shift, scale = self.statistics(module)
        return module.decode((latents * scale + shift).to(module.dtype)).sample

    def moments(self, module: Module, images: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of latents as they come (N, 2C, h, w)."""
        return module.encode(images).latent_dist.parameters

    def statistics(self, module: Module) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Shift and scale of latents: numbers, or one for each channel (1, C, 1, 1) on the module's device."""
        return self.config["shift_factor"] or 0.0, 1 / self.config["scaling_factor"]


class PlainVae(Vae):
    """A VAE that knows a scale, and no shift."""

    applied_statistics = ("scaling_factor",)


class VaeWithMeans(Vae):
    """A VAE whose configuration may hold `latents_mean` and `latents_std`, of each channel."""

    applied_statistics: tuple[str, ...] = ("scaling_factor", "latents_mean", "latents_std")

    def statistics(self, module: Module) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        factor = self.config.get("scaling_factor", 1.0)
        if mean is None or std is None:  # pipelines apply both or neither
            return 0.0, 1 / factor
        mean, std = (torch.tensor(values, device=module.device).view(1, -1, 1, 1) for values in (mean, std))
        return mean, std / factor


def sample_latents(moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Samples normalised latents.

    Args:
        moments: (N, 2C, h, w), from `Vae.encode`.
        generators: one for each image.

    Returns:
        Latents (N, C, h, w), float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * draw_noise(generators, mean.shape[1:], moments.device)


def vae_source(options: ModelConfig) -> tuple[str, dict]:
    """Where the VAE is, and the arguments to load it from there with."""
    if options.pretrained_vae_model_name_or_path is not None:
        return options.pretrained_vae_model_name_or_path, {"cache_dir": options.cache_dir}
    source, variant = options.pretrained_model_name_or_path, options.variant
    if variant is not None and Path(source).is_dir() and not has_variant(Path(source, "vae"), variant):
        variant = None  # as diffusers does with the other modules
    return source, {"variant": variant, "subfolder": "vae", **options.source_options}
