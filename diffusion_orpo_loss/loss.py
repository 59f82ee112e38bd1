"""The ORPO loss for diffusion models.

Three layers, each of them public, so that a trainer can enter where it wants:

    predictions --per_pair_error--> errors m_w, m_l --odds_ratio_objective--> loss
    `-------------------------------- orpo_loss ---------------------------------'

No function here moves a value from the device to the host.
"""

from typing import Literal, TypedDict

import torch
import torch.nn.functional as F


# Errors below this count as this in the odds and in logarithms. Their derivatives are about 1/m, so that without a floor
# two perfect predictions would give 0/0. Real errors are 1e-3 to 1; at the floor the gradient with respect to a
# prediction is still finite, below it only the published form's own m_w gives one.
ERROR_FLOOR = 1e-9
BETA = 0.1  # where neither beta nor loser_share is given

Reduction = Literal["mean", "sum", "none"]

OrpoMetrics = TypedDict(
    "OrpoMetrics",
    {
        "rewards/chosen": torch.Tensor,
        "rewards/rejected": torch.Tensor,
        "rewards/margins": torch.Tensor,
        "rewards/accuracies": torch.Tensor,
        "logps/chosen": torch.Tensor,
        "logps/rejected": torch.Tensor,
        "nll_loss": torch.Tensor,
        "log_odds_ratio": torch.Tensor,
        "log_odds_chosen": torch.Tensor,
    },
)
OrpoMetrics.__doc__ = """What trl logs for ORPO, under the same names: detached, one value per pair, shape (B,).

- `logps/chosen`, `logps/rejected`: log p = -m, the negative error of winner and loser.
- `rewards/chosen`, `rewards/rejected`: beta * log p; `rewards/margins`: their difference.
- `rewards/accuracies`: 1.0 where the winner has the smaller error, else 0.0.
- `nll_loss`: m_w.
- `log_odds_chosen`: z, the log odds ratio itself; above 0 where the model prefers the winner.
- `log_odds_ratio`: log sigmoid(z), or T log sigmoid(z / T) with a temperature T.

The loss per pair is `nll_loss - beta * log_odds_ratio`; with a loser share, `log(nll_loss) - beta * log_odds_ratio`,
where beta is `beta_of_share(loser_share)`.
"""


def orpo_loss(
    model_pred_w: torch.Tensor,
    model_pred_l: torch.Tensor,
    target: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    beta: float | None = None,
    *,
    loser_share: float | None = None,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, OrpoMetrics]:
    """ORPO loss from the predictions for the winner and the loser of each pair.

    Both images of a pair are to be noised with the same noise at the same timestep.

    Args:
        model_pred_w: prediction for the preferred images, shape (B, ...), any floating dtype.
        model_pred_l: prediction for the rejected images, the same shape.
        target: what both should predict, the same shape (the shared noise, in epsilon prediction); or a pair
            `(target_w, target_l)` where the target holds the clean image (v-prediction, flow matching).
        beta: weight of the odds ratio term, at least 0; 0 is supervised fine-tuning on the winners. Default: 0.1, unless
            `loser_share` is given.
        loser_share: strength in place of beta, above 0 and below 0.5: where both errors are equal, the loser takes this
            share of the pair's gradient, at every noise level and under any weighting. With beta its share falls from
            0.5 at small errors to nearly 0 at large ones. Takes the logarithm of the errors: see `odds_ratio_objective`.
        temperature: T in -T log sigmoid(z / T), above 0. Above 1 the sigmoid is flatter, so that pairs whose winner has the
            larger error weigh less: among them are those with wrong labels. Leaves the gradient at z = 0 as it is.
        weights: factor on each pair's whole loss, shape (B,), for example of min-SNR weighting. They do not enter the
            metrics, and "mean" divides by B, not by their sum.
        reduction: "mean" or "sum" over the pairs, or "none" for the loss of each pair, shape (B,).
        return_metrics: also return `OrpoMetrics`.

    Returns:
        The loss, in float32 (float64 for float64 predictions); with `return_metrics` the tuple (loss, metrics).

    Raises:
        TypeError: a tensor is not of floating dtype, or beta or loser_share is not a number.
        ValueError: shapes differ, the batch is empty, beta is negative or not finite, loser_share not between 0 and 0.5 or
            given beside beta, or the temperature not above 0.

    Example:
        >>> import torch
        >>> noise = torch.randn(2, 4, 8, 8)
        >>> pred_w, pred_l = (noise + 0.1 * torch.randn(2, 4, 8, 8) for _ in range(2))
        >>> orpo_loss(pred_w, pred_l, noise, beta=0.1).shape
        torch.Size([])

    Source: equations 6 and 7 of ORPO, arXiv 2403.07691, with log p taken as the negative mean squared error. Loser share
    and temperature are not in the paper.
    """
    _check_same_shape("model_pred_w", model_pred_w, "model_pred_l", model_pred_l)
    target_w, target_l = _split_target(target)
    _check_same_shape("model_pred_w", model_pred_w, "target" if target_w is target_l else "target_w", target_w)
    _check_same_shape("model_pred_l", model_pred_l, "target" if target_w is target_l else "target_l", target_l)
    error_w = per_pair_error(model_pred_w, target_w)
    error_l = per_pair_error(model_pred_l, target_l)
    return odds_ratio_objective(
        error_w,
        error_l,
        beta,
        loser_share=loser_share,
        temperature=temperature,
        weights=weights,
        reduction=reduction,
        return_metrics=return_metrics,
    )


def odds_ratio_objective(
    error_w: torch.Tensor,
    error_l: torch.Tensor,
    beta: float | None = None,
    *,
    loser_share: float | None = None,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, OrpoMetrics]:
    """ORPO loss from the errors of winner and loser, for trainers with masks or a weighting of their own.

    With beta, as published, on the errors:

        m_w - beta log sigmoid(z),            z = log_odds(m_w) - log_odds(m_l)

    With a loser share s, on their logarithms, so that scaling a pair's errors changes neither its odds nor the balance
    of its two terms:

        log m_w - b log sigmoid(z),           z = log(m_l / m_w),    b = 2 s / (1 - 2 s)

    log m_w is the Gaussian negative log likelihood per half dimension at its best variance; -log m is the log odds of
    p = 1 / (1 + m), and what `log_odds` tends to at small errors. At z = 0 the gradients on log m_w and log m_l are
    1 + b/2 and -b/2: the loser's share is s.

    Args:
        error_w: error of each preferred image, at least 0, shape (B,), any floating dtype.
        error_l: error of each rejected image, shape (B,).
        beta, loser_share, temperature, weights, reduction, return_metrics: as for `orpo_loss`.

    Returns:
        As `orpo_loss`.

    Raises:
        TypeError, ValueError: as `orpo_loss`.
    """
    _check_same_shape("error_w", error_w, "error_l", error_l)
    if error_w.ndim != 1:
        raise ValueError(f"error_w and error_l must hold one error per pair, shape (B,); got {tuple(error_w.shape)}.")
    beta = _strength(beta, loser_share)
    _check_number("temperature", temperature)
    if temperature == 0:
        raise ValueError("temperature must be above 0; 1 is ORPO as published.")
    error_w, error_l = _at_least_float32(error_w), _at_least_float32(error_l)

    if loser_share is None:
        supervised, z = error_w, log_odds(error_w) - log_odds(error_l)  # arXiv 2403.07691, equation 4
    else:
        log_w, log_l = (error.clamp(min=ERROR_FLOOR).log() for error in (error_w, error_l))
        supervised, z = log_w, log_l - log_w
    log_odds_ratio = temperature * F.logsigmoid(z / temperature)  # equation 7: L_OR = -log sigmoid(z)
    loss = supervised - beta * log_odds_ratio  # equation 6

    if weights is not None:
        _check_same_shape("weights", weights, "the errors", error_w)
        loss = loss * weights.to(loss.dtype)
    loss = _reduce(loss, reduction)
    if not return_metrics:
        return loss

    m_w, m_l = error_w.detach(), error_l.detach()
    metrics: OrpoMetrics = {
        "rewards/chosen": -beta * m_w,
        "rewards/rejected": -beta * m_l,
        "rewards/margins": beta * (m_l - m_w),
        "rewards/accuracies": (m_w < m_l).to(m_w.dtype),
        "logps/chosen": -m_w,
        "logps/rejected": -m_l,
        "nll_loss": m_w,
        "log_odds_ratio": log_odds_ratio.detach(),
        "log_odds_chosen": z.detach(),
    }
    return loss, metrics


def per_pair_error(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each element of the batch, over all other dimensions.

    Args:
        model_pred: shape (B, ...), any floating dtype.
        target: the same shape.

    Returns:
        Shape (B,), in float32 (float64 for float64 predictions).

    Raises:
        TypeError: a tensor is not of floating dtype.
        ValueError: shapes differ, or the batch is empty.
    """
    _check_same_shape("model_pred", model_pred, "target", target)
    squared = (_at_least_float32(model_pred) - _at_least_float32(target)).square()
    return squared.reshape(squared.shape[0], -1).mean(dim=1)


def beta_of_share(loser_share: float) -> float:
    """The weight b of the odds ratio term that gives the loser this share of a pair's gradient where errors are equal.

    Args:
        loser_share: s, above 0 and below 0.5. The loss per pair is log m_w - b log sigmoid(log(m_l / m_w)).

    Returns:
        b = 2 s / (1 - 2 s).

    Raises:
        TypeError: it is not a number.
        ValueError: it lies outside.
    """
    _check_number("loser_share", loser_share)
    if not 0 < loser_share < 0.5:
        raise ValueError(
            f"loser_share must be above 0 and below 0.5; got {loser_share}. For supervised fine-tuning on the winners use"
            " beta=0."
        )
    return 2 * loser_share / (1 - 2 * loser_share)


def log_odds(error: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(-error), elementwise: arXiv 2403.07691, equation 3.

    It equals -log(exp(error) - 1), written so that nothing cancels at small errors and nothing overflows at large
    ones. Falls from +inf (error 0, here cut at `ERROR_FLOOR`) through 0 (error log 2) like -error.

    Args:
        error: at least 0, any shape, float32 or float64.

    Returns:
        The same shape and dtype.
    """
    error = error.clamp(min=ERROR_FLOOR)
    return -(error + torch.log(-torch.expm1(-error)))


def _strength(beta: float | None, loser_share: float | None) -> float:
    if loser_share is None:
        beta = BETA if beta is None else beta
        _check_number("beta", beta)
        return beta
    if beta is not None:
        raise ValueError("beta and loser_share are two ways to set the same strength: give one of them.")
    return beta_of_share(loser_share)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _split_target(target: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(target, torch.Tensor):
        return target, target
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        raise TypeError("target must be a tensor or a pair of tensors (target_w, target_l).")
    target_w, target_l = target
    return target_w, target_l


def _check_same_shape(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    for argument, value in ((name, tensor), (other_name, other)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{argument} must be a tensor of floating dtype; got {found}.")
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape; got {tuple(tensor.shape)} and {tuple(other.shape)}."
        )
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise ValueError(
            f"{name} and {other_name} must hold at least one pair, shape (B, ...); "
            f"got {tuple(tensor.shape)} and {tuple(other.shape)}."
        )


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):  # a tensor would have to be read back from the device to be checked
        raise TypeError(f"{name} must be a Python number; got {type(value).__name__}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0; got {value}.")


def _reduce(loss: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    if reduction == "none":
        return loss
    raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}.')
