"""Whole runs from shards: the script for WebDataset on one and two processes, from files, pipes and S3."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import arguments, face_rows, logged, lora_weights, train, write_shards
from launching import SHARDS_SCRIPT, assert_ok, run, two_processes
from orpo.models.sdxl import StableDiffusionXL


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 pairs and 4 ties in 4 shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), face_rows(28), per_shard=7)


def assert_same(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_path_has_no_default(capsys):
    from train_diffusion_orpo_sdxl_lora_wds import parse_args

    assert parse_args(["--pretrained_model_name_or_path=m", "--dataset_path", "a", "b"]).dataset_path == ("a", "b")
    with pytest.raises(SystemExit):
        parse_args(["--pretrained_model_name_or_path=m"])
    assert "--dataset_path" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_the_uninterrupted_run(tiny_sdxl, folder, tmp_path, workers):
    flags = {"dataset_path": folder, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    flags |= {"checkpointing_steps": 3, "max_train_steps": 9, "shuffle_buffer_size": 4, "random_flip": True}
    whole = train(tiny_sdxl, None, tmp_path / "whole", **flags)  # 36 pairs: crosses an epoch of 24
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    assert_same(train(tiny_sdxl, None, tmp_path / "part", resume_from_checkpoint="latest", **flags), whole)
    moved = [value for name, value in whole.items() if "lora_B" in name]
    assert max(value.abs().max() for value in moved) > 1e-4


def test_resuming_on_other_shards_or_another_buffer_is_refused(tiny_sdxl, folder, tmp_path):
    flags = {"dataset_path": folder, "checkpointing_steps": 2}
    train(tiny_sdxl, None, tmp_path / "lora", **flags)
    flags |= {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    with pytest.raises(ValueError, match="--shuffle_buffer_size was 1024 and is now 2"):
        train(tiny_sdxl, None, tmp_path / "lora", shuffle_buffer_size=2, **flags)
    with pytest.raises(ValueError, match="the pairs are different"):
        train(tiny_sdxl, None, tmp_path / "lora", **flags | {"dataset_path": f"{folder}/train-{{00000..00002}}.tar"})


CHANGES = {
    "labels": lambda row: row | {"label_0": 1 - row["label_0"]},
    "captions": lambda row: row | {"caption": row["caption"].swapcase()},
    "images": lambda row: row | {"jpg_0": row["jpg_0"][:-2] + b"\0\0"},  # in its last bytes, of the same size
}


def test_resuming_on_shards_of_the_same_names_and_sizes_is_refused_where_their_content_is_another(tiny_sdxl, tmp_path):
    rows = face_rows(8, ties=0)
    flags = {"dataset_path": tmp_path / "shards", "checkpointing_steps": 2, "cache_dir": tmp_path / "cache"}
    for manifest in (False, True):
        output = tmp_path / f"lora-{manifest}"
        write_shards(tmp_path / "shards", rows, 4, manifest=manifest)
        train(tiny_sdxl, None, output, **flags)
        kept = shutil.copytree(tmp_path / "shards", tmp_path / f"kept-{manifest}")
        resume = flags | {"resume_from_checkpoint": "latest", "max_train_steps": 3}
        for change in CHANGES.values():
            write_shards(tmp_path / "shards", [*rows[:7], change(rows[7])], 4, manifest=manifest)
            with pytest.raises(ValueError, match="the pairs are different"):
                train(tiny_sdxl, None, output, **resume)
        train(tiny_sdxl, None, output, **resume | {"dataset_path": kept})  # the same, in another folder


def test_an_epoch_counts_pairs_not_ties_and_no_more_than_asked_for(tiny_sdxl, folder, tmp_path):
    flags = {"dataset_path": folder, "max_train_steps": None, "report_to": "tensorboard"}
    train(
        tiny_sdxl,
        None,
        tmp_path / "lora",
        run_validation=True,
        num_validation_pairs=8,
        validation_prompts=["red"],
        validation_inference_steps=1,
        train_batch_size=4,
        **flags,
    )
    scalars = logged(tmp_path / "lora")
    assert len(scalars["loss"]) == 4  # 16 pairs of 28 samples: 8 are held out, 4 are ties
    right = scalars["eval_rewards/accuracies"][0] * 8 * 12  # pairs, and how often each is predicted
    assert right == pytest.approx(round(right))
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "4 shards: 16 pairs to train on, 8 held out, 4 ties left out" in card
    train(tiny_sdxl, None, tmp_path / "few", train_batch_size=5, max_train_samples=10, **flags)
    assert len(logged(tmp_path / "few")["loss"]) == 2


def test_bad_samples_show_in_the_progress_bar_and_may_stop_the_run(tiny_sdxl, tmp_path, capsys):
    rows = face_rows(20, ties=0)
    rows[3]["jpg_1"] = b"no image"
    folder = write_shards(tmp_path / "shards", rows, per_shard=10)
    flags = {"dataset_path": folder, "train_batch_size": 5, "max_train_steps": 5}
    train(tiny_sdxl, None, tmp_path / "a", max_bad_samples=0.1, **flags)
    assert "bad=1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="train-00000.tar: 1 undecodable image"):
        train(tiny_sdxl, None, tmp_path / "b", **flags)


def test_a_wrong_path_stops_before_models_load(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionXL, "load", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="2 of 2 missing"):
        train(tiny_sdxl, None, tmp_path / "lora", dataset_path=f"{tmp_path}/{{0..1}}.tar")


def test_two_processes_share_the_shards_and_resume_exactly(tiny_sdxl, folder, tmp_path):
    flags = {"dataset_path": folder, "dataloader_num_workers": 1, "checkpointing_steps": 2, "max_train_steps": 8}
    line = arguments(tiny_sdxl, None, tmp_path / "whole", **flags)
    assert_ok(two_processes(line, script=SHARDS_SCRIPT))
    for rank in (0, 1):
        position = json.loads((tmp_path / "whole" / "checkpoint-4" / f"data_position_{rank}.json").read_text())
        assert position["pairs_seen"] == 16
    line = arguments(
        tiny_sdxl,
        None,
        tmp_path / "part",
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4",
        **flags,
    )
    assert_ok(two_processes(line, script=SHARDS_SCRIPT))
    assert_same(lora_weights(tmp_path / "part"), lora_weights(tmp_path / "whole"))


def test_one_two_and_four_processes_train_the_same_lora_also_when_they_take_turns(tiny_sdxl, folder, tmp_path):
    """8 pairs a step: 1 process x 4 batches, 2 x 2, 4 x 1, of 2 pairs each; 6 steps are two epochs of 24."""
    loras, flags = {}, {"dataset_path": folder, "checkpointing_steps": 2, "random_flip": True}
    for processes in (1, 2, 4):
        output_dir, division = tmp_path / str(processes), {"gradient_accumulation_steps": 4 // processes}
        line = arguments(tiny_sdxl, None, output_dir, max_train_steps=6, **flags, **division)
        assert_ok(several_processes(processes, line))
        loras[processes] = lora_weights(output_dir)
    turns = tmp_path / "turns"
    for processes, steps in ((4, 2), (1, 4), (2, 6)):
        division = {"gradient_accumulation_steps": 4 // processes, "dataloader_num_workers": processes % 4}
        line = arguments(tiny_sdxl, None, turns, max_train_steps=steps, **flags, **division)
        assert_ok(several_processes(processes, [*line, "--resume_from_checkpoint=latest"]))
    for other in (loras[2], loras[4], lora_weights(turns)):
        torch.testing.assert_close(other, loras[1], rtol=0, atol=2e-5)
    moved = [value.abs().max() for name, value in loras[1].items() if "lora_B" in name]
    assert max(moved) > 1e-3  # far more than the tolerance


def several_processes(number: int, line: list[str]):
    result = run(["torch.distributed.run", "--standalone", f"--nproc_per_node={number}"], line, SHARDS_SCRIPT)
    assert f"on {number} processes" in result.output or result.returncode, result.output[-3000:]
    return result


@contextmanager
def s3_server():
    """A real S3 server on loopback; sets the environment of its clients."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "no_proxy": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_training_from_s3_by_pipe_and_by_url_equals_training_from_files(tiny_sdxl, folder, tmp_path):
    expected = train(tiny_sdxl, None, tmp_path / "files", dataset_path=folder)
    with s3_server():
        for command in ("mb s3://pairs", f"sync {folder} s3://pairs/faces --only-show-errors"):
            subprocess.run(["aws", "s3", *command.split()], check=True, capture_output=True)
        names = "train-{00000..00003}.tar"
        for i, path in enumerate((f"pipe:aws s3 cp s3://pairs/faces/{names} -", f"s3://pairs/faces/{names}")):
            assert_same(train(tiny_sdxl, None, tmp_path / str(i), dataset_path=path), expected)
        with pytest.raises(OSError, match="exit"):
            train(tiny_sdxl, None, tmp_path / "none", dataset_path="pipe:aws s3 cp s3://pairs/none/0.tar -")
