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
"""Aligns Stable Diffusion 1.x or 2.x with human preferences: trains a LoRA with ORPO on pairs from a data set or from shards."""

import argparse
import sys
from pathlib import Path

from orpo.data_source import SOURCES, check_source
from orpo.models.registry import SD
from orpo.training_script import parse_training_flags, train_lora, training_flags


FLAGS = training_flags(SD, SOURCES)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return parse_training_flags(__doc__, FLAGS, SD, input_args, check_source)


def main(input_args: list[str] | None = None) -> int:
    return train_lora(Path(__file__).name, parse_args(input_args), FLAGS, SD)


if __name__ == "__main__":
    sys.exit(main())
