"""The training loop, for any model family and any source of pairs."""

import math
import time
from dataclasses import asdict

from accelerate.logging import get_logger
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..runtime.processes import on_main_process
from ..runtime.signals import StopSignals
from .amounts import Amount
from .best import Best, load_best
from .checkpoints import (
    TrainingState,
    load_checkpoint,
    read_position,
    read_state,
    register_lora_hooks,
    save_checkpoint,
)
from .collapse import CollapseWatch
from .divergence import count_skipped, stop_if_not_finite
from .held_out import ACCURACY
from .optimizer import LearningRate, make_optimizer, same_rate
from .run import Run, finish_run, flush_trackers, report_preemption, start_trackers
from .same_run import check_same_run, identify_in_background
from .step import compute_losses
from .validation import Validator
from .window import Window


logger = get_logger(__name__)


def train(run: Run, model, data) -> int:
    """Trains the model's LoRA on the data's pairs, and writes the result.

    Args:
        run: from `start_run`.
        model: the model family, such as `StableDiffusionXL`.
        data: the source of pairs, such as `PreferenceData`.

    Returns:
        The exit status: 0, or `signals.EXIT_STATUS` if SIGTERM or SIGINT came and a checkpoint was saved instead.

    Raises:
        ValueError: the checkpoint is of another run.
        FloatingPointError: loss or gradient is not finite.
        OSError: a checkpoint or the result can't be written.
    """
    config, accelerator, output_dir = run.config, run.accelerator, run.output_dir
    rank, world_size = accelerator.process_index, accelerator.num_processes
    base = identify_in_background(model.base_identity) if accelerator.is_main_process else dict
    state, position = begin_or_resume(run, data, base)
    pairs_per_step = config.train_batch_size * config.gradient_accumulation_steps * world_size
    pairs = data.pairs_of(config.num_train_epochs, config.train_batch_size, config.seed, position)
    first_pairs = data.pairs_of(config.num_train_epochs, state.batch_size, config.seed, None)
    amount = Amount(config.max_train_steps, pairs, pairs_per_step, state.pairs_per_step, first_pairs)
    last_step = amount.last_step(state.global_step, state.pairs_seen)

    if config.init_lora_weights is not None and run.checkpoint is None:
        model.start_from_initial_lora()
    parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, parameters, fused=accelerator.scaler is None)
    learning_rate = LearningRate.of(config, optimizer, amount.horizon)
    denoiser, optimizer = accelerator.prepare(model.denoiser, optimizer)
    register_lora_hooks(accelerator, model)
    set_seed(run.config.seed, device_specific=True)  # LoRA dropout draws from the global generators
    if run.checkpoint is not None:
        check_learning_rate(run, state, learning_rate.at(amount.place(state.global_step, state.pairs_seen)))
        load_checkpoint(accelerator, run.checkpoint, state.processes)
        logger.info(f"Resuming from {run.checkpoint}, after step {state.global_step}")
    state.processes = world_size
    best, validator = Best(**state.best), Validator(run, model, data)
    batches = data.training_batches(config.train_batch_size, config.seed, position, rank, world_size)

    state.trackers = start_trackers(run, state.global_step, state.trackers)
    logger.info(f"{data}; {last_step} steps of {pairs_per_step} pairs on {world_size} processes")
    # The last step is left out: what is measured after training serves for it.
    validation_steps = (
        range(config.validation_steps, last_step, config.validation_steps) if config.run_validation else ()
    )
    next_batch, skipped, collapse = iter(batches).__next__, 0, CollapseWatch.from_dict(state.collapse)
    progress = tqdm(
        total=last_step, initial=state.global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    if config.run_validation and state.global_step == 0:
        validator.before_training()
    if config.keep_best and best.validated < state.global_step and state.global_step in validation_steps:
        # A checkpoint is saved before its step is validated, and a run can end in between.
        best.add(state.global_step, accuracy_to_keep(validator, validator.during_training(state.global_step)))
    denoiser.train()
    with progress, StopSignals() as signals:
        while state.global_step < last_step:
            started, window = time.perf_counter(), Window()
            learning_rate.set(amount.place(state.global_step, state.pairs_seen))
            for _ in range(config.gradient_accumulation_steps):
                batch = next_batch()
                with accelerator.accumulate(denoiser):
                    losses, metrics, timesteps = compute_losses(config, model, denoiser, batch)
                    accelerator.backward(losses.mean())
                    window.add(losses, metrics, timesteps)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                        logs, stop = window.reduce(accelerator, grad_norm, signals.received)
                        stop_if_not_finite(accelerator, *window.pairs(), logs, state.global_step + 1, output_dir)
                    optimizer.step()
                    optimizer.zero_grad()
            logs["lr"] = optimizer.param_groups[0]["lr"]
            if "d" in optimizer.param_groups[0]:  # Prodigy's own step size
                logs["lr/d*lr"] = float(optimizer.param_groups[0]["d"]) * logs["lr"]
            state.global_step += 1
            state.pairs_seen += pairs_per_step
            skipped = count_skipped(accelerator, skipped, state.global_step)
            if accelerator.scaler is not None:
                state.skipped_steps += accelerator.optimizer_step_was_skipped
                logs["skipped_steps"] = state.skipped_steps
            collapse.add(logs, state.global_step)

            accelerator.log(logs, step=state.global_step)
            show_progress(progress, logs, pairs_per_step / (time.perf_counter() - started), batches.problems)
            state.learning_rate = learning_rate.at(amount.place(state.global_step, state.pairs_seen))
            saved = stop or state.global_step % config.checkpointing_steps == 0
            if saved:
                save(run, state, base, collapse, best, batches.position)
            if stop:
                return report_preemption(signals.received, state.global_step)
            if state.global_step in validation_steps:
                metrics = validator.during_training(state.global_step)
                if (
                    config.keep_best
                    and best.add(state.global_step, accuracy_to_keep(validator, metrics))
                    and not saved
                ):
                    save(run, state, base, collapse, best, batches.position)
                denoiser.train()

        conclude(run, state, model, data, best, validator)
    return 0


def conclude(run: Run, state: TrainingState, model, data, best: Best, validator: Validator) -> None:
    """Goes back to the best checkpoint with --keep_best, validates, and writes the result. Every process must call it."""
    step, last = state.global_step, {}
    if run.config.keep_best and (metrics := validator.measure()):
        kept = accuracy_to_keep(validator, metrics)
        step = load_best(run.accelerator, model, run.output_dir, best, step, -1.0 if kept is None else kept)
        last = {"step": step, "last_step": state.global_step, f"{ACCURACY}_last_step": metrics[ACCURACY]}
    results = validator.after_training(state.global_step, last) if run.config.run_validation else None
    finish_run(run, model, str(data), step, results)


def accuracy_to_keep(validator: Validator, metrics: dict[str, float]) -> float | None:
    """The accuracy by which --keep_best chooses; None where none was measured or the model has lost the prompt."""
    return None if validator.has_lost_the_prompt(metrics) else metrics.get(ACCURACY)


def save(run: Run, state: TrainingState, base, collapse: CollapseWatch, best: Best, position: dict) -> None:
    """Saves a checkpoint, and everything logged so far. Every process must call it."""
    flush_trackers(run.accelerator)
    state.base = state.base or base()
    state.collapse = asdict(collapse)
    state.best = asdict(best) if run.config.keep_best else {}
    save_checkpoint(run.accelerator, run.output_dir, state, position, run.config.checkpoints_total_limit)


def begin_or_resume(run: Run, data, base) -> tuple[TrainingState, dict | None]:
    """Where the run stands and where its data stands: at the start, or where the checkpoint says.

    Args:
        run: the run.
        data: its pairs.
        base: waits for the base's identity.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    config, accelerator = run.config, run.accelerator
    pairs_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    state = TrainingState(
        0,
        data.fingerprint,
        run.recorded_flags,
        accelerator.num_processes,
        pairs_seen=0,
        pairs_per_step=pairs_per_step,
        batch_size=config.train_batch_size,
    )
    if run.checkpoint is None:
        return state, None
    saved, position = read_state(run.checkpoint), read_position(run.checkpoint, accelerator.process_index)

    def check() -> dict[str, str]:
        state.base = base()
        check_same_run(
            saved, state, run.config.values(resume="same"), run.config.values(resume="warn"), run.checkpoint
        )
        return state.base

    saved.base = on_main_process(accelerator, check)
    saved.flags = state.flags
    return saved, position


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


def show_progress(progress: tqdm, logs: dict, pairs_per_s: float, problems: dict[str, int]) -> None:
    progress.update()
    progress.set_postfix(
        loss=f"{logs['loss']:.4f}",
        accuracy=f"{logs['rewards/accuracies']:.2f}",
        pairs_per_s=f"{pairs_per_s:.2f}",
        **({"skipped": logs["skipped_steps"]} if logs.get("skipped_steps") else {}),
        **problems,
    )
