"""Does a resumed run continue the one that was saved? What must be the same, what is pointed out, what can't be known."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate.logging import get_logger

from ..system.messages import differences
from .checkpoints import TrainingState


logger = get_logger(__name__)


def identify_in_background(identify: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """Begins to identify the base, which reads all of its files, beside whatever else the run does.

    Args:
        identify: takes seconds for a model in a local folder.

    Returns:
        A function that waits for the result: nothing, with a warning, where the files can't be read any more.
    """
    executor = ThreadPoolExecutor(1, "identity")
    future: Future = executor.submit(identify)
    executor.shutdown(wait=False)

    def result() -> dict[str, str]:
        try:
            return future.result()
        except OSError as error:
            logger.warning(f"The base model can't be identified, so that checkpoints don't know it: {error}")
            return {}

    return result


def check_same_run(saved: TrainingState, current: TrainingState, same: dict, warn: dict, checkpoint: Path) -> None:
    """Stops a resumed run that would not continue the saved one.

    Args:
        saved: of the checkpoint.
        current: of this run, at its start.
        same: flags that must be as they were, with their values now.
        warn: flags whose change is pointed out.
        checkpoint: for messages.

    Raises:
        ValueError: names what differs.
    """
    refused = changed(saved.flags, same)
    if saved.data != current.data:
        refused.append("the pairs are others")
    if saved.base:
        refused += [f"the base model is another: {difference}" for difference in differences(saved.base, current.base)]
    if refused:
        raise ValueError(f"Cannot resume from {checkpoint}: {'; '.join(refused)}.")
    unknown = [f"--{name}" for name in (*same, *warn) if name not in saved.flags]
    if not saved.base:
        unknown.append("the base model")
    if unknown:
        logger.warning(
            f"{checkpoint} does not record {', '.join(unknown)}: it can't be checked that they are what they were"
        )
    noted = changed(saved.flags, warn)
    if noted:
        logger.warning(
            f"The run goes on with other settings than those that {checkpoint} was made with: {'; '.join(noted)}"
        )


def changed(saved: dict, now: dict) -> list[str]:
    """The flags, among those saved, that have another value now."""
    return [
        f"--{name} was {saved[name]} and is now {value}"
        for name, value in now.items()
        if name in saved and saved[name] != value
    ]
