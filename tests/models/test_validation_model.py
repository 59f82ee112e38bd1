"""--validation_model_path: train one checkpoint, draw with another that takes the same LoRA."""

import numpy as np
import pytest
import torch
from families import FAMILIES, load_pipeline, save_tiny
from orpo.models.lora import lora_is_off
from PIL import Image


NAME = "z_image"  # people train Z-Image and draw with Z-Image-Turbo
FLAGS = {"run_validation": True, "validation_prompts": ["a red ball"], "validation_inference_steps": 3}
FLAGS |= {"num_validation_pairs": 2, "max_train_steps": 3, "validation_steps": 2, "learning_rate": 0.02, "rank": 3}
FLAGS |= {"validation_guidance_scale": 1.0, "lora_alpha": 9, "seed": 5}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A base and another one of the same architecture, with other weights."""
    return tuple(save_tiny(NAME, tmp_path_factory.mktemp(f"seed-{seed}"), seed=seed) for seed in (0, 1))


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


@pytest.mark.parametrize("cache_latents", [False, True])
def test_images_are_those_that_the_other_checkpoint_draws_with_the_lora(
    models, faces, tmp_path, cache_latents, monkeypatch
):
    base, other = models
    family = FAMILIES[NAME]
    family.train(base, faces, tmp_path, validation_model_path=other, cache_latents=cache_latents, **FLAGS)
    trained, plain = pixels(tmp_path / "image_0.png"), pixels(tmp_path / "image_0_without_lora.png")
    snippet = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"{other!r},  # trained on {base!r}" in snippet

    pipeline = load_pipeline(other)
    options = SIZE | {"num_inference_steps": 3} | family.guidance(1.0) | family.call_options
    for expected in (plain, trained):
        image = pipeline(prompt="a red ball", generator=torch.Generator().manual_seed(5), **options).images[0]
        assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 1
        pipeline.load_lora_weights(tmp_path)
    assert np.abs(trained - plain).max() > 2

    monkeypatch.chdir(tmp_path)
    seeded = "'a red ball', height=64, width=64, generator=torch.Generator().manual_seed(5)"
    exec(snippet.replace("'a red ball'", seeded), {})
    assert np.abs(pixels("image.png") - trained).max() <= 1


def test_the_model_that_trains_is_the_base_alone(models, faces, tmp_path):
    """The LoRA is the same, whichever checkpoint draws."""
    base, other = models
    loras = [
        FAMILIES[NAME].train(base, faces, tmp_path / str(i), **FLAGS, **more)
        for i, more in enumerate(({}, {"validation_model_path": other}))
    ]
    assert all((loras[0][name] == value).all() for name, value in loras[1].items())


def test_it_is_refused_before_weights_load_where_it_does_not_take_the_lora(models, tmp_path, monkeypatch):
    base, _ = models
    family = FAMILIES[NAME]
    wider = save_tiny(NAME, tmp_path / "wider", num_heads=4)
    deeper = save_tiny(NAME, tmp_path / "deeper", num_layers=2)
    sd3 = save_tiny("sd3", tmp_path / "sd3")
    monkeypatch.setattr(family.cls.pipeline_class, "from_pretrained", None)
    cases = {
        wider: "does not take this LoRA: .* of shape .* there and of shape",
        deeper: "does not take this LoRA: .* there and missing in the model that trains",
        sd3: "is a StableDiffusion3Pipeline: this script trains Z-Image",
        str(tmp_path / "z-image.safetensors"): "is a single file",
    }
    (tmp_path / "z-image.safetensors").touch()
    for other, message in cases.items():
        with pytest.raises(ValueError, match=f"--validation_model_path=.*{message}"):
            family.cls.check(family.parse_args(base, run_validation=True).replace(validation_model_path=other))


def test_it_needs_validation_and_must_exist(models, capsys):
    family = FAMILIES[NAME]
    for flags, message in (
        ({"validation_model_path": models[1]}, "--validation_model_path generates the images of validation"),
        ({"validation_model_path": "./nowhere", "run_validation": True}, "--validation_model_path=./nowhere does not"),
    ):
        with pytest.raises(SystemExit):
            family.parse_args(models[0], **flags)
        assert message in capsys.readouterr().err


def test_text_encoders_are_loaded_for_the_first_drawing_only(models, monkeypatch):
    base, other = models
    loaded = FAMILIES[NAME].load(base, validation_model_path=other, run_validation=True)
    with loaded.generating(["a red ball"]) as generate:
        first = generate(["a red ball"], [5], 2, 1.0)
    load, encoders = type(loaded)._load_pipeline, []
    monkeypatch.setattr(
        type(loaded),
        "_load_pipeline",
        lambda self, **given: encoders.append(given["text_encoder"]) or load(self, **given),
    )
    with loaded.generating(["a red ball"]) as generate:
        assert not lora_is_off(loaded.validation_model.denoiser)
        assert generate(["a red ball"], [5], 2, 1.0) == first
    assert encoders == [None]
    assert not hasattr(loaded.validation_model, "pipeline")  # its memory is given back
