"""Accelerate's own configuration, from the environment as `accelerate config` sets it: taken or refused, never half."""

from types import SimpleNamespace

import pytest
import torch
from helpers import train
from orpo.training.accelerate_settings import check_settings


@pytest.mark.parametrize(("configured", "flag"), [(4, 1), (2, 4)])
def test_another_accumulation_than_the_flags_is_refused(tiny_sdxl, faces, output_dir, monkeypatch, configured, flag):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(configured))
    with pytest.raises(ValueError, match=f"--gradient_accumulation_steps={flag}, but .* says {configured} "):
        train(tiny_sdxl, faces, output_dir, gradient_accumulation_steps=flag)


def test_the_same_accumulation_is_taken(tiny_sdxl, faces, output_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train(tiny_sdxl, faces, output_dir, gradient_accumulation_steps=2, checkpointing_steps=2)
    state = torch.load(output_dir / "checkpoint-2" / "optimizer.bin")["state"]
    assert {float(moments["step"]) for moments in state.values()} == {2.0}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP .*--bnb_quantization_config_path"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed .*--multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --compile"),
    ],
)
def test_what_can_not_be_served_is_refused_at_the_start(output_dir, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=said):
        train("no/model", "no/data", output_dir)
    assert not output_dir.exists()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_bf16_alone_is_refused_on_mps(precision):
    args = SimpleNamespace(gradient_accumulation_steps=1)
    device = torch.device("mps")
    check_settings(args, SimpleNamespace(gradient_accumulation_steps=1, mixed_precision=precision, device=device))
    with pytest.raises(ValueError, match="bf16 does not work on MPS"):
        check_settings(args, SimpleNamespace(gradient_accumulation_steps=1, mixed_precision="bf16", device=device))


def test_a_precision_of_accelerate_that_is_not_ours_is_refused():
    accelerator = SimpleNamespace(gradient_accumulation_steps=1, mixed_precision="fp8", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'fp8', which is not one of no, fp16, bf16"):
        check_settings(SimpleNamespace(gradient_accumulation_steps=1), accelerator)
