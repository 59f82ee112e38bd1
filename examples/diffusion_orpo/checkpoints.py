"""Checkpoints of a run: save, rotate, find, resume.

`checkpoint-N` holds the LoRA in diffusers format, optimizer, learning-rate scheduler, gradient scaler, the RNG state
and the data position of each process, and `training_state.json`. It is written under another name and renamed, so it is
complete or absent.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)

STATE_FILE = "training_state.json"
# A checkpoint restores what these flags decided, so a run that continues it must have the same.
SAME_FLAGS = (
    "seed rank lora_alpha lora_layers learning_rate scale_lr lr_scheduler use_8bit_adam adam_beta1 adam_beta2"
    " adam_weight_decay adam_epsilon mixed_precision"
).split()


@dataclass
class TrainingState:
    """Where a run stands, and what it must agree on with the run that continues it.

    Attributes:
        global_step: optimizer steps done.
        data: fingerprint of the pairs.
        flags: those of `SAME_FLAGS`, with their values.
    """

    global_step: int
    data: str
    flags: dict


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, by rising N. Other names, such as `checkpoint-old`, are let alone."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """The folder to resume from, or None to start anew.

    Args:
        resume_from_checkpoint: None, "latest", a path, or a folder's name in `output_dir`.
        output_dir: of the run.

    Raises:
        ValueError: there is no such checkpoint; or `output_dir` holds later ones, of a run that this one would mix with.
    """
    existing = list_checkpoints(output_dir)
    found = None
    if resume_from_checkpoint == "latest":
        found = existing[-1] if existing else None
        logger.info(f"Resuming from {found}" if found else f"No checkpoint in {output_dir}: starting anew")
    elif resume_from_checkpoint is not None:
        candidates = (output_dir / resume_from_checkpoint, Path(resume_from_checkpoint))
        found = next((path for path in candidates if (path / STATE_FILE).is_file()), None)
        if found is None:
            raise ValueError(
                f"--resume_from_checkpoint={resume_from_checkpoint} is not a checkpoint, neither in {output_dir} nor as"
                f" a path. There are: {', '.join(path.name for path in existing) or 'none'}."
            )
    step = read_state(found).global_step if found else -1
    if existing and step_of(existing[-1]) > step:
        raise ValueError(
            f"{output_dir} holds {existing[-1].name} of an earlier run. Continue it with --resume_from_checkpoint=latest,"
            " or choose another --output_dir."
        )
    return found


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_state(checkpoint: Path) -> TrainingState:
    return TrainingState(**json.loads((checkpoint / STATE_FILE).read_text()))


def read_position(checkpoint: Path, process_index: int) -> dict:
    """Where a process stood in its data. A process that the saved run did not have gets the first one's position.

    What is in it is the data source's own affair, and so is whether it serves another number of processes.
    """
    path = checkpoint / f"data_position_{process_index}.json"
    return json.loads((path if path.exists() else checkpoint / "data_position_0.json").read_text())


def check_same_run(saved: TrainingState, current: TrainingState, checkpoint: Path) -> None:
    """Stops a resumed run that would not continue the saved one.

    Raises:
        ValueError: names what differs.
    """
    differences = [
        f"--{name} was {value} and is now {current.flags[name]}"
        for name, value in saved.flags.items()
        if value != current.flags[name]
    ]
    if saved.data != current.data:
        differences.append("the pairs are others")
    if differences:
        raise ValueError(f"Cannot resume from {checkpoint}: {'; '.join(differences)}.")


def register_lora_hooks(accelerator: Accelerator, model) -> None:
    """Makes `accelerator.save_state` and `load_state` handle the LoRA alone, not the whole denoiser."""

    def save(models: list, weights: list, directory: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            model.save_lora(Path(directory))

    def load(models: list, directory: str) -> None:
        models.clear()
        model.load_lora(Path(directory))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainingState, position: dict, total_limit: int | None
) -> None:
    """Writes `checkpoint-{global_step}`, then removes the oldest beyond `total_limit`. Every process must call it.

    Args:
        accelerator: of the run.
        output_dir: gets the checkpoint.
        state: where the run stands.
        position: where this process stands in its data.
        total_limit: how many checkpoints to keep; None for all.
    """
    checkpoint = output_dir / f"checkpoint-{state.global_step}"
    partial = output_dir / f".{checkpoint.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    (partial / f"data_position_{accelerator.process_index}.json").write_text(json.dumps(position))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        os.replace(partial, checkpoint)
        logger.info(f"Saved {checkpoint}")
        for outdated in list_checkpoints(output_dir)[:-total_limit] if total_limit else []:
            logger.info(f"Removing {outdated}: --checkpoints_total_limit={total_limit}")
            shutil.rmtree(outdated)
    accelerator.wait_for_everyone()
