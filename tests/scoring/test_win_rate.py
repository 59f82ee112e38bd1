"""Win rates and their intervals: closed forms, SciPy's bootstrap, and coverage by simulation."""

import numpy as np
import pytest
from orpo.scoring.image_statistics import high_frequency, saturation, warning
from orpo.scoring.win_rate import compare_scores, interval
from PIL import Image, ImageFilter
from scipy.stats import binomtest, bootstrap, norm


def scores(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Base and LoRA, where 1 wins, 0 loses and 0.5 ties."""
    base = np.arange(wins.size, dtype=float).reshape(wins.shape)
    return base, base + (wins - 0.5)


def test_ties_count_half_and_are_reported():
    c = compare_scores(*scores(np.array([[1, 1], [1, 0.5], [0.5, 0], [0, 0.5]])))
    assert (c.wins, c.ties, c.losses, c.win_rate) == (3, 3, 2, (3 + 1.5) / 8)


@pytest.mark.parametrize("prompts", [1, 4, 30])
def test_all_wins_and_all_losses_have_the_exact_binomial_interval_over_prompts(prompts):
    won = compare_scores(*scores(np.ones((prompts, 3))))
    exact = binomtest(prompts, prompts).proportion_ci(method="exact")
    assert won.win_rate == 1 == pytest.approx(won.win_rate_high)
    assert won.win_rate_low == pytest.approx(exact.low, abs=0.005)
    lost = compare_scores(*scores(np.zeros((prompts, 3))))
    assert (lost.win_rate, lost.win_rate_low) == (0, 0)
    assert lost.win_rate_high == pytest.approx(1 - exact.low, abs=0.005)


@pytest.mark.parametrize("prompts", [1, 2, 10, 200])
def test_all_ties_leave_room_for_what_was_not_seen(prompts):
    """As many images that tie have this chance, 2.5 %, if the share of all prompts that decide is 2 (win rate - 1/2)."""
    base = np.random.default_rng(0).normal(size=(prompts, 2))
    c = compare_scores(base, base)
    assert (c.ties, c.win_rate, c.verdict) == (2 * prompts, 0.5, "undecided")
    assert (1 - 2 * (c.win_rate_high - 0.5)) ** prompts == pytest.approx(0.025, abs=0.005)
    assert c.win_rate_low == pytest.approx(1 - c.win_rate_high, abs=1e-6)
    assert (c.difference, c.difference_low, c.difference_high) == (0, None, None)


def test_one_prompt_says_nothing_about_others_however_many_its_images():
    c = compare_scores(np.zeros((1, 50)), np.ones((1, 50)))
    assert c.win_rate == 1 and c.win_rate_low < 0.05 and c.verdict == "undecided"
    assert (c.difference, c.difference_low) == (1, None)


@pytest.mark.parametrize("n, share", [(2, 0.5), (3, 0.9), (5, 0.7), (10, 0.95)])
def test_few_prompts_do_not_make_the_interval_miss_the_truth_more_often(n, share):
    rng = np.random.default_rng(7)
    ends = [interval((rng.random(n) < share).astype(float), range(n), (0, 1)) for _ in range(200)]
    assert np.mean([low <= share <= high for low, high in ends]) >= 0.94


def test_swapping_the_models_mirrors_the_comparison():
    rng = np.random.default_rng(1)
    base, lora = rng.normal(size=(40, 2)), rng.normal(0.8, size=(40, 2))
    there, back = compare_scores(base, lora), compare_scores(lora, base)
    assert (there.verdict, back.verdict) == ("higher", "lower")
    assert there.win_rate == pytest.approx(1 - back.win_rate) and there.difference == pytest.approx(-back.difference)
    assert there.win_rate_low == pytest.approx(1 - back.win_rate_high, abs=0.02)


def test_intervals_are_near_scipys_percentile_bootstrap():
    values = np.random.default_rng(2).gamma(1.0, size=60)
    low, high = interval(values, range(60))
    theirs = bootstrap((values,), np.mean, n_resamples=50_000, method="percentile", rng=3).confidence_interval
    assert (low, high) == (pytest.approx(theirs.low, abs=0.015), pytest.approx(theirs.high, abs=0.015))
    spread = norm.ppf(0.975) * values.std() / np.sqrt(60)
    assert high - low == pytest.approx(2 * spread, rel=0.05)


def test_intervals_hold_the_truth_95_percent_of_the_time_though_images_of_a_prompt_agree(monkeypatch):
    """Of 4 images a prompt that nearly all win or lose together; images taken for independent would cover far less."""
    monkeypatch.setattr("orpo.scoring.win_rate.RESAMPLES", 1000)
    rng, inside, inside_difference, runs = np.random.default_rng(4), 0, 0, 400
    for _ in range(runs):
        lora = 0.3 + rng.normal(size=(60, 1)) + 0.3 * rng.normal(size=(60, 4))
        c = compare_scores(np.zeros_like(lora), lora)
        inside += c.win_rate_low <= norm.cdf(0.3 / np.sqrt(1.09)) <= c.win_rate_high
        inside_difference += c.difference_low <= 0.3 <= c.difference_high
    assert 0.90 < inside / runs < 0.985
    assert 0.90 < inside_difference / runs < 0.985


def test_more_images_of_the_same_prompts_do_not_make_the_interval_smaller():
    wins = (np.random.default_rng(5).random((30, 1)) < 0.6).astype(float)
    once, often = compare_scores(*scores(wins)), compare_scores(*scores(np.repeat(wins, 8, axis=1)))
    assert (often.win_rate_low, often.win_rate_high) == (once.win_rate_low, once.win_rate_high)


def test_saturation_is_the_mean_chroma():
    colors = {(255, 0, 0): 1, (128, 128, 128): 0, (0, 0, 0): 0, (255, 255, 255): 0, (200, 100, 149): 100 / 255}
    for color, expected in colors.items():
        assert saturation([Image.new("RGB", (9, 7), color)], [""]) == [pytest.approx(expected)]
    halves = Image.new("RGB", (8, 8), "red")
    halves.paste("gray", (0, 0, 4, 8))
    assert saturation([halves], [""]) == [pytest.approx(0.5)]


def grating(cycles_per_pixel: float, angle: float = 0.0, size: int = 128) -> Image.Image:
    y, x = np.mgrid[:size, :size]
    phase = 2 * np.pi * cycles_per_pixel * (np.cos(angle) * x + np.sin(angle) * y)
    return Image.fromarray((127.5 + 100 * np.sin(phase)).round().astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("angle", [0, np.pi / 2, np.pi / 4, 1.0])
def test_high_frequencies_are_those_above_half_nyquist_in_every_direction(angle):
    slow, fast = high_frequency([grating(0.22, angle), grating(0.28, angle)], [""] * 2)
    assert slow < 0.01 and fast > 0.99


def test_two_gratings_share_the_energy_by_their_squares():
    low, high = (np.asarray(grating(f).convert("L"), dtype=float) - 127.5 for f in (0.1, 0.4))
    mixed = Image.fromarray((127.5 + 0.8 * low + 0.4 * high).round().astype(np.uint8)).convert("RGB")
    assert high_frequency([mixed], [""]) == [pytest.approx(0.4**2 / (0.4**2 + 0.8**2), abs=0.01)]


def test_flat_images_and_borders_that_do_not_meet_have_no_high_frequencies():
    ramp = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    assert high_frequency([Image.new("RGB", (64, 64), "teal"), ramp], [""] * 2) == [0, pytest.approx(0, abs=1e-3)]


def test_blur_takes_high_frequencies_and_noise_adds_them():
    rng = np.random.default_rng(6)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    noisy = np.clip(np.asarray(image) + rng.normal(0, 20, (64, 64, 1)), 0, 255).astype(np.uint8)
    blurred, plain, crisp = high_frequency(
        [image.filter(ImageFilter.GaussianBlur(1)), image, Image.fromarray(noisy)], [""] * 3
    )
    assert blurred < plain < crisp


def test_a_statistic_that_moved_far_is_said_in_words():
    assert warning("saturation", 0.2, 0.24) is None and warning("high_frequency", 0.0, 0.0) is None
    assert warning("saturation", 0.2, 0.3).startswith("Colours are much stronger")
    assert warning("saturation", 0.2, 0.1).startswith("Colours are much paler")
    assert "fine detail or noise" in warning("high_frequency", 0.01, 0.02)
    assert "smoother" in warning("high_frequency", 0.01, 0.005)
