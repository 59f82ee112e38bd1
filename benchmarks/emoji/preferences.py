"""The three tasks: which pairs, how they are labelled, and what is measured on images of other subjects."""

from dataclasses import dataclass


import drawings  # noqa: F401, isort: skip

import numpy as np
import torch
from scipy.special import expit

from classifier import FrechetDistance
from diffusers import StableDiffusionXLPipeline
from drawings import ARTISTS, Emoji
from instruments import Classifier
from make_base import encode, load_base
from sampling import generate as generate_images


TARGET = ARTISTS.index("fluent")
GUIDANCE, SAMPLER_STEPS = 2.0, 20
LOWEST_LOG_PROB = float(np.log(1e-3))  # rewards are no lower: one absurd image must not decide a label
FIRST = 5  # names that count as the subject's, of the judge's
SEEDS = {"tuning": 100_000_000, "test": 200_000_000}  # of the images that are measured
PAIR_SEED = 300_000_000
TUNING_SUBJECTS = 200


@dataclass
class Pairs:
    """Preference pairs, encoded by the base's VAE.

    Attributes:
        latents_w, latents_l: of chosen and rejected images (N, 4, SIZE / 4, SIZE / 4).
        classes: their subjects (N,).
        noise: share of the labels that go against the reward.
    """

    latents_w: torch.Tensor
    latents_l: torch.Tensor
    classes: np.ndarray
    noise: float


def generate(pipeline: StableDiffusionXLPipeline, emoji: Emoji, subjects: np.ndarray, first_seed: int) -> torch.Tensor:
    """An image of each subject, uint8 (N, 3, SIZE, SIZE). The seed of its noise is the subject's, whatever the others."""
    prompts, seeds = [emoji.captions[i] for i in subjects], [first_seed + int(i) for i in subjects]
    images = generate_images(pipeline, prompts, seeds, "Generating", SAMPLER_STEPS, GUIDANCE)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def reward(task: str, instruments: dict[str, Classifier], images: torch.Tensor, subjects: np.ndarray) -> np.ndarray:
    """What labels the pairs (N,)."""
    if task == "adherence":
        log_probs = instruments["reward_names"].log_probs(images)[
            torch.arange(len(images)), torch.from_numpy(subjects)
        ]
    else:
        log_probs = instruments["reward_artist"].log_probs(images)[:, TARGET]
    return log_probs.numpy().clip(LOWEST_LOG_PROB)


def make_pairs(
    task: str, emoji: Emoji, instruments: dict[str, Classifier], number: int, count: int | None = None
) -> Pairs:
    """One draw of a task's pairs, of the first `count` subjects or of all."""
    subjects = emoji.split["pairs"][:count]
    rng = np.random.default_rng((number, *map(ord, task)))
    pipeline = load_base()
    if task == "drawings":
        artists = rng.permuted(np.tile(np.arange(len(ARTISTS)), (len(subjects), 1)), axis=1)
        images = [emoji.images[subjects, artists[:, side]] for side in (0, 1)]
    else:
        images = [generate(pipeline, emoji, subjects, (2 * number + side) * PAIR_SEED) for side in (0, 1)]
    first, second = (reward(task, instruments, side, subjects) for side in images)
    first_wins = rng.random(len(subjects)) < expit(first - second)
    latents, chosen = (
        [encode(pipeline.vae, side) for side in images],
        torch.from_numpy(first_wins)[:, None, None, None],
    )
    return Pairs(
        torch.where(chosen, *latents),
        torch.where(chosen, *latents[::-1]),
        subjects,
        float((first_wins != (first > second)).mean()),
    )


def subjects_of(emoji: Emoji, split: str) -> np.ndarray:
    """Those that are measured."""
    return emoji.split[split][:TUNING_SUBJECTS] if split == "tuning" else emoji.split[split]


def measure(
    task: str, emoji: Emoji, instruments: dict[str, Classifier], images: torch.Tensor, subjects: np.ndarray
) -> dict:
    """What the judges say: `style` and `adherence` of each image, `distance` of all."""
    names = instruments["judge_names"].log_probs(images)
    asked = names[torch.arange(len(images)), torch.from_numpy(subjects)]
    style = instruments["judge_artist"].log_probs(images)[:, TARGET].exp()
    artists = slice(None) if task == "adherence" else slice(TARGET, TARGET + 1)
    distance = FrechetDistance(instruments["judge_names"], emoji.images[subjects, artists].flatten(0, 1))
    return {
        "style": [round(value, 3) for value in style.tolist()],
        "adherence": [int(better < FIRST) for better in (names > asked[:, None]).sum(dim=1)],
        "distance": round(distance(images), 3),
    }
