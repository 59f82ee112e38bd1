"""Preference accuracy on held-out pairs, precise enough to steer by.

One noise and one timestep for each pair leave most of the accuracy to chance. So each pair is predicted several times, at timesteps
spread evenly over the noise levels that training draws; noise and timesteps never change, so that two measurements differ
only by what the model has learned.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from diffusion_orpo_loss import OrpoMetrics, per_pair_error

from ..config import LossConfig
from .protocols import ModelFamily, NoiseProcess
from .step import compute_losses, encode, predict_pairs


QUARTERS = 4
# How often each held-out pair is predicted. The accuracy on 64 pairs then has a standard error of at most 2 points, at the cost of
# 6 training passes.
LEVELS = 12
ACCURACY = "eval_rewards/accuracies"
PROMPT_MARGIN = "eval_prompt_margin"
MARGIN_EVERY = 3  # of so many noise levels one serves for the prompt margin, which takes one more prediction there
NAMES = ("loss", *OrpoMetrics.__annotations__)


class NoiseLevels:
    """Timesteps at evenly spaced quantiles of those that training draws.

    Args:
        noise_process: of the model family.
        draws: how many each pair gets, in as many equally likely ranges of noise.
    """

    def __init__(self, noise_process: NoiseProcess, draws: int = LEVELS) -> None:
        self.draws, count = draws, 4096
        generator = torch.Generator().manual_seed(0)
        self.sorted = noise_process.sample_timesteps([generator] * count).sort().values  # the quantiles (count,)

    def batch(self, batch: dict, draw: int) -> dict:
        """The batch with the noise and the timesteps of one of the draws."""
        seeds = [(seed + draw * 0x9E3779B97F4A7C15) % 2**63 for seed in batch["seeds"]]
        within = torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        places = ((draw + within) / self.draws * len(self.sorted)).long().clamp(max=len(self.sorted) - 1)
        return batch | {"seeds": seeds, "timesteps": self.sorted[places]}

    def batches(self, model: ModelFamily, batch: dict) -> Iterator[dict]:
        """The batch with each of the draws in turn. Images and prompts are encoded once."""
        moments, embeds = encode(model, batch)
        for draw in range(self.draws):
            yield self.batch(batch | {"moments": moments, "embeds": embeds}, draw)


class PromptMargin:
    """How much the model relies on its prompts: log(error under another prompt / error under the own one), of the chosen images.

    Preference accuracy may rise while images stop showing what the prompt asks for; this mean then falls towards 0. The
    other prompt is that of the pair before. A pair of the same prompt does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # of margins, and of pairs
        self.last: dict[str, torch.Tensor] = {}

    def add(self, model: ModelFamily, batch: dict, error_w: torch.Tensor) -> None:
        """Adds pairs at one noise level.

        Args:
            model: the model family.
            batch: encoded pairs at this level.
            error_w: of the chosen images under their own prompts (B,).
        """
        own = batch["embeds"]
        others = {name: torch.cat([self.last.get(name, rows[-1:]), rows[:-1]]) for name, rows in own.items()}
        model_pred_w, _, target, _ = predict_pairs(model, model.denoiser, batch | {"embeds": others})
        margins = (
            per_pair_error(model_pred_w, target if isinstance(target, torch.Tensor) else target[0]).log()
            - error_w.log()
        )
        differs = [(rows != others[name]).reshape(len(rows), -1).any(dim=1) for name, rows in own.items()]
        counts = torch.stack(differs).any(dim=0)
        self.sums += torch.stack([margins.double()[counts].sum(), counts.double().sum()])

    def next_batch(self, embeds: dict[str, torch.Tensor]) -> None:
        self.last = {name: rows[-1:] for name, rows in embeds.items()}


@torch.no_grad()
def measure_held_out(
    strength: LossConfig,
    model: ModelFamily,
    accelerator: Accelerator,
    batches: Iterable[dict],
    levels: NoiseLevels,
) -> dict[str, float]:
    """Means over all held-out pairs and their noise levels. Every process must call it.

    Args:
        strength: of the loss, as for `compute_losses`.
        model: the model family.
        accelerator: of the run.
        batches: this process's share of the pairs.
        levels: at which each is predicted.

    Returns:
        `eval_loss` and the metrics of the loss as `eval_*`; `eval_prompt_margin`, see `PromptMargin`. `eval_rewards/accuracies` is how often the model prefers the
        winner (z > 0), `eval_rewards/accuracies_error` its standard error from noise and timesteps,
        `eval_rewards/accuracies_quarter_1` to `_4` the same from the least noise to the most. Empty where no pair could be
        read.
    """
    size = 1 + len(NAMES)
    sums = torch.zeros(levels.draws, size, dtype=torch.float64, device=accelerator.device)
    variance = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    margin = PromptMargin(accelerator.device)
    for batch in batches:
        accuracies = torch.zeros(len(batch["seeds"]), dtype=torch.float64, device=accelerator.device)
        for draw, drawn in enumerate(levels.batches(model, batch)):
            losses, metrics, _ = compute_losses(strength, model, model.denoiser, drawn)
            values = torch.stack([torch.ones_like(losses), losses, *metrics.values()])
            sums[draw] += values.double().sum(dim=1)
            accuracies = accuracies + metrics["rewards/accuracies"].double() / levels.draws
            if draw % MARGIN_EVERY == 0:
                margin.add(model, drawn, metrics["nll_loss"])
        margin.next_batch(drawn["embeds"])
        variance += (accuracies * (1 - accuracies)).sum()
    flat = accelerator.reduce(torch.cat([sums.flatten(), variance, margin.sums]), "sum").tolist()
    *flat, variance, margins, count = flat
    sums = torch.tensor(flat, dtype=torch.float64).view(levels.draws, size)
    if not sums[0, 0]:
        return {}
    return summarize(sums, variance) | ({PROMPT_MARGIN: margins / count} if count else {})


def summarize(sums: torch.Tensor, variance: float) -> dict[str, float]:
    """The metrics from their sums.

    Args:
        sums: of each draw: the number of pairs, then of each name of `NAMES` the sum over them (draws, 1 + names).
        variance: sum over the pairs of p (1 - p), where p is the share of a pair's draws that prefer the winner.
    """
    draws, pairs = len(sums), sums[0, 0].item()
    means = (sums[:, 1:].sum(dim=0) / (pairs * draws)).tolist()
    metrics = {f"eval_{name}": mean for name, mean in zip(NAMES, means)}
    # The draws of a pair lie in different ranges of noise; treating them as independent errs on the safe side.
    metrics[f"{ACCURACY}_error"] = math.sqrt(variance / (draws - 1)) / pairs
    accuracies = sums[:, 1 + NAMES.index("rewards/accuracies")] / pairs
    for quarter in range(QUARTERS):
        own = [draw for draw in range(draws) if draw * QUARTERS // draws == quarter]
        metrics[f"{ACCURACY}_quarter_{quarter + 1}"] = accuracies[own].mean().item()
    return metrics
