"""The beginning and the end of a run: devices, folder, checkpoint and seed before models load, and trackers."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from huggingface_hub import create_repo

import diffusers

from ..config import TrainingConfig
from ..runtime.durable import remove_leftovers
from ..runtime.lock import lock
from ..runtime.precision import DTYPES
from ..runtime.processes import is_lost_connection, on_main_process
from ..runtime.redaction import command_line_without_secrets, flags_without_secrets
from ..runtime.signals import EXIT_STATUS
from .accelerate_settings import check_settings, refuse_sharding
from .checkpoint import find_checkpoint, list_checkpoints, read_state


logger = get_logger(__name__)

# How long processes wait for one another, including for the main one to generate validation images and to upload.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Run:
    """One training run, from its first line in the log to its last.

    Attributes:
        config: with the seed and the precision in force, if they were not given.
        accelerator: devices, processes, precision, trackers.
        checkpoint: to resume from, or None.
        hub_repository: to upload to, or None.
    """

    config: TrainingConfig
    accelerator: Accelerator
    checkpoint: Path | None
    hub_repository: str | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights: what the flag, or else the accelerate configuration, says."""
        return DTYPES[self.accelerator.mixed_precision]

    @property
    def seed(self) -> int:
        """The one given, the checkpoint's, or a random one."""
        assert self.config.seed is not None  # `start_run` fills it in
        return self.config.seed

    @property
    def recorded_flags(self) -> dict[str, object]:
        """All settings for a checkpoint: exact values of those that a resumed run is compared by, the others without secrets."""
        config = self.config
        return flags_without_secrets(config.values()) | config.values(resume="same") | config.values(resume="warn")


@contextmanager
def start_run(config: TrainingConfig) -> Iterator[Run]:
    """Prepares devices, logging, seed, output folder and Hub repository.

    The output folder is this run's alone until the block is left. A failure in the block is logged with what to do;
    without one, trackers and process group are closed.

    Raises:
        ValueError: the output folder can't be written or is in use, the checkpoint is missing or damaged, or the tracker
            is not installed.
    """
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(config)
    on_main_process(accelerator, make_writable, output_dir)
    with lock(output_dir, accelerator):
        on_main_process(accelerator, remove_leftovers, output_dir)
        checkpoint = on_main_process(accelerator, find_checkpoint, config.resume_from_checkpoint, output_dir)
        seed = config.seed
        if seed is None:
            drawn = on_main_process(accelerator, secrets.randbits, 31)
            seed = read_state(checkpoint).flags["seed"] if checkpoint else drawn
            logger.info(f"No --seed was given: using {seed}")
        set_seed(seed)
        repository = on_main_process(accelerator, make_repository, config) if config.push_to_hub else None
        try:
            settings = config.replace(seed=seed, mixed_precision=accelerator.mixed_precision)
            yield Run(settings, accelerator, checkpoint, repository)
        except Exception as error:
            explain_failure(error, config, accelerator)
            raise
        # First the wrapper of the model, then its process group: if the wrapper goes last, it holds Python's lock while it
        # waits for a thread that waits for that lock, and some runs never end.
        accelerator.free_memory()
        accelerator.end_training()


def make_repository(config: TrainingConfig) -> str:
    """Makes the repository to upload to, if it doesn't exist, and returns its full name."""
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    return create_repo(name, exist_ok=True).repo_id


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Sets up devices, precision and logging.

    Raises:
        ValueError: accelerate's own configuration contradicts the flags, or the tracker is not installed.
    """
    refuse_sharding()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=os.path.join(config.output_dir, "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        step_scheduler_with_optimizer=False,  # the loop steps it: once per optimizer step, however many processes
    )
    check_settings(config, accelerator)
    if config.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to={config.report_to}: not installed. Install it, or choose another tracker.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    for name in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()  # loading takes seconds; the bars of downloads stay
    return accelerator


def make_writable(output_dir: Path) -> None:
    """Makes the output folder, and checks that it can be written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output_dir={output_dir} can't be written: {error}") from error


def explain_failure(error: Exception, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Logs what the exception itself can't know: which process is to blame, and where the run can continue."""
    if accelerator.num_processes > 1 and is_lost_connection(error):
        logger.error(
            f"Process {accelerator.process_index} ends because another one died, or did not answer within"
            f" {TIMEOUT}. The other one's own messages say why.",
            main_process_only=False,
        )
    checkpoints = list_checkpoints(Path(config.output_dir))
    if checkpoints:
        logger.error(
            f"The run ended with {type(error).__name__}, whose message follows. Its last checkpoint is {checkpoints[-1]}:"
            " once the cause is fixed, continue with --resume_from_checkpoint=latest",
            main_process_only=False,
        )


def start_trackers(run: Run, step: int, known: dict[str, str]) -> dict[str, str]:
    """Starts the trackers with the flags as configuration, without their secrets.

    Args:
        run: whose flags they record.
        step: the one that the run continues from, or 0. TensorBoard hides later steps that an interrupted run had logged.
        known: what this function returned in the run that is resumed.

    Returns:
        What the trackers need to continue the same run.
    """
    options: dict[str, dict] = {"tensorboard": {"purge_step": step + 1}, "wandb": {"dir": str(run.output_dir)}}
    if "wandb" in known:
        options["wandb"] |= {"id": known["wandb"], "resume": "allow"}
    with command_line_without_secrets():
        run.accelerator.init_trackers(
            os.environ.get("WANDB_PROJECT", run.output_dir.resolve().name),
            config=flags_without_secrets(run.config.values()),
            init_kwargs=options,
        )
    if not run.accelerator.is_main_process:
        return {}
    return {tracker.name: tracker.run.id for tracker in run.accelerator.trackers if tracker.name == "wandb"}


def flush_trackers(accelerator: Accelerator) -> None:
    """Writes everything logged so far: a run that continues from a checkpoint does not log the steps before it again."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard" and accelerator.is_main_process:
            tracker.writer.flush()


def report_preemption(received, step: int) -> int:
    """Logs why a run ends after saving the checkpoint of `step`, and returns its exit status.

    Args:
        received: the signal, or None where another process got it.
        step: the last one made.
    """
    logger.warning(
        f"{received.name if received else 'A signal to another process'}: step {step} is saved. Continue with"
        f" --resume_from_checkpoint=latest. Exit status {EXIT_STATUS}",
        main_process_only=False,
    )
    return EXIT_STATUS
