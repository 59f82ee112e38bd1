"""Optimizers, one entry each, and the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger

from diffusers.optimization import get_scheduler


logger = get_logger(__name__)


def make_optimizer(
    args, parameters: list[torch.nn.Parameter], pairs_per_step: int, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer that the flags name.

    Args:
        args: the flags.
        parameters: of the LoRA.
        pairs_per_step: multiplies the learning rate with --scale_lr.
        fused: whether one kernel may step all tensors. It would hide from accelerate which steps the gradient scaler skips.

    Raises:
        ImportError: its package is not installed.
    """
    make = OPTIMIZERS["AdamW8bit" if args.use_8bit_adam else args.optimizer]
    options = {
        "lr": args.learning_rate * (pairs_per_step if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    return make(args, parameters, options, fused)


def _adamw(args, parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    fused = fused and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, **options, fused=fused)


def _adamw_8bit(args, parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from error
    return AdamW8bit(parameters, **options)


def _prodigy(args, parameters, options: dict, fused: bool) -> torch.optim.Optimizer:
    """Finds its own step size (arXiv 2306.06101); the learning rate multiplies it."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ImportError("--optimizer=prodigy needs prodigyopt: `pip install prodigyopt`.") from error
    if options["lr"] <= 0.1:
        logger.warning(
            f"--learning_rate={args.learning_rate} multiplies the step size that Prodigy finds, which is meant for 1.0"
        )
    return Prodigy(
        parameters,
        **options,
        beta3=args.prodigy_beta3,
        decouple=args.prodigy_decouple,
        use_bias_correction=args.prodigy_use_bias_correction,
        safeguard_warmup=args.prodigy_safeguard_warmup,
    )


# Functions of (flags, parameters, the options that all of Adam's kind take, whether one kernel may step all tensors).
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "prodigy": _prodigy,
}


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
    def of(cls, args, optimizer: torch.optim.Optimizer, steps: int) -> "LearningRate":
        """The course that the flags name, over so many steps."""
        _check_warm_up(args, steps)
        base = optimizer.param_groups[0]["lr"]
        scheduler = get_scheduler(  # serves for its function alone, so it gets an optimizer of its own
            args.lr_scheduler,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base),
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        return cls(optimizer, base, scheduler.lr_lambdas[0])

    def at(self, place: float) -> float:
        return self.base * self.factor(place)

    def set(self, place: float) -> None:
        """Gives the optimizer the learning rate of the step that begins at a place."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.at(place)


def same_rate(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)


def _check_warm_up(args, steps: int) -> None:
    """Points out a warm-up that does not do what it says."""
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        logger.warning(
            f"--lr_warmup_steps={args.lr_warmup_steps} does nothing with --lr_scheduler=constant, which has no warm-up:"
            " constant_with_warmup has one"
        )
    elif args.lr_warmup_steps >= steps:
        logger.warning(
            f"--lr_warmup_steps={args.lr_warmup_steps} is no shorter than the run of {steps} steps: the learning rate"
            f" ends at {min(1.0, steps / args.lr_warmup_steps):.2g} of --learning_rate. Lower --lr_warmup_steps"
        )
