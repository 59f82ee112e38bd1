"""The noise process of SD and SDXL: DDPM's schedule, noise or velocity as the target, min-SNR weights."""

from dataclasses import dataclass, field

import torch

from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


@dataclass
class DDPM:
    """Noise is added in 1,000 steps, and the denoiser predicts it, or the velocity.

    Attributes:
        scheduler: with the schedule, and the type of prediction.
        snr_gamma: of min-SNR weights, or None.
        sampler_config: what the sampler's configuration has to say, too.
    """

    scheduler: DDPMScheduler
    snr_gamma: float | None = None
    sampler_config: dict = field(default_factory=dict)

    @classmethod
    def load(cls, args) -> "DDPM":
        """Reads the schedule of the flags' model.

        Raises:
            ValueError: the model predicts something else than noise or velocity.
        """
        source = args.pretrained_model_name_or_path
        scheduler = DDPMScheduler.from_pretrained(
            source, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
        )
        sampler_config = {} if args.prediction_type is None else {"prediction_type": args.prediction_type}
        scheduler.register_to_config(**sampler_config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Cannot train for prediction type {scheduler.config.prediction_type!r} of {source}.")
        return cls(scheduler, args.snr_gamma, sampler_config)

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
