"""The checkpoint with the best accuracy on held-out pairs, and making it the result."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from ..runtime.checksums import Damaged
from ..runtime.processes import on_main_process
from .checkpoints import verify


logger = get_logger(__name__)


@dataclass
class Best:
    """What --keep_best knows; a checkpoint keeps it.

    Attributes:
        step: whose checkpoint is best so far; 0 before the first validation.
        accuracy: on the held-out pairs, there.
        validated: last step that was validated.
    """

    step: int = 0
    accuracy: float = -1.0
    validated: int = 0

    def add(self, step: int, accuracy: float | None) -> bool:
        """Takes note of a validation; returns whether it is the best. The earlier of two equal ones is."""
        self.validated = step
        if accuracy is None or accuracy <= self.accuracy:
            return False
        self.step, self.accuracy = step, accuracy
        return True


def load_best(accelerator: Accelerator, model, output_dir: Path, best: Best, step: int, accuracy: float) -> int:
    """Puts the LoRA of the best checkpoint into the model, unless the last step is as good. Every process must call it.

    Args:
        accelerator: of the run.
        model: with the LoRA of the last step.
        output_dir: with the checkpoints.
        best: before the last step.
        step, accuracy: the last ones.

    Returns:
        The step whose LoRA the model has now.
    """
    if accuracy > best.accuracy or best.step == 0:
        logger.info(f"--keep_best: the last step, {step}, has the best held-out accuracy, {accuracy:.3f}")
        return step
    checkpoint = output_dir / f"checkpoint-{best.step}"
    try:
        on_main_process(accelerator, verify, checkpoint)
    except (Damaged, ValueError) as error:
        logger.error(f"--keep_best: {error} The result is the last step's LoRA instead.")
        return step
    model.load_lora(checkpoint)
    logger.info(
        f"--keep_best: the result is step {best.step}, with a held-out accuracy of {best.accuracy:.3f}; the last step,"
        f" {step}, had {accuracy:.3f}"
    )
    return best.step
