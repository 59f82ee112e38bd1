"""The two noise processes: DDPM of SD and SDXL, and flow matching of the transformers. Latents have any number of dimensions."""

import inspect
from dataclasses import dataclass

import torch

import diffusers
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from ..config import ModelConfig


@dataclass
class DDPM:
    """Noise is added in 1,000 steps, and the denoiser predicts it, or the velocity.

    Attributes:
        scheduler: with the schedule, and the type of prediction.
        snr_gamma: of min-SNR weights, or None.
    """

    scheduler: DDPMScheduler
    snr_gamma: float | None = None

    @classmethod
    def load(cls, options: ModelConfig) -> "DDPM":
        """Reads the schedule of a model.

        Raises:
            ValueError: the model has another kind of noise, or predicts something other than noise or velocity.
        """
        source = options.pretrained_model_name_or_path
        config = DDPMScheduler.load_config(source, subfolder="scheduler", **options.source_options)
        check_is_ddpm(config, source)
        scheduler = DDPMScheduler.from_config(config | options.sampler_config)
        predicted = scheduler.config.prediction_type
        if predicted not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{source} predicts {predicted!r}, as its scheduler says; this trains models that predict noise (epsilon) or"
                " velocity (v_prediction). Where the scheduler is wrong, --prediction_type says what is right."
            )
        if predicted == "epsilon" and scheduler.config.rescale_betas_zero_snr:
            raise ValueError(
                f"The scheduler of {source} has rescale_betas_zero_snr, whose last timestep is noise alone, and predicts"
                " epsilon, which says nothing there. Give --prediction_type=v_prediction if that is what the model predicts."
            )
        return cls(scheduler, options.snr_gamma)

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """A timestep for each generator (B,), all equally likely."""
        num_timesteps = self.scheduler.config.num_train_timesteps
        return torch.cat([torch.randint(num_timesteps, (1,), generator=generator) for generator in generators])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(
        self, latents_w: torch.Tensor, latents_l: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The noise, for both images; or the velocity, which holds the clean image, so that each image has its own."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return tuple(self.scheduler.get_velocity(latents, noise, timesteps) for latents in (latents_w, latents_l))

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Weight of each pair (B,): min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity; None without a gamma.

        Source: arXiv 2303.09556, section 3.4.
        """
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        divisor = snr if self.scheduler.config.prediction_type == "epsilon" else snr + 1
        return snr.clamp(max=self.snr_gamma) / divisor


def check_is_ddpm(config: dict, source: str) -> None:
    """Checks that a model's sampler follows a schedule of betas, with any steps.

    Args:
        config: of the model's scheduler.
        source: of the model, for messages.

    Raises:
        ValueError: the model was trained on another kind of noise, or the schedule is missing.
    """
    name = config.get("_class_name", "of no class")
    scheduler_class = getattr(diffusers, name, None)
    has_betas = scheduler_class is not None and "beta_schedule" in inspect.signature(scheduler_class).parameters
    if not has_betas or config.get("use_flow_sigmas"):
        kind = f"{name} with use_flow_sigmas" if has_betas else name
        raise ValueError(
            f"{source} has the scheduler {kind}: it was trained on another kind of noise (EDM or flow matching, for"
            " instance) than DDPM's, which this script adds, and would be damaged by it. Choose a model with DDPM's noise."
        )
    if config.get("trained_betas") is None:
        missing = [field for field in ("beta_start", "beta_end", "beta_schedule") if field not in config]
        if missing:
            raise ValueError(
                f"The scheduler of {source} lacks {', '.join(missing)} in scheduler_config.json: complete it from the model"
                " that this one was derived from."
            )
        known = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
        if config["beta_schedule"] not in known:
            raise ValueError(
                f"The scheduler of {source} has beta_schedule {config['beta_schedule']!r}, not one of {known}."
            )


@dataclass
class FlowMatching:
    """A noisy image is (1 - sigma) latents + sigma noise, and the denoiser predicts noise - latents.

    Attributes:
        scheduler: with the timesteps, 1000 sigma, under its static shift; one that depends on the resolution is for generating only.
        weighting_scheme, logit_mean, logit_std, mode_scale: as the flags of these names.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float

    @classmethod
    def load(cls, options: ModelConfig) -> "FlowMatching":
        """Reads the schedule of a model.

        Raises:
            ValueError: the model's scheduler is not one of flow matching.
        """
        source = options.pretrained_model_name_or_path
        config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler", **options.source_options)
        name = config.get("_class_name", "of no class")
        if not name.startswith("FlowMatch") or config.get("invert_sigmas"):
            kind = f"{name} with invert_sigmas" if config.get("invert_sigmas") else name
            raise ValueError(
                f"{source} has the scheduler {kind}, and this script trains only on the noise of flow matching, that of"
                " FlowMatchEulerDiscreteScheduler."
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        names = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")  # which have values in these families
        return cls(scheduler, *(getattr(options, name) for name in names))

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """A timestep for each generator (B,), as the weighting scheme distributes them."""
        density = [
            compute_density_for_timestep_sampling(
                self.weighting_scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
            )
            for generator in generators
        ]
        num_timesteps = self.scheduler.config.num_train_timesteps
        indices = (torch.cat(density) * num_timesteps).long().clamp(0, num_timesteps - 1)  # 1 itself may be sampled
        return self.scheduler.timesteps[indices]

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of noise (B,), from 0 to 1."""
        return timesteps / self.scheduler.config.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps).unflatten(0, (-1, *[1] * (latents.ndim - 1)))
        return (1 - sigmas) * latents + sigmas * noise

    def target(
        self, latents_w: torch.Tensor, latents_l: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity, which holds the clean image, so that each image has its own."""
        return noise - latents_w, noise - latents_l

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of each pair (B,)."""
        return compute_loss_weighting_for_sd3(self.weighting_scheme, self.sigmas(timesteps))
