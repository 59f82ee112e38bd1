"""How much of the gradient pushes losers away, and that a run says so at its start."""

import json
import logging
import math
import re
from importlib import import_module

import pytest
import torch
from families import FAMILIES, save_tiny
from helpers import train
from orpo.runtime.flags import make_parser, parse
from orpo.training.gradient_share import beta_of_share, loser_share


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


@pytest.mark.parametrize("share", [0.01, 0.25, 0.45])
def test_beta_of_a_share_has_that_share(share):
    error_w, error_l = 0.02 * torch.rand(50) + 0.01, 0.02 * torch.rand(50) + 0.01
    assert loser_share(error_w, error_l, beta_of_share(error_w, error_l, share)) == pytest.approx(share, abs=1e-6)


def test_a_share_that_no_beta_reaches_is_refused():
    with pytest.raises(ValueError, match="Lower it, or set --beta_orpo"):
        beta_of_share(errors(0.01), errors(0.5), 0.49)


def test_a_run_computes_beta_once_and_a_resumed_one_keeps_it(tiny_sdxl, faces, output_dir, caplog):
    flags = {"loser_share": 0.3, "checkpointing_steps": 1}
    with caplog.at_level(logging.INFO):
        train(tiny_sdxl, faces, output_dir, max_train_steps=1, **flags)
        train(tiny_sdxl, faces, output_dir, max_train_steps=2, resume_from_checkpoint="latest", **flags)
    said = [record.getMessage() for record in caplog.records]
    (computed,) = [line for line in said if "computed on" in line]
    beta = float(re.search(r"beta is ([\d.e+-]+)", computed)[1])
    state = json.loads((output_dir / "checkpoint-2" / "training_state.json").read_text())
    assert state["beta"] == pytest.approx(beta, rel=1e-3)
    assert f"beta_orpo: {state['beta']}"[:16] in (output_dir / "README.md").read_text().replace("\\_", "_")
    (share,) = [float(re.search(r"gradient is ([\d.]+)", line)[1]) for line in said if "gradient is" in line]
    assert share == pytest.approx(0.3, abs=0.1)  # of one batch; beta is that of more


def test_the_share_leaves_the_run_as_its_beta_alone_would(tiny_sdxl, faces, tmp_path):
    shared = train(tiny_sdxl, faces, tmp_path / "share", max_train_steps=2, checkpointing_steps=2, loser_share=0.3)
    state = json.loads((tmp_path / "share" / "checkpoint-2" / "training_state.json").read_text())
    given = train(tiny_sdxl, faces, tmp_path / "beta", max_train_steps=2, beta_orpo=state["beta"])
    assert all(torch.equal(shared[name], given[name]) for name in shared)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_velocities_start_with_a_share_unless_a_beta_is_given(name):
    declared = import_module(FAMILIES[name].script).FLAGS

    def strength(*given: str) -> tuple[float | None, float | None]:
        command = ["--pretrained_model_name_or_path=x", "--dataset_name=y", "--output_dir=z", *given]
        args = parse(make_parser(None, declared), declared, command)
        return args.beta_orpo, args.loser_share

    assert strength() == ((0.1, None) if name == "sd" else (None, 0.4))
    assert strength("--beta_orpo=0") == (0.0, None)
    assert strength("--loser_share=0.2") == (None, 0.2)


def test_flow_matching_finds_its_beta_at_the_start(faces, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        FAMILIES["flux"].train(save_tiny("flux", tmp_path / "base"), faces, tmp_path / "lora", max_train_steps=1)
    said = "\n".join(record.getMessage() for record in caplog.records)
    (beta,) = re.findall(r"--loser_share=0.4: beta is ([\d.]+)", said)
    ((used, share),) = re.findall(r"With --beta_orpo=([\d.]+) .* gradient is ([\d.]+)", said)
    assert (
        float(used) == pytest.approx(float(beta), rel=1e-3) and float(beta) > 1
    )  # 0.1 would be a share of 0.07 or less
    assert float(share) == pytest.approx(0.4, abs=0.03)
