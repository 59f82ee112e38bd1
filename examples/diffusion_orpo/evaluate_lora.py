#!/usr/bin/env python
# coding=utf-8
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Did the LoRA get better? Generates images with base and LoRA from the same prompts and seeds, and lets scorers compare them.

    python evaluate_lora.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --lora_weights=diffusion-sdxl-orpo --scorers pickscore imagereward --output_dir=evaluation

Writes the images, `results.json` and `index.html`, a page that shows every pair. Started again, it continues where it stopped;
with more prompts, or more images per prompt, it generates what is missing.
"""

import json
from datetime import timedelta
from functools import partial

from orpo.cli import read_flags, run
from orpo.config import EvaluationConfig
from orpo.runtime.start import begin


TIMEOUT = timedelta(hours=6)  # the other processes wait for the first one to download a scorer, and for the slowest


parse_args = partial(read_flags, EvaluationConfig, __doc__)


def main(line: list[str] | None = None) -> None:
    config = parse_args(line)
    begin(__file__)
    evaluate(config)


def evaluate(config: EvaluationConfig) -> None:
    """Generates the images that are missing, scores all of them, and writes results and page.

    Raises:
        ValueError: model, LoRA, prompts or scorers can't be used, or a folder holds images that were generated differently.
    """
    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from orpo.generation.images import generate_missing, read_image
    from orpo.generation.model import Generator
    from orpo.generation.prompts import read_prompts
    from orpo.reports.evaluation import evaluation_page, make_results, summary
    from orpo.runtime.durable import write_text
    from orpo.scoring.image_statistics import STATISTICS
    from orpo.scoring.scorers import check_scorer, score_together, scorer_label

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    prompts, notes = read_prompts(config)
    generator = Generator(config, state.device)
    for name in config.scorers if state.is_main_process else ():
        check_scorer(name, generator.settings.resolution)
    folders = {"base": config.base_dir, "lora": config.output_dir / "lora"}
    images = generate_missing(
        generator, folders, prompts, config.num_images_per_prompt, config.seed, config.batch_size
    )
    files = [folders[side] / request.name for side in ("base", "lora") for request in images.requests]
    captions = [request.prompt for request in images.requests] * 2
    scores = {
        name: score_together(name, lambda i: read_image(files[i]), captions).reshape(2, -1)
        for name in dict.fromkeys([*config.scorers, *STATISTICS])
    }
    if not state.is_main_process:
        return

    settings = images.settings | {
        "lora_weights": config.lora_weights,
        "num_images_per_prompt": config.num_images_per_prompt,
        "prompts": prompts,
        "scorers": config.scorers,
        "versions": images.versions,
    }
    results = make_results(
        settings,
        images.requests,
        {scorer_label(name): scores[name] for name in config.scorers},
        {name: scores[name] for name in STATISTICS},
        images.warnings,
    )
    write_text(config.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    page = evaluation_page(results, list(zip(files, files[len(captions) // 2 :])))
    write_text(config.output_dir / "index.html", page)
    print(*notes, summary(results), f"Look at the pairs: {config.output_dir / 'index.html'}", sep="\n")


if __name__ == "__main__":
    run(main)
