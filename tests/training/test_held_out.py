"""Accuracy on held-out pairs: even over the noise levels, precise, and what --keep_best makes of it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import logged, lora_weights, train
from orpo.training.best import Best
from orpo.training.held_out import NAMES, NoiseLevels, summarize
from orpo.training.validation import Validator
from safetensors.torch import load_file

from train_diffusion_orpo_sdxl_lora import parse_args


ACCURACY = "eval_rewards/accuracies"
VALIDATION = {
    "run_validation": True,
    "num_validation_pairs": 4,
    "validation_steps": 2,
    "validation_draws": 4,
    "validation_inference_steps": 1,
    "validation_prompts": ["a face"],
}


def uniform(generators: list[torch.Generator]) -> torch.Tensor:
    return torch.cat([torch.randint(1000, (1,), generator=generator) for generator in generators])


def test_each_draw_has_its_own_range_of_noise_and_never_another():
    levels = NoiseLevels(SimpleNamespace(sample_timesteps=uniform), draws=8)
    batch = {"seeds": [1, 2, 3, 4], "prompts": ["a"] * 4}
    for draw in range(8):
        drawn, again = levels.batch(batch, draw), levels.batch(batch, draw)
        assert torch.equal(drawn["timesteps"], again["timesteps"]) and drawn["seeds"] == again["seeds"]
        assert ((drawn["timesteps"] >= 125 * draw - 25) & (drawn["timesteps"] <= 125 * (draw + 1) + 25)).all()
    assert len({seed for draw in range(8) for seed in levels.batch(batch, draw)["seeds"]}) == 32


def sums_of(correct: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sums and variance of pairs (draws, pairs) that are right or not."""
    sums = torch.zeros(len(correct), 1 + len(NAMES), dtype=torch.float64)
    sums[:, 0] = correct.shape[1]
    sums[:, 1 + NAMES.index("rewards/accuracies")] = correct.sum(dim=1)
    p = correct.mean(dim=0)
    return sums, float((p * (1 - p)).sum())


def test_the_error_is_how_far_measurements_scatter_and_at_most_two_points():
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(64, generator=generator, dtype=torch.float64)
    found = [summarize(*sums_of(torch.bernoulli(chances.expand(12, 64), generator=generator))) for _ in range(400)]
    scatter = torch.tensor([metrics[ACCURACY] for metrics in found]).std().item()
    error = sum(metrics[f"{ACCURACY}_error"] for metrics in found) / len(found)
    assert error == pytest.approx(scatter, rel=0.15)
    even = torch.arange(12)[:, None].remainder(2).double().expand(12, 64)  # every pair is right in half of its draws
    assert summarize(*sums_of(even))[f"{ACCURACY}_error"] <= 0.02


def test_quarters_are_means_of_their_draws():
    correct = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).repeat_interleave(
        3, 0
    )
    metrics = summarize(*sums_of(correct))
    assert [metrics[f"{ACCURACY}_quarter_{i}"] for i in (1, 2, 3, 4)] == [0, 0.5, 0.5, 1]
    assert metrics[ACCURACY] == 0.5


def test_the_best_is_the_earlier_of_equals():
    best = Best()
    assert [best.add(step, accuracy) for step, accuracy in ((2, 0.5), (4, 0.7), (6, 0.7), (8, None))] == [
        True,
        True,
        False,
        False,
    ]
    assert (best.step, best.accuracy, best.validated) == (4, 0.7, 8)


def script_accuracies(monkeypatch, *accuracies: float) -> None:
    """Validations find these in turn, the last one again and again."""
    left = list(accuracies)
    monkeypatch.setattr(Validator, "measure", lambda self: {ACCURACY: left.pop(0) if left[1:] else left[0]})


@pytest.mark.parametrize("accuracies, best", [((0.5, 0.9, 0.7), 4), ((0.5, 0.6, 0.9), 6)])
def test_keep_best_makes_the_best_checkpoint_the_result(tiny_sdxl, faces, output_dir, monkeypatch, accuracies, best):
    script_accuracies(monkeypatch, *accuracies)
    flags = {"checkpointing_steps": 5, "checkpoints_total_limit": 1}
    result = train(tiny_sdxl, faces, output_dir, max_train_steps=6, keep_best=True, **VALIDATION, **flags)
    written = json.loads((output_dir / "eval_results.json").read_text())
    assert (written["step"], written["last_step"], written[f"{ACCURACY}_last_step"]) == (best, 6, accuracies[-1])
    plain = train(tiny_sdxl, faces, output_dir.with_name("plain"), max_train_steps=best)
    if best == 4:  # the newest is kept, and the best beside it
        assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
        saved = load_file(output_dir / "checkpoint-4" / "pytorch_lora_weights.safetensors")
        assert all(torch.equal(saved[name], result[name]) for name in saved)
    assert result.keys() == plain.keys()
    assert f"optimizer steps: {best}" in (output_dir / "README.md").read_text()


def test_keep_best_is_exact_on_resume(tiny_sdxl, faces, tmp_path):
    flags = VALIDATION | {"keep_best": True, "checkpointing_steps": 4, "learning_rate": 1e-2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_sdxl, faces, whole, max_train_steps=7, **flags)
    train(tiny_sdxl, faces, parts, max_train_steps=4, **flags)
    train(tiny_sdxl, faces, parts, max_train_steps=7, resume_from_checkpoint="latest", **flags)
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (whole, parts)]
    assert results[0] == results[1]
    first, second = lora_weights(whole), lora_weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [json.loads((f / "checkpoint-4" / "training_state.json").read_text())["best"] for f in (whole, parts)]
    assert states[0] == states[1] and states[0]["validated"] == 2


def test_a_run_logs_the_error_and_every_quarter(tiny_sdxl, faces, output_dir):
    train(tiny_sdxl, faces, output_dir, max_train_steps=2, report_to="tensorboard", **VALIDATION)
    scalars = logged(output_dir)
    quarters = [scalars[f"{ACCURACY}_quarter_{i}"][-1] for i in (1, 2, 3, 4)]
    assert sum(quarters) / 4 == pytest.approx(scalars[ACCURACY][-1])
    assert 0 <= scalars[f"{ACCURACY}_error"][-1] <= 0.5 / math.sqrt(4 * 3)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--keep_best"], "add --run_validation"),
        (["--keep_best", "--run_validation", "--num_validation_pairs=0"], "num_validation_pairs above 0"),
        (["--loser_share=0"], "above 0 and below 0.5"),
        (["--loser_share=0.5"], "above 0 and below 0.5"),
        (["--loser_share=nan"], "--loser_share"),
        (["--loser_share=0.3", "--beta_orpo=0.1"], "give one of them"),
    ],
)
def test_contradictions_are_refused_at_once(flags, said, capsys):
    given = ["--pretrained_model_name_or_path=x", "--dataset_name=y", "--output_dir=z", *flags]
    with pytest.raises(SystemExit):
        parse_args(given)
    assert said in " ".join(capsys.readouterr().err.split())
