"""Whole runs of the script in this process: what they leave behind, and runs compared with runs."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_orpo_loss import OrpoMetrics
from helpers import (
    arguments,
    face_rows,
    logged,
    lora_weights,
    swap_labels,
    train,
    without_weights,
    write_parquet,
    write_shards,
)
from PIL import Image
from safetensors import safe_open


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def moved(weights: dict) -> float:
    """How far the LoRA has gone from adding nothing."""
    return max(value.abs().max().item() for name, value in weights.items() if "lora_B" in name)


REFERENCE = {
    "rank": 3,
    "lora_alpha": 6,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "report_to": "tensorboard",
    "run_validation": True,
    "validation_steps": 2,
    "num_validation_pairs": 5,
    "validation_prompts": ["a red ball", "a face | and more"],
    "num_validation_images": 2,
    "validation_inference_steps": 2,
    "validation_guidance_scale": 2.0,
}


@pytest.fixture(scope="module")
def reference(tiny_sdxl, faces, tmp_path_factory) -> Path:
    """The output of one run, which tests only read."""
    folder = tmp_path_factory.mktemp("reference") / "lora"
    train(tiny_sdxl, faces, folder, **REFERENCE)
    return folder


@pytest.fixture
def copy(reference, output_dir) -> Path:
    """The same, to go on from."""
    return shutil.copytree(reference, output_dir)


def test_only_lora_weights_are_saved_and_they_moved(reference):
    weights = lora_weights(reference)
    assert all(name.startswith("unet.") and "lora" in name for name in weights)
    assert all(value.dtype == torch.float32 and 3 in value.shape for value in weights.values())
    assert moved(weights) > 1e-4
    with safe_open(reference / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (3, 6)


def test_lora_layers_choose_the_modules(tiny_sdxl, faces, output_dir):
    names = train(tiny_sdxl, faces, output_dir, lora_layers="to_k")
    assert names and all(".to_k." in name for name in names)


def test_a_run_is_a_function_of_its_seed(tiny_sdxl, faces, reference, tmp_path):
    """Also where "latest" finds no checkpoint, and starts from scratch."""
    again = train(tiny_sdxl, faces, tmp_path / "again", resume_from_checkpoint="latest", **REFERENCE)
    assert_same(again, lora_weights(reference))
    other = train(tiny_sdxl, faces, tmp_path / "other", seed=1, **REFERENCE)
    assert any(not torch.equal(other[name], again[name]) for name in again)


def test_seed_0_is_a_seed_and_no_seed_is_drawn(tiny_sdxl, faces, tmp_path):
    """Without a seed, each run draws one; the checkpoint remembers it, so that resuming still is exact."""
    runs = [
        train(tiny_sdxl, faces, tmp_path / str(i), seed=None, max_train_steps=4, checkpointing_steps=2)
        for i in range(2)
    ]
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    shutil.rmtree(tmp_path / "0" / "checkpoint-4")
    resumed = train(
        tiny_sdxl, faces, tmp_path / "0", seed=None, max_train_steps=4, resume_from_checkpoint="checkpoint-2"
    )
    assert_same(resumed, runs[0])


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_resuming_equals_the_uninterrupted_run(tiny_sdxl, faces, tmp_path, lora_dropout):
    flags = {
        "lora_dropout": lora_dropout,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "gradient_accumulation_steps": 2,
        "random_crop": True,
        "random_flip": True,
        "proportion_empty_prompts": 0.3,
        "checkpointing_steps": 3,
    }
    whole = train(tiny_sdxl, faces, tmp_path / "whole", max_train_steps=9, **flags)  # 36 pairs: crosses an epoch of 24
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    resumed = train(tiny_sdxl, faces, tmp_path / "part", max_train_steps=9, resume_from_checkpoint="latest", **flags)
    assert_same(resumed, whole)
    for name in ("checkpoint-6", "checkpoint-9"):
        assert_same(lora_weights(tmp_path / "part" / name), lora_weights(tmp_path / "whole" / name))


def test_resuming_with_another_accumulation_goes_on_with_the_next_pair(tiny_sdxl, faces, tmp_path):
    """The same pairs per step, cut otherwise: the data position and the windows survive."""
    flags = {"max_train_steps": 5, "checkpointing_steps": 3}
    whole = train(tiny_sdxl, faces, tmp_path / "a", train_batch_size=2, gradient_accumulation_steps=3, **flags)
    other = train(
        tiny_sdxl,
        faces,
        tmp_path / "b",
        train_batch_size=3,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=tmp_path / "a" / "checkpoint-3",
        **flags,
    )
    assert_close(other, whole)


def test_resuming_a_finished_run_trains_no_more(tiny_sdxl, faces, copy):
    weights = lora_weights(copy)
    assert_same(train(tiny_sdxl, faces, copy, resume_from_checkpoint="latest", **REFERENCE), weights)


def test_checkpoints_total_limit_keeps_the_newest_and_foreign_folders(tiny_sdxl, faces, output_dir):
    for name in ("checkpoint-old", "checkpoints"):
        (output_dir / name).mkdir(parents=True)
    train(tiny_sdxl, faces, output_dir, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    names = {path.name for path in output_dir.glob("*checkpoint*")}
    assert names == {"checkpoint-old", "checkpoints", "checkpoint-4", "checkpoint-6"}
    train(
        tiny_sdxl,
        faces,
        output_dir,
        max_train_steps=10,
        checkpointing_steps=2,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
    )
    names = {path.name for path in output_dir.glob("checkpoint-[0-9]*")}
    assert names == {"checkpoint-8", "checkpoint-10"}


def test_a_checkpoint_is_complete_and_of_loras_alone(reference):
    names = {path.name for path in (reference / "checkpoint-4").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "optimizer.bin", "random_states_0.pkl"} <= names
    assert "model.safetensors" not in names
    assert_same(lora_weights(reference / "checkpoint-4"), lora_weights(reference))
    assert not list(reference.glob(".checkpoint*"))


def test_gradient_accumulation_equals_the_larger_batch(tiny_sdxl, faces, tmp_path):
    whole = train(tiny_sdxl, faces, tmp_path / "a", train_batch_size=6, max_train_steps=5)
    parts = train(
        tiny_sdxl, faces, tmp_path / "b", train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=5
    )
    assert_close(parts, whole)


@pytest.mark.parametrize("source", ["parquet", "shards"])
def test_swapped_labels_train_the_opposite_margin(demo_base, tmp_path, source):
    """From the label in the file to the gradient's sign: a run learns to prefer what its labels say, either way."""
    rows, z = face_rows(24, ties=0), {}
    for name, labelled in (("smiles", rows), ("frowns", swap_labels(rows))):
        folder = tmp_path / name
        shards = source == "shards" and write_shards(folder, labelled, per_shard=6)
        train(
            demo_base,
            None if shards else write_parquet(folder, labelled),
            tmp_path / f"{name}-lora",
            dataset_path=shards,
            learning_rate=3e-3,
            beta_orpo=1.0,
            rank=8,
            train_batch_size=8,
            max_train_steps=40,
            report_to="tensorboard",
        )
        z[name] = np.array(logged(tmp_path / f"{name}-lora")["log_odds_chosen"])
    # The same 24 pairs, three steps to an epoch. Untrained, what one run calls the winner, the other calls the loser.
    assert z["smiles"][0] == pytest.approx(-z["frowns"][0], abs=0.02)
    for values in z.values():
        assert values[-9:].mean() > values[:3].mean() + 0.1


def test_epochs_when_steps_are_not_given(tiny_sdxl, faces, output_dir):
    """Over the first pairs alone, and with the last step smaller than the others."""
    flags = {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(tiny_sdxl, faces, output_dir, report_to="tensorboard", max_train_samples=5, **flags)
    assert len(logged(output_dir)["loss"]) == math.ceil(2 * 5 / 4)


def test_everything_is_logged_once_per_step_and_averaged(tiny_sdxl, faces, tmp_path):
    """One window of three micro-batches logs what one batch of all its pairs logs."""
    flags = {
        "report_to": "tensorboard",
        "max_train_steps": 3,
        "learning_rate": 1e-6,
        "max_grad_norm": 0,
        "beta_orpo": 0.1,
    }
    train(tiny_sdxl, faces, tmp_path / "a", train_batch_size=6, **flags)
    train(tiny_sdxl, faces, tmp_path / "b", train_batch_size=2, gradient_accumulation_steps=3, **flags)
    whole, parts = logged(tmp_path / "a"), logged(tmp_path / "b")
    assert set(whole) >= {"loss", "grad_norm", "lr", *OrpoMetrics.__annotations__}
    for name in whole:
        assert len(whole[name]) == len(parts[name]) == 3
        assert parts[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-5), name
    losses = np.array(whole["nll_loss"]) - 0.1 * np.array(whole["log_odds_ratio"])
    assert whole["loss"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"lr_scheduler": "constant"}, lambda s: 1),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, lambda s: min(1, s / 4)),
        ({"lr_scheduler": "linear"}, lambda s: 1 - s / 8),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 2}, lambda s: s / 2 if s < 2 else (1 + math.cos(math.pi * (s - 2) / 6)) / 2),
    ],
)  # fmt: skip
def test_learning_rate_schedules(tiny_sdxl, faces, output_dir, flags, expected):
    train(
        tiny_sdxl,
        faces,
        output_dir,
        max_train_steps=8,
        gradient_accumulation_steps=2,
        train_batch_size=1,
        report_to="tensorboard",
        **flags,
    )
    assert logged(output_dir)["lr"] == pytest.approx([1e-3 * expected(step) for step in range(8)], rel=2e-3, abs=1e-8)


def test_the_gradient_norm_is_limited_and_0_is_no_limit(tiny_sdxl, faces, tmp_path):
    """Plain averages of gradients don't show in Adam's steps, but the limit shows in its first moment."""
    norms = {}
    for limit in (0, 1e-4):
        train(tiny_sdxl, faces, tmp_path / str(limit), max_grad_norm=limit, max_train_steps=1, checkpointing_steps=1)
        state = torch.load(tmp_path / str(limit) / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
        norms[limit] = torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm().item() / 0.1
    assert norms[1e-4] == pytest.approx(1e-4, rel=0.01)
    assert norms[0] > 1e-3


def test_validation_measures_held_out_pairs_generates_images_and_writes_a_card(tiny_sdxl, faces, reference, tmp_path):
    scalars = logged(reference)
    for name in ("loss", *OrpoMetrics.__annotations__):
        assert len(scalars[f"eval_{name}"]) == 3 and len(scalars[f"eval_{name}_without_lora"]) == 1
    accuracies = scalars["eval_rewards/accuracies"]
    assert all(accuracy * 5 * 12 == pytest.approx(round(accuracy * 5 * 12)) for accuracy in accuracies)
    assert len(set(scalars["eval_loss"])) == 3  # before the first step, in the middle, at the end
    base = train(tiny_sdxl, faces, tmp_path / "base", learning_rate=0, run_validation=True, num_validation_pairs=5)
    assert moved(base) == 0
    untrained = json.loads((tmp_path / "base" / "eval_results.json").read_text())
    assert scalars["eval_loss_without_lora"][0] == pytest.approx(untrained["eval_loss"], rel=1e-6)
    assert scalars["eval_loss_without_lora"][0] != scalars["eval_loss"][-1]

    images = [np.asarray(Image.open(reference / f"image_{i}.png"), dtype=int) for i in range(4)]
    without = [np.asarray(Image.open(reference / f"image_{i}_without_lora.png"), dtype=int) for i in range(4)]
    assert all(image.shape == (64, 64, 3) for image in images + without)
    assert len({image.tobytes() for image in without}) == 4  # two prompts, two seeds

    card = (reference / "README.md").read_text()
    assert "eval_rewards/accuracies" in card and "a face \\| and more" in card
    for tag in ("stable-diffusion-xl-diffusers", "lora", "text-to-image", "template:sd-lora", "diffusers-training"):
        assert f"- {tag}\n" in card
    results = json.loads((reference / "eval_results.json").read_text())
    assert results["eval_rewards/accuracies"] == pytest.approx(accuracies[-1])


def test_validation_images_are_logged_at_their_step(reference):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference / "logs" / reference.name), size_guidance={"images": 0})
    events.Reload()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    for i in range(2):
        assert steps[f"validation/{i}"] == [0, 2]
        assert steps[f"test/{i}"] == steps[f"test_without_lora/{i}"] == [4]


def test_validation_does_not_disturb_training(tiny_sdxl, faces, tmp_path):
    flags = {"lora_dropout": 0.2, "max_train_steps": 4, "num_validation_pairs": 4, "run_validation": True}
    flags |= {"validation_prompts": ["red"], "validation_inference_steps": 1}
    often = train(tiny_sdxl, faces, tmp_path / "often", validation_steps=1, **flags)
    rarely = train(tiny_sdxl, faces, tmp_path / "rarely", validation_steps=100, **flags)
    assert_same(often, rarely)


def test_the_cards_snippet_runs(tiny_sdxl, faces, output_dir, tmp_path, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    train(
        tiny_sdxl,
        faces,
        output_dir,
        pretrained_vae_model_name_or_path=Path(tiny_sdxl) / "vae",
        validation_prompts=["a 'red' ball"],
        prediction_type="v_prediction",
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", (output_dir / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    call = StableDiffusionXLPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionXLPipeline, "__call__", lambda self, prompt: call(self, prompt, num_inference_steps=1)
    )
    exec(snippet, {})
    assert Image.open(tmp_path / "image.png").size == (64, 64)
    assert "register_to_config(prediction_type='v_prediction')" in snippet


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"resume_from_checkpoint": "checkpoint-7"}, ["checkpoint-7", "none"]),
        ({"output_dir": "/dev/null/lora"}, ["--output_dir", "/dev/null/lora"]),
    ],
)
def test_bad_input_stops_before_models_load(faces, output_dir, flags, parts):
    """The model does not exist: whoever came as far as loading it would say so."""
    with pytest.raises(Exception) as raised:
        train("no/such-model", faces, flags.pop("output_dir", output_dir), **flags)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "such-model" not in str(raised.value)


def test_bad_rows_stop_before_models_load(tiny_sdxl, tmp_path, output_dir):
    model = without_weights(tiny_sdxl, tmp_path / "model")
    rows = face_rows(6, ties=0)
    rows[2]["jpg_0"] = rows[2]["jpg_0"][:500]
    with pytest.raises(ValueError, match="row 2"):
        train(str(model), write_parquet(tmp_path / "data", rows), output_dir)


def test_a_new_run_does_not_overwrite_an_old_ones_checkpoints(faces, copy):
    with pytest.raises(ValueError, match="checkpoint-4 of an earlier run.*--resume_from_checkpoint=latest"):
        train("no/such-model", faces, copy)
    with pytest.raises(ValueError, match="checkpoint-4 of an earlier run"):
        train("no/such-model", faces, copy, resume_from_checkpoint="checkpoint-2")


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"rank": 8}, "--rank"),
        ({"lora_alpha": 2}, "--lora_alpha"),
        ({"seed": 3}, "--seed"),
        ({"learning_rate": 1e-5}, "--learning_rate"),
        ({"max_train_samples": 9}, "the pairs are different"),
        ({"prediction_type": "v_prediction"}, "--prediction_type was None and is now v_prediction"),
        ({"resolution": 72}, "--resolution was 64 and is now 72"),
        ({"optimizer": "prodigy"}, "--optimizer"),
    ],
)
def test_resuming_another_run_is_refused(tiny_sdxl, faces, copy, flags, part):
    with pytest.raises(ValueError, match=f"Cannot resume.*{part}"):
        train(tiny_sdxl, faces, copy, resume_from_checkpoint="latest", **REFERENCE | flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"hub_token": "hf_secret"}, "there is no --hub_token: run `hf auth login`"),
        ({"resolution": 100}, "--resolution"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"beta_orpo": -1}, "--beta_orpo"),
        ({"beta_orpo": "nan"}, "--beta_orpo"),
        ({"odds_temperature": 0}, "--odds_temperature"),
        ({"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts"),
        ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"max_grad_norm": -1}, "--max_grad_norm"),
        ({"num_validation_images": 0}, "--num_validation_images"),
        ({"learning_rate": "inf"}, "--learning_rate"),
        ({"lora_dropout": 1.1}, "--lora_dropout"),
        ({"prediction_type": "sample"}, "--prediction_type"),
        ({"lr_scheduler": "none"}, "--lr_scheduler"),
        ({"mixed_precision": "fp8"}, "--mixed_precision"),
        ({"dataset_name": "/no/such/folder"}, "--dataset_name=/no/such/folder does not exist"),
        ({"learning_rat": 1}, "there is no --learning_rat. Did you mean --learning_rate?"),
    ],
)
def test_flags_are_checked_first(capsys, flags, message):
    from train_diffusion_orpo_sdxl_lora import parse_args

    with pytest.raises(SystemExit):
        parse_args(arguments("model", "data", "out", **flags))
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and "hf_secret" not in error


def test_a_loss_that_is_not_finite_stops_the_run(tiny_sdxl, faces, output_dir, monkeypatch):
    """From the third step on, predictions overflow: the run names step and timesteps, and its checkpoint is good."""
    from orpo.training import trainer as training

    calls = []

    def overflow(*args, original=training.compute_losses):
        losses, metrics, timesteps = original(*args)
        calls.append(timesteps)
        return (losses * torch.tensor([1.0, math.inf]) if len(calls) == 3 else losses), metrics, timesteps

    monkeypatch.setattr(training, "compute_losses", overflow)
    with pytest.raises(FloatingPointError) as raised:
        train(tiny_sdxl, faces, output_dir, max_train_steps=5, checkpointing_steps=1)
    assert "Step 3" in str(raised.value) and f"timestep {calls[2][1].item()}," in str(raised.value)
    assert str(output_dir / "checkpoint-2") in str(raised.value)
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert all(value.isfinite().all() for value in lora_weights(output_dir / "checkpoint-2").values())


def test_a_checkpoint_is_complete_or_absent(tiny_sdxl, faces, output_dir, monkeypatch):
    """The second checkpoint dies half-way: it is not there, and the run goes on from the first."""
    from accelerate import Accelerator

    whole = train(tiny_sdxl, faces, output_dir.parent / "whole", max_train_steps=3)
    save_state = Accelerator.save_state

    def die(self, folder):
        save_state(self, folder)
        if "2" in Path(folder).name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Accelerator, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_sdxl, faces, output_dir, max_train_steps=3, checkpointing_steps=1)
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    assert_same(train(tiny_sdxl, faces, output_dir, max_train_steps=3, resume_from_checkpoint="latest"), whole)


def test_resuming_on_other_pairs_is_refused(tiny_sdxl, tmp_path, copy):
    other = write_parquet(tmp_path / "other", swap_labels(face_rows(28)))
    with pytest.raises(ValueError, match="the pairs are different"):
        train(tiny_sdxl, other, copy, resume_from_checkpoint="latest", **REFERENCE)


def test_resuming_eight_bit_adam_equals_the_uninterrupted_run(tiny_sdxl, faces, tmp_path):
    flags = {"optimizer": "AdamW8bit", "max_train_steps": 4, "rank": 64}  # small tensors stay in 32 bits
    whole = train(tiny_sdxl, faces, tmp_path / "a", checkpointing_steps=2, **flags)
    part = tmp_path / "a" / "checkpoint-2"
    assert_same(train(tiny_sdxl, faces, tmp_path / "b", resume_from_checkpoint=part, **flags), whole)


def test_a_gradient_scaler_that_skips_every_step_stops_the_run(tiny_sdxl, faces, output_dir, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(FloatingPointError, match="Step 20: 20 steps in a row"):
        train(tiny_sdxl, faces, output_dir, max_train_steps=30, train_batch_size=1)


def test_a_tracker_that_is_not_installed_is_an_error(faces, output_dir, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="--report_to=wandb: not installed"):
        train("no/such-model", faces, output_dir, report_to="wandb")


def test_a_result_has_nothing_of_an_earlier_one_beside_it(tiny_sdxl, faces, output_dir):
    """A run with validation, then one without in the same folder; files that are not results are left alone."""
    validation = {"run_validation": True, "num_validation_pairs": 4, "validation_prompts": ["red", "ball"]}
    train(tiny_sdxl, faces, output_dir, **validation, validation_inference_steps=1)
    names = {path.name for path in output_dir.iterdir()}
    assert {"eval_results.json", "image_1.png", "image_1_without_lora.png"} <= names
    for name in ("notes.txt", "image_of_mine.png"):
        (output_dir / name).write_bytes(b"mine")
    train(tiny_sdxl, faces, output_dir)
    left = {path.name for path in output_dir.iterdir() if path.is_file()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "notes.txt", "image_of_mine.png"} <= left
    assert not left & {"eval_results.json", "image_0.png", "image_1.png", "image_1_without_lora.png"}
