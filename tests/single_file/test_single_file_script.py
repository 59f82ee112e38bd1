"""The one file on its own: what it leaves behind, resumes, refuses, uploads; and its README."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, face_rows, logged, lora_weights, write_parquet
from hub_server import hub_server
from launching import assert_ok, run
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from single_file_script import EXAMPLE, SCRIPT, load, train_single_file

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel


ROOT = Path(__file__).parents[2]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_command_of_the_readme_parses():
    page = (EXAMPLE / "README.md").read_text()
    command = re.search(r"accelerate launch train_\S+ (\\\n.*?)```", page, flags=re.DOTALL)[1]
    args = load().parse_args(shlex.split(command.replace("\\\n", " ")))
    assert (args.rank, args.seed, args.max_train_steps) == (8, 0, 2000)


def test_requirements_are_those_of_the_scripts_own_block():
    block = SCRIPT.read_text().split("# /// script\n")[1].split("# ///\n")[0]
    required = (EXAMPLE / "requirements.txt").read_text().splitlines()
    assert re.findall(r'#     "(.*)",', block) == required


def test_the_folder_imports_nothing_of_this_repository():
    """And neither torchvision nor, before a flag asks for them, trackers and bitsandbytes."""
    imported = re.findall(r"^\s*(?:from|import) (\w+)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert not {"orpo", "diffusion_orpo_loss", "torchvision", "wandb"} & set(imported)
    assert not re.search(r"^(from|import) bitsandbytes", SCRIPT.read_text(), flags=re.MULTILINE)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tiny_sdxl, faces, tmp_path):
    """From the newest checkpoint, and from an older one by an absolute path; other folders do not matter."""
    flags = {"checkpointing_steps": 2, "gradient_accumulation_steps": 2, "lr_scheduler": "linear", "random_flip": True}
    whole = train_single_file(tiny_sdxl, faces, tmp_path / "whole", max_train_steps=6, **flags)
    halted = tmp_path / "halted"
    train_single_file(tiny_sdxl, faces, halted, max_train_steps=6, **flags)
    shutil.rmtree(halted / "checkpoint-6")
    (halted / "checkpoint-old").mkdir()
    resumed = train_single_file(
        tiny_sdxl, faces, halted, max_train_steps=6, resume_from_checkpoint="latest", dataloader_num_workers=1, **flags
    )
    assert_same(whole, resumed)
    path = str(tmp_path / "whole" / "checkpoint-4")
    elsewhere = train_single_file(
        tiny_sdxl, faces, tmp_path / "elsewhere", max_train_steps=6, resume_from_checkpoint=path, **flags
    )
    assert_same(whole, elsewhere)
    finished = train_single_file(
        tiny_sdxl, faces, tmp_path / "whole", max_train_steps=6, resume_from_checkpoint="latest", **flags
    )
    assert_same(whole, finished)


def test_a_folder_with_another_runs_checkpoints_is_refused_before_models_load(faces, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    for flags in ({}, {"resume_from_checkpoint": "checkpoint-3"}, {"resume_from_checkpoint": str(tmp_path)}):
        with pytest.raises(ValueError, match="checkpoint-4 of an earlier run|is not a checkpoint"):
            train_single_file("no/model", faces, tmp_path, **flags)


def test_old_checkpoints_go_and_the_lora_has_its_metadata(tiny_sdxl, faces, tmp_path):
    train_single_file(
        tiny_sdxl, faces, tmp_path, rank=3, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2
    )
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (3, 3)
    assert all(name.startswith("unet.") and "lora" in name for name in lora_weights(tmp_path))


def test_a_pipeline_loads_every_kind_of_module_that_it_saves(tiny_sdxl, tmp_path):
    """Whatever a reader puts in place of the attention projections."""
    layers = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2", "conv_in", "time_embedding.linear_1"]
    model = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    model.add_adapter(LoraConfig(r=2, target_modules=layers))
    load().save_lora(model, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, unet=None)
    pipeline.unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    pipeline.load_lora_weights(tmp_path)
    trained, loaded = (
        {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
        for unet in (model, pipeline.unet)
    )
    assert loaded == trained and {name.split(".")[-1] for name in trained} >= {"to_q", "conv1", "linear_1"}


@pytest.mark.parametrize("label", [0.7, float("nan"), "yes", None])
def test_a_label_that_is_none_names_its_row(label, tmp_path):
    labels = ["1", "0.5", label if isinstance(label, (str, type(None))) else str(label)]
    rows = [row | {"label_0": value} for row, value in zip(face_rows(3, ties=0), labels)]
    data = write_parquet(tmp_path / "pairs", rows, features=None)
    with pytest.raises(ValueError, match="Row 2: label_0 is"):
        train_single_file("no/model", data, tmp_path / "lora")


def test_labels_of_text_are_read_and_ties_are_counted(tmp_path, caplog):
    rows = [row | {"label_0": text} for row, text in zip(face_rows(4, ties=0), ["0", "1.0", "0.5", "0.0"])]
    data = write_parquet(tmp_path, rows, features=None)
    line = ["--pretrained_model_name_or_path=model", f"--dataset_name={data}"]
    with caplog.at_level("INFO"):
        _, pairs = load().load_pairs(load().parse_args(line))
    assert pairs == [(0, False), (1, True), (3, False)]
    assert "3 pairs, 1 ties dropped" in caplog.text
    _, pairs = load().load_pairs(load().parse_args([*line, "--max_train_samples=99"]))
    assert len(pairs) == 3


def test_only_ties_and_broken_images_are_named(tiny_sdxl, tmp_path):
    ties = write_parquet(tmp_path / "ties", face_rows(3, ties=3))
    with pytest.raises(ValueError, match="No pairs are left of the 3 rows"):
        train_single_file("no/model", ties, tmp_path / "lora")
    broken = write_parquet(tmp_path / "broken", [face_rows(1, ties=0)[0] | {"jpg_1": b"no image"}])
    with pytest.raises(ValueError, match="Row 0 can't be read: .*Remove or replace it"):
        train_single_file(tiny_sdxl, broken, tmp_path / "lora")


def test_bfloat16_trains_the_lora_in_float32_beside_a_vae_in_float32(tiny_sdxl, faces, tmp_path, monkeypatch):
    """Said by accelerate's configuration alone. Validation images of each step stay apart."""
    base = tmp_path / "base"
    shutil.copytree(tiny_sdxl, base)
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = {}
    original = load().log_validation

    def look(pipeline, args, accelerator, name, step):
        seen[step] = {
            "vae": pipeline.vae.dtype,
            "unet": pipeline.unet.conv_in.weight.dtype,
            "lora": {p.dtype for name, p in pipeline.unet.named_parameters() if "lora" in name},
        }
        return original(pipeline, args, accelerator, name, step)

    monkeypatch.setattr(load(), "log_validation", look)
    weights = train_single_file(
        str(base),
        faces,
        tmp_path / "lora",
        max_train_steps=4,
        run_validation=True,
        validation_steps=1,
        validation_prompts=["red ball", "red face"],
        report_to="tensorboard",
        gradient_checkpointing=True,
        use_8bit_adam=True,
    )
    dtypes = {"vae": torch.float32, "unet": torch.bfloat16, "lora": {torch.float32}}
    assert seen == {1: dtypes, 2: dtypes, 3: dtypes, 4: dtypes}
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert len(logged(tmp_path / "lora")["grad_norm"]) == 4
    assert len(list((tmp_path / "lora").glob("image_*.png"))) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "lora").glob("logs/*/"))), size_guidance={"images": 0})
    events.Reload()
    assert {event.step for event in events.Images("validation")} == {1, 2, 3}


def test_two_processes_train_the_lora_of_one_with_twice_the_batch(tiny_sdxl, faces, tmp_path):
    """So their noise is not the same. Every process saves its state; the learning rate has one course."""
    flags = {"max_train_steps": 4, "lr_scheduler": "linear", "checkpointing_steps": 2, "dataloader_num_workers": 1}
    line = arguments(tiny_sdxl, faces, tmp_path / "two", train_batch_size=2, **flags)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run(launcher, line, SCRIPT)
    assert_ok(result)
    assert "steps of 4 pairs on 2 processes" in result.output
    one = train_single_file(tiny_sdxl, faces, tmp_path / "one", train_batch_size=4, **flags)
    torch.testing.assert_close(lora_weights(tmp_path / "two"), one, rtol=1e-3, atol=1e-5)
    saved = {path.name for path in (tmp_path / "two" / "checkpoint-4").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= saved


def test_the_upload_is_lora_card_and_images_with_the_token(tiny_sdxl, faces, tmp_path):
    with hub_server() as hub:
        line = arguments(
            tiny_sdxl,
            faces,
            tmp_path / "my-lora",
            push_to_hub=True,
            hub_token="hf_secret",
            checkpointing_steps=1,
            run_validation=True,
            validation_prompts=["red ball"],
            report_to="tensorboard",
        )
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes=1"]
        assert_ok(run(launcher, line, SCRIPT, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0"))
    assert set(hub.files) == {"pytorch_lora_weights.safetensors", "README.md", "image_0.png"}
    assert all(authorization == "Bearer hf_secret" for method, _, authorization in hub.requests if method == "POST")
    card = hub.files["README.md"].decode()
    assert "license: openrail++" in card and 'load_lora_weights("somebody/my-lora")' in card and tiny_sdxl in card
    assert f"base_model: {tiny_sdxl}" not in card  # the Hub takes its own names only
    assert not any("hf_secret" in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())


def test_a_token_that_a_tracker_would_record_is_refused(capsys):
    line = ["--pretrained_model_name_or_path=m", "--dataset_name=d", "--hub_token=hf_secret", "--report_to=wandb"]
    with pytest.raises(SystemExit):
        load().parse_args(line)
    assert "hf_secret" not in capsys.readouterr().err


def test_a_tracker_that_is_not_there_is_named(faces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(ImportError, match="--report_to=aim is not installed"):
        train_single_file("no/model", faces, tmp_path, report_to="aim")


def test_order_is_a_permutation_each_epoch_and_processes_share_it():
    batches = [load().endless_batches(10, 2, 0, 0, rank, 3) for rank in range(3)]
    keys = [key for _ in range(5) for process in batches for key in next(process)]
    assert sorted(keys) == [(epoch, index) for epoch in range(3) for index in range(10)]
    assert [index for epoch, index in keys if epoch == 0] != [index for epoch, index in keys if epoch == 1]
    later = load().endless_batches(10, 3, 0, 12, 0, 1)
    assert np.array_equal(next(later), keys[12:15])
