"""What the tests of the model families share: tiny models of them with random weights, and runs of their scripts."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import arguments, lora_weights
from orpo.models.flux import Flux
from orpo.models.latent_diffusion import LatentDiffusion
from orpo.models.options import ModelOptions
from orpo.models.sd import StableDiffusion
from orpo.models.sd3 import StableDiffusion3

from diffusers import AutoencoderKL, DiffusionPipeline
from faces import ALL_KINDS
from tiny_flux import build_tiny_flux
from tiny_sd import build_tiny_sd
from tiny_sd3 import build_tiny_sd3


DEMO_BASE = Path(__file__).parent.parent / "examples" / "demo" / "base"
WORDS = sorted({word.strip(",") for kind in ALL_KINDS for word in kind.prompt.split()})
T5_FLAGS = {"max_sequence_length": 12}


@dataclass(frozen=True)
class Family:
    """One family under test.

    Attributes:
        cls: of the example.
        script: its training script.
        build: makes a tiny pipeline of it.
        flags: that a run on the tiny pipeline needs.
        call_options: that make its pipeline read prompts as these flags do.
    """

    cls: type[LatentDiffusion]
    script: str
    build: object
    flags: dict
    call_options: dict

    def parse_args(self, model: str, **flags):
        script = importlib.import_module(self.script)
        return script.parse_args(arguments(model, "unused", "unused", **self.flags | flags))

    def load(self, model: str, dtype=torch.float32, **flags) -> LatentDiffusion:
        return self.cls.load(ModelOptions.from_flags(self.parse_args(model, **flags)), torch.device("cpu"), dtype)

    def train(self, model: str, data: str | None, output_dir, **flags) -> dict[str, torch.Tensor]:
        """Runs the script in this process, on a data set, or, without `data`, on `dataset_path`; returns the LoRA."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        importlib.import_module(self.script).main(arguments(model, data, output_dir, **self.flags | flags))
        return lora_weights(output_dir)


FAMILIES = {
    "sd": Family(StableDiffusion, "train_diffusion_orpo_sd_lora", build_tiny_sd, {}, {}),
    "sd3": Family(StableDiffusion3, "train_diffusion_orpo_sd3_lora", build_tiny_sd3, T5_FLAGS, T5_FLAGS),
    "flux": Family(Flux, "train_diffusion_orpo_flux_lora", build_tiny_flux, T5_FLAGS, T5_FLAGS),
}
SMALL = {
    "sd": {"channels": (16, 32)},
    "sd3": {"num_layers": 2, "num_heads": 2},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_heads": 2},
}


def save_tiny(name: str, folder: Path, **options) -> str:
    """A pipeline of random weights on the demo's VAE, with a shift where the family has one."""
    vae = AutoencoderKL.from_pretrained(DEMO_BASE / "vae")
    if name != "sd":
        vae.register_to_config(shift_factor=0.3)
    FAMILIES[name].build(WORDS, vae, **SMALL[name] | options).save_pretrained(folder)
    return str(folder)


def load_pipeline(folder: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
