"""How strong a beta is for a model: the share of the loss's gradient that pushes losers away."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusion_orpo_loss import odds_ratio_objective

from .held_out import NoiseLevels
from .step import compute_losses


logger = get_logger(__name__)

PAIRS = 32  # that --loser_share looks at; one batch at least


def log_loser_share(pairs: torch.Tensor, beta: float, temperature: float) -> None:
    """Logs how strong a beta is for the pairs of a run's first step: loss, winner's and loser's log p of each (3, B)."""
    _, error_w, error_l = -pairs
    share = loser_share(error_w, error_l, beta, temperature)
    logger.info(
        f"With --beta_orpo={beta} the losers' share of the gradient is {share:.2f} at the"
        f" start (0 is fine-tuning on winners, 0.5 the maximum), at a mean error of {error_w.mean().item():.4f}"
    )


@torch.no_grad()
def find_beta(
    accelerator: Accelerator, model, batches: Iterable[dict], levels: NoiseLevels, share: float, temperature: float
) -> float:
    """The beta that gives the losers `share` of the gradient on the first pairs. Every process must call it.

    Args:
        accelerator: of the run.
        model: the model family.
        batches: this process's pairs.
        levels: of noise, at each of which every pair is predicted.
        share: above 0 and below 1/2.
        temperature: of the loss.

    Raises:
        ValueError: no beta reaches the share on these pairs.
    """
    model.denoiser.eval()
    errors, count = [], 0
    for batch in batches:
        for drawn in levels.batches(model, batch):
            _, metrics, _ = compute_losses(0.0, model, model.denoiser, drawn)
            errors.append(-torch.stack([metrics["logps/chosen"], metrics["logps/rejected"]], dim=1))
        count += len(batch["seeds"]) * accelerator.num_processes
        if count >= PAIRS:
            break
    error_w, error_l = accelerator.gather(torch.cat(errors)).cpu().unbind(dim=1)
    beta = beta_of_share(error_w, error_l, share, temperature)
    logger.info(f"--loser_share={share}: beta is {beta:.4g}, computed on {count} pairs")
    return beta


@torch.enable_grad()
def beta_of_share(error_w: torch.Tensor, error_l: torch.Tensor, share: float, temperature: float = 1.0) -> float:
    """The beta that gives the losers this share of the gradient: the inverse of `loser_share`.

    Args:
        error_w, error_l: errors of winners and losers (B,).
        share: above 0 and below 1/2.
        temperature: of the loss.

    Raises:
        ValueError: no beta reaches the share on these pairs.
    """
    low, high = 1e-9, 1e9
    if loser_share(error_w, error_l, high, temperature) < share:
        raise ValueError(
            f"No beta reaches --loser_share={share} on these pairs, whose winners' errors are smaller than the losers'."
            " Lower it, or set --beta_orpo."
        )
    for _ in range(60):
        middle = (low * high) ** 0.5
        reached = loser_share(error_w, error_l, middle, temperature)
        low, high = (middle, high) if reached < share else (low, middle)
    return high


def loser_share(error_w: torch.Tensor, error_l: torch.Tensor, beta: float, temperature: float = 1.0) -> float:
    """The losers' share of the loss's gradient with respect to the pairs' errors.

    For equal, small errors it is about beta / (2 (beta + error)): near 0 if beta is far below the errors, a quarter
    if it equals them, a half at most.

    Args:
        error_w, error_l: errors of winners and losers (B,).
        beta, temperature: of the loss.

    Returns:
        A number between 0 and 1/2, if winners are no worse than losers.
    """
    error_w, error_l = (error.detach().double().requires_grad_() for error in (error_w, error_l))
    loss = odds_ratio_objective(error_w, error_l, beta, temperature=temperature)
    on_winners, on_losers = (gradient.abs().sum() for gradient in torch.autograd.grad(loss, (error_w, error_l)))
    return (on_losers / (on_winners + on_losers)).item()
