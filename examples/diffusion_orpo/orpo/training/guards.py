"""What watches a run: losses that are not finite never reach the weights, and a model that forgets its pairs is pointed out.

The odds ratio compares the two images of a pair, so it may go on improving while both errors rise, the rejected image's faster.
What the model generates may then be lost. (DPO is known to do the same: arXiv 2402.13228, section 3.)
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .checkpoint import TrainingState, list_checkpoints
from .metrics import Window


logger = get_logger(__name__)

MAX_SKIPPED_STEPS = 20  # in a row, by fp16's gradient scaler, which halves its scale with each
ADVICE = "Lower --learning_rate or --loser_share (or --beta_orpo), or use bf16, and resume from the last checkpoint"

START = 50  # steps whose mean is what later errors are compared with
DECAY = 0.98  # of the running mean: it looks back about 50 steps
RISE = 1.5  # of both errors, relative to their start; in the demo, which goes well, the winners' rises by 1.3
NOISE = 4.0  # and at least so many standard errors


def stop_if_not_finite(
    accelerator: Accelerator, window: Window, logs: dict[str, float], step: int, output_dir: Path
) -> None:
    """Ends the run before a loss or gradient that is not finite reaches the weights. Every process must call it.

    Under fp16 the gradient alone may be infinite now and then: the gradient scaler skips such steps.

    Args:
        accelerator: of the run.
        window: losses and errors of this process's pairs.
        logs: means over all processes; `loss` and `grad_norm` are looked at.
        step: the step that these would make.
        output_dir: has the checkpoints.

    Raises:
        FloatingPointError: names step, timesteps, the side of each pair that is not finite, and the last checkpoint.
    """
    if math.isfinite(logs["loss"]) and (math.isfinite(logs["grad_norm"]) or accelerator.scaler is not None):
        return
    pairs, timesteps = window.pairs()
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


class SkippedSteps:
    """Counts the steps that fp16's gradient scaler skips, for the log, and in a row."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def add(self, accelerator: Accelerator, state: TrainingState) -> dict[str, int]:
        """Takes note of the step just made; returns what is logged of it.

        Raises:
            FloatingPointError: `MAX_SKIPPED_STEPS` in a row.
        """
        self.in_a_row = self.in_a_row + 1 if accelerator.optimizer_step_was_skipped else 0
        if self.in_a_row == MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"Step {state.global_step}: {self.in_a_row} steps in a row had no finite gradient. {ADVICE}."
            )
        state.skipped_steps += accelerator.optimizer_step_was_skipped
        return {} if accelerator.scaler is None else {"skipped_steps": state.skipped_steps}


@dataclass
class RunningError:
    """Mean and spread of one error over the first `START` steps, and its running mean after them.

    All of its logarithm: timesteps make errors differ by orders of magnitude from step to step, and the few large ones
    would decide any plain mean.
    """

    steps: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    recent: float = 0.0

    def add(self, error: float) -> None:
        value = math.log(max(error, 1e-12))
        self.steps += 1
        if self.steps <= START:
            deviation = value - self.mean
            self.mean += deviation / self.steps
            self.squares += deviation * (value - self.mean)
            self.recent = self.mean
        else:
            self.recent = DECAY * self.recent + (1 - DECAY) * value

    def has_risen(self) -> bool:
        if self.steps <= START:
            return False
        variance = self.squares / (START - 1)
        standard_error = math.sqrt(variance * (1 / START + (1 - DECAY) / (1 + DECAY)))
        return self.recent - self.mean > max(math.log(RISE), NOISE * standard_error)

    def __str__(self) -> str:
        return f"from {math.exp(self.mean):.3g} to {math.exp(self.recent):.3g}"


@dataclass
class CollapseWatch:
    """Sees each step's errors and warns once.

    Attributes:
        winner, loser: their errors so far.
        warned: whether the warning was given.
    """

    winner: RunningError = field(default_factory=RunningError)
    loser: RunningError = field(default_factory=RunningError)
    warned: bool = False

    @classmethod
    def from_dict(cls, saved: dict) -> "CollapseWatch":
        """Goes on from `dataclasses.asdict` of another, or from the start if `saved` is empty."""
        if not saved:
            return cls()
        return cls(RunningError(**saved["winner"]), RunningError(**saved["loser"]), saved["warned"])

    def add(self, logs: dict[str, float], step: int) -> None:
        """Takes the errors of one optimizer step from what is logged of it."""
        self.winner.add(-logs["logps/chosen"])
        self.loser.add(-logs["logps/rejected"])
        if not self.warned and self.winner.has_risen() and self.loser.has_risen():
            self.warned = True
            logger.warning(
                f"Step {step}: the model gets worse at winners and losers alike. Since the start, the winners' error rose"
                f" {self.winner}, the losers' {self.loser}. Lower --loser_share (or --beta_orpo) or --learning_rate and start again."
            )
