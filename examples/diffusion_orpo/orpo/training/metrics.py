"""Losses and metrics of the micro-batches of one optimizer step, and the means that the run logs."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusion_orpo_loss import OrpoMetrics


@dataclass
class Window:
    """Losses and metrics of the micro-batches of one optimizer step. They stay on the device until `reduce`."""

    values: list[torch.Tensor] = field(default_factory=list)  # of each pair: its loss and then its metrics
    timesteps: list[torch.Tensor] = field(default_factory=list)

    names = ("loss", *OrpoMetrics.__annotations__)

    def add(self, losses: torch.Tensor, metrics: OrpoMetrics, timesteps: torch.Tensor) -> None:
        self.values.append(torch.stack([losses.detach(), *metrics.values()]))
        self.timesteps.append(timesteps)

    def reduce(self, accelerator: Accelerator, grad_norm: torch.Tensor, stop: object) -> tuple[dict[str, float], bool]:
        """Means over micro-batches and processes, and whether any process passed something as `stop`.

        One collective and one read from the device per optimizer step.
        """
        means = torch.stack([values.mean(dim=1) for values in self.values]).mean(dim=0)
        more = torch.tensor([stop is not None], dtype=means.dtype, device=means.device)
        means = torch.cat([means, grad_norm.to(means).reshape(1), more])
        *means, stopping = accelerator.reduce(means, "mean").tolist()
        return dict(zip((*self.names, "grad_norm"), means)), stopping > 0

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, winner's and loser's log p of each pair (3, B), and the timesteps (B,)."""
        rows = [self.names.index(name) for name in ("loss", "logps/chosen", "logps/rejected")]
        return torch.cat(self.values, dim=1)[rows], torch.cat(self.timesteps)
