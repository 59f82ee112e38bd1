"""The beginning and the end of a run: what can fail before models load, trackers, and the output."""

import json
import logging
import secrets
from datetime import timedelta
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from huggingface_hub import create_repo, upload_folder

from checkpoints import find_checkpoint, read_state
from model_card import save_model_card
from validation import ValidationResults


logger = get_logger(__name__)

# Processes wait for the first one while it checks the data set, longer than torch lets them wait by default.
CHECK_TIMEOUT = timedelta(hours=6)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_run(args) -> tuple[Accelerator, Path | None]:
    """Prepares devices, logging, seed, output folder and Hub repository. Draws `args.seed` where none was given.

    Returns:
        The accelerator, and the checkpoint to resume from, or None.

    Raises:
        ValueError: the output folder can't be written, the checkpoint is missing, or the tracker is not installed.
    """
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=str(output_dir / args.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=CHECK_TIMEOUT)],
        step_scheduler_with_optimizer=False,  # the loop steps it: once per optimizer step, however many processes
    )
    args.mixed_precision = accelerator.mixed_precision  # may come from the accelerate configuration
    if args.mixed_precision not in DTYPES:
        raise ValueError(f"Mixed precision {args.mixed_precision!r} is none of {', '.join(DTYPES)}.")
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to={args.report_to}: not installed. Install it, or choose another tracker.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    for name in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)

    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    if args.seed is None:
        seed = read_state(checkpoint).flags["seed"] if checkpoint else secrets.randbits(31)
        args.seed = broadcast_object_list([seed])[0]
        logger.info(f"No --seed was given: it is {args.seed}")
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.is_main_process:
        _make_writable(output_dir)
        if args.push_to_hub:
            name = args.hub_model_id or output_dir.resolve().name
            args.hub_model_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    return accelerator, checkpoint


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of the frozen weights: what the flag, or else the accelerate configuration, says."""
    return DTYPES[accelerator.mixed_precision]


def start_trackers(args, accelerator: Accelerator) -> None:
    """Starts the trackers with the flags as configuration, the Hub token left out."""
    config = {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in vars(args).items()
        if name != "hub_token"
    }
    accelerator.init_trackers(args.tracker_name, config=config)


def finish_run(
    args, accelerator: Accelerator, model, data: str, steps: int, results: ValidationResults | None
) -> None:
    """Writes LoRA, held-out metrics, validation images and model card, and uploads these, and nothing else, where asked to."""
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        model.save_lora(output_dir)
        written = ["pytorch_lora_weights.safetensors", *save_model_card(args, model, data, steps, results)]
        if results is not None:
            (output_dir / "eval_results.json").write_text(json.dumps(results.all_metrics(), indent=2) + "\n")
            written.append("eval_results.json")
        logger.info(f"Wrote {', '.join(written)} to {output_dir}")
        if args.push_to_hub:
            upload_folder(
                repo_id=args.hub_model_id,
                folder_path=output_dir,
                allow_patterns=written,
                commit_message=f"ORPO LoRA after {steps} steps",
                token=args.hub_token,
            )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _make_writable(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output_dir={output_dir} can't be written: {error}") from error
