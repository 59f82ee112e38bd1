"""The one-file example, under a name of its own: the trainer's script has the same file name."""

import importlib.util
import sys
from pathlib import Path

import torch
from helpers import arguments, lora_weights


EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion_orpo_single_file"
SCRIPT = EXAMPLE / "train_diffusion_orpo_sdxl_lora.py"


def load():
    if "single_file_training" not in sys.modules:
        spec = importlib.util.spec_from_file_location("single_file_training", SCRIPT)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["single_file_training"]


def train_single_file(model: str, data: str, output_dir, **flags) -> dict[str, torch.Tensor]:
    """Runs the script in this process; returns the trained LoRA."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = load()
    script.main(script.parse_args(arguments(model, data, output_dir, **flags)))
    return lora_weights(output_dir)
