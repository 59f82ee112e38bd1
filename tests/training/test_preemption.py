"""SIGTERM and SIGINT: the step is finished and saved; a second signal ends the process; workers are not hurt.

Several processes, and signals at any instant: tests/faults/preempt.py, of which test_faults.py runs a handful.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import lora_weights, train
from orpo.runtime.signals import COPY_SECONDS, EXIT_STATUS, SIGNALS, shield_worker
from orpo.training import trainer as training
from orpo.training.validation import Validator
from torch.utils.data import DataLoader


FLAGS = {"max_train_steps": 4, "lora_dropout": 0.2, "resume_from_checkpoint": "latest"}


def signal_at(monkeypatch, number: int, place: object, name: str, call: int) -> None:
    """Sends this process a signal in the `call`-th call of a function."""
    calls, function = [], getattr(place, name)

    def function_with_signal(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, function_with_signal)


@pytest.fixture
def run_status(monkeypatch):
    """The exit status of the last run by `helpers.train`, which returns the LoRA that an interrupted run does not write."""
    import train_diffusion_orpo_sdxl_lora as script

    statuses, main = [], script.main
    monkeypatch.setattr(script, "main", lambda line: statuses.append(main(line)) or statuses[-1])
    return statuses


def interrupted(tiny_sdxl, faces, output_dir, run_status, **flags) -> int:
    with pytest.raises(FileNotFoundError):  # there is no LoRA yet
        train(tiny_sdxl, faces, output_dir, **FLAGS | flags)
    return run_status[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_finished_and_saved_and_the_run_goes_on(
    tiny_sdxl, faces, tmp_path, monkeypatch, run_status, capfd, number
):
    """Amid the accumulation of step 2, with no checkpoint due for long."""
    flags = {"gradient_accumulation_steps": 2}
    expected = train(tiny_sdxl, faces, tmp_path / "whole", **FLAGS | flags)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_at(patch, number, training, "compute_losses", call=3)
        assert interrupted(tiny_sdxl, faces, tmp_path / "part", run_status, **flags) == EXIT_STATUS
    assert [path.name for path in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-2"]
    assert f"{number.name}: ending after this step" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = train(tiny_sdxl, faces, tmp_path / "part", **FLAGS | flags)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    assert run_status == [0, EXIT_STATUS, 0]


def test_a_signal_during_validation_is_heeded_after_the_next_step(
    tiny_sdxl, faces, output_dir, monkeypatch, run_status
):
    signal_at(monkeypatch, signal.SIGTERM, Validator, "during_training", call=1)
    flags = {"run_validation": True, "validation_steps": 1, "validation_prompts": ["red"], "num_validation_pairs": 2}
    assert interrupted(tiny_sdxl, faces, output_dir, run_status, validation_inference_steps=1, **flags) == EXIT_STATUS
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_signal_in_the_last_step_leaves_validation_and_result_to_the_resumed_run(
    tiny_sdxl, faces, output_dir, monkeypatch, run_status
):
    signal_at(monkeypatch, signal.SIGTERM, training, "compute_losses", call=4)
    assert interrupted(tiny_sdxl, faces, output_dir, run_status) == EXIT_STATUS
    resumed = train(tiny_sdxl, faces, output_dir, **FLAGS)
    torch.testing.assert_close(resumed, lora_weights(output_dir / "checkpoint-4"), rtol=0, atol=0)


WAITING = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from orpo.runtime import signals
signals.time = SimpleNamespace(monotonic=lambda: float(Path(sys.argv[1]).read_text()))
with signals.StopSignals():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_but_a_launchers_copy_does_not(number, tmp_path):
    """By the process's own clock, which is a file here."""
    folder = Path(__file__).parents[2] / "examples" / "diffusion_orpo"
    (tmp_path / "clock").write_text("10")
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, tmp_path / "clock"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # SLURM's, torchrun's, and once more
        process.send_signal(number)
        time.sleep(0.2)  # signals that wait are delivered as one
    assert process.poll() is None
    (tmp_path / "clock").write_text(str(10 + COPY_SECONDS + 0.1))
    process.send_signal(number)
    assert process.wait() == -number
    assert process.stderr.read().count(f"{number.name}: ending after this step") == 1


def test_workers_outlive_signals_to_all_processes_but_not_their_own_process():
    """SLURM signals every process of a job, workers too; the last step needs what they read."""
    loader = DataLoader(range(1000), num_workers=2, worker_init_fn=shield_worker, generator=torch.Generator())
    batches = iter(loader)
    first = [int(next(batches)) for _ in range(10)]
    workers = batches._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
    assert first + [int(batch) for batch in batches] == list(range(1000))

    batches = iter(loader)
    next(batches)
    workers = batches._workers
    for worker in workers:
        worker.terminate()
        worker.join()
    assert not any(worker.is_alive() for worker in workers)


def test_a_run_in_a_thread_trains_and_says_that_it_hears_no_signals(tiny_sdxl, faces, output_dir, caplog):
    """As in gradio and notebooks: Python lets the main thread alone handle signals."""
    before, ended = [signal.getsignal(number) for number in SIGNALS], []
    thread = threading.Thread(target=lambda: ended.append(train(tiny_sdxl, faces, output_dir)))
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert ended and len(ended[0]) > 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert "main thread" in caplog.text
