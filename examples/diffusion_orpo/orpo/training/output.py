"""The result of a run: its LoRA, metrics, images and model card, complete or absent, and their upload."""

import json
import os
import re
import shutil
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import upload_folder

from ..runtime.durable import rename, sync_all
from ..runtime.processes import on_main_process
from .model_card import save_model_card
from .protocols import ModelFamily
from .run import Run
from .validation import ValidationResults


logger = get_logger(__name__)

# Files of a result. Others that lie in an output folder are left alone.
RESULT = re.compile(r"README\.md|eval_results\.json|image_\d+(_without_lora)?\.png|\w+_lora(_weights)?\.safetensors")


def write_result(run: Run, model: ModelFamily, data: str, steps: int, results: ValidationResults | None) -> None:
    """Writes LoRA, held-out metrics, validation images and model card, and uploads these, and nothing else, where asked to."""
    written = on_main_process(run.accelerator, write_files, run, model, data, steps, results)
    logger.info(f"Wrote {', '.join(written)} to {run.output_dir}")
    if run.hub_repository is not None:
        on_main_process(run.accelerator, upload, run.hub_repository, run.output_dir, written, steps)


def write_files(run: Run, model: ModelFamily, data: str, steps: int, results: ValidationResults | None) -> list[str]:
    """Writes the output aside and moves it into place, the LoRA last: if it is there, so is everything else.

    Returns:
        Names of the files.

    Raises:
        OSError: it can't be written.
    """
    output_dir = run.output_dir
    partial = output_dir / ".output.partial"
    partial.mkdir()
    try:
        model.save_lora(partial)
        model.save_for_other_programs(partial)
        save_model_card(run, model, data, steps, results, partial)
        if results is not None:
            (partial / "eval_results.json").write_text(json.dumps(results.all_metrics(), indent=2) + "\n")
        sync_all(partial)
        names = sorted(os.listdir(partial), key=lambda name: (name == model.lora_file, name))
        remove_earlier_result(output_dir, model.lora_file, names)
        for name in names:
            rename(partial / name, output_dir / name)
        return names
    finally:
        shutil.rmtree(partial)


def remove_earlier_result(output_dir: Path, lora_file: str, names: list[str]) -> None:
    """Removes files of an earlier result that this one lacks, the LoRA first: the files of a folder belong together."""
    (output_dir / lora_file).unlink(missing_ok=True)
    for path in output_dir.iterdir():
        if path.is_file() and RESULT.fullmatch(path.name) and path.name not in names:
            path.unlink()


def upload(repository: str, output_dir: Path, names: list[str], steps: int) -> None:
    """Uploads files of the output folder."""
    upload_folder(
        repo_id=repository,
        folder_path=output_dir,
        allow_patterns=names,
        commit_message=f"ORPO LoRA after {steps} steps",
    )
