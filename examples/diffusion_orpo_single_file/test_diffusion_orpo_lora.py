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
"""Run from the root of diffusers: pytest examples/research_projects/diffusion_orpo_lora

The environment variable TINY_SDXL may name a local folder in place of the tiny pipeline on the Hub.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image


FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))
from test_examples_utils import ExamplesTestsAccelerate, run_command  # noqa: E402

from diffusers import StableDiffusionXLPipeline  # noqa: E402


PIPELINE = os.environ.get("TINY_SDXL", "hf-internal-testing/tiny-stable-diffusion-xl-pipe")


def save_pairs(folder: str) -> None:
    """Eight pairs of noise in several sizes, one of them a tie."""
    rng = np.random.default_rng(0)
    rows = []
    for label in (1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0):
        sizes = rng.integers(48, 96, (2, 2))
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        rows.append({"jpg_0": images[0], "jpg_1": images[1], "label_0": label, "caption": "a prompt"})
    features = Features(
        {"jpg_0": ImageFeature(), "jpg_1": ImageFeature(), "label_0": Value("float64"), "caption": Value("string")}
    )
    Dataset.from_list(rows, features=features).to_parquet(Path(folder, "train.parquet"))


class TestDiffusionORPOLoRA(ExamplesTestsAccelerate):
    def train(self, output_dir: str, *flags: str) -> None:
        with tempfile.TemporaryDirectory() as pairs:
            save_pairs(pairs)
            test_args = f"""
                {FOLDER}/train_diffusion_orpo_sdxl_lora.py
                --pretrained_model_name_or_path {PIPELINE}
                --dataset_name {pairs}
                --resolution 64
                --train_batch_size 2
                --gradient_accumulation_steps 1
                --learning_rate 5.0e-04
                --lr_scheduler constant
                --lr_warmup_steps 0
                --report_to none
                --output_dir {output_dir}
                """.split()
            run_command(self._launch_args + test_args + list(flags))

    def checkpoints(self, folder: str) -> set[str]:
        return {name for name in os.listdir(folder) if "checkpoint" in name}

    def test_diffusion_orpo_lora(self):
        with tempfile.TemporaryDirectory() as tmpdir:
            self.train(tmpdir, "--max_train_steps=2", "--gradient_accumulation_steps=2", "--run_validation")
            # save_pretrained smoke test
            lora_file = os.path.join(tmpdir, "pytorch_lora_weights.safetensors")
            assert os.path.isfile(lora_file)

            # make sure the state_dict has the correct naming in the parameters, and that the weights moved.
            lora_state_dict = safetensors.torch.load_file(lora_file)
            assert all(name.startswith("unet.") and "lora" in name for name in lora_state_dict)
            assert any(weights.abs().max() > 1e-5 for name, weights in lora_state_dict.items() if "lora_B" in name)
            assert {"README.md", "image_0.png", "image_3.png"} <= set(os.listdir(tmpdir))

    def test_diffusion_orpo_lora_checkpointing_checkpoints_total_limit(self):
        with tempfile.TemporaryDirectory() as tmpdir:
            # checkpoints at steps 2, 4 and 6, of which the first is removed
            self.train(tmpdir, "--max_train_steps=6", "--checkpointing_steps=2", "--checkpoints_total_limit=2")
            assert self.checkpoints(tmpdir) == {"checkpoint-4", "checkpoint-6"}

            pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
            pipeline.load_lora_weights(tmpdir)
            pipeline("a prompt", num_inference_steps=1)

    def test_diffusion_orpo_lora_resuming_ends_as_without_interruption(self):
        with tempfile.TemporaryDirectory() as tmpdir:
            whole, parts = os.path.join(tmpdir, "whole"), os.path.join(tmpdir, "parts")
            self.train(whole, "--max_train_steps=4")
            self.train(parts, "--max_train_steps=2", "--checkpointing_steps=2")
            self.train(
                parts,
                "--max_train_steps=4",
                "--checkpointing_steps=2",
                "--checkpoints_total_limit=1",
                "--resume_from_checkpoint=checkpoint-2",
            )
            assert self.checkpoints(parts) == {"checkpoint-4"}
            lora_state_dicts = [
                safetensors.torch.load_file(os.path.join(folder, "pytorch_lora_weights.safetensors"))
                for folder in (whole, parts)
            ]
            torch.testing.assert_close(*lora_state_dicts)
