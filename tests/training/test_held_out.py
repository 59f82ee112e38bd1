"""Accuracy on held-out pairs: even over the noise levels, precise, and what --keep_best makes of it."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import logged, lora_weights, train
from orpo.training.held_out import NAMES, PROMPT_MARGIN, NoiseLevels, PromptMargin, summarize
from orpo.training.validation import Best, Validator
from safetensors.torch import load_file

from train_diffusion_orpo_sdxl_lora import parse_args


ACCURACY = "eval_rewards/accuracies"
VALIDATION = {
    "run_validation": True,
    "num_validation_pairs": 4,
    "validation_steps": 2,
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


def script_measurements(monkeypatch, *accuracies: float, margins: tuple[float, ...] = ()) -> None:
    """Validations find these in turn, the base's first, the last one again and again."""
    left = [{ACCURACY: accuracy} for accuracy in accuracies]
    left = [metrics | {PROMPT_MARGIN: margin} for metrics, margin in zip(left, margins)] or left
    monkeypatch.setattr(Validator, "measure", lambda self: left.pop(0) if left[1:] else left[0])


@pytest.mark.parametrize("accuracies, best", [((0.5, 0.9, 0.7), 4), ((0.5, 0.6, 0.9), 6)])
def test_keep_best_makes_the_best_checkpoint_the_result(tiny_sdxl, faces, output_dir, monkeypatch, accuracies, best):
    script_measurements(monkeypatch, 0.4, *accuracies)
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


@pytest.mark.parametrize(
    "margins, best, warnings",
    [((0.6, 0.4, 0.29, 0.1), 2, 2), ((0.6, 0.4, 0.31, 0.31), 4, 0), ((0.6, 0.2, 0.2, 0.2), 6, 3)],
)
def test_keep_best_never_takes_a_checkpoint_that_has_lost_the_prompt(
    tiny_sdxl, faces, output_dir, monkeypatch, caplog, margins, best, warnings
):
    """Below half of the base's margin, 0.6 here. If all have, the result is the last step, and each one has said so."""
    script_measurements(monkeypatch, 0.5, 0.6, 0.9, 0.8, margins=margins)
    with caplog.at_level(logging.WARNING):
        train(tiny_sdxl, faces, output_dir, max_train_steps=6, keep_best=True, **VALIDATION)
    written = json.loads((output_dir / "eval_results.json").read_text())
    assert (written["step"], written[f"{PROMPT_MARGIN}_without_lora"]) == (best, 0.6)
    said = [record.getMessage() for record in caplog.records if "relies on its prompts less" in record.getMessage()]
    assert len(said) >= warnings and bool(said) == bool(warnings)


class PromptReader:
    """Predicts the noise, 1 beside it under a pair's own prompt, and 3 under any other."""

    device = torch.device("cpu")
    noise_process = SimpleNamespace(
        add_noise=lambda latents, noise, timesteps: noise, target=lambda latents_w, latents_l, noise, timesteps: noise
    )
    denoiser = None

    def sample_latents(self, moments, generators):
        return moments

    def predict(self, denoiser, noisy_latents, timesteps, embeds, batch):
        distance = torch.where(embeds["prompt_embeds"][:, 0] == batch["own"], 1.0, 3.0)
        return noisy_latents + distance.repeat(2)[:, None, None, None]


@pytest.mark.parametrize("batch_size, counted", [(6, 4), (2, 3), (1, 3)])
def test_the_prompt_margin_compares_with_the_prompt_before_and_skips_equal_ones(batch_size, counted):
    """Of six pairs, two have the prompt of the one before; the first pair of all meets the last of its batch."""
    margin, prompts = PromptMargin(torch.device("cpu")), torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0])
    for own in prompts.split(batch_size):
        batch = {"own": own, "embeds": {"prompt_embeds": own[:, None]}, "seeds": list(range(len(own)))}
        batch |= {"moments": torch.zeros(2 * len(own), 4, 2, 2), "timesteps": torch.zeros(len(own))}
        margin.add(PromptReader(), batch, torch.ones(len(own)))
        margin.next_batch(batch["embeds"])
    total, count = margin.sums.tolist()
    assert count == counted
    assert total / count == pytest.approx(math.log(9))


def test_validation_starts_at_step_0_with_the_base(tiny_sdxl, faces, output_dir):
    train(tiny_sdxl, faces, output_dir, max_train_steps=3, report_to="tensorboard", learning_rate=1e-2, **VALIDATION)
    written, scalars = json.loads((output_dir / "eval_results.json").read_text()), logged(output_dir)
    for name in (ACCURACY, PROMPT_MARGIN):
        assert len(scalars[name]) == 3  # at 0, 2 and 3
        assert scalars[name][0] == pytest.approx(written[f"{name}_without_lora"])
    assert scalars["eval_loss"][0] != scalars["eval_loss"][1]


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
