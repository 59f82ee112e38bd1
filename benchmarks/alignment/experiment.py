"""One experiment: a LoRA is trained with one objective at one setting, and measured on the way."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


import paths  # noqa: F401, isort: skip

import numpy as np
import torch
from diffusion_orpo_loss import per_pair_error
from orpo.config import ModelConfig
from orpo.models.sdxl import StableDiffusionXL
from orpo.training.step import predict_pairs

from diffusers.training_utils import EMAModel
from objectives import OBJECTIVES, Errors
from settings import Experiment
from tasks import TEST_IMAGES, Pairs, Task


PAIRS_PER_STEP = 16
RANK = 8
HELD_OUT_SEED = 2**31
TEST_SEED = 600_000_000  # of the images that are measured
QUARTERS = 4  # of the noise levels, in each of which every held-out pair is predicted once


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


def load_model(base: str, seed: int) -> EncodedSDXL:
    """The base with a fresh LoRA."""
    torch.manual_seed(seed)
    config = ModelConfig(
        pretrained_model_name_or_path=base, resolution=64, rank=RANK, lora_layers="to_k,to_q,to_v,to_out.0"
    )
    model = EncodedSDXL.load(config, torch.device("cpu"), torch.float32)
    model.denoiser.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    return model


def trained_parameters(model: EncodedSDXL) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]


def make_batch(task: Task, pairs: Pairs, chosen: np.ndarray, seeds: list[int]) -> dict:
    """Pairs as a batch of the training scripts, with latents for images, and a seed for the noise of each."""
    return {
        "moments": torch.cat([pairs.latents_w[chosen], pairs.latents_l[chosen]]),
        "original_sizes": torch.full((2 * len(chosen), 2), 64),
        "crop_top_lefts": torch.zeros(2 * len(chosen), 2, dtype=torch.long),
        "prompts": [task.prompts[c] for c in pairs.classes[chosen]],
        "seeds": seeds,
    }


def training_batches(task: Task, pairs: Pairs, seed: int, first: int, last: int) -> Iterator[dict]:
    """The batches of these steps: every epoch in an order of its own, noise by (seed, epoch, pair)."""
    per_epoch = len(pairs.classes) // PAIRS_PER_STEP
    for step in range(first, last):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(pairs.classes))
        chosen = order[place * PAIRS_PER_STEP : (place + 1) * PAIRS_PER_STEP]
        yield make_batch(task, pairs, chosen, [noise_seed(seed, epoch, index) for index in chosen])


def noise_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def compute_errors(model: EncodedSDXL, batch: dict) -> Errors:
    """Errors of the model on a batch."""
    model_pred_w, model_pred_l, target, _ = predict_pairs(model, model.denoiser, batch)
    return Errors(per_pair_error(model_pred_w, target), per_pair_error(model_pred_l, target))


@torch.no_grad()
def reference_errors(model: EncodedSDXL, batch: dict) -> Errors:
    """Errors of the base, from the same noise at the same timesteps as the model's."""
    model.denoiser.disable_adapters()
    errors = compute_errors(model, batch)
    model.denoiser.enable_adapters()
    return errors


def train_step(model: EncodedSDXL, batch: dict, loss, optimizer, clip: float = 1.0, reference=None) -> None:
    """One step.

    Args:
        loss: errors -> loss of each pair.
        reference: errors of the base on this batch, for an objective that has a reference.
    """
    errors = compute_errors(model, batch)
    if reference:
        errors = replace(errors, reference_w=reference.w, reference_l=reference.l)
    loss(errors).mean().backward()
    torch.nn.utils.clip_grad_norm_(trained_parameters(model), clip)
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Quarter:
    """A noise process whose timesteps all lie in one quarter of the noise levels, 0 being the least noise."""

    process: object
    index: int

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        length = self.process.scheduler.config.num_train_timesteps // QUARTERS
        sampled = torch.cat([torch.randint(length, (1,), generator=generator) for generator in generators])
        return self.index * length + sampled

    def __getattr__(self, name: str):
        return getattr(self.process, name)


@torch.no_grad()
def held_out_errors(task: Task, model: EncodedSDXL, held_out: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of winners and losers that were not trained on, each (QUARTERS, N): always the same noise and timesteps."""
    process, errors = model.noise_process, []
    for quarter in range(QUARTERS):
        model.noise_process = Quarter(process, quarter)
        for chosen in np.array_split(np.arange(len(held_out.classes)), len(held_out.classes) // 32 or 1):
            seeds = [noise_seed(HELD_OUT_SEED, quarter, index) for index in chosen]
            errors.append(compute_errors(model, make_batch(task, held_out, chosen, seeds)))
    model.noise_process = process
    return tuple(torch.cat(side).view(QUARTERS, -1) for side in zip(*((e.w, e.l) for e in errors)))


@torch.no_grad()
def measure(task: Task, model: EncodedSDXL, held_out: Pairs) -> dict:
    """Generates the test images and reads them; measures the held-out pairs.

    Returns:
        Means of each test prompt: `rewards`, `adherence`. Of each quarter of the noise levels, on the held-out pairs:
        `m_w`, `accuracy`. Of all images: `distance`.
    """
    model.denoiser.eval()
    classes = np.resize(task.test_classes, TEST_IMAGES)
    images = task.generate(model.pipeline, classes, TEST_SEED)
    m_w, m_l = held_out_errors(task, model, held_out)
    model.denoiser.train()
    rewards, adherence = task.reward(images, classes), task.adheres(images, classes)
    return {
        "rewards": by_prompt(rewards, len(task.test_classes)),
        "adherence": by_prompt(adherence, len(task.test_classes)),
        "distance": round(task.distance(images), 2),
        "m_w": [round(value, 6) for value in m_w.mean(dim=1).tolist()],
        "accuracy": [round(value, 4) for value in (m_w < m_l).double().mean(dim=1).tolist()],
    }


def by_prompt(values: np.ndarray, count: int) -> list[float]:
    """Means of images whose prompts take turns."""
    return [round(float(np.mean(values[i::count])), 4) for i in range(count)]


class Training:
    """A training run that can be left and resumed.

    Args:
        experiment: what is trained.
        task, pairs: of the experiment.
        work: folder that keeps where the run was left and the reference's errors; None keeps nothing.
    """

    def __init__(self, experiment: Experiment, task: Task, pairs: Pairs, work: Path | None = None) -> None:
        self.experiment, self.task, self.work = experiment, task, work
        self.objective = OBJECTIVES[experiment.objective]
        self.pairs = flip(pairs, experiment.flipped, experiment.seed)
        self.model = load_model(task.base, experiment.seed)
        self.model.denoiser.train()
        self.parameters = trained_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=experiment.learning_rate)
        self.ema = EMAModel(self.parameters, decay=experiment.ema) if experiment.ema else None
        self.step = 0
        if work and self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        return self.work / "states" / f"{self.experiment.name}.pt"

    def train_to(self, step: int) -> None:
        """Trains up to this step."""
        e = self.experiment
        for batch in training_batches(self.task, self.pairs, e.seed, self.step, step):
            self.optimizer.param_groups[0]["lr"] = e.learning_rate * (1 - self.step / e.steps)
            train_step(self.model, batch, self._loss, self.optimizer, e.clip, self._reference(batch))
            if self.ema:
                self.ema.step(self.parameters)
            self.step += 1

    def _loss(self, errors: Errors) -> torch.Tensor:
        return self.objective.loss(errors, self.experiment)

    def measure(self, held_out: Pairs) -> dict:
        """What `measure` returns, with the mean of the weights where the experiment has one."""
        if self.ema is None:
            return measure(self.task, self.model, held_out)
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        result = measure(self.task, self.model, held_out)
        self.ema.restore(self.parameters)
        return result

    def save(self) -> None:
        """Keeps where the run is."""
        state = {
            "step": self.step,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
        }
        save_aside(state, self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=False)
        self.step = state["step"]
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    def _reference(self, batch: dict) -> Errors | None:
        """The base's errors on the batch of this step: the same for every run with the seed, so they are kept in `work`."""
        if not self.objective.has_reference:
            return None
        if self.work is None:
            return reference_errors(self.model, batch)
        e, block = self.experiment, 100
        start = self.step // block * block
        file = self.work / "references" / f"{e.task}-{e.seed}-{e.flipped:g}-{start}.pt"
        if not file.exists():
            batches = training_batches(self.task, self.pairs, e.seed, start, start + block)
            errors = [reference_errors(self.model, each) for each in batches]
            save_aside([(each.w, each.l) for each in errors], file)
        if getattr(self, "_references_of", None) != file:
            self._references_of, self._references = file, torch.load(file)
        return Errors(*self._references[self.step - start])


def save_aside(content, file: Path) -> None:
    """Saves so that the file is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    torch.save(content, aside)
    aside.replace(file)


def run(
    experiment: Experiment, task: Task, pairs: Pairs, held_out: Pairs, steps: tuple[int, ...], work: Path | None = None
) -> Iterator[tuple[int, dict]]:
    """Trains to the last of these steps from where the run was left, and gives what is measured at each."""
    training = Training(experiment, task, pairs, work)
    for step in (step for step in steps if step > training.step):
        training.train_to(step)
        yield step, training.measure(held_out)
        if work:
            training.save()


def flip(pairs: Pairs, share: float, seed: int) -> Pairs:
    """Exchanges winner and loser in that share of the pairs."""
    flipped = torch.from_numpy(np.random.default_rng(seed).random(len(pairs.classes)) < share)[:, None, None, None]
    return replace(
        pairs,
        latents_w=torch.where(flipped, pairs.latents_l, pairs.latents_w),
        latents_l=torch.where(flipped, pairs.latents_w, pairs.latents_l),
    )
