"""Is it getting better? Preference accuracy on held-out pairs, and images from fixed prompts and seeds.

Validation uses the modules that train: no second copy is loaded. With --keep_best it chooses the result.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL.Image import Image

from ..config import TrainingConfig
from ..runtime.checksums import Damaged
from ..runtime.processes import on_main_process
from .checkpoint import verify
from .held_out import ACCURACY, PROMPT_MARGIN, NoiseLevels, measure_held_out
from .protocols import ModelFamily, PairSource
from .run import Run


logger = get_logger(__name__)

# Below this share of the base's prompt margin a LoRA has probably lost the prompt. Digits that had stopped being digits
# were at 0.4, smiles on intact faces at 0.6: docs/results.md.
LOST_PROMPT = 0.5


@dataclass
class ValidationResults:
    """Held-out metrics and images, with the LoRA and without it.

    Attributes:
        metrics, metrics_without_lora: `eval_*` to mean over the held-out pairs; empty where none are held out.
        images, images_without_lora: the validation prompts' images; on the main process only.
        comparison: the result of `Validator.compare`, and with --keep_best the step.
    """

    metrics: dict[str, float]
    metrics_without_lora: dict[str, float]
    images: list[Image]
    images_without_lora: list[Image]
    comparison: dict[str, float] = field(default_factory=dict)

    def all_metrics(self) -> dict[str, float]:
        """Both sets of metrics, the second as `eval_*_without_lora`, and the comparison."""
        without_lora = {f"{name}_without_lora": value for name, value in self.metrics_without_lora.items()}
        return self.metrics | without_lora | self.comparison


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

    def load(self, run: Run, model: ModelFamily, step: int, accuracy: float | None) -> int:
        """Puts the LoRA of the best checkpoint into the model, unless the last step is as good. Every process must call it.

        Args:
            run: with the checkpoints.
            model: with the LoRA of the last step.
            step: the last one.
            accuracy: there, by `Validator.accuracy_to_keep`.

        Returns:
            The step whose LoRA the model has now.
        """
        accuracy = -1.0 if accuracy is None else accuracy
        if accuracy > self.accuracy or self.step == 0:
            logger.info(f"--keep_best: the last step, {step}, has the best held-out accuracy, {accuracy:.3f}")
            return step
        checkpoint = run.output_dir / f"checkpoint-{self.step}"
        try:
            on_main_process(run.accelerator, verify, checkpoint)
        except (Damaged, ValueError) as error:
            logger.error(f"--keep_best: {error} The result is the last step's LoRA instead.")
            return step
        model.load_lora(checkpoint)
        logger.info(
            f"--keep_best: the result is step {self.step}, with a held-out accuracy of {self.accuracy:.3f}; the last step,"
            f" {step}, had {accuracy:.3f}"
        )
        return self.step


@dataclass
class Validator:
    """Validates during and after training.

    Attributes:
        run: the `Run`.
        model: the model family, with the LoRA that trains.
        pairs: the source of held-out pairs.
    """

    run: Run
    model: ModelFamily
    pairs: PairSource

    @cached_property
    def levels(self) -> NoiseLevels:
        """The noise at which held-out pairs are predicted."""
        return NoiseLevels(self.model.noise_process)

    @property
    def config(self) -> TrainingConfig:
        return self.run.config

    @property
    def accelerator(self) -> Accelerator:
        return self.run.accelerator

    def before_training(self) -> None:
        """Logs the base's held-out metrics and images as those of step 0. Every process must call it."""
        self.accelerator.log(self.metrics_without_lora, step=0)
        self._log_images("validation", self.images_without_lora, 0)
        self.accelerator.wait_for_everyone()

    def during_training(self, step: int) -> dict[str, float]:
        """Logs held-out metrics, which it returns, images, and their scores against the base's. Every process must call it."""
        metrics, images = self.measure(), self.generate()
        self.accelerator.log(metrics | self.compare(images), step=step)
        self._log_images("validation", images, step)
        self._say(metrics, step)
        self.accelerator.wait_for_everyone()
        return metrics

    def has_lost_the_prompt(self, metrics: dict[str, float]) -> bool:
        """Whether the model relies on prompts less than half as much as the base does."""
        margin, base = metrics.get(PROMPT_MARGIN), self.metrics_without_lora.get(PROMPT_MARGIN)
        return margin is not None and base is not None and base > 0 and margin < LOST_PROMPT * base

    def accuracy_to_keep(self, metrics: dict[str, float]) -> float | None:
        """The accuracy by which --keep_best chooses; None where none was measured or the model has lost the prompt."""
        return None if self.has_lost_the_prompt(metrics) else metrics.get(ACCURACY)

    def _say(self, metrics: dict[str, float], step: int) -> None:
        if not metrics:
            return
        names = {ACCURACY: "accuracy", PROMPT_MARGIN: "prompt margin"}
        said = ", ".join(
            f"{names[name]} {metrics[name]:.3f} (base {self.metrics_without_lora[name]:.3f})"
            for name in names
            if name in metrics and name in self.metrics_without_lora
        )
        logger.info(f"Step {step}, held-out pairs: {said}")
        if self.has_lost_the_prompt(metrics):
            logger.warning(
                f"Step {step}: the model relies on its prompts less than half as much as the base ({said}). Images may no"
                " longer show what the prompt asks for: look at the validation images. If so, take an earlier checkpoint,"
                " or train again with a lower --loser_share or --learning_rate."
            )

    def after_training(self, step: int, more: dict[str, float]) -> ValidationResults:
        """Logs and returns metrics and images with the LoRA and without it. Every process must call it.

        Args:
            step: the last one.
            more: joins the metrics that are written.
        """
        metrics, images = self.measure(), self.generate()
        results = ValidationResults(
            metrics, self.metrics_without_lora, images, self.images_without_lora, self.compare(images) | more
        )
        self.accelerator.log(results.all_metrics(), step=step)
        self._say(metrics, step)
        self._log_images("test", images, step)
        self._log_images("test_without_lora", self.images_without_lora, step)
        return results

    def measure(self) -> dict[str, float]:
        """The metrics of `measure_held_out`; empty where no pairs are held out. Every process must call it."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batches = self.pairs.held_out_batches(self.config.train_batch_size, rank, world_size)
        if batches is None:
            return {}
        self.model.denoiser.eval()
        metrics = measure_held_out(self.config, self.model, self.accelerator, batches, self.levels)
        if not metrics:
            logger.warning("No held-out sample holds a readable preference: there are no eval_* metrics")
        return metrics

    def generate(self) -> list[Image]:
        """Generates `--num_validation_images` per prompt, the i-th with the same seed in every call; prompt by prompt.

        With aspect-ratio buckets, they take the shapes in turn, the most frequent first.
        """
        if not self.accelerator.is_main_process:
            return []
        self.model.denoiser.eval()
        config, shapes = self.config, self.pairs.shapes
        steps, guidance_scale = config.validation_inference_steps, config.validation_guidance_scale
        with self.model.generating(list(config.validation_prompts)) as generate:
            return [
                generate([prompt], [self.run.seed + i], steps, guidance_scale, shapes[i % len(shapes)])[0]
                for prompt in config.validation_prompts
                for i in range(config.num_validation_images)
            ]

    @cached_property
    def metrics_without_lora(self) -> dict[str, float]:
        """The base's metrics, which never change. Every process must ask for them at the same time."""
        self.model.denoiser.disable_adapters()
        metrics = self.measure()
        self.model.denoiser.enable_adapters()
        return metrics

    @cached_property
    def images_without_lora(self) -> list[Image]:
        """The base's images of the same prompts and seeds. They never change, so they are generated once."""
        self.model.denoiser.disable_adapters()
        images = self.generate()
        self.model.denoiser.enable_adapters()
        return images

    @cached_property
    def judge(self) -> "ImageJudge":
        """Of `--validation_scorer`."""
        config, device = self.config, self.accelerator.device
        assert config.validation_scorer is not None
        return ImageJudge(config.validation_scorer, config.validation_prompts, self.images_without_lora, device)

    def compare(self, images: list[Image]) -> dict[str, float]:
        """The result of `ImageJudge.compare`; empty without a scorer, and on all processes but the main one."""
        if self.config.validation_scorer is None or not self.accelerator.is_main_process:
            return {}
        return self.judge.compare(images)

    def _log_images(self, name: str, images: list[Image], step: int) -> None:
        """Sends `name/i`, the images of the i-th prompt, to the trackers; a prompt would not do as a file name.

        Those of other shapes than the first go as `name/i/{width}x{height}`.
        """
        per_prompt = self.config.num_validation_images
        grouped: dict[str, list[Image]] = {}
        for number, image in enumerate(images):
            shape = "" if image.size == images[0].size else "/{}x{}".format(*image.size)
            grouped.setdefault(f"{name}/{number // per_prompt}{shape}", []).append(image)
        values = {label: np.stack(of_label) for label, of_label in grouped.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(values, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images(values, step=step)


class ImageJudge:
    """Scores validation images against the base's, which it scores once.

    Args:
        scorer: as `--validation_scorer` names it.
        prompts: of the validation.
        images_without_lora: the base's, as many for each prompt, prompt by prompt.
        device: for the scorer's model.
    """

    def __init__(
        self, scorer: str, prompts: tuple[str, ...], images_without_lora: list[Image], device: torch.device
    ) -> None:
        from ..scoring import scorers, win_rate  # not needed without a scorer

        self.score_images, self.compare_scores = scorers.score_images, win_rate.compare_scores
        self.name, self.scorer, self.prompts = scorer, scorers.load_scorer(scorer, device), prompts
        self.scores_without_lora = self._score(images_without_lora)

    def compare(self, images: list[Image]) -> dict[str, float]:
        """Compares images generated with the LoRA with the base's.

        Returns:
            `eval_win_rate`, from 0 to 1, ties counting half, and `eval_score_difference`, the mean difference of the
            scores.
        """
        comparison = self.compare_scores(self.scores_without_lora, self._score(images))
        return {"eval_win_rate": comparison.win_rate, "eval_score_difference": comparison.difference}

    def _score(self, images: list[Image]) -> np.ndarray:
        """Scores (prompts, images per prompt)."""
        per_prompt = len(images) // len(self.prompts)
        prompts = [prompt for prompt in self.prompts for _ in range(per_prompt)]
        return np.array(self.score_images(self.name, self.scorer, images, prompts)).reshape(
            len(self.prompts), per_prompt
        )
