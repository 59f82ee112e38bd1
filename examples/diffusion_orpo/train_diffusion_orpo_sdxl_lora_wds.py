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
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO on pairs from WebDataset shards."""

import argparse
import sys
from pathlib import Path

from orpo.models.registry import SDXL
from orpo.store.flags import SHARDS
from orpo.training_script import parse_training_flags, train_lora, training_flags


FLAGS = training_flags(SDXL, [SHARDS], train_batch_size=8)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return parse_training_flags(__doc__, FLAGS, SDXL, input_args)


def main(input_args: list[str] | None = None) -> int:
    return train_lora(Path(__file__).name, parse_args(input_args), FLAGS, SDXL)


if __name__ == "__main__":
    sys.exit(main())
