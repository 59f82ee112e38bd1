"""The objectives that are compared, each as published, on the errors of a batch of pairs.

Only ORPO is part of the package. All are trained on the same predictions, by the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusion_orpo_loss import odds_ratio_objective
from torch.nn.functional import logsigmoid


@dataclass
class Errors:
    """Mean squared errors of each pair, shape (B,): of the model, and of the reference where the objective has one."""

    w: torch.Tensor
    l: torch.Tensor
    reference_w: torch.Tensor | None = None
    reference_l: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """An objective.

    Attributes:
        label: its name in tables and figures.
        loss: (errors, setting) -> loss of each pair (B,). A setting has `strength` and `temperature`.
        symbol: of the strength; empty where it has none.
        has_reference: whether each step also runs the base model.
    """

    label: str
    loss: Callable[[Errors, object], torch.Tensor]
    symbol: str = "beta"
    has_reference: bool = False


def sft(errors: Errors, setting) -> torch.Tensor:
    return errors.w


def scaled_margin(errors: Errors, setting) -> torch.Tensor:
    """A difference of errors with a scale inside the sigmoid, and beta 1."""
    return errors.w - logsigmoid(setting.strength * (errors.l - errors.w))


def orpo(errors: Errors, setting) -> torch.Tensor:
    """As in the paper, arXiv 2403.07691."""
    return odds_ratio_objective(
        errors.w, errors.l, setting.strength, temperature=setting.temperature, reduction="none"
    )


def even_share(errors: Errors, setting) -> torch.Tensor:
    """ORPO at a loser share; with a cap, pairs whose errors are further apart are trained on for the winner only."""
    loss = odds_ratio_objective(
        errors.w, errors.l, loser_share=setting.strength, temperature=setting.temperature, reduction="none"
    )
    return torch.where(errors.l > setting.cap * errors.w, errors.w.log(), loss) if setting.cap else loss


def mapo(errors: Errors, setting) -> torch.Tensor:
    """Margin-aware preference optimization, arXiv 2406.06424, with its authors' constants: 1/2 inside, 1000 outside."""
    score_w, score_l = (0.5 * m / torch.expm1(0.5 * m) for m in (errors.w, errors.l))
    return errors.w - setting.strength * logsigmoid(1000 * (score_w - score_l))


def diffusion_dpo(errors: Errors, setting) -> torch.Tensor:
    """Diffusion-DPO, arXiv 2311.12908, equation 14; the reference is the model with its LoRA switched off."""
    margin = (errors.l - errors.w) - (errors.reference_l - errors.reference_w)
    return -logsigmoid(0.5 * setting.strength * margin)


OBJECTIVES = {
    "sft": Objective("SFT on winners", sft, symbol=""),
    "scaled": Objective("scaled margin", scaled_margin, symbol="scale"),
    "mapo": Objective("MaPO", mapo),
    "dpo": Objective("Diffusion-DPO", diffusion_dpo, has_reference=True),
    "orpo": Objective("ORPO, beta", orpo),
    "even": Objective("ORPO, even share", even_share, symbol="share"),
}
