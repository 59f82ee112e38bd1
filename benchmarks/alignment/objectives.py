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
    """An objective and what it is tuned over: three strengths at two learning rates, or six learning rates.

    Attributes:
        label: its name in tables and figures.
        loss: (errors, strength) -> loss of each pair (B,).
        strengths: of the preference term.
        has_reference: whether each step also runs the base model.
        symbol: of the strength.
    """

    label: str
    loss: Callable[[Errors, float], torch.Tensor]
    strengths: tuple[float, ...]
    has_reference: bool = False
    symbol: str = "beta"


def sft(errors: Errors, _: float) -> torch.Tensor:
    return errors.w


def earlier(errors: Errors, beta: float) -> torch.Tensor:
    """The earlier public implementation: the margin has the wrong sign, and there are no odds."""
    return errors.w - beta * logsigmoid(errors.w - errors.l)


def mended(errors: Errors, beta: float) -> torch.Tensor:
    """The same with its sign mended."""
    return errors.w - beta * logsigmoid(errors.l - errors.w)


def scaled_margin(errors: Errors, scale: float) -> torch.Tensor:
    """The mended margin with a scale inside the sigmoid, and beta 1."""
    return errors.w - logsigmoid(scale * (errors.l - errors.w))


def orpo(errors: Errors, beta: float) -> torch.Tensor:
    return odds_ratio_objective(errors.w, errors.l, beta, reduction="none")


def mapo(errors: Errors, beta: float) -> torch.Tensor:
    """Margin-aware preference optimization, arXiv 2406.06424, with its authors' constants: 1/2 inside, 1000 outside."""
    score_w, score_l = (0.5 * m / torch.expm1(0.5 * m) for m in (errors.w, errors.l))
    return errors.w - beta * logsigmoid(1000 * (score_w - score_l))


def diffusion_dpo(errors: Errors, beta: float) -> torch.Tensor:
    """Diffusion-DPO, arXiv 2311.12908, equation 14; the reference is the model with its LoRA switched off."""
    margin = (errors.l - errors.w) - (errors.reference_l - errors.reference_w)
    return -logsigmoid(0.5 * beta * margin)


OBJECTIVES = {
    "sft": Objective("SFT on winners", sft, (0.0,)),
    "earlier": Objective("earlier formula", earlier, (0.1, 0.3, 1.0)),
    "mended": Objective("its sign mended", mended, (1.0, 10.0, 100.0)),
    "scaled": Objective("scaled margin", scaled_margin, (3.0, 10.0, 30.0), symbol="scale"),
    "orpo": Objective("ORPO", orpo, (0.1, 0.5, 2.0)),
    "mapo": Objective("MaPO", mapo, (0.1, 1.0, 10.0)),
    "dpo": Objective("Diffusion-DPO", diffusion_dpo, (20.0, 100.0, 500.0), has_reference=True),
}
