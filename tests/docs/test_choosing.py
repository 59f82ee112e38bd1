"""docs/choosing.md: its table of shares is computed from the loss, and the flags it names exist."""

import re
from pathlib import Path

import pytest
import torch
from diffusion_orpo_loss import odds_ratio_objective
from orpo.config import TrainingConfig


def share_of_gradient(error: float, beta: float) -> float:
    """The rejected image's, where both errors are equal."""
    errors = [torch.tensor([error], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    on_w, on_l = torch.autograd.grad(odds_ratio_objective(*errors, beta), errors)
    return (-on_l / (on_w - on_l)).item()


PAGE = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()


def test_the_shares_are_those_of_the_loss():
    header, _, *rows = re.search(r"\| error of the model.*?\n\n", PAGE, flags=re.DOTALL)[0].strip().splitlines()
    betas = [float(beta) for beta in re.findall(r"beta ([\d.]+)", header)]
    assert len(betas) == 4 and len(rows) == 5
    for row in rows:
        error, *shares = map(float, row.strip("|").split("|"))
        assert shares == pytest.approx([share_of_gradient(error, beta) for beta in betas], abs=0.0051)


def test_its_flags_exist():
    known = set(TrainingConfig.settings())
    assert set(re.findall(r"`?--(\w+)", PAGE)) <= known


def test_it_is_no_longer_than_a_screen_and_a_half():
    assert len(PAGE.splitlines()) <= 75
