"""Does a resumed run continue the saved one? Compares the two, and refuses or warns where they differ."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate.logging import get_logger

from ..runtime.messages import differences
from .checkpoints import TrainingState


logger = get_logger(__name__)


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


def check_same_run(saved: TrainingState, current: TrainingState, same: dict, warn: dict, checkpoint: Path) -> None:
    """Stops a resumed run that would not continue the saved one.

    Args:
        saved: of the checkpoint.
        current: of this run, at its start.
        same: flags that must be unchanged, with their current values.
        warn: flags whose change is pointed out.
        checkpoint: for messages.

    Raises:
        ValueError: names what differs.
    """
    refused = changed(saved.flags, same)
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
    noted = changed(saved.flags, warn)
    if noted:
        logger.warning(f"The run continues with settings that differ from those of {checkpoint}: {'; '.join(noted)}")


def changed(saved: dict, now: dict) -> list[str]:
    """The saved flags whose value has changed."""
    return [f"--{name} was {saved[name]} and is now {value}" for name, value in now.items() if saved[name] != value]
