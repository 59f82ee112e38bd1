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
"""Makes preference pairs from prompts: a model draws several images of each, and scorers, or people, judge them.

    python make_preferences.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --prompt_file=prompts.txt --num_images_per_prompt=4 --scorers pickscore imagereward --output_dir=my_preferences

Writes images/, with a metadata.jsonl, and pairs/train.parquet, which training takes as --dataset_name=my_preferences/pairs.
Without --scorers there are images only: judge them with label_preferences.py --images_dir=my_preferences/images.

With --winners_dir=my_images, your own images are preferred to what the model draws from their captions: this teaches a style or
a subject. With --lora_weights, the model draws with a LoRA: this makes the pairs of a second round.

Started again, it continues where it stopped. `accelerate launch make_preferences.py` draws on several GPUs.
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

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from orpo.drawing.prompts import read_prompts
    from orpo.pairs.listing import read_listing

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    if config.winners_dir is not None:
        winners = read_listing(Path(config.winners_dir))
        make(config, state, [winner.prompt for winner in winners], winners)
    else:
        make(config, state, read_prompts(config), None)


def make(config: MakingConfig, state, prompts: list[str], winners: list | None) -> None:
    """Draws, judges and writes."""
    from orpo.drawing.images import draw_images, make_requests, missing, open_folder
    from orpo.making import output
    from orpo.making.judging import score
    from orpo.making.settings import settings
    from orpo.making.usable import usable
    from orpo.models.drawing import Drawing, draw, identify_lora, load_model, open_model
    from orpo.models.registry import find_family
    from orpo.scoring.names import scorer_label
    from orpo.scoring.scorers import check_scorer

    family = find_family(config)
    drawing = Drawing.from_config(config, family, state.device)
    scorers = config.scorers
    for name in scorers if state.is_main_process else ():
        check_scorer(name, drawing.resolution)
    images = Path(config.output_dir) / "images"
    lora_digest, warnings = identify_lora(drawing, open_model(drawing, family, state.device, config.cache_dir))
    requests = make_requests(prompts, config.images_per_prompt, config.seed)
    with state.main_process_first():
        open_folder(images, settings(drawing, lora_digest, requests))
    if missing(images, requests):
        model = load_model(drawing, family, state.device, config.cache_dir)
        draw_images(partial(draw, drawing, model), images, requests, config.batch_size, name="Drawing")
        del model

    kept, left_out = usable(images, requests)
    scores = {scorer_label(name): score(name, images, kept, config.batch_size) for name in scorers}
    if not state.is_main_process:
        return
    output.write_metadata(images, kept, drawing.model_name, scores)
    lines = [*warnings, f"{len(requests)} images of {len(prompts)} prompts in {images}."]
    lines += [f"{number} {what} images are left out." for what, number in left_out.items()]
    if winners is not None:
        lines.append(output.write_against_winners(Path(config.winners_dir), winners, images, kept, drawing.model_name))
    elif scores:
        lines.append(output.write_judged(config, images, kept, drawing.model_name, scores))
    else:
        lines.append(f"Judge them: python label_preferences.py --images_dir={images}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    run(main)
