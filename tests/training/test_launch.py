"""The script as users start it: `accelerate launch`, and two processes; each in processes of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, logged, lora_weights, train
from hub_server import hub_server
from launching import SCRIPT, accelerate_launch, assert_ok, two_processes
from orpo.training.checkpoint import list_checkpoints, read_state, verify
from orpo.training.held_out import PROMPT_MARGIN


def test_the_readmes_command_and_its_upload(tiny_sdxl, faces, tmp_path):
    """Every flag of the README's command, with what does not exist here replaced: model, VAE, data, GPU, wandb server.

    fp16 needs a GPU, so precision is bf16. Repositories are created and files uploaded on a Hub on loopback.
    """
    output_dir = tmp_path / "diffusion-sdxl-orpo"
    line = arguments(
        tiny_sdxl,
        faces,
        output_dir,
        pretrained_vae_model_name_or_path=Path(tiny_sdxl) / "vae",
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        optimizer="AdamW8bit",
        rank=8,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_train_steps=2,
        checkpointing_steps=1,
        run_validation=True,
        validation_steps=1,
        report_to="wandb",
        push_to_hub=True,
        num_validation_pairs=4,
        validation_prompts=["a red ball"],
        validation_inference_steps=1,
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_in_the_environment", "HF_HUB_DISABLE_XET": "1"}
    with hub_server() as hub:
        environment |= {"HF_ENDPOINT": hub.url, "WANDB_MODE": "offline"}
        result = accelerate_launch(line, **environment)
    assert_ok(result)
    assert all(value.dtype == torch.float32 for value in lora_weights(output_dir).values())

    assert set(hub.files) == {
        "comfyui_lora.safetensors",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "eval_results.json",
        "image_0.png",
        "image_0_without_lora.png",
    }
    for name, content in hub.files.items():
        assert content == (output_dir / name).read_bytes()
    assert ("POST", "/api/repos/create", "Bearer hf_in_the_environment") in hub.requests
    assert all("/somebody/diffusion-sdxl-orpo/" in path for _, path, _ in hub.requests if "commit" in path)
    assert "load_lora_weights('somebody/diffusion-sdxl-orpo')" in hub.files["README.md"].decode()

    (wandb_file,) = output_dir.rglob("offline-run-*/*.wandb")
    content = wandb_file.read_bytes()
    for name in (b"rewards/accuracies", b"grad_norm", b"eval_loss", b"loser_share"):
        assert name in content


def test_a_token_and_a_name_for_the_upload(tiny_sdxl, faces, tmp_path):
    """HF_TOKEN and --hub_model_id are used; the token goes nowhere else."""
    line = arguments(
        tiny_sdxl,
        faces,
        tmp_path / "lora",
        max_train_steps=1,
        push_to_hub=True,
        hub_model_id="my-name",
        report_to="tensorboard",
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    with hub_server() as hub:
        result = accelerate_launch(line, **environment, HF_ENDPOINT=hub.url)
    assert_ok(result)
    assert {token for method, path, token in hub.requests if "commit" in path or "create" in path} == {
        "Bearer hf_secret"
    }
    assert any("/somebody/my-name/commit/main" in path for _, path, _ in hub.requests)
    assert "hf_secret" not in result.output
    for path in (tmp_path / "lora").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_precision_from_the_accelerate_configuration(tiny_sdxl, faces, tmp_path):
    """Without the flag, `accelerate launch --mixed_precision` decides; the LoRA stays float32 all the same."""
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", checkpointing_steps=2)
    result = accelerate_launch(line, "--mixed_precision=bf16")
    assert_ok(result)
    assert "- mixed_precision: bf16" in (tmp_path / "lora" / "README.md").read_text()
    for folder in (tmp_path / "lora", tmp_path / "lora" / "checkpoint-2"):
        assert all(value.dtype == torch.float32 for value in lora_weights(folder).values())
    state = torch.load(tmp_path / "lora" / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    assert all(value["exp_avg"].dtype == torch.float32 for value in state.values())


# 16 pairs in steps of 4: the epoch, and with it the learning rate's horizon, is 4 steps on any number of processes.
FLAGS = {
    "max_train_steps": None,
    "max_train_samples": 16,
    "checkpointing_steps": 2,
    "lr_scheduler": "linear",
    "report_to": "tensorboard",
    "run_validation": True,
    "num_validation_pairs": 5,
    "validation_prompts": ["red"],
    "validation_inference_steps": 1,
    "validation_steps": 2,
}


@pytest.fixture(scope="module")
def two_process_run(tiny_sdxl, faces, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("two") / "lora"
    result = two_processes(arguments(tiny_sdxl, faces, output_dir, **FLAGS))
    assert_ok(result)
    return output_dir


def test_two_processes_equal_one_with_twice_the_batch(tiny_sdxl, faces, two_process_run, tmp_path):
    """The same pairs, noise and timesteps: the ranks shared the work, and neither saw what the other saw."""
    alone = train(tiny_sdxl, faces, tmp_path / "lora", **FLAGS, train_batch_size=4)
    torch.testing.assert_close(lora_weights(two_process_run), alone, rtol=1e-3, atol=2e-5)
    one, two = logged(tmp_path / "lora"), logged(two_process_run)
    assert one.keys() == two.keys()
    for name in (
        name for name in one if not name.startswith(PROMPT_MARGIN)
    ):  # means over both ranks; each rank has other prompts to compare with
        assert two[name] == pytest.approx(one[name], rel=5e-3, abs=2e-4), name
    assert two["lr"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-3)


def test_both_processes_save_their_random_state(two_process_run):
    names = {path.name for path in (two_process_run / "checkpoint-2").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= names
    states = [
        torch.load(two_process_run / "checkpoint-2" / f"random_states_{i}.pkl", weights_only=False) for i in (0, 1)
    ]
    assert not torch.equal(*(state["torch_manual_seed"] for state in states))  # for LoRA dropout
    assert json.loads((two_process_run / "checkpoint-2" / "data_position_1.json").read_text()) == {"pairs_seen": 8}


def test_resuming_on_two_processes_equals_the_uninterrupted_run(tiny_sdxl, faces, two_process_run, tmp_path):
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", **FLAGS)
    result = two_processes([*line, f"--resume_from_checkpoint={two_process_run / 'checkpoint-2'}"])
    assert_ok(result)
    torch.testing.assert_close(lora_weights(tmp_path / "lora"), lora_weights(two_process_run), rtol=0, atol=0)


def test_two_processes_train_from_one_cache(tiny_sdxl, faces, two_process_run, tmp_path):
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", **FLAGS, cache_latents=True, cache_dir=tmp_path / "cache")
    assert_ok(two_processes(line))
    torch.testing.assert_close(lora_weights(tmp_path / "lora"), lora_weights(two_process_run), rtol=1e-3, atol=2e-5)


def test_resuming_on_one_process_goes_on_with_the_next_pair(tiny_sdxl, faces, two_process_run, tmp_path):
    resumed = train(
        tiny_sdxl,
        faces,
        tmp_path / "lora",
        **FLAGS,
        train_batch_size=4,
        resume_from_checkpoint=two_process_run / "checkpoint-2",
    )
    torch.testing.assert_close(resumed, lora_weights(two_process_run), rtol=1e-3, atol=2e-5)


def test_no_tracker_is_imported_unless_asked_for(tiny_sdxl, faces, tmp_path):
    """wandb and torchvision may be absent: importing either ends this run."""
    block = tmp_path / "sitecustomize.py"
    block.write_text("import sys\nsys.modules['wandb'] = None\nsys.modules['torchvision'] = None\n")
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", report_to="tensorboard", max_train_steps=1)
    result = accelerate_launch(line, PYTHONPATH=str(tmp_path))
    assert_ok(result)
    assert np.isfinite(logged(tmp_path / "lora")["loss"]).all()


def test_torchruns_sigterm_saves_a_checkpoint_on_both_processes(tiny_sdxl, faces, tmp_path):
    """The launcher gets the signal, as from SLURM, and passes it on to processes and data-loading workers."""
    flags = {"max_train_steps": 500, "checkpointing_steps": 3, "dataloader_num_workers": 1}
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", **flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *line]
    process = subprocess.Popen(
        command,
        env=os.environ | {"ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "lora" / "checkpoint-3").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    process.terminate()
    output = process.communicate()[0]
    assert output.count("Exit status 75") == 2 and "DataLoader worker" not in output, output[-4000:]
    newest = list_checkpoints(tmp_path / "lora")[-1]
    verify(newest)
    assert f"step {read_state(newest).global_step} is saved" in output
