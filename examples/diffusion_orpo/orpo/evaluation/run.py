"""An evaluation from beginning to end: draw, score, write."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..config import EvaluationConfig
from ..drawing.images import Draw, draw_images, make_requests, missing, open_folder
from ..drawing.prompts import read_prompts
from ..runtime.durable import write_text
from ..scoring.image_statistics import STATISTICS
from ..scoring.names import scorer_label
from ..scoring.scorers import check_scorer
from .page import render_page
from .results import make_results, score_folders, summary


TIMEOUT = timedelta(hours=6)  # the other processes wait for the first one to download a scorer, and for the slowest


class Contestants(Protocol):
    """A base model and a LoRA for it."""

    def settings(self) -> tuple[dict, dict, list[str]]:
        """What decides the base's images, what else decides the LoRA's, and warnings that make a verdict doubtful."""

    def load(self) -> dict[str, Draw]:
        """Functions that draw without and with the LoRA, as "base" and as "lora"."""


def evaluate(config: EvaluationConfig, open_model: Callable[[EvaluationConfig, object], Contestants]) -> None:
    """Draws the images that are missing, scores all of them, and writes results and page.

    Args:
        config: which models to compare, and how.
        open_model: finds base and LoRA from the config and the device, without loading weights.

    Raises:
        ValueError: model, LoRA, prompts or scorers can't be used, or a folder holds images that were drawn differently.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    prompts = read_prompts(config)
    model = open_model(config, state.device)
    base, lora, warnings = model.settings()
    for name in config.scorers if state.is_main_process else ():
        check_scorer(name, base["resolution"])
    base |= {"num_images_per_prompt": config.num_images_per_prompt, "seed": config.seed, "prompts": prompts}
    requests = make_requests(prompts, config.num_images_per_prompt, config.seed)
    folders = {"base": config.base_dir, "lora": config.output_dir / "lora"}
    with state.main_process_first():
        versions = open_folder(folders["base"], base)
        open_folder(folders["lora"], base | lora)

    if any(missing(folder, requests) for folder in folders.values()):
        for side, draw in model.load().items():
            draw_images(draw, folders[side], requests, config.batch_size, name=side)
        del draw  # and with it the pipeline: a scorer needs the memory
    if not state.is_main_process:
        return

    scores = {scorer_label(name): score_folders(name, folders, requests, state.device) for name in config.scorers}
    statistics = {
        name: scores[name] if name in scores else score_folders(name, folders, requests, state.device)
        for name in STATISTICS
    }
    settings = base | lora | {"lora_weights": config.lora_weights, "scorers": config.scorers, "versions": versions}
    results = make_results(settings, requests, scores, statistics, warnings)
    write_text(config.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    page = render_page(results, [tuple(folders[side] / r.name for side in ("base", "lora")) for r in requests])
    write_text(config.output_dir / "index.html", page)
    print(summary(results), f"Look at the pairs: {config.output_dir / 'index.html'}", sep="\n")
