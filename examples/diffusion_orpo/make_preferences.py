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
"""Makes preference pairs from prompts: a model generates several images of each, and reward models, or people, rank them.

    python make_preferences.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --prompt_file=prompts.txt --num_images_per_prompt=4 --scorers pickscore imagereward --output_dir=my_preferences

Writes images/, with a metadata.jsonl, and pairs/train.parquet, which training takes as --dataset_name=my_preferences/pairs.
Without --scorers there are images only: label them with label_preferences.py --images_dir=my_preferences/images.

With --chosen_dir=my_images, your own images are preferred to those that the model generates from their captions: this teaches
a style or a subject. With --lora_weights, the model generates with a LoRA: this makes the pairs of a second round.

Started again, it continues where it stopped; with more prompts, or more images per prompt, it generates what is missing.
`accelerate launch make_preferences.py` generates on several GPUs.
"""

from datetime import timedelta
from functools import partial
from pathlib import Path

from orpo.cli import read_flags, run
from orpo.config import MakingConfig
from orpo.runtime.start import begin


TIMEOUT = timedelta(hours=6)  # the other processes wait for the first one to download a scorer, and for the slowest


parse_args = partial(read_flags, MakingConfig, __doc__)


def main(line: list[str] | None = None) -> None:
    config = parse_args(line)
    begin(__file__)
    make(config)


def make(config: MakingConfig) -> None:
    """Generates the images that are missing, ranks them, and writes the pairs.

    Raises:
        ValueError: model, LoRA, prompts or scorers can't be used, a folder holds images that were generated differently, or there
            are no pairs.
    """
    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from orpo.generation.images import generate_missing, read_image
    from orpo.generation.model import Generator
    from orpo.generation.prompts import read_prompts
    from orpo.generation.ranking import PairsFile, usable, write_metadata
    from orpo.pairs.image_folder import read_listing
    from orpo.scoring.scorers import check_scorer, score_together, scorer_label

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    chosen = None if config.chosen_dir is None else read_listing(Path(config.chosen_dir))
    prompts, lines = ([image.prompt for image in chosen], []) if chosen else read_prompts(config)
    generator = Generator(config, state.device)
    scorers = config.scorers
    for name in scorers if state.is_main_process else ():
        check_scorer(name, generator.settings.resolution)
    folder = Path(config.output_dir) / "images"
    per_prompt = config.images_per_prompt
    images = generate_missing(generator, {"lora": folder}, prompts, per_prompt, config.seed, config.batch_size)
    requests = images.requests
    kept, skipped = usable(folder, requests)
    lines += [f"Warning: {warning}" for warning in images.warnings]
    lines += [f"{len(requests)} images of {len(prompts)} prompts in {folder}."]
    lines += [f"Skipped: {number} {reason} images." for reason, number in skipped.items()]
    if state.is_main_process and (scorers or chosen):
        pairs = PairsFile(Path(config.output_dir) / "pairs" / "train.parquet", folder, generator.name)
    captions = [request.prompt for request in kept]
    scores = {
        scorer_label(name): score_together(
            name, lambda i: read_image(folder / kept[i].name), captions, config.batch_size
        )
        for name in scorers
    }
    if not state.is_main_process:
        return
    write_metadata(folder, kept, generator.name, scores)
    if chosen:
        groups = [request.group for request in requests[::per_prompt]]
        lines.append(pairs.write_against(Path(config.chosen_dir), dict(zip(groups, chosen)), kept))
    elif scorers:
        lines.append(pairs.write_ranked(kept, scores, config))
    else:
        lines.append(f"Label them: python label_preferences.py --images_dir={folder}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    run(main)
