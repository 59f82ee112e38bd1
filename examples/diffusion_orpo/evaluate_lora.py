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
"""Did the LoRA get better? Draws base and LoRA from the same prompts and seeds, and lets scorers judge.

    python evaluate_lora.py --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
      --lora_weights=diffusion-sdxl-orpo --scorers pickscore imagereward --output_dir=evaluation

Writes the images, `results.json` and `index.html`, a page that shows every pair. Started again, it continues where it stopped.
"""

from functools import partial

from orpo.cli import read_flags, run
from orpo.config import EvaluationConfig
from orpo.runtime.start import begin


parse_args = partial(read_flags, EvaluationConfig, __doc__)


def main(line: list[str] | None = None) -> None:
    config = parse_args(line)
    begin(__file__)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.evaluation.run import evaluate
    from orpo.models.base_and_lora import BaseAndLora

    evaluate(config, BaseAndLora.from_config)


if __name__ == "__main__":
    run(main)
