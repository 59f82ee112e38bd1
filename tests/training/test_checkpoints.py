"""Checkpoints under damage: what is not whole is refused by name, `latest` goes back to what is, nothing in it runs."""

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import lora_weights, train
from orpo.runtime.checksums import SUMS_FILE, Damaged, write_checksums
from orpo.training.checkpoint import STATE_FILE, find_checkpoint, list_checkpoints, verify


FLAGS = {"max_train_steps": 3, "checkpointing_steps": 1, "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def whole(tiny_sdxl, faces, tmp_path_factory) -> Path:
    """The output folder of a run with three checkpoints."""
    output_dir = tmp_path_factory.mktemp("whole") / "lora"
    train(tiny_sdxl, faces, output_dir, **FLAGS)
    return output_dir


@pytest.fixture
def output_dir(whole, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "lora"))


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.glob("*checkpoint*")}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_flipped_bit_is_found_and_named(output_dir):
    """In any file, the list of checksums included; a damaged list may name a file that it no longer describes."""
    rng, checkpoint = random.Random(0), output_dir / "checkpoint-3"
    for path in files(checkpoint):
        content = path.read_bytes()
        for _ in range(60):
            place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(Damaged) as raised:
                verify(checkpoint)
            assert str(path) in str(raised.value) or path.name == SUMS_FILE, (path, place, bit)
        path.write_bytes(content)
    verify(checkpoint)


def test_every_cut_missing_or_added_file_is_found_and_named(output_dir):
    checkpoint = output_dir / "checkpoint-3"
    for path in files(checkpoint):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1], b"", content + b"\0", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(Damaged) as raised:
                find_checkpoint("checkpoint-3", output_dir)
            assert str(path) in str(raised.value) or path.name == SUMS_FILE
        path.write_bytes(content)
    (checkpoint / "added.pkl").write_bytes(b"")
    with pytest.raises(Damaged, match="added.pkl"):
        find_checkpoint("checkpoint-3", output_dir)


def test_the_list_of_checksums_is_coreutils_own(output_dir):
    checkpoint = output_dir / "checkpoint-3"
    command = ["sha256sum", "--check", "--strict", SUMS_FILE]
    result = subprocess.run(command, cwd=checkpoint, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count(": OK\n") == len(files(checkpoint)) - 1


def test_latest_goes_back_to_the_newest_good_one_and_keeps_the_broken(tiny_sdxl, faces, whole, output_dir, caplog):
    for name in ("checkpoint-2", "checkpoint-3"):
        with open(output_dir / name / "optimizer.bin", "r+b") as file:
            file.truncate(1000)
    broken = (output_dir / "checkpoint-3" / "optimizer.bin").read_bytes()
    (output_dir / "pytorch_lora_weights.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        resumed = train(tiny_sdxl, faces, output_dir, resume_from_checkpoint="latest", **FLAGS)
    assert_same(resumed, lora_weights(whole))
    for name in ("checkpoint-2", "checkpoint-3"):
        assert f"{name}/optimizer.bin" in caplog.text and f"{name}.broken" in caplog.text
        verify(output_dir / name)
    assert names(output_dir) == names(whole) | {"checkpoint-2.broken", "checkpoint-3.broken"}
    assert (output_dir / "checkpoint-3.broken" / "optimizer.bin").read_bytes() == broken


def test_a_second_broken_one_of_the_same_step_is_kept_too(output_dir):
    for suffix in ("", "-2"):
        (output_dir / "checkpoint-3" / STATE_FILE).write_text("{}")
        assert find_checkpoint("latest", output_dir) == output_dir / "checkpoint-2"
        assert (output_dir / f"checkpoint-3.broken{suffix}").is_dir() and not (output_dir / "checkpoint-3").exists()
        shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-3")


def test_without_a_good_checkpoint_latest_does_not_start_from_scratch(output_dir):
    for checkpoint in list_checkpoints(output_dir):
        (checkpoint / "optimizer.bin").unlink()
    before = names(output_dir)
    with pytest.raises(
        ValueError, match="All checkpoints in .* are broken.*checkpoint-1/optimizer.bin.*Move them away"
    ):
        find_checkpoint("latest", output_dir)
    assert names(output_dir) == before


def test_naming_a_checkpoint_passes_over_broken_later_ones_but_not_over_good_ones(output_dir):
    (output_dir / "checkpoint-3" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match="of an earlier run"):
        find_checkpoint("checkpoint-1", output_dir)
    assert "checkpoint-3" in names(output_dir)
    assert find_checkpoint("checkpoint-2", output_dir) == output_dir / "checkpoint-2"
    assert names(output_dir) == {"checkpoint-1", "checkpoint-2", "checkpoint-3.broken"}


class Payload:
    """Unpickled without restraint, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("save", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
def test_a_crafted_pickle_runs_nothing(tiny_sdxl, faces, output_dir, tmp_path, name, save):
    """Its author has made the checksums good, too."""
    checkpoint, canary = output_dir / "checkpoint-3", tmp_path / "canary"
    save({"state": Payload(canary), "torch_manual_seed": Payload(canary)}, checkpoint / name)
    write_checksums(checkpoint)
    with pytest.raises(Damaged, match=f"{checkpoint}.*not loaded") as raised:
        train(tiny_sdxl, faces, output_dir, resume_from_checkpoint=checkpoint, **FLAGS)
    assert not canary.exists() and "weights_only=False" not in str(raised.value)
    with pytest.raises(FileExistsError):  # the payload does work: loaded without restraint, it is run twice
        for _ in range(2):
            torch.load(checkpoint / name, weights_only=False)


def test_a_random_state_that_does_not_load_is_refused(tiny_sdxl, faces, output_dir):
    """Accelerate passes over it in silence, and dropout would draw other numbers than the saved run's."""
    checkpoint = output_dir / "checkpoint-3"
    states = torch.load(checkpoint / "random_states_0.pkl", weights_only=False)
    states["torch_manual_seed"] = states["torch_manual_seed"][:100]
    torch.save(states, checkpoint / "random_states_0.pkl")
    write_checksums(checkpoint)
    with pytest.raises(Damaged, match="random_states_0.pkl"):
        train(tiny_sdxl, faces, output_dir, resume_from_checkpoint="latest", **FLAGS)


@pytest.mark.parametrize("version", [2, 4])
def test_another_layout_is_refused_and_not_taken_for_damage(output_dir, version):
    path = output_dir / "checkpoint-3" / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version, "something": "new"}))
    write_checksums(path.parent)
    for name in ("latest", "checkpoint-3"):
        with pytest.raises(ValueError, match=f"checkpoint-3 has version {version} .* start a new run"):
            find_checkpoint(name, output_dir)
    assert names(output_dir) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_everything_is_on_disk_before_it_has_its_name(tiny_sdxl, faces, tmp_path, monkeypatch):
    """Each file, and each folder of files, is synced after its last change and before the rename; then the parent."""
    synced, renamed = {}, []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_ctime_ns
        renamed.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def record_rename(source, target) -> None:
        source, target = Path(source), Path(target)
        if source.is_relative_to(tmp_path) and not target.name.endswith(".removed"):
            for path in (source, *source.rglob("*")):
                assert synced.get(path.stat().st_ino) == path.stat().st_ctime_ns, f"{path} is not on disk"
        replace(source, target)
        renamed.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    train(tiny_sdxl, faces, tmp_path / "lora", checkpoints_total_limit=1, **FLAGS)
    names = [Path(target).name for what, target in renamed if what == "rename"]
    assert names[:4] == ["checkpoint-1", "checkpoint-2", ".checkpoint-1.removed", "checkpoint-3"]
    assert names[-1] == "pytorch_lora_weights.safetensors"
    for (what, target), after in zip(renamed, renamed[1:]):
        assert what == "sync" or after == ("sync", str(Path(target).parent)), target


def test_leftovers_of_a_killed_run_are_removed(tiny_sdxl, faces, output_dir):
    for name in (".checkpoint-4.partial", ".checkpoint-1.removed", ".output.partial"):
        (output_dir / name).mkdir()
        (output_dir / name / "half").write_bytes(b"half")
    train(tiny_sdxl, faces, output_dir, resume_from_checkpoint="latest", **FLAGS | {"max_train_steps": 4})
    assert [path.name for path in output_dir.glob(".*")] == [".lock"]


def test_a_finished_run_writes_a_lost_result_again(tiny_sdxl, faces, whole, output_dir):
    """The kill came between the last checkpoint and the result."""
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        (output_dir / name).unlink()
    assert_same(train(tiny_sdxl, faces, output_dir, resume_from_checkpoint="latest", **FLAGS), lora_weights(whole))
    assert "optimizer steps: 3" in (output_dir / "README.md").read_text()


def test_broken_checkpoints_stop_the_run_before_models_load(faces, output_dir):
    (output_dir / "checkpoint-3" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(Damaged, match="checkpoint-3/optimizer.bin"):
        train("no/such-model", faces, output_dir, resume_from_checkpoint="checkpoint-3", **FLAGS)
