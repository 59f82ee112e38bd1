"""How much of the gradient pushes losers away, and that a run says so at its start."""

import logging
import math
import re

import pytest
import torch
from helpers import train
from orpo.training.gradient_share import loser_share


def equal_errors_share(beta: float, error: float) -> float:
    slope = beta / (1 - math.exp(-error))
    return slope / 2 / (1 + slope)


def errors(value: float) -> torch.Tensor:
    return torch.full((3,), value)


@pytest.mark.parametrize("beta, error", [(0.1, 0.1), (0.1, 0.001), (1e-4, 0.1), (2.0, 0.02)])
def test_share_is_the_closed_form_of_equal_errors(beta, error):
    share = loser_share(errors(error), errors(error), beta)
    assert share == pytest.approx(equal_errors_share(beta, error), rel=1e-4)
    assert share == pytest.approx(beta / (2 * (beta + error)), rel=0.06)  # what the docstring and the docs say


def test_share_needs_beta_and_grows_with_it():
    assert loser_share(errors(0.1), errors(0.1), 0) == 0
    shares = [loser_share(errors(0.1), errors(0.12), beta) for beta in (0.01, 0.1, 1, 10)]
    assert shares == sorted(shares) and shares[-1] < 0.5


def test_a_run_says_at_its_start_what_its_beta_does(tiny_sdxl, faces, output_dir, caplog):
    with caplog.at_level(logging.INFO):
        train(tiny_sdxl, faces, output_dir, max_train_steps=2, beta_orpo=0.3)
    said = [record.getMessage() for record in caplog.records if "share of the gradient" in record.getMessage()]
    assert len(said) == 1
    found = re.search(r"--beta_orpo=([\d.]+) .* is ([\d.]+) at .* error of ([\d.]+)", said[0])
    beta, share, error = map(float, found.groups())
    assert beta == 0.3
    assert share == pytest.approx(equal_errors_share(beta, error), abs=0.02)
