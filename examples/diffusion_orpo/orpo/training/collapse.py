"""Warns of the slow way in which preference training fails: the model forgets both images of its pairs.

The odds ratio compares winner and loser, so it may go on improving while both errors rise, the loser's faster. What the
model draws may then be lost. (DPO is known to do the same: arXiv 2402.13228, section 3.)
"""

import math
from dataclasses import dataclass, field

from accelerate.logging import get_logger


logger = get_logger(__name__)

START = 50  # steps whose mean is what later errors are compared with
DECAY = 0.98  # of the running mean: it looks back about 50 steps
RISE = 1.5  # of both errors, relative to their start; in the demo, which goes well, the winners' rises by 1.3
NOISE = 4.0  # and at least so many standard errors


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
