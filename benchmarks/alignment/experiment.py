"""One experiment: a LoRA is trained with one objective at one setting, and measured as it goes."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from diffusion_orpo_loss import per_pair_error
from orpo.data.dataset import EndlessOrder
from orpo.data.flags import IMAGES
from orpo.data.pair import sample_seed
from orpo.models.options import ModelOptions
from orpo.models.registry import SDXL
from orpo.models.sdxl import StableDiffusionXL
from orpo.system.flags import assemble, make_parser, parse
from orpo.training.flags import TRAINING
from orpo.training.optimizer import make_optimizer
from orpo.training.step import predict_pairs

from objectives import OBJECTIVES, Errors
from worlds import TEST_IMAGES, Pairs, World


PAIRS_PER_STEP = 16
RANK = 8
HELD_OUT_SEED = 2**31
TEST_SEEDS = {"validation": 500_000_000, "test": 600_000_000}


@dataclass(frozen=True)
class Experiment:
    """What is trained, and when it is measured.

    Attributes:
        world: the preference.
        objective: a key of `OBJECTIVES`.
        strength: of its preference term.
        learning_rate: of AdamW.
        seed: of LoRA, order, noise and timesteps.
        steps: of 16 pairs.
        evaluate_at: steps after which it is measured.
        split: "validation" (prompts of the pairs) or "test" (other prompts where there are any); the seeds differ too.
        flipped: share of the pairs whose winner and loser are exchanged.
    """

    world: str
    objective: str
    strength: float
    learning_rate: float
    seed: int = 0
    steps: int = 200
    evaluate_at: tuple[int, ...] = (200,)
    split: str = "validation"
    flipped: float = 0.0


class EncodedSDXL(StableDiffusionXL):
    """SDXL whose images come as latents, and whose prompts are encoded once."""

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        return moments

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        known = self.__dict__.setdefault("_known_prompts", {})
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            embeds = super().encode_prompts(new)
            known.update((prompt, {name: rows[i] for name, rows in embeds.items()}) for i, prompt in enumerate(new))
        return {name: torch.stack([known[prompt][name] for prompt in prompts]) for name in known[prompts[0]]}


def load_model(base: str, learning_rate: float, seed: int) -> tuple[argparse.Namespace, EncodedSDXL]:
    """The base with a fresh LoRA, and the training scripts' flags."""
    flags = {
        "pretrained_model_name_or_path": base,
        "output_dir": "unused",
        "resolution": 64,
        "rank": RANK,
        "train_batch_size": PAIRS_PER_STEP,
        "learning_rate": learning_rate,
    }
    declared = assemble([*SDXL.flags, IMAGES, *TRAINING], SDXL.defaults)
    args = parse(make_parser(None, declared), declared, [f"--{name}={value}" for name, value in flags.items()])
    torch.manual_seed(seed)
    return args, EncodedSDXL.load(ModelOptions.from_flags(args), torch.device("cpu"), torch.float32)


def make_batch(world: World, pairs: Pairs, keys: list[tuple[int, int]], seed: int) -> dict:
    """The pairs of (epoch, index) as a batch of the training scripts, with latents for images."""
    chosen = [index for _, index in keys]
    return {
        "moments": torch.cat([pairs.latents_w[chosen], pairs.latents_l[chosen]]),
        "original_sizes": torch.full((2 * len(keys), 2), 64),
        "crop_top_lefts": torch.zeros(2 * len(keys), 2, dtype=torch.long),
        "prompts": [world.prompts[pairs.classes[index]] for index in chosen],
        "seeds": [sample_seed(seed, epoch, index) for epoch, index in keys],
    }


def compute_errors(model: EncodedSDXL, batch: dict, has_reference: bool) -> Errors:
    """Errors of a batch. The reference predicts from the same noise at the same timesteps: the pairs' seeds decide them."""
    model_pred_w, model_pred_l, target, _ = predict_pairs(model, model.denoiser, batch)
    errors = Errors(per_pair_error(model_pred_w, target), per_pair_error(model_pred_l, target))
    if has_reference:
        model.denoiser.disable_adapters()
        with torch.no_grad():
            reference_w, reference_l, target, _ = predict_pairs(model, model.denoiser, batch)
        model.denoiser.enable_adapters()
        errors = replace(
            errors,
            reference_w=per_pair_error(reference_w, target),
            reference_l=per_pair_error(reference_l, target),
        )
    return errors


def train_step(model: EncodedSDXL, batch: dict, objective, strength: float, optimizer, parameters: list) -> Errors:
    errors = compute_errors(model, batch, objective.has_reference)
    objective.loss(errors, strength).mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return errors


@torch.no_grad()
def measure(world: World, model: EncodedSDXL, held_out: Pairs, split: str) -> dict:
    """Draws the split's images and reads them; measures the held-out pairs.

    Returns:
        Per image: `rewards`, `follows`. Scalars: `distance`, and `accuracy`, `m_w` and `m_l` of the held-out pairs.
    """
    model.denoiser.eval()
    classes = world.cycle(world.test_classes if split == "test" else world.train_classes, TEST_IMAGES)
    images = world.draw(model.pipeline, classes, TEST_SEEDS[split], "Drawing")
    keys = [(0, index) for index in range(len(held_out.classes))]
    errors = [
        compute_errors(model, make_batch(world, held_out, keys[i : i + 32], HELD_OUT_SEED), has_reference=False)
        for i in range(0, len(keys), 32)
    ]
    m_w, m_l = torch.cat([e.w for e in errors]), torch.cat([e.l for e in errors])
    model.denoiser.train()
    return {
        "rewards": [round(float(value), 3) for value in world.reward(images, classes)],
        "follows": [int(value) for value in world.follows_prompt(images, classes)],
        "distance": round(world.distance[split](images), 3),
        "accuracy": round((m_w < m_l).double().mean().item(), 4),
        "m_w": round(m_w.mean().item(), 6),
        "m_l": round(m_l.mean().item(), 6),
    }


def train(experiment: Experiment, world: World, pairs: Pairs) -> Iterator[tuple[int, EncodedSDXL]]:
    """Trains, and gives step and model after each step."""
    objective = OBJECTIVES[experiment.objective]
    args, model = load_model(world.base, experiment.learning_rate, experiment.seed)
    model.denoiser.train()
    pairs = flip(pairs, experiment.flipped, experiment.seed)
    parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters, PAIRS_PER_STEP)
    order = iter(EndlessOrder(len(pairs.classes), PAIRS_PER_STEP, experiment.seed, 0, 0, 1))
    for step in range(1, experiment.steps + 1):
        batch = make_batch(world, pairs, next(order), experiment.seed)
        train_step(model, batch, objective, experiment.strength, optimizer, parameters)
        yield step, model


def run(experiment: Experiment, world: World, pairs: Pairs, held_out: Pairs) -> dict:
    """Trains and measures.

    Returns:
        The experiment, and `evaluations`: step to what `measure` returns.
    """
    started = time.perf_counter()
    evaluations = {
        step: measure(world, model, held_out, experiment.split)
        for step, model in train(experiment, world, pairs)
        if step in experiment.evaluate_at
    }
    return asdict(experiment) | {"evaluations": evaluations, "seconds": round(time.perf_counter() - started, 1)}


def flip(pairs: Pairs, share: float, seed: int) -> Pairs:
    """Exchanges winner and loser in that share of the pairs."""
    flipped = torch.from_numpy(np.random.default_rng(seed).random(len(pairs.classes)) < share)[:, None, None, None]
    return replace(
        pairs,
        latents_w=torch.where(flipped, pairs.latents_l, pairs.latents_w),
        latents_l=torch.where(flipped, pairs.latents_w, pairs.latents_l),
    )
