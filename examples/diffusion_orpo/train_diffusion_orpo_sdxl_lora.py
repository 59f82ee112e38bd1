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
"""Aligns Stable Diffusion XL with human preferences: train_diffusion_orpo_lora.py for SDXL alone, by its known name."""

from functools import partial

from orpo.cli import parse_training_flags, run, train
from orpo.models.registry import SDXL


MODELS = (SDXL,)

parse_args = partial(parse_training_flags, __doc__, MODELS)


def main(line: list[str] | None = None) -> int:
    return train(__file__, parse_args(line), MODELS)


if __name__ == "__main__":
    run(main)
