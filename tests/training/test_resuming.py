"""A resumed run is the same run: it trains what remains, at the learning rate it was at, on the base it was made for."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import face_rows, logged, train, write_parquet
from orpo.runtime.checksums import SUMS_FILE, write_checksums
from orpo.training.checkpoint import STATE_FILE, read_state
from orpo.training.optimizer import Length
from safetensors.torch import load_file, save_file


EPOCHS = {"max_train_steps": None, "num_train_epochs": 2, "report_to": "tensorboard", "checkpointing_steps": 4}


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> str:
    """Eight pairs."""
    return write_parquet(tmp_path_factory.mktemp("eight"), face_rows(8, ties=0))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def finished(output_dir: Path) -> tuple[int, int]:
    """Steps and pairs of the newest checkpoint."""
    state = read_state(max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    return state.global_step, state.pairs_seen


def rewrite(checkpoint: Path, change) -> None:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(change(state)))
    (checkpoint / SUMS_FILE).unlink()
    write_checksums(checkpoint)


# Amounts


@pytest.mark.parametrize(("batch", "accumulation", "steps"), [(2, 1, 8 + 4), (1, 4, 8 + 2), (3, 1, 8 + 3), (1, 1, 16)])
def test_epochs_are_passes_over_the_pairs_whatever_batch_a_resumed_run_has(
    tiny_sdxl, eight, tmp_path, batch, accumulation, steps
):
    """16 pairs in all, 8 of them in the first run's batches of one."""
    first = EPOCHS | {"num_train_epochs": 1, "checkpointing_steps": 8}
    train(tiny_sdxl, eight, tmp_path, train_batch_size=1, **first)
    more = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "checkpointing_steps": 1}
    train(tiny_sdxl, eight, tmp_path, **EPOCHS | more, resume_from_checkpoint="latest")
    global_step, pairs_seen = finished(tmp_path)
    assert global_step == steps
    assert 0 <= pairs_seen - 16 < batch * accumulation


def test_what_remains_follows_from_the_pairs_seen_over_any_chain_of_changes():
    pairs, first = 1000, 7
    for sizes in ([7], [7, 14, 3], [7, 1, 64, 5]):
        step = seen = 0
        for number, size in enumerate(sizes):
            last = Length(None, pairs, size, first).last_step(step, seen)
            stop = last if number == len(sizes) - 1 else step + (last - step) // 2
            step, seen = stop, seen + (stop - step) * size
        assert pairs <= seen < pairs + sizes[-1]
        assert Length(None, pairs, sizes[-1], first).last_step(step, seen) == step


def test_a_longer_epoch_count_after_the_end_is_trained(tiny_sdxl, eight, tmp_path):
    train(tiny_sdxl, eight, tmp_path, **EPOCHS)
    train(tiny_sdxl, eight, tmp_path, **EPOCHS | {"num_train_epochs": 3}, resume_from_checkpoint="latest")
    assert finished(tmp_path) == (12, 24)


# The learning rate


def test_another_batch_size_leaves_the_course_over_the_pairs_as_it_was(tiny_sdxl, eight, tmp_path):
    flags = EPOCHS | {"lr_scheduler": "linear", "checkpointing_steps": 8}
    train(tiny_sdxl, eight, tmp_path, train_batch_size=1, **flags)
    shutil.rmtree(tmp_path / "checkpoint-16")
    shutil.rmtree(tmp_path / "logs")
    train(tiny_sdxl, eight, tmp_path, train_batch_size=2, **flags, resume_from_checkpoint="latest")
    assert logged(tmp_path)["lr"] == pytest.approx([1e-3 * (1 - pairs / 16) for pairs in (8, 10, 12, 14)])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_course_that_would_jump_is_refused_with_both_rates(tiny_sdxl, eight, tmp_path, scheduler):
    flags = {"lr_scheduler": scheduler, "checkpointing_steps": 2}
    train(tiny_sdxl, eight, tmp_path, max_train_steps=4, **flags)
    with pytest.raises(ValueError, match="the learning rate would jump from 0 to 0.0005"):
        train(tiny_sdxl, eight, tmp_path, max_train_steps=8, resume_from_checkpoint="latest", **flags)


@pytest.mark.parametrize(
    "flags",
    [{"lr_scheduler": "constant"}, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}],
)
def test_a_course_without_an_end_is_extended(tiny_sdxl, eight, tmp_path, flags):
    flags |= {"checkpointing_steps": 2, "report_to": "tensorboard"}
    whole = train(tiny_sdxl, eight, tmp_path / "whole", max_train_steps=4, **flags)
    train(tiny_sdxl, eight, tmp_path / "part", max_train_steps=2, **flags)
    assert_same(
        train(tiny_sdxl, eight, tmp_path / "part", max_train_steps=4, resume_from_checkpoint="latest", **flags), whole
    )


def test_another_warm_up_within_it_is_refused(tiny_sdxl, eight, tmp_path):
    flags = {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 2}
    train(tiny_sdxl, eight, tmp_path, lr_warmup_steps=4, **flags)
    with pytest.raises(ValueError, match="jump from 0.0005 to 0.000333"):
        train(
            tiny_sdxl, eight, tmp_path, lr_warmup_steps=6, max_train_steps=4, resume_from_checkpoint="latest", **flags
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 500}, "no shorter than the run of 2 steps.*0.004 of"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "does nothing with --lr_scheduler=constant"),
    ],
)
def test_a_warm_up_that_does_not_do_what_it_says_is_pointed_out(tiny_sdxl, eight, tmp_path, caplog, flags, said):
    with caplog.at_level(logging.WARNING):
        train(tiny_sdxl, eight, tmp_path, **flags)
    (message,) = [record.getMessage() for record in caplog.records if "--lr_warmup_steps" in record.getMessage()]
    assert re.search(said, message)


# Identity


@pytest.fixture
def stopped(tiny_sdxl, eight, tmp_path) -> Path:
    """The output folder of a run after two steps."""
    train(tiny_sdxl, eight, tmp_path / "lora", checkpointing_steps=2)
    return tmp_path / "lora"


def go_on(model: str, data: str, output_dir: Path, **flags):
    return train(model, data, output_dir, max_train_steps=4, resume_from_checkpoint="latest", **flags)


@pytest.mark.parametrize("module", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_another_base_is_refused_by_its_content(tiny_sdxl, eight, stopped, tmp_path, module):
    other = shutil.copytree(tiny_sdxl, tmp_path / "other")
    (path,) = (other / module).glob("*.safetensors")
    save_file({name: value * 0.9 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the base model is different: {module} was sha256"):
        go_on(str(other), eight, stopped)


def test_the_same_base_at_another_place_is_the_same(tiny_sdxl, eight, stopped, tmp_path):
    whole = train(tiny_sdxl, eight, tmp_path / "whole", max_train_steps=4)
    moved = shutil.copytree(tiny_sdxl, tmp_path / "moved")
    assert_same(go_on(str(moved), eight, stopped), whole)


def test_settings_that_steer_the_run_are_listed_old_and_new_in_one_warning(tiny_sdxl, eight, stopped, caplog):
    changes = {"max_grad_norm": 2.0, "lora_dropout": 0.1, "random_flip": True, "snr_gamma": 5.0}
    changes |= {"odds_temperature": 4.0}
    with caplog.at_level(logging.WARNING):
        go_on(tiny_sdxl, eight, stopped, **changes, proportion_empty_prompts=0.2)
    (message,) = [record.getMessage() for record in caplog.records if "settings that differ" in record.getMessage()]
    before = {"odds_temperature": 1.0, "max_grad_norm": 1.0, "lora_dropout": 0.0, "snr_gamma": None}
    for name, old in before.items():
        assert f"--{name} was {old} and is now {changes[name]}" in message
    assert "--random_flip was False and is now True" in message
    assert "--proportion_empty_prompts was 0.0 and is now 0.2" in message


def test_a_checkpoint_records_all_flags_without_secrets(stopped):
    flags = read_state(stopped / "checkpoint-2").flags
    assert flags["loser_share"] == 0.375 and flags["checkpointing_steps"] == 2


# Optimizers


def test_resuming_prodigy_equals_the_uninterrupted_run(tiny_sdxl, eight, tmp_path):
    flags = {"optimizer": "prodigy", "learning_rate": 1.0, "checkpointing_steps": 2, "report_to": "tensorboard"}
    whole = train(tiny_sdxl, eight, tmp_path / "whole", max_train_steps=4, **flags)
    (group,) = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.bin")["param_groups"]
    assert logged(tmp_path / "whole")["d*lr"][-1] == pytest.approx(group["d"] * group["lr"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    assert_same(go_on(tiny_sdxl, eight, tmp_path / "part", **flags), whole)


def test_wandb_goes_on_with_the_same_run_below_the_output_folder(tiny_sdxl, eight, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    flags = {"report_to": "wandb", "checkpointing_steps": 2}
    train(tiny_sdxl, eight, tmp_path / "lora", **flags)
    go_on(tiny_sdxl, eight, tmp_path / "lora", **flags)
    runs = sorted(path.name for path in (tmp_path / "lora" / "wandb").glob("offline-run-*"))
    assert len({name.rpartition("-")[2] for name in runs}) == 1 and runs
    assert not (tmp_path / "wandb").exists()
