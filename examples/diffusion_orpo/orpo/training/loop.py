"""The ORPO training step, and the loop around it.

Whatever the model family, and wherever the pairs come from: `train` is handed both.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusion_orpo_loss import OrpoMetrics, orpo_loss, per_pair_error
from tqdm.auto import tqdm

from diffusers.optimization import get_scheduler

from ..system.signals import StopSignals
from ..system.transfer import draw_noise, to_device
from .best import Best, load_best
from .checkpoints import (
    TrainingState,
    check_same_run,
    load_checkpoint,
    read_position,
    read_state,
    register_lora_hooks,
    save_checkpoint,
)
from .collapse import CollapseWatch
from .divergence import count_skipped, stop_if_not_finite
from .gradient_share import beta_of_share, log_loser_share
from .held_out import ACCURACY, NoiseLevels
from .run import Run, finish_run, flush_trackers, report_preemption, start_trackers
from .validation import Validator


logger = get_logger(__name__)

PAIRS_FOR_BETA = 32  # that --loser_share looks at


def compute_losses(args, model, denoiser, batch: dict) -> tuple[torch.Tensor, OrpoMetrics, torch.Tensor]:
    """The ORPO step, forward.

    Args:
        args: the flags.
        model: the model family; encodes images and prompts.
        denoiser: what predicts; may be wrapped for distributed training.
        batch: B pairs as `collate_pairs` makes them: tensors of 2B images, the B winners first.

    Returns:
        The loss of each pair (B,), the metrics of each pair, and the timesteps (B,).
    """
    model_pred_w, model_pred_l, target, timesteps = predict_pairs(model, denoiser, batch)
    losses, metrics = orpo_loss(
        model_pred_w,
        model_pred_l,
        target,
        args.beta_orpo,
        weights=model.noise_process.weights(timesteps),
        reduction="none",
        return_metrics=True,
    )
    return losses, metrics, timesteps


def predict_pairs(model, denoiser, batch: dict) -> tuple:
    """Adds noise to both images of each pair and predicts, in one call of the denoiser.

    Args:
        model, denoiser, batch: as `compute_losses` takes them.

    Returns:
        The predictions for the winners and for the losers (B, C, H/8, W/8); their target, one for both or one each;
        and the timesteps (B,).
    """
    moments, embeds = encode(model, batch)

    # All randomness comes from the pair's own seed: not from its place in the batch, nor from the number of processes.
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
    timesteps = batch["timesteps"] if "timesteps" in batch else model.noise_process.sample_timesteps(generators)
    timesteps = to_device(timesteps, model.device)
    latents = model.sample_latents(moments, generators * 2)  # (2B, C, H/8, W/8)
    latents_w, latents_l = latents.chunk(2)
    noise = draw_noise(generators, latents_w.shape[1:], model.device)  # the same for both images of a pair

    noisy_latents = model.noise_process.add_noise(latents, noise.repeat(2, 1, 1, 1), timesteps.repeat(2))
    model_pred = model.predict(denoiser, noisy_latents, timesteps.repeat(2), embeds, batch)
    target = model.noise_process.target(latents_w, latents_l, noise, timesteps)
    return *model_pred.chunk(2), target, timesteps


def encode(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The moments of the images' latents (2B, 2C, H/8, W/8), and the prompts' embeddings: those in the batch, or made now."""
    if "moments" in batch:
        moments = to_device(batch["moments"], model.device)
    else:
        moments = model.encode_images(batch["pixel_values"])
    if "embeds" in batch:
        embeds = {name: to_device(rows, model.device) for name, rows in batch["embeds"].items()}
    else:
        embeds = model.encode_prompts(batch["prompts"])
    return moments, embeds


def train(run: Run, model, data) -> int:
    """Trains the model's LoRA on the data's pairs, and writes the result.

    Args:
        run: of `start_run`.
        model: the model family, such as `StableDiffusionXL`.
        data: the source of pairs, such as `PreferenceData`.

    Returns:
        The exit status: 0, or `preemption.EXIT_STATUS` if SIGTERM or SIGINT came and a checkpoint was saved instead.

    Raises:
        ValueError: the checkpoint is of another run.
        FloatingPointError: loss or gradient is not finite.
        OSError: a checkpoint or the result can't be written.
    """
    args, accelerator, output_dir = run.args, run.accelerator, run.output_dir
    rank, world_size = accelerator.process_index, accelerator.num_processes
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * world_size
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * data.num_pairs / pairs_per_step)

    parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters, pairs_per_step, fused=accelerator.scaler is None)
    lr_scheduler = make_lr_scheduler(args, optimizer, max_train_steps)
    denoiser, optimizer, lr_scheduler = accelerator.prepare(model.denoiser, optimizer, lr_scheduler)
    register_lora_hooks(accelerator, model)
    set_seed(run.seed, device_specific=True)  # LoRA dropout draws from the global generators
    state, position = TrainingState(0, data.fingerprint, run.values(resume="same"), world_size), None
    if run.checkpoint is not None:
        state, position = resume(accelerator, run.checkpoint, state)
    best = Best(**state.best)
    validator = Validator(run, model, data, compute_losses, encode)
    if args.loser_share is not None:
        if state.beta is None:
            first = data.training_batches(args.train_batch_size, run.seed, None, rank, world_size)
            state.beta = find_beta(accelerator, model, first, validator.levels, args.loser_share)
        args.beta_orpo = state.beta
    batches = data.training_batches(args.train_batch_size, run.seed, position, rank, world_size)

    start_trackers(run, state.global_step)
    logger.info(f"{data}; {max_train_steps} steps of {pairs_per_step} pairs on {world_size} processes")
    # The last step is left out: what is measured after training serves for it.
    validation_steps = (
        range(args.validation_steps, max_train_steps, args.validation_steps) if args.run_validation else ()
    )
    next_batch, skipped, collapse = iter(batches).__next__, 0, CollapseWatch.from_dict(state.collapse)
    progress = tqdm(
        total=max_train_steps, initial=state.global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    if args.keep_best and best.validated < state.global_step and state.global_step in validation_steps:
        # A checkpoint is saved before its step is validated, and a run can end in between.
        best.add(state.global_step, validator.during_training(state.global_step).get(ACCURACY))
    denoiser.train()
    with progress, StopSignals() as signals:
        while state.global_step < max_train_steps:
            started, window = time.perf_counter(), Window()
            for _ in range(args.gradient_accumulation_steps):
                batch = next_batch()
                with accelerator.accumulate(denoiser):
                    losses, metrics, timesteps = compute_losses(args, model, denoiser, batch)
                    accelerator.backward(losses.mean())
                    window.add(losses, metrics, timesteps)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                        logs, stop = window.reduce(accelerator, grad_norm, signals.received)
                        stop_if_not_finite(accelerator, *window.pairs(), logs, state.global_step + 1, output_dir)
                    optimizer.step()
                    optimizer.zero_grad()
            logs["lr"] = lr_scheduler.get_last_lr()[0]
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
            state.global_step += 1
            if state.global_step == 1:
                log_loser_share(window.pairs()[0], args.beta_orpo)
            skipped = count_skipped(accelerator, skipped, state.global_step)
            if accelerator.scaler is not None:
                state.skipped_steps += accelerator.optimizer_step_was_skipped
                logs["skipped_steps"] = state.skipped_steps
            collapse.add(logs, state.global_step)

            accelerator.log(logs, step=state.global_step)
            show_progress(progress, logs, pairs_per_step / (time.perf_counter() - started), batches.problems)
            if stop or state.global_step % args.checkpointing_steps == 0:
                save(run, state, collapse, best, batches.position)
            if stop:
                return report_preemption(signals.received, state.global_step)
            if state.global_step in validation_steps:
                metrics = validator.during_training(state.global_step)
                if args.keep_best and best.add(state.global_step, metrics.get(ACCURACY)):
                    if state.global_step % args.checkpointing_steps:  # else it is saved already
                        save(run, state, collapse, best, batches.position)
                denoiser.train()

        step, last = state.global_step, {}
        if args.keep_best and (accuracy := validator.measure().get(ACCURACY)) is not None:
            step = load_best(accelerator, model, output_dir, best, step, accuracy)
            last = {"step": step, "last_step": state.global_step, f"{ACCURACY}_last_step": accuracy}
        results = validator.after_training(state.global_step, last) if args.run_validation else None
        finish_run(run, model, str(data), step, results)
    return 0


def save(run: Run, state: TrainingState, collapse: CollapseWatch, best: Best, position: dict) -> None:
    """Saves a checkpoint, and what is logged so far. Every process must call it."""
    flush_trackers(run.accelerator)
    state.collapse = asdict(collapse)
    if run.args.keep_best:
        state.best = asdict(best)
    save_checkpoint(run.accelerator, run.output_dir, state, position, run.args.checkpoints_total_limit)


def find_beta(accelerator: Accelerator, model, batches, levels: NoiseLevels, share: float) -> float:
    """The beta with which the losers' share of the gradient is `share` on the first pairs. Every process must call it."""
    denoiser, errors, count = model.denoiser.eval(), [], 0
    with torch.no_grad():
        for batch in batches:
            moments, embeds = encode(model, batch)
            for draw in range(levels.draws):
                drawn = levels.batch(batch | {"moments": moments, "embeds": embeds}, draw)
                model_pred_w, model_pred_l, target, _ = predict_pairs(model, denoiser, drawn)
                targets = target if isinstance(target, tuple) else (target, target)
                predictions = (model_pred_w, model_pred_l)
                errors.append(torch.stack([per_pair_error(p, t) for p, t in zip(predictions, targets)]))
            count += len(batch["seeds"]) * accelerator.num_processes
            if count >= PAIRS_FOR_BETA:
                break
    error_w, error_l = accelerator.gather(torch.cat(errors, dim=1).T.contiguous()).T.cpu()
    beta = beta_of_share(error_w, error_l, share)
    logger.info(f"--loser_share={share}: beta is {beta:.4g}, computed on {count} pairs")
    return beta


def show_progress(progress: tqdm, logs: dict, pairs_per_s: float, problems: dict[str, int]) -> None:
    progress.update()
    progress.set_postfix(
        loss=f"{logs['loss']:.4f}",
        accuracy=f"{logs['rewards/accuracies']:.2f}",
        pairs_per_s=f"{pairs_per_s:.2f}",
        **({"skipped": logs["skipped_steps"]} if logs.get("skipped_steps") else {}),
        **problems,
    )


def make_optimizer(
    args, parameters: list[torch.nn.Parameter], pairs_per_step: int, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit variant.

    Args:
        args: the flags.
        parameters: of the LoRA.
        pairs_per_step: multiplies the learning rate with --scale_lr.
        fused: whether one kernel may step all tensors. It would hide from accelerate which steps the gradient scaler skips.
    """
    fused = fused and parameters[0].device.type in ("cpu", "cuda")
    optimizer_class, options = torch.optim.AdamW, {"fused": fused}
    if args.use_8bit_adam:
        options = {}
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from error
    return optimizer_class(
        parameters,
        lr=args.learning_rate * (pairs_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_lr_scheduler(args, optimizer: torch.optim.Optimizer, max_train_steps: int):
    """The learning rate's course over `max_train_steps`, to be stepped once per optimizer step."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def resume(accelerator: Accelerator, checkpoint: Path, current: TrainingState) -> tuple[TrainingState, dict]:
    """Restores LoRA, optimizer, learning rate, scaler and RNG; returns where the saved run and its data stood."""
    saved = read_state(checkpoint)
    check_same_run(saved, current, checkpoint)
    load_checkpoint(accelerator, checkpoint, saved.processes)
    logger.info(f"Resuming from {checkpoint}, after step {saved.global_step}")
    saved.processes = current.processes
    return saved, read_position(checkpoint, accelerator.process_index)


@dataclass
class Window:
    """Losses and metrics of the micro-batches of one optimizer step. They stay on the device until `reduce`."""

    values: list[torch.Tensor] = field(default_factory=list)  # of each pair: its loss and then its metrics
    timesteps: list[torch.Tensor] = field(default_factory=list)

    names = ("loss", *OrpoMetrics.__annotations__)

    def add(self, losses: torch.Tensor, metrics: OrpoMetrics, timesteps: torch.Tensor) -> None:
        self.values.append(torch.stack([losses.detach(), *metrics.values()]))
        self.timesteps.append(timesteps)

    def reduce(self, accelerator: Accelerator, grad_norm: torch.Tensor, stop: object) -> tuple[dict[str, float], bool]:
        """Means over micro-batches and processes, and whether any process is to `stop` (has something there).

        One collective and one read from the device per optimizer step.
        """
        means = torch.stack([values.mean(dim=1) for values in self.values]).mean(dim=0)
        more = torch.tensor([stop is not None], dtype=means.dtype, device=means.device)
        means = torch.cat([means, grad_norm.to(means).reshape(1), more])
        *means, stopping = accelerator.reduce(means, "mean").tolist()
        return dict(zip((*self.names, "grad_norm"), means)), stopping > 0

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, winner's and loser's log p of each pair (3, B), and the timesteps (B,)."""
        rows = [self.names.index(name) for name in ("loss", "logps/chosen", "logps/rejected")]
        return torch.cat(self.values, dim=1)[rows], torch.cat(self.timesteps)
