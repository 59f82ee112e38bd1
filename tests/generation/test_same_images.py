"""The validation images of a training run are those that `evaluate_lora.py` generates with its LoRA, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from families import FAMILIES
from helpers import train
from orpo.generation.model import Generator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate_lora


LORA_FILE = "pytorch_lora_weights.safetensors"
TRAINING = {"rank": 3, "lora_alpha": 9, "lora_dropout": 0.3, "learning_rate": 0.02, "max_train_steps": 3, "seed": 5}
TRAINING |= {"run_validation": True, "validation_steps": 1, "num_validation_pairs": 0, "num_validation_images": 2}
TRAINING |= {"validation_prompts": ["a red ball"], "validation_inference_steps": 3}


@pytest.fixture(params=["sdxl", *FAMILIES])
def name(request):
    return request.param


@pytest.fixture
def base(name, models) -> str:
    return models[name]


def train_one(name: str, base: str, faces: str, folder: Path, **flags) -> dict[str, torch.Tensor]:
    if name == "sdxl":
        return train(base, faces, folder, **TRAINING | flags)
    return FAMILIES[name].train(base, faces, folder, **TRAINING | flags)


def command_line(name: str, base: str, lora: Path, folder: Path, dtype: str = "fp32") -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ball\n")
    flags = {
        "pretrained_model_name_or_path": base,
        "lora_weights": lora,
        "prompt_file": prompts,
        "output_dir": folder / "evaluation",
        "resolution": 64,
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "seed": 5,
        "batch_size": 1,
        "scorers": "saturation",
        "dtype": dtype,
        **({} if name == "sdxl" else FAMILIES[name].flags),
    }
    return [f"--{flag}={value}" for flag, value in flags.items()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


@pytest.mark.parametrize("precision, dtype", [("no", "fp32"), ("bf16", "bf16")])
def test_validation_and_evaluation_generate_the_same_images(name, base, faces, tmp_path, precision, dtype):
    """With each family's own guidance, of which neither script is told, and with dropout in training."""
    train_one(name, base, faces, tmp_path / "lora", mixed_precision=precision)
    PartialState._reset_state()
    evaluate_lora.main(command_line(name, base, tmp_path / "lora", tmp_path, dtype))
    for i in range(2):
        generated = {}
        for side, ending in (("lora", ""), ("base", "_without_lora")):
            generated[side] = pixels(tmp_path / "lora" / f"image_{i}{ending}.png")
            evaluated = pixels(tmp_path / "evaluation" / side / f"00000-{i}.png")
            np.testing.assert_array_equal(evaluated, generated[side])
        assert abs(generated["lora"] - generated["base"]).max() > 2


def test_generating_in_half_precision_leaves_the_training_as_it_is(tiny_sdxl, faces, tmp_path):
    """It rounds the LoRA while it generates, and calls the denoiser without accelerate's autocast."""
    generating, still = (
        train_one("sdxl", tiny_sdxl, faces, tmp_path / str(i), mixed_precision="bf16", run_validation=generating)
        for i, generating in enumerate((True, False))
    )
    torch.testing.assert_close(generating, still, rtol=0, atol=0)


def test_a_dropout_in_the_file_of_a_lora_does_not_act_in_generation(tiny_sdxl, faces, tmp_path):
    """Ours name none; those of other programs, and of earlier versions of this one, do."""
    train(tiny_sdxl, faces, tmp_path / "lora", **TRAINING)
    path = tmp_path / "lora" / LORA_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert '"unet.lora_dropout": 0.0' in metadata["lora_adapter_metadata"]
    metadata["lora_adapter_metadata"] = metadata["lora_adapter_metadata"].replace(
        '"unet.lora_dropout": 0.0', '"unet.lora_dropout": 0.9'
    )
    (tmp_path / "other").mkdir()
    save_file(load_file(path), tmp_path / "other" / LORA_FILE, metadata=metadata)
    images = []
    for lora in ("lora", "other"):
        args = evaluate_lora.parse_args(command_line("sdxl", tiny_sdxl, tmp_path / lora, tmp_path))
        generator = Generator(args, torch.device("cpu"))
        generator.load()
        images += generator.generate(["a red ball"], [5])
    np.testing.assert_array_equal(*map(np.asarray, images))
