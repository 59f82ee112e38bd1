"""Is it getting better? Preference accuracy on held-out pairs, and images from fixed prompts and seeds.

Validation uses the modules that train: no second copy is loaded.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from accelerate.logging import get_logger
from PIL.Image import Image

from .held_out import ACCURACY, PROMPT_MARGIN, NoiseLevels, measure_held_out


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
class Validator:
    """Validates during and after training.

    Attributes:
        run: the `Run`.
        model: the model family, with the LoRA that trains.
        data: the source of held-out pairs.
    """

    run: object
    model: object
    data: object

    @cached_property
    def levels(self) -> NoiseLevels:
        """The noise at which held-out pairs are predicted."""
        return NoiseLevels(self.model.noise_process)

    @property
    def config(self):
        return self.run.config

    @property
    def accelerator(self):
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
        batches = self.data.held_out_batches(self.config.train_batch_size, rank, world_size)
        if batches is None:
            return {}
        self.model.denoiser.eval()
        metrics = measure_held_out(self.config, self.model, self.accelerator, batches, self.levels)
        if not metrics:
            logger.warning("No held-out sample holds a readable preference: there are no eval_* metrics")
        return metrics

    def generate(self) -> list[Image]:
        """Draws `--num_validation_images` per prompt, the i-th with the same seed in every call; prompt by prompt.

        With aspect-ratio buckets, they take the shapes in turn, the most frequent first.
        """
        if not self.accelerator.is_main_process:
            return []
        self.model.denoiser.eval()
        config, shapes = self.config, self.data.shapes
        steps, guidance_scale = config.validation_inference_steps, config.validation_guidance_scale
        with self.model.generating(list(config.validation_prompts)) as generate:
            return [
                generate([prompt], [self.config.seed + i], steps, guidance_scale, shapes[i % len(shapes)])[0]
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
    def judge(self):
        """The `Judge` of `--validation_scorer`."""
        from .judge import Judge  # without a scorer, the room `scoring` is not needed

        config = self.config
        return Judge(
            config.validation_scorer, config.validation_prompts, self.images_without_lora, self.accelerator.device
        )

    def compare(self, images: list[Image]) -> dict[str, float]:
        """The result of `Judge.compare`; empty without a scorer, and on all processes but the main one."""
        if self.config.validation_scorer is None or not self.accelerator.is_main_process:
            return {}
        return self.judge.compare(images)

    def _log_images(self, name: str, images: list[Image], step: int) -> None:
        """Sends `name/i`, the images of the i-th prompt, to the trackers; a prompt would not do as a file name.

        Those of other shapes than the first go as `name/i/{width}x{height}`.
        """
        per_prompt, grouped = self.config.num_validation_images, {}
        for number, image in enumerate(images):
            shape = "" if image.size == images[0].size else "/{}x{}".format(*image.size)
            grouped.setdefault(f"{name}/{number // per_prompt}{shape}", []).append(image)
        values = {label: np.stack(of_label) for label, of_label in grouped.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(values, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images(values, step=step)
