#!/usr/bin/env python
"""Did the LoRA get better? Draws base and LoRA from the same prompts and seeds, and lets scorers judge.

    python evaluate_lora.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --lora_weights=diffusion-sdxl-orpo --scorers pickscore imagereward --output_dir=evaluation

Writes the images, `results.json` and `index.html`, a page that shows every pair. Started again, it goes on where it was.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from orpo.evaluation.images import draw_images, make_requests, missing, open_folder, write_atomically
from orpo.evaluation.page import render_page
from orpo.evaluation.prompts import add_prompt_arguments, read_prompts
from orpo.evaluation.results import make_results, score_folders, summary
from orpo.models.drawing import DTYPES, Drawing, base_identity, draw, find_family, load_pipeline, lora_identity
from orpo.scoring.image_statistics import STATISTICS
from orpo.scoring.scorers import BUILT_IN, check_scorer, scorer_label


TIMEOUT = timedelta(hours=6)  # the other processes wait for the first one to download a scorer, and for the slowest


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model_arguments(parser.add_argument_group("model"))
    add_prompt_arguments(parser)
    _add_drawing_arguments(parser.add_argument_group("drawing"))
    group = parser.add_argument_group("judging and output")
    group.add_argument(
        "--scorers",
        nargs="+",
        default=["pickscore"],
        help=f"Built in: {', '.join(BUILT_IN)}. Your own: my_module:my_function or path/to/file.py:my_function, a "
        "function of images and prompts that returns a score for each, the higher the better.",
    )
    group.add_argument("--output_dir", type=Path, default=Path("evaluation"), help="Folder for all that is written.")
    group.add_argument(
        "--base_images_dir",
        type=Path,
        help="Folder of the base's images, which several evaluations may share. Default: base, in --output_dir.",
    )
    args = parser.parse_args(input_args)
    for name in ("resolution", "num_prompts", "num_images_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}.")
    labels = [scorer_label(name) for name in args.scorers]
    if len(set(labels)) < len(labels):
        parser.error(f"--scorers: names must differ; got {', '.join(labels)}.")
    args.base_images_dir = args.base_images_dir or args.output_dir / "base"
    return args


def _add_model_arguments(group) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="Path to pretrained model or model identifier from huggingface.co/models: what the LoRA was trained on.",
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="Path or identifier of a VAE to use instead of the model's own, such as madebyollin/sdxl-vae-fp16-fix.",
    )
    group.add_argument("--revision", help="Revision of the pretrained model.")
    group.add_argument("--variant", help="Variant of the pretrained model's files, e.g. fp16.")
    group.add_argument(
        "--lora_weights", required=True, help="The trained LoRA: a folder, a file, or a name on the Hub."
    )
    group.add_argument("--lora_scale", type=float, default=1.0, help="Strength of the LoRA.")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        help="What the U-Net predicts, where the training was told so. Default: what the model's scheduler says.",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Precision to draw in. Default: fp16 or bf16 on a GPU, as the family wants it; fp32 on a CPU.",
    )


def _add_drawing_arguments(group) -> None:
    group.add_argument("--num_images_per_prompt", type=int, default=1, help="Images per prompt and model.")
    group.add_argument("--resolution", type=int, help="Pixels a side. Default: what the model was made for.")
    group.add_argument("--num_inference_steps", type=int, default=30, help="Sampling steps per image.")
    group.add_argument("--guidance_scale", type=float, help="Classifier-free guidance. Default: as in training.")
    group.add_argument(
        "--max_sequence_length",
        type=int,
        help="Tokens of a prompt, in families that have the flag. Default: as in training.",
    )
    group.add_argument("--seed", type=int, default=0, help="Seed of the first image; each further one has the next.")
    group.add_argument("--batch_size", type=int, default=4, help="Images drawn at once.")


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    try:
        evaluate(args, state)
    except ValueError as error:  # what the user can put right
        sys.exit(f"evaluate_lora.py: {error}")


def evaluate(args: argparse.Namespace, state: PartialState) -> None:
    """Draws what is not drawn yet, scores all of it, and writes results and page."""
    prompts = read_prompts(args)
    family = find_family(args)
    drawing = Drawing.from_flags(args, family, state.device)
    for name in args.scorers if state.is_main_process else ():
        check_scorer(name, drawing.resolution)
    flags = asdict(drawing)
    lora = {"lora_scale": flags.pop("lora_scale")}
    del flags["lora_weights"]  # known by its content
    lora["lora_sha256"], misfit = lora_identity(drawing, family)
    base = flags | {"num_images_per_prompt": args.num_images_per_prompt, "seed": args.seed, "prompts": prompts}
    base |= base_identity(drawing, family)
    requests = make_requests(prompts, args.num_images_per_prompt, args.seed)
    folders = {"base": args.base_images_dir, "lora": args.output_dir / "lora"}
    with state.main_process_first():
        versions = open_folder(folders["base"], base)
        open_folder(folders["lora"], base | lora)

    if any(missing(folder, requests) for folder in folders.values()):
        pipeline = load_pipeline(drawing, family, state.device)
        draw_batch = partial(draw, drawing, pipeline)
        pipeline.disable_lora()
        draw_images(draw_batch, folders["base"], requests, args.batch_size, name="Base")
        pipeline.enable_lora()
        draw_images(draw_batch, folders["lora"], requests, args.batch_size, name="LoRA")
        del draw_batch, pipeline
    if not state.is_main_process:
        return

    scores = {scorer_label(name): score_folders(name, folders, requests, state.device) for name in args.scorers}
    statistics = {
        name: scores[name] if name in scores else score_folders(name, folders, requests, state.device)
        for name in STATISTICS
    }
    settings = base | lora | {"lora_weights": args.lora_weights, "scorers": args.scorers, "versions": versions}
    results = make_results(settings, requests, scores, statistics, [misfit] if misfit else [])
    write_atomically(args.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    page = render_page(results, [tuple(folders[side] / r.name for side in ("base", "lora")) for r in requests])
    write_atomically(args.output_dir / "index.html", page)
    print(summary(results), f"Look at the pairs: {args.output_dir / 'index.html'}", sep="\n")


if __name__ == "__main__":
    main()
