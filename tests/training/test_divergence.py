"""Runs that go wrong by themselves: losses and gradients that are not finite, fp16's skipped steps, slow collapse."""

import json
import logging
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from helpers import logged, lora_weights, train
from orpo.models.sdxl import StableDiffusionXL
from orpo.training import step as training
from orpo.training.guards import CollapseWatch


@pytest.fixture
def loaded_models(monkeypatch) -> list[StableDiffusionXL]:
    """The models that runs have loaded."""
    loaded, load = [], StableDiffusionXL.load
    monkeypatch.setattr(
        StableDiffusionXL, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1]
    )
    return loaded


def spoil(monkeypatch, call: int, change) -> list[torch.Tensor]:
    """Changes the predictions (winner's, loser's) of the `call`-th micro-batch; returns the timesteps of each."""
    timesteps, predict = [], training.predict_pairs

    def predict_pairs(*args):
        pred_w, pred_l, target, t = predict(*args)
        timesteps.append(t)
        if len(timesteps) == call:
            pred_w, pred_l = change(pred_w, pred_l)
        return pred_w, pred_l, target, t

    monkeypatch.setattr(training, "predict_pairs", predict_pairs)
    return timesteps


def spoiled(pred: torch.Tensor, value: float) -> torch.Tensor:
    """One number of the second pair's prediction is another."""
    factor = torch.ones_like(pred)
    factor[1, 0, 0, 0] = value
    return pred * factor


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "side, change",
    [
        ("winner", lambda w, l, value: (spoiled(w, value), l)),
        ("loser", lambda w, l, value: (w, spoiled(l, value))),
        ("winner and loser", lambda w, l, value: (spoiled(w, value), spoiled(l, value))),
    ],
)
def test_what_is_not_finite_is_named_and_stays_out_of_the_weights(
    tiny_sdxl, faces, output_dir, monkeypatch, loaded_models, side, change, value
):
    """In the second of two micro-batches of step 3."""
    timesteps = spoil(monkeypatch, 6, lambda w, l: change(w, l, value))
    with pytest.raises(FloatingPointError) as raised:
        train(tiny_sdxl, faces, output_dir, max_train_steps=5, checkpointing_steps=1, gradient_accumulation_steps=2)
    message = str(raised.value)
    assert "Step 3" in message and f"timestep {timesteps[5][1]}, {side}." in message
    assert f"{timesteps[5][0]}" not in message and str(output_dir / "checkpoint-2") in message
    loaded_models[0].save_lora(output_dir / "in-memory")
    torch.testing.assert_close(
        lora_weights(output_dir / "in-memory"), lora_weights(output_dir / "checkpoint-2"), rtol=0, atol=0
    )


def test_a_gradient_that_is_not_finite_stays_out_of_the_weights(
    tiny_sdxl, faces, output_dir, monkeypatch, loaded_models
):
    """The loss is finite: the derivative of a square root at zero is not."""
    spoil(monkeypatch, 3, lambda w, l: (w + (w - w.detach()).abs().sqrt(), l))
    with pytest.raises(FloatingPointError, match="Step 3.*errors of all pairs are finite, but the gradient is not"):
        train(tiny_sdxl, faces, output_dir, max_train_steps=5, checkpointing_steps=1, max_grad_norm=0)
    loaded_models[0].save_lora(output_dir / "in-memory")
    torch.testing.assert_close(
        lora_weights(output_dir / "in-memory"), lora_weights(output_dir / "checkpoint-2"), rtol=0, atol=0
    )


def test_the_steps_that_the_gradient_scaler_skips_are_counted(tiny_sdxl, faces, output_dir, monkeypatch, capsys):
    """A real scaler, on the CPU, that begins far too high: it skips steps until its scale fits. A resumed run counts on."""
    scales = []
    initialize = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
        scales.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    flags = {"report_to": "tensorboard", "checkpointing_steps": 2, "train_batch_size": 1, "lr_scheduler": "linear"}
    flags["beta_orpo"] = 16  # times the scale, more than float32 holds
    train(tiny_sdxl, faces, output_dir, max_train_steps=12, **flags)
    skipped = logged(output_dir)["skipped_steps"]
    halvings = 127 - math.log2(scales[0].get_scale())  # the scaler halves its scale with each step that it skips
    assert skipped[0] == 1 and 1 < skipped[-1] == halvings < 12
    assert set(np.diff(skipped)) == {0, 1}
    assert f"skipped={int(skipped[-1])}" in capsys.readouterr().err
    assert logged(output_dir)["lr"][-1] == pytest.approx(1e-3 * (1 - 11 / 12), rel=1e-5)  # skipped or not

    state = json.loads((output_dir / "checkpoint-2" / "training_state.json").read_text())
    assert state["skipped_steps"] == skipped[1] == 2
    resumed = output_dir.parent / "resumed"
    flags |= {"resume_from_checkpoint": output_dir / "checkpoint-2"}
    train(tiny_sdxl, faces, resumed, max_train_steps=12, **flags)
    assert logged(resumed)["skipped_steps"] == skipped[2:]


@pytest.fixture(autouse=True)
def state():
    """Accelerate logs only where it knows its process."""
    PartialState()


def errors(winner: float, loser: float) -> dict[str, float]:
    return {"logps/chosen": -winner, "logps/rejected": -loser}


def watched(winners, losers, watch: CollapseWatch | None = None, first: int = 1) -> CollapseWatch:
    watch = watch or CollapseWatch()
    for step, (winner, loser) in enumerate(zip(winners, losers), start=first):
        watch.add(errors(winner, loser), step)
    return watch


def noisy(rng, course: np.ndarray) -> np.ndarray:
    """Errors as the demo's: each step's spread is 57 % of its mean, with a long tail."""
    sigma = math.sqrt(math.log(1 + 0.57**2))
    return course * rng.lognormal(-(sigma**2) / 2, sigma, len(course))


COURSES = {
    "level": (np.full(2000, 0.03), np.full(2000, 0.03)),
    "losers forgotten": (np.full(2000, 0.03), np.linspace(0.03, 0.2, 2000)),
    "winners learned": (np.linspace(0.03, 0.01, 2000), np.linspace(0.03, 0.06, 2000)),
    "both learned": (np.linspace(0.03, 0.02, 2000), np.linspace(0.03, 0.02, 2000)),
    "both forgotten": (np.linspace(0.03, 0.09, 2000), np.linspace(0.03, 0.2, 2000)),
}


@pytest.mark.parametrize("course", COURSES)
def test_only_the_forgetting_of_both_is_warned_of(course, caplog):
    """At the noise of small batches, over many runs; and once a run."""
    rng, runs = np.random.default_rng(0), 40
    warned = 0
    for _ in range(runs):
        caplog.clear()
        watch = watched(*(noisy(rng, errors) for errors in COURSES[course]))
        assert len(caplog.records) == watch.warned
        warned += watch.warned
    assert warned == (runs if course == "both forgotten" else 0)
    if warned:
        (record,) = caplog.records
        assert (
            "Lower --loser_share (or --beta_orpo) or --learning_rate" in record.message
            and record.levelno == logging.WARNING
        )


@pytest.mark.parametrize("cut", [20, 50, 51, 700, 1999])
def test_a_resumed_run_warns_at_the_same_step_and_not_twice(cut, caplog):
    rng = np.random.default_rng(1)
    winners, losers = (noisy(rng, errors) for errors in COURSES["both forgotten"])
    whole = watched(winners, losers)
    (record,) = caplog.records
    caplog.clear()
    saved = json.loads(json.dumps(asdict(watched(winners[:cut], losers[:cut]))))  # as a checkpoint keeps it
    resumed = watched(winners[cut:], losers[cut:], CollapseWatch.from_dict(saved), first=cut + 1)
    assert [record.message for record in caplog.records] == [record.message]
    assert resumed == whole


@pytest.mark.campaign
def test_a_run_that_collapses_warns_and_one_that_aligns_does_not(demo_base, faces, tmp_path, caplog):
    """The demo's model: as the demo trains it, and at a learning rate that climbs to the absurd."""
    message = "worse at winners and losers"
    flags = {"train_batch_size": 2, "rank": 8, "report_to": "tensorboard"}
    train(demo_base, faces, tmp_path / "good", max_train_steps=70, learning_rate=1e-3, beta_orpo=0.5, **flags)
    assert message not in caplog.text
    flags |= {"learning_rate": 0.1, "beta_orpo": 5, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 300}
    flags |= {"max_train_steps": 160, "checkpointing_steps": 155}
    train(demo_base, faces, tmp_path / "bad", **flags)
    assert caplog.text.count(message) == 1
    bad = logged(tmp_path / "bad")
    for name in ("logps/chosen", "logps/rejected"):
        assert np.mean(bad[name][-20:]) < 1.5 * np.mean(bad[name][:50])  # negated errors
    caplog.clear()
    train(demo_base, faces, tmp_path / "bad", resume_from_checkpoint="latest", **flags)
    assert message not in caplog.text
