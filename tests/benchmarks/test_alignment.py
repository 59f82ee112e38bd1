"""The benchmark of alignment: a short run of it, its instruments against closed forms, and its pages against its results."""

from collections import Counter

import numpy as np
import pytest
import torch

from bootstrap import Bootstrap
from classifier import FrechetDistance
from experiment import Experiment, compute_errors, flip, load_model, make_batch, run
from objectives import OBJECTIVES, Errors
from report import pages
from run_all import WORLDS, tuning
from worlds import draw_pairs, make_world


@pytest.fixture(scope="module")
def smile():
    """The demo's world, and few pairs of it."""
    world = make_world("smile", bases="")
    return world, draw_pairs(world, 288), draw_pairs(world, 24, seed=1)


def test_orpo_beats_sft_and_the_earlier_formula_does_not(smile):
    world, train, held_out = smile
    rewards = {}
    for name in ("orpo", "sft", "earlier"):
        strength = {"orpo": 0.5}.get(name, OBJECTIVES[name].strengths[0])
        result = run(Experiment("smile", name, strength, 2e-3, seed=3, split="test"), world, train, held_out)
        rewards[name] = np.mean(result["evaluations"][200]["rewards"])
    assert rewards["orpo"] > rewards["sft"] + 0.1
    assert rewards["sft"] > rewards["earlier"] - 0.05  # they differ by noise: beta 0.1 is a push of 5 %


def test_pairs_carry_the_preference_and_flipping_takes_it_away(smile):
    world, train, _ = smile
    assert 0.05 < train.noise < 0.3
    flipped = flip(train, 1.0, seed=0)
    assert torch.equal(flipped.latents_w, train.latents_l) and torch.equal(flipped.latents_l, train.latents_w)
    changed = (flip(train, 0.3, seed=0).latents_w != train.latents_w).flatten(1).any(dim=1).double().mean()
    assert 0.2 < changed < 0.4


def test_the_reference_is_the_model_before_training(smile):
    world, train, _ = smile
    _, model = load_model(world.base, 1e-3, seed=0)
    batch = make_batch(world, train, [(0, i) for i in range(8)], seed=0)
    errors = compute_errors(model, batch, has_reference=True)
    torch.testing.assert_close(errors.w, errors.reference_w)
    torch.testing.assert_close(errors.l, errors.reference_l)
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    moved = compute_errors(model, batch, has_reference=True)
    torch.testing.assert_close(moved.reference_w, errors.w.detach())
    assert (moved.w - errors.w).abs().min() > 1e-6


def gradients(name: str, strength: float, w: float, l: float) -> tuple[float, float]:
    """Derivatives of an objective with respect to the winner's and the loser's error; the reference has these errors too."""
    error_w, error_l = (torch.tensor([m], dtype=torch.float64, requires_grad=True) for m in (w, l))
    errors = Errors(error_w, error_l, error_w.detach(), error_l.detach())
    loss = OBJECTIVES[name].loss(errors, strength).sum()
    return tuple(
        g.item() if g is not None else 0.0 for g in torch.autograd.grad(loss, (error_w, error_l), allow_unused=True)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_earlier_formula_fits_the_loser(name):
    for strength in OBJECTIVES[name].strengths:
        on_winner, on_loser = gradients(name, strength, 0.04, 0.05)
        assert on_winner > 0
        assert on_loser == 0 if name == "sft" else on_loser > 0 if name == "earlier" else on_loser < 0


def test_objectives_meet_their_closed_forms():
    # Where both errors are equal, a sigmoid is at 1/2: the gradients are products of the constants.
    assert gradients("earlier", 0.1, 0.05, 0.05) == pytest.approx((0.95, 0.05))
    assert gradients("mended", 0.1, 0.05, 0.05) == pytest.approx((1.05, -0.05))
    assert gradients("scaled", 10, 0.05, 0.05) == pytest.approx((6, -5))
    assert gradients("dpo", 2000, 0.03, 0.07) == pytest.approx(
        (500, -500)
    )  # the reference's own margin does not count
    # MaPO's score falls by a quarter of a small error, so that its margin is a scaled one: 1000 / 4 = 250.
    assert gradients("mapo", 0.1, 1e-4, 1e-4) == pytest.approx((1 + 0.1 * 125, -0.1 * 125), rel=1e-3)


def test_every_objective_is_tuned_over_equally_many_settings():
    for world in WORLDS:
        settings = Counter(experiment.objective for experiment in tuning(world))
        assert settings == dict.fromkeys(OBJECTIVES, 6)


def test_bootstrap_intervals_cover_the_truth():
    """Values with an effect of each seed and prompt: 95 % intervals must hold the true mean 0 about that often."""
    rng = np.random.default_rng(0)
    classes = np.arange(96) % 12
    bootstrap, covered = Bootstrap(5, classes), 0
    for _ in range(100):
        values = 0.3 * rng.normal(size=(5, 1)) + rng.normal(size=12)[classes] + rng.normal(size=(5, 96))
        estimate = bootstrap.mean(values)
        covered += estimate.low < 0 < estimate.high
    assert 82 <= covered <= 99  # 5 seeds and 12 prompts are few: it falls short of 95 a little
    constant = bootstrap.mean(np.full((5, 96), 4.0))
    assert (constant.low, constant.high) == pytest.approx((4, 4))


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    class Identity:
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images

    draws = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    distance = FrechetDistance(Identity(), draws)
    assert distance(draws) == pytest.approx(0, abs=1e-6)
    shift = torch.linspace(0, 1, 16)
    expected = ((shift / draws.std(dim=0, correction=0)) ** 2).sum().item()
    assert distance(draws + shift) == pytest.approx(expected, rel=1e-3)


def test_the_pages_show_the_stored_results():
    for page, text in pages().items():
        assert page.read_text() == text, f"{page.name} is outdated: run benchmarks/alignment/report.py"
