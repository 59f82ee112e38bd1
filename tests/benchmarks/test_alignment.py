"""The benchmark of alignment: what the even share is for, its instruments against closed forms, and its pages against its results."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from orpo.config import LossConfig

import plan
from classifier import FrechetDistance
from experiment import (
    Training,
    compute_errors,
    flip,
    load_model,
    make_batch,
    measure,
    reference_errors,
    trained_parameters,
    training_batches,
)
from intervals import estimate, holm
from objectives import OBJECTIVES, Errors
from report import pages
from settings import TASKS, Experiment
from tasks import make_pairs, make_task


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prompt():
    """The task of prompt adherence, and few pairs of it."""
    task = make_task("prompt")
    return task, make_pairs(task, 64)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.parameters])


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["weights", "mean of weights"])
def test_a_resumed_run_is_the_one_that_was_not_left(prompt, tmp_path, ema):
    experiment = Experiment("prompt", "dpo", 100.0, 2e-3, steps=4, seed=1, flipped=0.3, ema=ema)
    whole = Training(experiment, *prompt)  # each step runs the reference itself
    whole.train_to(4)
    left = Training(experiment, *prompt, tmp_path)
    left.train_to(2)
    left.save()
    resumed = Training(experiment, *prompt, tmp_path)
    resumed.train_to(4)
    assert torch.equal(weights(resumed), weights(whole))
    if ema:
        assert all(map(torch.equal, resumed.ema.shadow_params, whole.ema.shadow_params))


def test_the_learning_rate_falls_to_zero(prompt):
    training = Training(Experiment("prompt", "even", 0.4, 2e-3, steps=4, seed=1), *prompt)
    sizes = []
    for step in range(1, 5):
        before = weights(training)
        training.train_to(step)
        sizes.append((weights(training) - before).abs().max().item())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * sizes[0]


def test_an_epoch_takes_every_pair_once_and_the_next_one_in_another_order(prompt):
    task, pairs = prompt
    epoch = len(pairs.classes) // 16
    batches = list(training_batches(task, pairs, 7, 0, 2 * epoch))
    first, second = (torch.cat([b["moments"][:16] for b in part]) for part in (batches[:epoch], batches[epoch:]))
    assert sorted(first.sum(dim=(1, 2, 3)).tolist()) == sorted(pairs.latents_w.sum(dim=(1, 2, 3)).tolist())
    assert not torch.equal(first, second)
    seeds = [seed for batch in batches for seed in batch["seeds"]]
    assert len(set(seeds)) == len(seeds)


def test_pairs_carry_the_preference_and_flipping_takes_it_away(prompt):
    task, pairs = prompt
    assert 0.05 < make_pairs(task, 192, seed=3).noise < 0.4
    flipped = flip(pairs, 1.0, seed=0)
    assert torch.equal(flipped.latents_w, pairs.latents_l) and torch.equal(flipped.latents_l, pairs.latents_w)
    changed = (flip(pairs, 0.3, seed=0).latents_w != pairs.latents_w).flatten(1).any(dim=1).double().mean()
    assert 0.1 < changed < 0.5


def test_no_prompt_of_the_faces_is_trained_on_and_measured(prompt):
    task, _ = prompt
    assert not set(task.train_classes) & set(task.test_classes)
    assert set(task.train_classes) | set(task.test_classes) == set(range(len(task.prompts)))


def test_the_reference_is_the_model_before_training(prompt):
    task, pairs = prompt
    model = load_model(task.base, seed=0)
    batch = make_batch(task, pairs, np.arange(8), seeds=list(range(8)))
    before = compute_errors(model, batch)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(0.05)
    after, reference = compute_errors(model, batch), reference_errors(model, batch)
    torch.testing.assert_close(reference.w, before.w.detach())
    torch.testing.assert_close(reference.l, before.l.detach())
    assert (after.w - before.w).abs().min() > 1e-6


def gradients(name: str, strength: float, w: float, l: float, **more) -> tuple[float, float]:
    """Derivatives of an objective with respect to the winner's and the loser's error; the reference has these errors too."""
    error_w, error_l = (torch.tensor([m], dtype=torch.float64, requires_grad=True) for m in (w, l))
    errors = Errors(error_w, error_l, error_w.detach(), error_l.detach())
    setting = Experiment("prompt", name, strength, 1e-3, steps=1, seed=0, **more)
    loss = OBJECTIVES[name].loss(errors, setting).sum()
    found = torch.autograd.grad(loss, (error_w, error_l), allow_unused=True)
    return tuple(gradient.item() if gradient is not None else 0.0 for gradient in found)


def test_objectives_meet_their_closed_forms():
    # Where both errors are equal, a sigmoid is at 1/2: the gradients are products of the constants.
    assert gradients("sft", 0, 0.05, 0.05) == (1, 0)
    assert gradients("scaled", 10, 0.05, 0.05) == pytest.approx((6, -5))
    assert gradients("dpo", 2000, 0.03, 0.07) == pytest.approx((500, -500))  # the reference's margin does not count
    # MaPO's score falls by a quarter of a small error, so that its margin is a scaled one: 1000 / 4 = 250.
    assert gradients("mapo", 0.1, 1e-4, 1e-4) == pytest.approx((1 + 0.1 * 125, -0.1 * 125), rel=1e-3)
    # (1 - s) / (1 - 2s) and s / (1 - 2s), each over the error: 0.4 of the sum is the loser's, at any size of the errors.
    for error in (1e-3, 1):
        assert gradients("even", 0.4, error, error, temperature=4.0) == pytest.approx((3 / error, -2 / error))
    assert gradients("even", 0.4, 0.1, 0.3, cap=2.0) == pytest.approx((10, 0))
    assert gradients("even", 0.4, 0.1, 0.15, cap=2.0) == gradients("even", 0.4, 0.1, 0.15)


def test_every_planned_run_is_of_a_task_and_an_objective_and_each_is_planned_once():
    experiments = list(plan.experiments())
    assert len(set(experiments)) == len(experiments)
    assert {e.task for e in experiments} == set(TASKS) and {e.objective for e in experiments} == set(OBJECTIVES)
    counts = {len(both) for settings in plan.SETTINGS.values() for both in settings.values()}
    assert counts == {2}, "every objective gets as many settings as any other"


@pytest.mark.parametrize("num_seeds", [1, 3, 5])
def test_intervals_cover_the_truth(num_seeds):
    """Values with an effect of each seed and prompt: 95 % intervals must hold the true mean 0 about that often."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        seeds = 0.4 * rng.normal(size=(num_seeds, 1)) * (num_seeds > 1)
        values = seeds + rng.normal(size=12) + 0.5 * rng.normal(size=(num_seeds, 12))
        found = estimate(values)
        covered += found.low < 0 < found.high
        assert (found.p < 0.05) == (not found.low < 0 < found.high)
    assert 370 <= covered <= 398
    constant = estimate(np.full((num_seeds, 12), 4.0))
    assert (constant.low, constant.high) == (4, 4)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    class Identity:
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images

    samples = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    distance = FrechetDistance(Identity(), samples)
    assert distance(samples) == pytest.approx(0, abs=1e-6)
    shift = torch.linspace(0, 1, 16)
    expected = ((shift / samples.std(dim=0, correction=0)) ** 2).sum().item()
    assert distance(samples + shift) == pytest.approx(expected, rel=1e-3)


def test_the_pages_show_the_stored_results():
    for page, text in pages().items():
        assert (ROOT / page).read_text() == text, f"{page} is outdated: run benchmarks/alignment/report.py"


@pytest.mark.campaign
def test_digits_stay_digits_at_the_default_share_and_do_not_at_a_large_beta():
    """600 steps, the same rate: most of the base's 0.92 beside less than half of it."""
    task = make_task("digits")
    pairs, held_out = make_pairs(task, 480), make_pairs(task, 16, seed=1)
    even = Experiment("digits", "even", LossConfig().loser_share, 5e-4, steps=600, seed=1)
    adherence = {}
    for experiment in (even, replace(even, objective="orpo", strength=5.0)):
        training = Training(experiment, task, pairs)
        training.train_to(600)
        adherence[experiment.objective] = np.mean(measure(task, training.model, held_out)["adherence"])
    print(adherence)
    assert adherence["even"] > 0.7 and adherence["orpo"] < 0.45
