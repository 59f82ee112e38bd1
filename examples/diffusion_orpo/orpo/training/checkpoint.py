"""Checkpoints of a run: save, rotate, verify, find, resume.

`checkpoint-N` holds the LoRA in diffusers format, optimizer, learning-rate scheduler, gradient scaler, the RNG state
and the data position of each process, `training_state.json`, and `SHA256SUMS` of all these, which `sha256sum --check`
reads too. It is written under another name, forced to disk and renamed: it is complete or absent.

Accelerate writes and reads everything but the LoRA, so every optimizer and precision that it prepares is covered. It
unpickles tensors and numbers only (`weights_only`). It silently skips a random state that does not load, so that is
checked here.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import load

from ..runtime.checksums import Damaged, verify_checksums, write_checksums
from ..runtime.durable import remove_folder, rename, sync_all
from ..runtime.processes import on_all_processes, on_main_process
from .protocols import ModelFamily


logger = get_logger(__name__)

VERSION = 3  # of the layout
STATE_FILE = "training_state.json"


@dataclass
class TrainingState:
    """Where a run stands, and what a run that continues it must agree with.

    Attributes:
        global_step: optimizer steps done.
        data: fingerprint of the pairs.
        flags: all flags; those that a resumed run is compared by have their exact values.
        processes: how many saved it.
        pairs_per_step: at the beginning of the run.
        pairs_seen: by all processes together.
        horizon: steps that the learning rate's course is laid out for.
        base: identity of the base model, from the model family; empty if unknown.
        learning_rate: of the next step.
        trackers: what each tracker needs to continue the same run, by its name.
        skipped_steps: how many steps of `global_step` the gradient scaler skipped.
        collapse: of the `CollapseWatch`.
        best: of `Best`, with --keep_best.
        version: of the checkpoint's layout.
    """

    global_step: int
    data: str
    flags: dict
    processes: int
    pairs_per_step: int
    pairs_seen: int = 0
    horizon: int | None = None
    base: dict[str, str] = field(default_factory=dict)
    learning_rate: float | None = None
    trackers: dict[str, str] = field(default_factory=dict)
    skipped_steps: int = 0
    collapse: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    version: int = VERSION


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, by ascending N. Other names, such as `checkpoint-old`, are left alone."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, verified, or None to start from scratch.

    "latest" skips broken checkpoints to reach the newest good one. The skipped ones become `checkpoint-N.broken`, so that
    the run can write that N again.

    Args:
        resume_from_checkpoint: None, "latest", a path, or a folder's name in `output_dir`.
        output_dir: of the run.

    Raises:
        ValueError: the checkpoint does not exist, is broken, or comes from another version of these scripts; or
            `output_dir` holds good later ones of another run.
    """
    existing = list_checkpoints(output_dir)
    broken: dict[Path, str] = {}
    if resume_from_checkpoint is None:
        found = None
    elif resume_from_checkpoint == "latest":
        found = next((path for path in reversed(existing) if not note_if_broken(path, broken)), None)
        if broken and not found:
            raise ValueError(
                f"All checkpoints in {output_dir} are broken: {' '.join(broken.values())} Move them away to start from scratch."
            )
        logger.info(f"Resuming from {found}" if found else f"No checkpoint in {output_dir}: starting from scratch")
    else:
        found = named_checkpoint(resume_from_checkpoint, output_dir)
    step = read_state(found).global_step if found else -1
    later = [path for path in existing if step_of(path) > step]
    for path in later:
        if found is None or path not in broken and not note_if_broken(path, broken):
            raise ValueError(
                f"{output_dir} holds {later[-1].name} of an earlier run. Continue it with"
                " --resume_from_checkpoint=latest, or choose another --output_dir."
            )
    for path in later:
        logger.warning(f"{broken[path]} It is kept as {set_aside(path).name}; the run continues from {found}")
    return found


def named_checkpoint(name: str, output_dir: Path) -> Path:
    """The checkpoint of a name in `output_dir`, or of a path, verified."""
    found = next((path for path in (output_dir / name, Path(name)) if path.is_dir()), None)
    if found is None:
        raise ValueError(
            f"--resume_from_checkpoint={name} is not a checkpoint, neither in {output_dir} nor as a path."
            f" Found: {', '.join(path.name for path in list_checkpoints(output_dir)) or 'none'}."
        )
    verify(found)
    return found


def note_if_broken(checkpoint: Path, broken: dict[Path, str]) -> bool:
    """Whether a checkpoint is broken; if so, adds what is wrong to `broken`."""
    try:
        verify(checkpoint)
    except Damaged as error:
        broken[checkpoint] = str(error)
    return checkpoint in broken


def set_aside(checkpoint: Path) -> Path:
    """Renames a broken checkpoint to `checkpoint-N.broken`, or `.broken-2` and so on, and returns that."""
    target, number = checkpoint.with_name(f"{checkpoint.name}.broken"), 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}.broken-{number}")
    rename(checkpoint, target)
    return target


def verify(checkpoint: Path) -> None:
    """Checks that every file is unchanged.

    Raises:
        Damaged: names a file that has changed.
        ValueError: another version of these scripts wrote it.
    """
    verify_checksums(checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise Damaged(f"{checkpoint / STATE_FILE} is missing.")
    read_state(checkpoint)


def read_state(checkpoint: Path) -> TrainingState:
    """Reads `training_state.json`.

    Raises:
        ValueError: it has another version.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text())
    if state.get("version") != VERSION:
        raise ValueError(
            f"{checkpoint} has version {state.get('version')} of the checkpoints' layout, and these scripts read"
            f" version {VERSION} only. Continue it with the scripts that wrote it, or start a new run."
        )
    return TrainingState(**state)


def read_position(checkpoint: Path, process_index: int) -> dict:
    """Where a process stood in its data. A process that the saved run did not have gets the first one's position.

    Its content is up to the data source, as is whether it can serve another number of processes.
    """
    path = checkpoint / f"data_position_{process_index}.json"
    return json.loads((path if path.exists() else checkpoint / "data_position_0.json").read_text())


def register_lora_hooks(accelerator: Accelerator, model: ModelFamily) -> None:
    """Makes `accelerator.save_state` and `load_state` handle only the LoRA, not the whole denoiser."""

    def save(models: list, weights: list, directory: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            model.save_lora(Path(directory))

    def load(models: list, directory: str) -> None:
        models.clear()
        model.load_lora(Path(directory))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, saved_processes: int) -> None:
    """Restores LoRA, optimizer, learning rate, scaler and RNG of this process.

    Args:
        accelerator: of the run.
        checkpoint: a verified one.
        saved_processes: of the run that saved it. If this one has more, LoRA dropout on the new ones is freshly seeded.

    Raises:
        Damaged: a file holds something other than tensors and numbers, or does not fit.
    """
    random_state = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        accelerator.load_state(str(checkpoint))
        if accelerator.process_index < saved_processes:
            saved = load(random_state)["torch_manual_seed"]
            if not torch.equal(saved, torch.get_rng_state()):
                raise Damaged(f"{random_state} was not loaded: the random state is not the saved one.")
        else:
            logger.warning(f"{random_state} does not exist: LoRA dropout is freshly seeded", main_process_only=False)
    except (UnpicklingError, KeyError, TypeError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]  # the rest is torch's advice to load it unsafely
        raise Damaged(
            f"{checkpoint} was not loaded, since it holds something that a checkpoint never does: {reason}"
        ) from error
    accelerator.step = 0  # checkpoints lie between windows, even if the number of accumulation steps has changed


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainingState, position: dict, total_limit: int | None
) -> None:
    """Writes `checkpoint-{global_step}`, then removes the oldest beyond `total_limit`, but not the best. Every process must call it.

    Args:
        accelerator: of the run.
        output_dir: gets the checkpoint.
        state: where the run stands.
        position: where this process stands in its data.
        total_limit: how many checkpoints to keep; None for all.

    Raises:
        OSError: on every process, if one can't write; says why, and which is the last good checkpoint.
    """
    checkpoint = output_dir / f"checkpoint-{state.global_step}"
    partial = output_dir / f".{checkpoint.name}.partial"

    def write_own_part() -> None:
        accelerator.save_state(str(partial))
        (partial / f"data_position_{accelerator.process_index}.json").write_text(json.dumps(position))

    def complete() -> None:
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        write_checksums(partial)
        sync_all(partial)
        rename(partial, checkpoint)

    try:
        on_main_process(accelerator, partial.mkdir)
        on_all_processes(accelerator, write_own_part)
        on_main_process(accelerator, complete)
    except OSError as error:
        full = shutil.disk_usage(output_dir).free < 2**20  # torch.save does not say so
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # it would keep filling the disk
        good = list_checkpoints(output_dir)
        raise OSError(
            f"{checkpoint} can't be written: {'No space left on device. ' if full else ''}{error}. Fix that, and resume."
            f" {f'The last good checkpoint is {good[-1]}' if good else 'No checkpoint was saved before'}."
        ) from error
    logger.info(f"Saved {checkpoint}")
    if accelerator.is_main_process and total_limit:
        best = output_dir / f"checkpoint-{state.best.get('step', 0)}"
        for outdated in (path for path in list_checkpoints(output_dir)[:-total_limit] if path != best):
            logger.info(f"Removing {outdated}: --checkpoints_total_limit={total_limit}")
            remove_folder(outdated)
