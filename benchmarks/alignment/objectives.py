"""The objectives that are compared, each as published, on the errors of a batch of pairs.

Only ORPO is part of the package. All are trained on the same predictions, by the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusion_orpo_loss import log_odds, odds_ratio_objective
from torch.nn.functional import logsigmoid


TRIED_BETA = 0.5  # of the variants of ORPO
TYPICAL_ERROR = 0.02
TEMPERATURE = 4.0


@dataclass
class Errors:
    """Mean squared errors of each pair, shape (B,): of the model, and of the reference where the objective has one.

    `share` is that of the votes which are for the winner.
    """

    w: torch.Tensor
    l: torch.Tensor
    reference_w: torch.Tensor | None = None
    reference_l: torch.Tensor | None = None
    share: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """An objective, and the strengths over which it may be tuned.

    Attributes:
        label: its name in tables and figures.
        loss: (errors, strength) -> loss of each pair (B,).
        strengths: of the preference term, about half a decade apart.
        has_reference: whether each step also runs the base model.
        symbol: of the strength.
        min_share: of the votes that must be for a pair's winner; pairs with a smaller one are left out.
    """

    label: str
    loss: Callable[[Errors, float], torch.Tensor]
    strengths: tuple[float, ...]
    has_reference: bool = False
    symbol: str = "beta"
    min_share: float = 0.0


def sft(errors: Errors, _: float) -> torch.Tensor:
    return errors.w


def earlier(errors: Errors, beta: float) -> torch.Tensor:
    """The earlier public implementation: the margin has the wrong sign, and there are no odds."""
    return errors.w - beta * logsigmoid(errors.w - errors.l)


def mended(errors: Errors, beta: float) -> torch.Tensor:
    """The same with its sign corrected."""
    return errors.w - beta * logsigmoid(errors.l - errors.w)


def scaled_margin(errors: Errors, scale: float) -> torch.Tensor:
    """The mended margin with a scale inside the sigmoid, and beta 1."""
    return errors.w - logsigmoid(scale * (errors.l - errors.w))


def orpo(errors: Errors, beta: float) -> torch.Tensor:
    return odds_ratio_objective(errors.w, errors.l, beta, reduction="none")


def flat_orpo(errors: Errors, beta: float) -> torch.Tensor:
    """ORPO with a flatter sigmoid."""
    return odds_ratio_objective(errors.w, errors.l, beta, temperature=TEMPERATURE, reduction="none")


def mapo(errors: Errors, beta: float) -> torch.Tensor:
    """Margin-aware preference optimization, arXiv 2406.06424, with its authors' constants: 1/2 inside, 1000 outside."""
    score_w, score_l = (0.5 * m / torch.expm1(0.5 * m) for m in (errors.w, errors.l))
    return errors.w - beta * logsigmoid(1000 * (score_w - score_l))


def diffusion_dpo(errors: Errors, beta: float) -> torch.Tensor:
    """Diffusion-DPO, arXiv 2311.12908, equation 14; the reference is the model with its LoRA switched off."""
    margin = (errors.l - errors.w) - (errors.reference_l - errors.reference_w)
    return -logsigmoid(0.5 * beta * margin)


def smoothed(errors: Errors, smoothing: float) -> torch.Tensor:
    """ORPO with smoothed labels, as conservative DPO has them: that share of each pair counts as exchanged."""
    log_odds_ratio = log_odds(errors.w) - log_odds(errors.l)
    likelihood = (1 - smoothing) * logsigmoid(log_odds_ratio) + smoothing * logsigmoid(-log_odds_ratio)
    return errors.w - TRIED_BETA * likelihood


def squared(errors: Errors, margin: float) -> torch.Tensor:
    """ORPO with a squared distance of the log odds ratio to a target margin, as IPO has it, arXiv 2310.12036."""
    return errors.w + TRIED_BETA * (log_odds(errors.w) - log_odds(errors.l) - margin) ** 2


def weighted(errors: Errors, exponent: float) -> torch.Tensor:
    """ORPO with the odds weighted by the noise level: its errors are small where there is much noise."""
    level = (0.5 * (errors.w + errors.l).detach() / TYPICAL_ERROR) ** exponent
    return errors.w - TRIED_BETA * level * logsigmoid(log_odds(errors.w) - log_odds(errors.l))


def weighted_by_votes(errors: Errors, beta: float) -> torch.Tensor:
    """ORPO with each pair weighted by how far the votes are from a tie."""
    return (2 * errors.share - 1) * orpo(errors, beta)


def expected_over_votes(errors: Errors, beta: float) -> torch.Tensor:
    """ORPO with the share of the votes in the objective: the mean of the loss over the votes, each with its own winner."""
    exchanged = Errors(errors.l, errors.w)
    return errors.share * orpo(errors, beta) + (1 - errors.share) * orpo(exchanged, beta)


OBJECTIVES = {
    "sft": Objective("SFT on winners", sft, (0.0,)),
    "scaled": Objective("scaled margin", scaled_margin, (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), symbol="scale"),
    "orpo": Objective("ORPO", orpo, (0.05, 0.15, 0.5, 1.5, 5.0, 15.0, 50.0)),
    "mapo": Objective("MaPO", mapo, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "dpo": Objective("Diffusion-DPO", diffusion_dpo, (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0), has_reference=True),
}
# Compared with SFT alone, at 200 steps: `earlier.py`.
EARLIER_OBJECTIVES = {
    "earlier": Objective("earlier formula", earlier, (0.1, 0.3, 1.0)),
    "mended": Objective("its sign corrected", mended, (1.0, 10.0, 100.0)),
}
# Not searched for itself: ORPO's own setting is its.
FLAT = {"flat": Objective(f"ORPO at temperature {TEMPERATURE:g}", flat_orpo, OBJECTIVES["orpo"].strengths)}
# ORPO with something changed, at ORPO's own setting: the strength is that of the change.
VARIANTS = {
    "smoothed": Objective("labels smoothed", smoothed, (0.1, 0.3), symbol="smoothing"),
    "squared": Objective("squared distance to a margin", squared, (0.05, 0.2), symbol="margin"),
    "weighted": Objective("odds weighted by the noise level", weighted, (0.5, 1.0), symbol="exponent"),
}
# What to do with votes: ORPO on labels that several people gave. A tie teaches nothing in any of them.
BETAS, MAJORITY = OBJECTIVES["orpo"].strengths, 0.51
VOTES = {
    "majority": Objective("the majority's label", orpo, BETAS, min_share=MAJORITY),
    "agreed": Objective("pairs with at least 80 % agreement", orpo, BETAS, min_share=0.8),
    "by_votes": Objective("pairs weighted by 2p - 1", weighted_by_votes, BETAS, min_share=MAJORITY),
    "expected": Objective("p in the objective", expected_over_votes, BETAS, min_share=MAJORITY),
}
ALL_OBJECTIVES = OBJECTIVES | FLAT | EARLIER_OBJECTIVES | VARIANTS | VOTES
