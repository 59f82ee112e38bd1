"""A model without encoders draws prompts it has drawn before with the VAE alone, and draws the same."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from helpers import arguments
from orpo.models.sdxl import StableDiffusionXL

import train_diffusion_orpo_sdxl_lora


def load(name: str, folder: str, **options):
    if name == "sdxl":
        args = train_diffusion_orpo_sdxl_lora.parse_args(arguments(folder, "unused", "unused"))
        family = StableDiffusionXL
    else:
        args = FAMILIES[name].parse_args(folder)
        family = FAMILIES[name].cls
    return family.load(args, torch.device("cpu"), torch.float32, **options)


def draw(model, prompt: str) -> np.ndarray:
    with model.generating([prompt]) as draw_images:
        return np.asarray(draw_images([prompt], [1], steps=2, guidance_scale=3.0)[0])


@pytest.mark.parametrize("name", ["sdxl", *FAMILIES])
def test_the_second_drawing_needs_no_text_encoder_and_is_the_same(name, models):
    expected = {prompt: draw(load(name, models[name]), prompt) for prompt in ("red", "ball")}
    model = load(name, models[name], encoders=False)
    np.testing.assert_array_equal(draw(model, "red"), expected["red"])
    with model.generating(["red"]):
        assert model.pipeline.vae is not None
        assert not any(getattr(model.pipeline, encoder) for encoder in model.text_encoder_names)
    np.testing.assert_array_equal(draw(model, "red"), expected["red"])
    np.testing.assert_array_equal(draw(model, "ball"), expected["ball"])  # is new, and loads them again
    np.testing.assert_array_equal(draw(model, "red"), expected["red"])
    assert not model.has_encoders
