"""One experiment: a LoRA is trained with one objective at one setting, and measured as it goes."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusion_orpo_loss import per_pair_error
from orpo.config import TrainingConfig
from orpo.models.registry import SDXL
from orpo.models.sdxl import StableDiffusionXL
from orpo.pairs.dataset import PairKeys
from orpo.pairs.order import in_one_bucket
from orpo.pairs.pair import sample_seed
from orpo.training.optimizer import make_optimizer
from orpo.training.step import predict_pairs

from objectives import ALL_OBJECTIVES, Errors
from worlds import TEST_IMAGES, Pairs, World


PAIRS_PER_STEP = 16
RANK = 8
HELD_OUT_SEED = 2**31
QUARTERS = 4  # of the noise levels, in each of which every held-out pair is predicted once
TEST_SEEDS = {"validation": 500_000_000, "test": 600_000_000, "final": 700_000_000}


@dataclass(frozen=True)
class Experiment:
    """What is trained, and on which images it is measured. How long it is trained, and when it is measured, is asked apart.

    Attributes:
        world: the preference.
        objective: a key of `OBJECTIVES`.
        strength: of its preference term.
        learning_rate: of AdamW.
        seed: of LoRA, order, noise and timesteps.
        split: "validation" (prompts of the pairs), "final" or "test" (prompts that no pair has); the seeds differ too.
        flipped: share of the pairs whose winner and loser are exchanged.
        votes: on each pair.
    """

    world: str
    objective: str
    strength: float
    learning_rate: float
    seed: int = 0
    split: str = "validation"
    flipped: float = 0.0
    votes: int = 1

    @property
    def name(self) -> str:
        """Of the training run, which is the same on both splits."""
        votes = "" if self.votes == 1 else f"-{self.votes}-votes"
        return f"{self.world}-{self.objective}-{self.strength:g}-{self.learning_rate:g}-{self.seed}-{self.flipped:g}{votes}"


class EncodedSDXL(StableDiffusionXL):
    """SDXL whose images come as latents, and whose prompts are encoded once."""

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        return moments

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        known = self.__dict__.setdefault("_known_prompts", {})
        for prompt in prompts:
            if prompt not in known:  # alone, so that no digit depends on the others in its batch
                known[prompt] = {name: rows[0] for name, rows in super().encode_prompts([prompt]).items()}
        return {name: torch.stack([known[prompt][name] for prompt in prompts]) for name in known[prompts[0]]}


def load_model(base: str, learning_rate: float, seed: int) -> tuple[TrainingConfig, EncodedSDXL]:
    """The base with a fresh LoRA, and the training scripts' flags."""
    flags = {
        "pretrained_model_name_or_path": base,
        "output_dir": "unused",
        "resolution": 64,
        "rank": RANK,
        "train_batch_size": PAIRS_PER_STEP,
        "learning_rate": learning_rate,
    }
    args = TrainingConfig(**SDXL.fill_in(flags | {"dataset_name": "unused"}))
    torch.manual_seed(seed)
    model = EncodedSDXL.load(args, torch.device("cpu"), torch.float32)
    model.denoiser.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    return args, model


def make_batch(world: World, pairs: Pairs, keys: list[tuple[int, int]], seed: int) -> dict:
    """The pairs of (epoch, index) as a batch of the training scripts, with latents for images."""
    chosen = [index for _, index in keys]
    return {
        "moments": torch.cat([pairs.latents_w[chosen], pairs.latents_l[chosen]]),
        "original_sizes": torch.full((2 * len(keys), 2), 64),
        "crop_top_lefts": torch.zeros(2 * len(keys), 2, dtype=torch.long),
        "prompts": [world.prompts[pairs.classes[index]] for index in chosen],
        "seeds": [sample_seed(seed, epoch, index) for epoch, index in keys],
        "shares": pairs.shares[chosen],
    }


def compute_errors(model: EncodedSDXL, batch: dict) -> Errors:
    """Errors of the model on a batch."""
    model_pred_w, model_pred_l, target, _ = predict_pairs(model, model.denoiser, batch)
    return Errors(per_pair_error(model_pred_w, target), per_pair_error(model_pred_l, target), share=batch["shares"])


@torch.no_grad()
def reference_errors(model: EncodedSDXL, batch: dict) -> Errors:
    """Errors of the base: from the same noise at the same timesteps as the model's, which the pairs' seeds decide."""
    model.denoiser.disable_adapters()
    errors = compute_errors(model, batch)
    model.denoiser.enable_adapters()
    return errors


def train_step(
    model: EncodedSDXL, batch: dict, objective, strength: float, optimizer, parameters: list, reference=None
) -> None:
    """One step. An objective with a reference runs it, unless its errors on this batch are handed in."""
    errors = compute_errors(model, batch)
    if objective.has_reference:
        reference = reference or reference_errors(model, batch)
        errors = replace(errors, reference_w=reference.w, reference_l=reference.l)
    objective.loss(errors, strength).mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Quarter:
    """A noise process whose timesteps all lie in one quarter of the noise levels, 0 being the least noise."""

    process: object
    index: int

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        length = self.process.scheduler.config.num_train_timesteps // QUARTERS
        drawn = torch.cat([torch.randint(length, (1,), generator=generator) for generator in generators])
        return self.index * length + drawn

    def __getattr__(self, name: str):
        return getattr(self.process, name)


@torch.no_grad()
def held_out_errors(world: World, model: EncodedSDXL, held_out: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of winners and losers that were not trained on, each (QUARTERS, N): always the same noise and timesteps."""
    process, errors = model.noise_process, []
    for quarter in range(QUARTERS):
        model.noise_process = Quarter(process, quarter)
        for i in range(0, len(held_out.classes), 32):
            keys = [(quarter, index) for index in range(i, min(i + 32, len(held_out.classes)))]
            errors.append(compute_errors(model, make_batch(world, held_out, keys, HELD_OUT_SEED)))
    model.noise_process = process
    return tuple(torch.cat(side).view(QUARTERS, -1) for side in zip(*((e.w, e.l) for e in errors)))


@torch.no_grad()
def measure(world: World, model: EncodedSDXL, held_out: Pairs, split: str) -> dict:
    """Draws the split's images and reads them; measures the held-out pairs.

    Returns:
        Per image: `rewards`, `follows`. Per quarter of the noise levels, on the held-out pairs: `accuracies`. Scalars:
        `distance`, and `accuracy`, `m_w` and `m_l` of the held-out pairs.
    """
    model.denoiser.eval()
    classes = world.cycle(world.classes[split], TEST_IMAGES)
    images = world.draw(model.pipeline, classes, TEST_SEEDS[split], "Drawing")
    m_w, m_l = held_out_errors(world, model, held_out)
    correct = (m_w < m_l).double()
    model.denoiser.train()
    return {
        "rewards": [round(float(value), 3) for value in world.reward(images, classes)],
        "follows": [int(value) for value in world.follows_prompt(images, classes)],
        "distance": round(world.distance[split](images), 3),
        "accuracy": round(correct.mean().item(), 4),
        "accuracies": [round(value, 4) for value in correct.mean(dim=1).tolist()],
        "m_w": round(m_w.mean().item(), 6),
        "m_l": round(m_l.mean().item(), 6),
    }


class Training:
    """A training run that can be left and taken up again.

    Args:
        experiment: what is trained.
        world, pairs: of the experiment.
        states: folder that keeps where runs were left, and the reference's errors; None keeps nothing.
        from_start: whether to train from the start although there is a state.
    """

    def __init__(
        self, experiment: Experiment, world: World, pairs: Pairs, states: Path | None = None, from_start: bool = False
    ) -> None:
        self.experiment, self.world = experiment, world
        self.objective = ALL_OBJECTIVES[experiment.objective]
        self.pairs = keep_clear(flip(pairs, experiment.flipped, experiment.seed), self.objective.min_share)
        self.args, self.model = load_model(world.base, experiment.learning_rate, experiment.seed)
        self.model.denoiser.train()
        self.parameters = [parameter for parameter in self.model.denoiser.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.args, self.parameters)
        self.states, self.step, self.references = states, 0, None
        if states and self.state_file.exists() and not from_start:
            self._load()

    @property
    def state_file(self) -> Path:
        return self.states / f"{self.experiment.name}.pt"

    def train_to(self, steps: int) -> Iterator[int]:
        """Trains, and gives the step after each."""
        if self.objective.has_reference and self.states:
            self.references = self._references(steps)
        for batch in self._batches(self.step, steps):
            reference = self.references[self.step] if self.references else None
            arguments = (self.objective, self.experiment.strength, self.optimizer, self.parameters, reference)
            train_step(self.model, batch, *arguments)
            self.step += 1
            yield self.step

    def save(self) -> None:
        """Keeps where the run is, unless more of it is kept already."""
        if self.state_file.exists() and torch.load(self.state_file)["step"] >= self.step:
            return
        state = {
            "step": self.step,
            "parameters": [parameter.detach().clone() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }
        save_aside(state, self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file)
        self.step = state["step"]
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    def _batches(self, first: int, last: int) -> Iterator[dict]:
        seed = self.experiment.seed
        count = len(self.pairs.classes)
        order = in_one_bucket(count, PAIRS_PER_STEP, PAIRS_PER_STEP * first)
        for _, keys in zip(range(first, last), PairKeys(order, seed, count, rank=0, world_size=1)):
            yield make_batch(self.world, self.pairs, keys, seed)

    def _references(self, steps: int) -> list[Errors]:
        """The reference's errors at each step up to this one: the same for every run with the seed, whatever its setting."""
        e = self.experiment
        file = self.states / f"reference-{e.world}-{e.seed}-{e.flipped:g}.pt"
        known = [Errors(w, l) for w, l in torch.load(file)] if file.exists() else []
        if len(known) < steps:
            known += [reference_errors(self.model, batch) for batch in self._batches(len(known), steps)]
            save_aside([(errors.w, errors.l) for errors in known], file)
        return known


def save_aside(content, file: Path) -> None:
    """Saves so that the file is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    torch.save(content, aside)
    aside.replace(file)


def run(
    experiment: Experiment, world: World, pairs: Pairs, held_out: Pairs, marks: list[int], states: Path | None = None
) -> dict:
    """Trains to the last mark, from where the run was left if that is before the first, and measures at each.

    Returns:
        The experiment, and `evaluations`: step to what `measure` returns.
    """
    started, training = time.perf_counter(), Training(experiment, world, pairs, states)
    if training.step >= min(marks):
        training = Training(experiment, world, pairs, states, from_start=True)
    evaluations = {
        step: measure(world, training.model, held_out, experiment.split)
        for step in training.train_to(max(marks))
        if step in marks
    }
    if states:
        training.save()
    return asdict(experiment) | {"evaluations": evaluations, "seconds": round(time.perf_counter() - started, 1)}


def flip(pairs: Pairs, share: float, seed: int) -> Pairs:
    """Exchanges winner and loser in that share of the pairs."""
    flipped = torch.from_numpy(np.random.default_rng(seed).random(len(pairs.classes)) < share)[:, None, None, None]
    return replace(
        pairs,
        latents_w=torch.where(flipped, pairs.latents_l, pairs.latents_w),
        latents_l=torch.where(flipped, pairs.latents_w, pairs.latents_l),
    )


def keep_clear(pairs: Pairs, min_share: float) -> Pairs:
    """Those pairs of which at least that share of the votes are for the winner."""
    clear = pairs.shares >= min_share
    kept = (tensor[clear] for tensor in (pairs.latents_w, pairs.latents_l, pairs.shares))
    return Pairs(*kept, pairs.classes[clear.numpy()], pairs.noise)
