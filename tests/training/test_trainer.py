"""The trainer from Python, and what a resumed run keeps of its length."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import logged, lora_weights, shaped_rows, train, write_parquet
from orpo.training.optimizer import Length


README = Path(__file__).parents[2] / "examples" / "diffusion_orpo" / "README.md"


def test_the_readmes_lines_of_python_train_the_scripts_lora(tiny_sdxl, faces, tmp_path, monkeypatch):
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Trainer" in code
    )
    assert len(block.strip().splitlines()) <= 10
    for old, new in (
        ("stabilityai/stable-diffusion-xl-base-1.0", tiny_sdxl),
        ("my_pairs", faces),
        ("max_train_steps=2000", "max_train_steps=2, seed=0, resolution=64, train_batch_size=2, learning_rate=1e-3"),
    ):
        assert old in block
        block = block.replace(old, new)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    exec(block, {})
    expected = train(tiny_sdxl, faces, tmp_path / "by-script")
    found = lora_weights(tmp_path / "sdxl-orpo")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_resumed_run_with_buckets_keeps_the_course_that_its_first_batches_were_laid_out_for(tiny_sdxl, tmp_path):
    """Batches of one shape are filled up, so another batch size sees another number of pairs in an epoch."""
    data = write_parquet(tmp_path / "data", shaped_rows(24))
    flags = {"aspect_ratio_buckets": "64,64;48,80;80,48", "max_train_steps": None, "lr_scheduler": "linear"}
    flags |= {"report_to": "tensorboard", "checkpointing_steps": 2}
    train(tiny_sdxl, data, tmp_path / "lora", train_batch_size=5, **flags)
    rates = logged(tmp_path / "lora")["lr"]
    for folder in (tmp_path / "lora").glob("checkpoint-*"):
        if folder.name != "checkpoint-2":
            (folder).rename(tmp_path / folder.name)
    (tmp_path / "lora" / "logs").rename(tmp_path / "logs")
    train(tiny_sdxl, data, tmp_path / "lora", train_batch_size=1, resume_from_checkpoint="latest", **flags)
    resumed = logged(tmp_path / "lora")["lr"]
    assert resumed[0] == pytest.approx(rates[2]) and resumed[1] == pytest.approx(rates[2] - (rates[2] - rates[3]) / 5)
    with pytest.raises(ValueError, match="the learning rate would jump"):
        train(tiny_sdxl, data, tmp_path / "lora", num_train_epochs=2, resume_from_checkpoint="latest", **flags)


def test_a_course_never_goes_beyond_its_end():
    length = Length(None, pairs=26, pairs_per_step=2, first_pairs_per_step=2, first_horizon=12)
    assert length.horizon == 12 and length.place(13, 26) == 12


def test_the_step_size_that_prodigy_finds_is_logged(tiny_sdxl, faces, tmp_path):
    flags = {"optimizer": "Prodigy", "learning_rate": 1.0, "max_train_steps": 3, "report_to": "tensorboard"}
    train(tiny_sdxl, faces, tmp_path, **flags)
    logs = logged(tmp_path)
    assert logs["lr"] == [1.0] * 3 and len(logs["d*lr"]) == 3 and all(0 < size < 1 for size in logs["d*lr"])
