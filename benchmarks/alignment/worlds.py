"""Three preferences to learn: a smile, following the prompt, and handwriting that leans. Each has a base and a reward.

The pairs are drawn by the base model and labelled by the reward, with Bradley-Terry noise. What else is measured comes from
another instrument than the reward, so that a model cannot gain by fooling one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from sklearn.svm import SVC

import paths
from classifier import Classifier, FrechetDistance, train_classifier
from compare import is_wrong
from diffusers import StableDiffusionXLPipeline
from digits_base import PROMPTS as DIGIT_PROMPTS
from digits_base import digit_images
from faces import ALL_KINDS, read_face
from sampling import draw, load_pipeline
from train_base import draw_images


BASES = paths.HERE / "bases"  # those that the demo does not have
STEPS = 12  # of the sampler
LOWEST_LOG_PROB = np.log(1e-3)  # rewards are no lower: one absurd image must not decide a mean
NUM_PAIRS, NUM_HELD_OUT = 960, 128
TEST_IMAGES = 96
UNSEEN = 12  # prompts that no pair has, in the two worlds of faces
FINAL_PROMPTS = tuple(sorted(np.random.default_rng(0).permutation(UNSEEN)[: UNSEEN // 2].tolist()))


@dataclass
class World:
    """A base model, prompts, and what is preferred.

    Attributes:
        base: folder of the pipeline.
        guidance_scale: that its images are drawn with.
        temperature: of the label noise, in units of the reward.
        prompts: by class.
        classes: by split, the prompts of its images: those of the pairs ("validation"), half of those that no pair has ("final"),
            and all of those that no pair has ("test": `FINAL_PROMPTS` are drawn too, but do not count). Digits have no "final".
        reward: (images, classes) -> (N,), higher is better.
        follows_prompt: (images, classes) -> (N,) bool.
        distance: by split, Frechet distance of images to real ones of the same classes.
        checks: how well its instruments read real images.
    """

    base: str
    guidance_scale: float
    temperature: float
    prompts: tuple[str, ...]
    classes: dict[str, list[int]]
    reward: Callable[[torch.Tensor, np.ndarray], np.ndarray]
    follows_prompt: Callable[[torch.Tensor, np.ndarray], np.ndarray]
    distance: dict[str, FrechetDistance]
    checks: dict[str, float]

    def draw(
        self, pipeline: StableDiffusionXLPipeline, classes: np.ndarray, first_seed: int, desc: str
    ) -> torch.Tensor:
        """Draws an image of each class, uint8 (N, 3, 64, 64)."""
        prompts, seeds = [self.prompts[c] for c in classes], [first_seed + i for i in range(len(classes))]
        images = draw(pipeline, prompts, seeds, desc, STEPS, self.guidance_scale)
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)

    def cycle(self, classes: list[int], count: int) -> np.ndarray:
        return np.resize(classes, count)


def make_world(name: str) -> World:
    """Makes one of `smile`, `prompt` and `digits`."""
    return digits(str(BASES / "digits-base")) if name == "digits" else faces(name)


def faces(name: str) -> World:
    images, prompts = draw_images(4000, seed=11)
    by_prompt = {kind.prompt: i for i, kind in enumerate(ALL_KINDS)}
    classes = np.array([by_prompt[prompt] for prompt in prompts])
    classifier = train_classifier(images[:3000], classes[:3000], epochs=6)
    accuracy = float((classifier.predict(images[3000:]) == classes[3000:]).mean())

    def smile(drawn: torch.Tensor, _: np.ndarray) -> np.ndarray:
        return np.array([read_face(image).smile for image in to_pil(drawn)])

    def is_as_asked(drawn: torch.Tensor, asked: np.ndarray) -> np.ndarray:
        return np.array([not is_wrong(read_face(image), ALL_KINDS[c]) for image, c in zip(to_pil(drawn), asked)])

    # Every other cell of colour x kind x background, like the white and the black squares of a board: each word is
    # trained on, half of their combinations are not.
    parity = np.indices((4, 3, 2)).sum(axis=0).reshape(-1) % 2
    seen, unseen = np.flatnonzero(parity == 0), np.flatnonzero(parity == 1)
    splits = {"validation": seen, "final": unseen[list(FINAL_PROMPTS)], "test": unseen}
    common = {
        "prompts": tuple(kind.prompt for kind in ALL_KINDS),
        "classes": {split: chosen.tolist() for split, chosen in splits.items()},
        "distance": {
            split: FrechetDistance(classifier, images[np.isin(classes, chosen)]) for split, chosen in splits.items()
        },
        "checks": {"classifier accuracy on real images": accuracy},
    }
    if name == "smile":
        base = str(paths.REPOSITORY / "examples" / "demo" / "base")
        return World(base, 3.0, 0.2, reward=smile, follows_prompt=classifier_agrees(classifier), **common)
    return World(
        str(BASES / "noisy-base"), 1.0, 1.0, reward=log_prob_reward(classifier), follows_prompt=is_as_asked, **common
    )


def digits(base: str) -> World:
    images, classes = digit_images()
    order, half = np.random.default_rng(0).permutation(len(images)), len(images) // 2
    images, classes = images[order], classes[order]
    classifier = train_classifier(images[:half], classes[:half], epochs=80)
    pixels = to_pixels(images)
    judge = SVC(C=10).fit(pixels[half:], classes[half:])  # another kind of classifier, and the other half of the data
    splits, every = ("validation", "test"), list(range(len(DIGIT_PROMPTS)))
    return World(
        base=base,
        guidance_scale=1.0,
        temperature=0.04,
        prompts=DIGIT_PROMPTS,
        classes=dict.fromkeys(splits, every),
        reward=lambda drawn, _: slant(drawn),
        follows_prompt=lambda drawn, asked: judge.predict(to_pixels(drawn)) == asked,
        distance=dict.fromkeys(splits, FrechetDistance(classifier, images)),
        checks={
            "classifier accuracy on real images": float((classifier.predict(images[half:]) == classes[half:]).mean()),
            "judge's accuracy on real images": float((judge.predict(pixels[:half]) == classes[:half]).mean()),
        },
    )


def slant(images: torch.Tensor) -> np.ndarray:
    """How far strokes lean to the right (N,): columns to the right per row upwards, by the ink's second moments."""
    ink = 1 - images.float().mean(dim=1).numpy() / 255  # (N, H, W)
    y, x = np.mgrid[: ink.shape[1], : ink.shape[2]]
    mass = ink.sum(axis=(1, 2)) + 1e-6
    dx, dy = (grid - ((ink * grid).sum(axis=(1, 2)) / mass)[:, None, None] for grid in (x, y))
    return -(ink * dx * dy).sum(axis=(1, 2)) / ((ink * dy * dy).sum(axis=(1, 2)) + 1e-6)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Brightness at 16 x 16 points (N, 256), from 0 to 1."""
    return images.float().mean(dim=1)[:, ::4, ::4].flatten(1).numpy() / 255


def log_prob_reward(classifier: Classifier) -> Callable:
    return lambda drawn, asked: classifier.log_probs(drawn, asked).clip(LOWEST_LOG_PROB)


def classifier_agrees(classifier: Classifier) -> Callable:
    return lambda drawn, asked: classifier.predict(drawn) == asked


def to_pil(images: torch.Tensor) -> list:
    from PIL import Image

    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


@dataclass
class Pairs:
    """Preference pairs, encoded by the base's VAE: what all the objectives train on.

    Attributes:
        latents_w, latents_l: of winners and losers (N, 4, 8, 8).
        shares: of the votes that are for the winner (N,).
        classes: of their prompts (N,).
        noise: share of the labels that go against the reward.
    """

    latents_w: torch.Tensor
    latents_l: torch.Tensor
    shares: torch.Tensor
    classes: np.ndarray
    noise: float


def draw_pairs(
    world: World, count: int, seed: int = 0, votes: int = 1, pipeline: StableDiffusionXLPipeline | None = None
) -> Pairs:
    """Draws pairs, with the base model unless told otherwise, and has them voted on; of a tie, the winner is whichever."""
    rng = np.random.default_rng(seed)
    classes = world.cycle(world.classes["validation"], count)
    pipeline = pipeline or load_pipeline(world.base)
    images = [
        world.draw(pipeline, classes, 10_000_000 * (seed + 1) + side * count, f"Drawing pairs, side {side}")
        for side in (0, 1)
    ]
    rewards = np.stack([world.reward(drawn, classes) for drawn in images])
    chance = expit((rewards[0] - rewards[1]) / world.temperature)
    share = (rng.random((votes, count)) < chance).mean(axis=0)  # of the votes, for the first
    first_wins = share > 0.5
    with torch.no_grad():
        vae = pipeline.vae
        first, second = (
            torch.cat([vae.encode(batch / 127.5 - 1).latent_dist.mode() for batch in drawn.split(64)])
            * vae.config.scaling_factor
            for drawn in images
        )
    chosen = torch.from_numpy(first_wins)[:, None, None, None]
    return Pairs(
        latents_w=torch.where(chosen, first, second),
        latents_l=torch.where(chosen, second, first),
        shares=torch.from_numpy(np.maximum(share, 1 - share)).float(),
        classes=classes,
        noise=float((first_wins != (rewards[0] > rewards[1])).mean()),
    )
