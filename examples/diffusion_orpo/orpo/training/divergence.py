"""Losses and gradients that are not finite: they never reach the weights, and the run says where they came from."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .checkpoints import list_checkpoints


MAX_SKIPPED_STEPS = 20  # in a row, by fp16's gradient scaler, which halves its scale with each
ADVICE = "Lower --learning_rate or --loser_share (or --beta_orpo), or use bf16, and resume from the last checkpoint"


def stop_if_not_finite(
    accelerator: Accelerator, pairs: torch.Tensor, timesteps: torch.Tensor, logs: dict, step: int, output_dir: Path
) -> None:
    """Ends the run before a loss or gradient that is not finite reaches the weights. Every process must call it.

    Under fp16 the gradient alone may be infinite now and then: the gradient scaler skips such steps.

    Args:
        accelerator: of the run.
        pairs: loss, winner's and loser's error of this process's pairs (3, B).
        timesteps: of these pairs (B,).
        logs: means over all processes; `loss` and `grad_norm` are looked at.
        step: the step that these would make.
        output_dir: has the checkpoints.

    Raises:
        FloatingPointError: names step, timesteps, the side of each pair that is not finite, and the last checkpoint.
    """
    if math.isfinite(logs["loss"]) and (math.isfinite(logs["grad_norm"]) or accelerator.scaler is not None):
        return
    finite = pairs.isfinite().tolist()
    bad = gather_object([describe(*pair) for pair in zip(timesteps.tolist(), *finite) if not all(pair[1:])])
    cause = f"Not finite: {'; '.join(bad)}." if bad else "The errors of all pairs are finite, but the gradient is not."
    checkpoints = list_checkpoints(output_dir)
    raise FloatingPointError(
        f"Step {step}: the loss is {logs['loss']}, the gradient norm {logs['grad_norm']}. {cause} The weights are those"
        f" of the step before. {ADVICE}{f', {checkpoints[-1]}' if checkpoints else ' (none was saved yet)'}."
    )


def describe(timestep: int, loss: bool, winner: bool, loser: bool) -> str:
    """Says which side of a pair is to blame, given which of its loss and errors are finite."""
    sides = [name for name, finite in (("winner", winner), ("loser", loser)) if not finite]
    return f"timestep {timestep}, {' and '.join(sides) or 'though both errors are finite'}"


def count_skipped(accelerator: Accelerator, running: int, step: int) -> int:
    """How many steps in a row the gradient scaler has skipped.

    Args:
        accelerator: of the run.
        running: those before this step.
        step: this step.

    Raises:
        FloatingPointError: they are `MAX_SKIPPED_STEPS`.
    """
    running = running + 1 if accelerator.optimizer_step_was_skipped else 0
    if running == MAX_SKIPPED_STEPS:
        raise FloatingPointError(f"Step {step}: {running} steps in a row had no finite gradient. {ADVICE}.")
    return running
