"""An evaluation from beginning to end: draw, score, write."""

import argparse
import json
from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..scoring.image_statistics import STATISTICS
from ..scoring.names import scorer_label
from ..scoring.scorers import check_scorer
from .images import (
    base_settings,
    draw_images,
    load_pipeline,
    lora_settings,
    make_requests,
    missing,
    open_folder,
    write_atomically,
)
from .page import render_page
from .prompts import read_prompts
from .results import make_results, score_folders, summary


TIMEOUT = timedelta(hours=6)  # the other processes wait for the first one to download a scorer, and for the slowest


def evaluate(args: argparse.Namespace) -> None:
    """Draws what is not drawn yet, scores all of it, and writes results and page.

    Raises:
        ValueError: model, LoRA, prompts or scorers can't be used, or a folder holds images of other settings.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    dtype = args.dtype or ("fp32" if state.device.type == "cpu" else "fp16")
    args = argparse.Namespace(**vars(args) | {"dtype": dtype})
    prompts = read_prompts(args)
    for name in args.scorers if state.is_main_process else ():
        check_scorer(name, args.resolution)
    base, lora = base_settings(args, prompts), lora_settings(args)
    requests = make_requests(prompts, args.num_images_per_prompt, args.seed)
    folders = {"base": args.base_images_dir, "lora": args.output_dir / "lora"}
    with state.main_process_first():
        versions = open_folder(folders["base"], base)
        open_folder(folders["lora"], base | lora)

    if any(missing(folder, requests) for folder in folders.values()):
        pipeline = load_pipeline(args, state.device)
        draw_images(args, pipeline, folders["base"], requests, name="Base")
        pipeline.enable_lora()
        draw_images(args, pipeline, folders["lora"], requests, name="LoRA")
        del pipeline
    if not state.is_main_process:
        return

    scores = {scorer_label(name): score_folders(name, folders, requests, state.device) for name in args.scorers}
    statistics = {
        name: scores[name] if name in scores else score_folders(name, folders, requests, state.device)
        for name in STATISTICS
    }
    settings = base | lora | {"lora_weights": args.lora_weights, "scorers": args.scorers, "versions": versions}
    results = make_results(settings, requests, scores, statistics)
    write_atomically(args.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    page = render_page(results, [tuple(folders[side] / r.name for side in ("base", "lora")) for r in requests])
    write_atomically(args.output_dir / "index.html", page)
    print(summary(results), f"Look at the pairs: {args.output_dir / 'index.html'}", sep="\n")
