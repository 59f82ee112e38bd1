"""What an experiment is. Imports nothing heavy: the report needs no model."""

from dataclasses import asdict, dataclass


TASKS = ("digits", "prompt", "smile")


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    Attributes:
        task: one of `TASKS`.
        objective: a key of `OBJECTIVES`.
        strength: of its preference term.
        learning_rate: of AdamW at the first step; it falls linearly to 0 at the last.
        steps: of training.
        seed: of LoRA, order, noise and timesteps.
        temperature: of the sigmoid, for the objectives that have one.
        flipped: share of the pairs whose winner and loser are exchanged.
        clip: the largest gradient norm.
        ema: decay of the exponential mean of the LoRA's weights that is measured in their place; 0 for none.
        cap: the largest m_l / m_w that the loss distinguishes, for the objectives that have one; 0 for none.
    """

    task: str
    objective: str
    strength: float
    learning_rate: float
    steps: int
    seed: int
    temperature: float = 1.0
    flipped: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    cap: float = 0.0

    @property
    def name(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(self).values())
