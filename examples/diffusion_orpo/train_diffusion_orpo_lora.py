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
"""Aligns a text-to-image model with human preferences: trains a LoRA with ORPO.

The model's own files say which family it belongs to: Stable Diffusion, SDXL, Stable Diffusion 3, FLUX.1, FLUX.2, Z-Image or
Qwen-Image. Preference pairs come from a dataset (--dataset_name) or from WebDataset shards (--dataset_path).
"""

from functools import partial

from orpo.cli import parse_training_flags, run, train
from orpo.models.registry import FAMILIES


MODELS = tuple(FAMILIES.values())

parse_args = partial(parse_training_flags, __doc__, MODELS)


def main(line: list[str] | None = None) -> int:
    return train(__file__, parse_args(line), MODELS)


if __name__ == "__main__":
    run(main)
