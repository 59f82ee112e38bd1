"""The noise process of SD3 and FLUX: a straight line from image to noise, with its velocity as the target.

Timesteps are drawn, and losses weighted, by diffusers' own helpers (arXiv 2403.03206, section 3.1).
"""

from dataclasses import dataclass

import torch

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ..config import ModelConfig


@dataclass
class FlowMatching:
    """A noisy image is (1 - sigma) latents + sigma noise, and the denoiser predicts noise - latents.

    Attributes:
        scheduler: with the timesteps, 1000 sigma, under its static shift; one that depends on the resolution is for drawing only.
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
        return cls(scheduler, options.weighting_scheme, options.logit_mean, options.logit_std, options.mode_scale)

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """A timestep for each generator (B,), as the weighting scheme distributes them."""
        density = [
            compute_density_for_timestep_sampling(
                self.weighting_scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
            )
            for generator in generators
        ]
        num_timesteps = self.scheduler.config.num_train_timesteps
        indices = (torch.cat(density) * num_timesteps).long().clamp(0, num_timesteps - 1)  # 1 itself may be drawn
        return self.scheduler.timesteps[indices]

    def sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of noise (B,), from 0 to 1."""
        return timesteps / self.scheduler.config.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def target(
        self, latents_w: torch.Tensor, latents_l: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity, which holds the clean image, so that each image has its own."""
        return noise - latents_w, noise - latents_l

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of each pair (B,)."""
        return compute_loss_weighting_for_sd3(self.weighting_scheme, self.sigmas(timesteps))
