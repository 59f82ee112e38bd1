"""Optimizers, one entry each; how long a run is; and the learning rate over its course."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger

from diffusers.optimization import get_scheduler

from ..config import OptimizerConfig


logger = get_logger(__name__)


# Of Adam's moments. Its epsilon is 1e-8.
BETAS = (0.9, 0.999)


def make_optimizer(
    config: OptimizerConfig, parameters: list[torch.nn.Parameter], fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer that the config names.

    Args:
        config: which one, its learning rate and its weight decay.
        parameters: of the LoRA.
        fused: whether one kernel may step all tensors. It would hide from accelerate which steps the gradient scaler skips.

    Raises:
        ImportError: its package is not installed.
    """
    options = {"lr": config.learning_rate, "betas": BETAS, "weight_decay": config.adam_weight_decay, "eps": 1e-8}
    return OPTIMIZERS[config.optimizer](parameters, options, fused)


def _adamw(parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    fused = fused and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, **options, fused=fused)


def _adamw_8bit(parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--optimizer=AdamW8bit needs bitsandbytes: `pip install bitsandbytes`.") from error
    return AdamW8bit(parameters, **options)


def _prodigy(parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    """Finds its own step size (arXiv 2306.06101); the learning rate multiplies it."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ImportError("--optimizer=prodigy needs prodigyopt: `pip install prodigyopt`.") from error
    if options["lr"] <= 0.1:
        logger.warning(
            f"--learning_rate={options['lr']} multiplies the step size that Prodigy finds, which is meant for 1.0"
        )
    return Prodigy(parameters, **options, decouple=True, use_bias_correction=True, safeguard_warmup=True)


# Functions of (parameters, the options that all of Adam's kind take, whether one kernel may step all tensors).
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "prodigy": _prodigy,
}


@dataclass(frozen=True)
class Length:
    """What a run is to do, counted in steps or in pairs.

    Epochs are passes over the pairs, whatever batch size, accumulation or number of processes a resumed run has: what
    remains follows from the pairs seen. The learning rate's course is laid out in the steps that the run began with.

    Attributes:
        max_train_steps: as given, or None: then epochs count.
        pairs: that all epochs have, with what fills their last batches.
        pairs_per_step: of this run.
        first_pairs_per_step: of the run that the first checkpoint came from; this one's, unless it is resumed.
        first_horizon: of that run, if it was to be as long: batches of another size would be filled with other pairs.
    """

    max_train_steps: int | None
    pairs: int
    pairs_per_step: int
    first_pairs_per_step: int
    first_horizon: int | None = None

    def last_step(self, global_step: int, pairs_seen: int) -> int:
        """The step at which the run is done, seen from a place in it."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        return global_step + max(0, math.ceil((self.pairs - pairs_seen) / self.pairs_per_step))

    @property
    def horizon(self) -> int:
        """Steps that the learning rate's course is laid out for."""
        return self.max_train_steps or self.first_horizon or math.ceil(self.pairs / self.first_pairs_per_step)

    def place(self, global_step: int, pairs_seen: int) -> float:
        """How far the run is, in the horizon's steps."""
        place = global_step if self.max_train_steps is not None else pairs_seen / self.first_pairs_per_step
        return min(place, self.horizon)


@dataclass
class LearningRate:
    """The learning rate as a function of how far a run is. It has no state: a resumed run asks for the same place.

    Steps that the gradient scaler skips count, too.

    Attributes:
        optimizer: whose learning rate it sets.
        base: learning rate after warm-up.
        factor: of the base, at a place in steps.
    """

    optimizer: torch.optim.Optimizer
    base: float
    factor: Callable[[float], float]

    @classmethod
    def of(cls, config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> "LearningRate":
        """The course that the config names, over so many steps."""
        _check_warm_up(config, steps)
        base = optimizer.param_groups[0]["lr"]
        scheduler = get_scheduler(  # serves for its function alone, so it gets an optimizer of its own
            config.lr_scheduler,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
        )
        return cls(optimizer, base, scheduler.lr_lambdas[0])

    def at(self, place: float) -> float:
        return self.base * self.factor(place)

    def set(self, place: float) -> None:
        """Gives the optimizer the learning rate of the step that begins at a place."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.at(place)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What is logged: the learning rate, and with Prodigy the step size, which is the rate times the `d` that it has found."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"]} | ({"d*lr": group["d"] * group["lr"]} if "d" in group else {})


def same_rate(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)


def _check_warm_up(config: OptimizerConfig, steps: int) -> None:
    """Points out a warm-up that does not do what it says."""
    if config.lr_warmup_steps and config.lr_scheduler == "constant":
        logger.warning(
            f"--lr_warmup_steps={config.lr_warmup_steps} does nothing with --lr_scheduler=constant, which has no warm-up:"
            " constant_with_warmup has one"
        )
    elif config.lr_warmup_steps >= steps:
        logger.warning(
            f"--lr_warmup_steps={config.lr_warmup_steps} is no shorter than the run of {steps} steps: the learning rate"
            f" ends at {min(1.0, steps / config.lr_warmup_steps):.2g} of --learning_rate. Lower --lr_warmup_steps"
        )
