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
"""Converts a LoRA that these scripts trained for ComfyUI, AUTOMATIC1111 and the like.

    python convert_lora.py diffusion-orpo-lora-sdxl

Training writes the same file beside the LoRA; this is for those trained before it did.
"""

import argparse
import sys
from pathlib import Path

from orpo.runtime.start import begin


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="The LoRA's folder, or its pytorch_lora_weights.safetensors.")
    parser.add_argument(
        "--output", type=Path, help="File to write. Default: comfyui_lora.safetensors, beside the LoRA."
    )
    args = parser.parse_args(input_args)
    if not args.lora.exists():
        parser.error(f"{args.lora} does not exist: name the output folder of a training run, or a file.")
    if args.lora.is_dir() and not (args.lora / "pytorch_lora_weights.safetensors").exists():
        parser.error(
            f"{args.lora} holds no pytorch_lora_weights.safetensors: name the output folder of a training run."
        )
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    from orpo.models.other_programs import COMFYUI_FILE, write_for_other_programs

    lora = args.lora / "pytorch_lora_weights.safetensors" if args.lora.is_dir() else args.lora
    target = args.output or lora.with_name(COMFYUI_FILE)
    try:
        write_for_other_programs(lora, target)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
