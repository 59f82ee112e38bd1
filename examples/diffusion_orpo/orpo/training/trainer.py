"""The trainer: any model family, any source of pairs.

    config = training_config(pretrained_model_name_or_path="...", dataset_name="...", output_dir="lora")
    Trainer(config, load_model(config), load_pairs(config)).train()

`train` reads from top to bottom: begin or resume, then for each optimizer step what listens to it, then the result.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict

from accelerate.logging import get_logger
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..config import TrainingConfig
from ..runtime.signals import StopSignals
from .checkpoint import load_checkpoint, register_lora_hooks, save_checkpoint
from .guards import CollapseWatch, SkippedSteps, stop_if_not_finite
from .held_out import ACCURACY
from .metrics import Window
from .optimizer import LearningRate, Length, learning_rates, make_optimizer
from .output import write_result
from .protocols import ModelFamily, PairSource
from .resume import begin_or_resume, check_learning_rate, identify_in_background
from .run import Run, flush_trackers, report_preemption, start_run, start_trackers
from .step import compute_losses
from .validation import Best, Validator


logger = get_logger(__name__)


class Trainer:
    """Trains the LoRA of a model on preference pairs, and writes the result to `config.output_dir`.

    Args:
        config: of the run.
        model: with a LoRA in its denoiser, such as `StableDiffusionXL`.
        pairs: to train on, and those to validate on, such as `PreferenceData`.
        run: from `start_run`, for a caller that checks folder and checkpoint before it loads the model. Default: begun by
            `train`.
    """

    def __init__(self, config: TrainingConfig, model: ModelFamily, pairs: PairSource, run: Run | None = None) -> None:
        self.config, self.model, self.pairs, self.given_run = config, model, pairs, run

    def train(self) -> int:
        """Trains to the end, or until SIGTERM or SIGINT.

        Returns:
            The exit status: 0, or `signals.EXIT_STATUS` if a signal came and a checkpoint was saved instead.

        Raises:
            ValueError: the output folder can't be used, or the checkpoint is of another run.
            FloatingPointError: loss or gradient is not finite.
            OSError: a checkpoint or the result can't be written.
        """
        with nullcontext(self.given_run) if self.given_run else start_run(self.config) as run:
            try:
                return self._train(run)
            finally:  # the wrapper of the model must go before the process group that it holds on to
                self.__dict__.pop("denoiser", None)

    def _train(self, run: Run) -> int:
        config = self._begin(run)
        self._validate_start()
        with self.progress, StopSignals() as signals:
            for logs in self._steps(signals):
                step = self.state.global_step
                self.collapse.add(logs, step)
                self.accelerator.log(logs, step=step)
                self._show(logs)
                self.is_saved = False
                if self.stop or step % config.checkpointing_steps == 0:
                    self._save()
                if self.stop:
                    return report_preemption(signals.received, step)
                if step in self.validation_steps:
                    self._validate()
            self._finish()
        return 0

    def _begin(self, run: Run) -> TrainingConfig:
        """Everything before the first step: where the run stands, optimizer, learning rate, batches, trackers."""
        config, accelerator, model, pairs = run.config, run.accelerator, self.model, self.pairs
        self.run, self.config, self.accelerator = run, config, accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.pairs_per_step = config.train_batch_size * config.gradient_accumulation_steps * world_size
        self.base = identify_in_background(model.base_identity) if accelerator.is_main_process else dict
        self.state, position = begin_or_resume(run, pairs, self.base, self.pairs_per_step)
        state = self.state
        to_see = pairs.pairs_of(config.num_train_epochs, config.train_batch_size, run.seed, position)
        first = state.pairs_per_step, state.horizon
        self.length = Length(config.max_train_steps, to_see, self.pairs_per_step, *first)
        state.horizon = self.length.horizon

        if config.init_lora_weights is not None and run.checkpoint is None:
            model.start_from_initial_lora()
        self.parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(config, self.parameters, fused=accelerator.scaler is None)
        self.learning_rate = LearningRate.of(config, optimizer, self.length.horizon)
        self.denoiser, self.optimizer = accelerator.prepare(model.denoiser, optimizer)
        register_lora_hooks(accelerator, model)
        set_seed(run.seed, device_specific=True)  # LoRA dropout samples from the global generators
        if run.checkpoint is not None:
            check_learning_rate(
                run, state, self.learning_rate.at(self.length.place(state.global_step, state.pairs_seen))
            )
            load_checkpoint(accelerator, run.checkpoint, state.processes)
            logger.info(f"Resuming from {run.checkpoint}, after step {state.global_step}")
        state.processes = world_size

        self.collapse, self.skipped = CollapseWatch.from_dict(state.collapse), SkippedSteps()
        self.best, self.validator = Best(**state.best), Validator(run, model, pairs)
        self.batches = pairs.training_batches(config.train_batch_size, run.seed, position, rank, world_size)
        state.trackers = start_trackers(run, state.global_step, state.trackers)
        self.last_step = self.length.last_step(state.global_step, state.pairs_seen)
        # The last step is left out: what is measured after training serves for it.
        every = config.validation_steps
        self.validation_steps = range(every, self.last_step, every) if config.run_validation else range(0)
        logger.info(f"{pairs}; {self.last_step} steps of {self.pairs_per_step} pairs on {world_size} processes")
        self.progress = tqdm(
            total=self.last_step,
            initial=state.global_step,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        return config

    def _steps(self, signals: StopSignals) -> Iterator[dict[str, float]]:
        """Makes optimizer steps, and yields what is logged of each."""
        config, accelerator, state, next_batch = self.config, self.accelerator, self.state, iter(self.batches).__next__
        self.denoiser.train()
        while state.global_step < self.last_step:
            self.started, window = time.perf_counter(), Window()
            self.learning_rate.set(self.length.place(state.global_step, state.pairs_seen))
            for _ in range(config.gradient_accumulation_steps):
                batch = next_batch()
                with accelerator.accumulate(self.denoiser):
                    losses, metrics, timesteps = compute_losses(config, self.model, self.denoiser, batch)
                    accelerator.backward(losses.mean())
                    window.add(losses, metrics, timesteps)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf)
                        logs, self.stop = window.reduce(accelerator, grad_norm, signals.received)
                        stop_if_not_finite(accelerator, window, logs, state.global_step + 1, self.run.output_dir)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            state.global_step += 1
            state.pairs_seen += self.pairs_per_step
            logs |= learning_rates(self.optimizer) | self.skipped.add(accelerator, state)
            state.learning_rate = self.learning_rate.at(self.length.place(state.global_step, state.pairs_seen))
            yield logs

    def _show(self, logs: dict[str, float]) -> None:
        self.progress.update()
        self.progress.set_postfix(
            loss=f"{logs['loss']:.4f}",
            accuracy=f"{logs['rewards/accuracies']:.2f}",
            pairs_per_s=f"{self.pairs_per_step / (time.perf_counter() - self.started):.2f}",
            **({"skipped": logs["skipped_steps"]} if logs.get("skipped_steps") else {}),
            **self.batches.problems,
        )

    def _save(self) -> None:
        """Saves a checkpoint, and everything logged so far. Every process must call it."""
        state = self.state
        flush_trackers(self.accelerator)
        state.base = state.base or self.base()
        state.collapse = asdict(self.collapse)
        state.best = asdict(self.best) if self.config.keep_best else {}
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.run.output_dir, state, self.batches.position, limit)
        self.is_saved = True

    def _validate_start(self) -> None:
        """Measures the base, and what an interrupted run saved and did not come to validate."""
        step = self.state.global_step
        if self.config.run_validation and step == 0:
            self.validator.before_training()
        if self.config.keep_best and self.best.validated < step and step in self.validation_steps:
            self.best.add(step, self.validator.accuracy_to_keep(self.validator.during_training(step)))

    def _validate(self) -> None:
        """Measures and shows, and saves a new best checkpoint with --keep_best."""
        step = self.state.global_step
        metrics = self.validator.during_training(step)
        if self.config.keep_best and self.best.add(step, self.validator.accuracy_to_keep(metrics)):
            if not self.is_saved:
                self._save()
        self.denoiser.train()

    def _finish(self) -> None:
        """Goes back to the best checkpoint with --keep_best, validates, and writes the result. Every process must call it."""
        step, last = self.state.global_step, {}
        if self.config.keep_best and (metrics := self.validator.measure()):
            accuracy = self.validator.accuracy_to_keep(metrics)
            step = self.best.load(self.run, self.model, step, accuracy)
            last = {"step": step, "last_step": self.state.global_step, f"{ACCURACY}_last_step": metrics[ACCURACY]}
        results = self.validator.after_training(self.state.global_step, last) if self.config.run_validation else None
        write_result(self.run, self.model, str(self.pairs), step, results)
