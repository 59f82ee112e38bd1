"""Does a resumed run continue the saved one? Compares the two, and refuses or warns where they differ."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from accelerate.logging import get_logger

from ..runtime.messages import differences
from ..runtime.processes import on_main_process
from .checkpoint import TrainingState, read_position, read_state
from .optimizer import same_rate
from .protocols import PairSource
from .run import Run


logger = get_logger(__name__)

LENGTH = ("max_train_steps", "num_train_epochs")  # settings that say how long a run is


def identify_in_background(identify: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """Starts to identify the base, which reads all of its files, in the background.

    Args:
        identify: takes seconds for a model in a local folder.

    Returns:
        A function that waits for the result: empty, with a warning, if the files can no longer be read.
    """
    executor = ThreadPoolExecutor(1, "identity")
    future: Future = executor.submit(identify)
    executor.shutdown(wait=False)

    def result() -> dict[str, str]:
        try:
            return future.result()
        except OSError as error:
            logger.warning(f"The base model can't be identified, so checkpoints won't record it: {error}")
            return {}

    return result


def begin_or_resume(
    run: Run, pairs: PairSource, base: Callable[[], dict[str, str]], pairs_per_step: int
) -> tuple[TrainingState, dict | None]:
    """Where the run stands and where its data stands: at the start, or where the checkpoint says.

    Args:
        run: the run.
        pairs: of the run.
        base: waits for the base's identity.
        pairs_per_step: of this run.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    accelerator = run.accelerator
    flags = run.recorded_flags
    state = TrainingState(0, pairs.fingerprint, flags, accelerator.num_processes, pairs_per_step=pairs_per_step)
    if run.checkpoint is None:
        return state, None
    saved = read_state(run.checkpoint)
    position = read_position(run.checkpoint, accelerator.process_index)

    def check() -> dict[str, str]:
        state.base = base()
        check_same_run(saved, state, run)
        return state.base

    saved.base = on_main_process(accelerator, check)
    if any(saved.flags.get(name) != flags[name] for name in LENGTH):
        saved.horizon = None
    saved.flags = flags
    return saved, position


def check_same_run(saved: TrainingState, current: TrainingState, run: Run) -> None:
    """Stops a resumed run that would not continue the saved one.

    Args:
        saved: of the checkpoint.
        current: of this run, at its start.
        run: with settings that must be unchanged, and some whose change is pointed out.

    Raises:
        ValueError: names what differs.
    """
    checkpoint = run.checkpoint
    refused = changed(saved.flags, run.config.values(resume="same"))
    if saved.data != current.data:
        refused.append("the pairs are different")
    if saved.base:
        refused += [
            f"the base model is different: {difference}" for difference in differences(saved.base, current.base)
        ]
    if refused:
        raise ValueError(f"Cannot resume from {checkpoint}: {'; '.join(refused)}.")
    if not saved.base:
        logger.warning(f"{checkpoint} does not record the base model: whether it is unchanged can't be checked")
    noted = changed(saved.flags, run.config.values(resume="warn"))
    if noted:
        logger.warning(f"The run continues with settings that differ from those of {checkpoint}: {'; '.join(noted)}")


def changed(saved: dict, now: dict) -> list[str]:
    """The saved flags whose value has changed."""
    return [f"--{name} was {saved[name]} and is now {value}" for name, value in now.items() if saved[name] != value]


def check_learning_rate(run: Run, state: TrainingState, now: float) -> None:
    """Stops a resumed run whose learning rate would jump.

    Raises:
        ValueError: names both.
    """
    if state.learning_rate is not None and not same_rate(state.learning_rate, now):
        raise ValueError(
            f"Cannot resume from {run.checkpoint}: the learning rate would jump from {state.learning_rate:.3g} to"
            f" {now:.3g}, since --lr_scheduler={run.config.lr_scheduler} was laid out for another length or warm-up. Keep"
            " --max_train_steps or --num_train_epochs, and --lr_warmup_steps, as they were; or start a new run."
        )
