"""The ORPO training step as an algorithm, whatever the model family, and wherever the pairs come from.

    encode    both images of each pair -> latents x_w, x_l; the prompt -> embeddings, once for both
    noise     one timestep t and one noise eps for both images of a pair: x_w,t and x_l,t
    forward   the denoiser predicts from x_w,t and x_l,t, in one call
    target    the correct prediction: eps for both, or a velocity for each                                     (1)
    loss      m_w, m_l   mean squared error of prediction and target, over all non-batch dimensions            (2)
              log p = -m;  log_odds(m) = log p - log(1 - p) = -log(exp(m) - 1)                                 (3)
              z = log_odds(m_w) - log_odds(m_l)                  > 0 when the model prefers the winner         (4)
              loss = m_w - beta * log sigmoid(z)                                       arXiv 2403.07691, eq. 6 (5)
              with --loser_share: z = log(m_l / m_w), loss = log m_w - b log sigmoid(z)
              with --odds_temperature T: T log sigmoid(z / T) in place of log sigmoid(z)
    backward  the loop's `accelerator.backward(losses.mean())`

(2) to (5) are `orpo_loss` of the package diffusion_orpo_loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusion_orpo_loss import OrpoMetrics, orpo_loss

from ..config import LossConfig
from ..runtime.transfer import draw_noise, to_device
from .protocols import ModelFamily


def compute_losses(
    strength: LossConfig, model: ModelFamily, denoiser: Callable[..., Any], batch: dict[str, Any]
) -> tuple[torch.Tensor, OrpoMetrics, torch.Tensor]:
    """Encode, noise, forward, target, loss.

    Args:
        strength: of the loss.
        model: the model family; encodes images and prompts.
        denoiser: the module that predicts; may be wrapped for distributed training.
        batch: B pairs as `collate_pairs` makes them: tensors of 2B images, the B winners first.

    Returns:
        The loss of each pair (B,), the metrics of each pair, and the timesteps (B,).
    """
    model_pred_w, model_pred_l, target, timesteps = predict_pairs(model, denoiser, batch)
    losses, metrics = orpo_loss(  # (2) to (5)
        model_pred_w,
        model_pred_l,
        target,
        strength.beta_orpo,
        loser_share=strength.loser_share,
        temperature=strength.odds_temperature,
        weights=model.noise_process.weights(timesteps),
        reduction="none",
        return_metrics=True,
    )
    return losses, metrics, timesteps


def predict_pairs(model: ModelFamily, denoiser: Callable[..., Any], batch: dict[str, Any]) -> tuple:
    """Adds noise to both images of each pair and predicts, in one call of the denoiser.

    Args:
        model, denoiser, batch: as `compute_losses` takes them.

    Returns:
        The predictions for the winners and for the losers (B, C, ...); their target, one for both or one each;
        and the timesteps (B,).
    """
    # encode
    moments, embeds = encode(model, batch)
    # All randomness comes from the pair's own seed: neither its place in the batch nor the number of processes matters.
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
    timesteps = batch["timesteps"] if "timesteps" in batch else model.noise_process.sample_timesteps(generators)
    timesteps = to_device(timesteps, model.device)
    latents = model.sample_latents(moments, generators * 2)  # (2B, C, ...)
    latents_w, latents_l = latents.chunk(2)

    # noise
    noise = draw_noise(generators, latents_w.shape[1:], model.device)  # the same for both images of a pair
    noisy_latents = model.noise_process.add_noise(latents, torch.cat([noise, noise]), timesteps.repeat(2))

    # forward
    model_pred = model.predict(denoiser, noisy_latents, timesteps.repeat(2), embeds, batch)

    # target (1)
    target = model.noise_process.target(latents_w, latents_l, noise, timesteps)
    return *model_pred.chunk(2), target, timesteps


def encode(model: ModelFamily, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The moments of the images' latents (2B, 2C, ...), and the prompts' embeddings: those in the batch, or made now."""
    if "moments" in batch:
        moments = to_device(batch["moments"], model.device)
    else:
        moments = model.encode_images(batch["pixel_values"])
    if "embeds" in batch:
        embeds = {name: to_device(rows, model.device) for name, rows in batch["embeds"].items()}
    else:
        embeds = model.encode_prompts(batch["prompts"])
    return moments, embeds
