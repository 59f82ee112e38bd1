"""The LoRA for ComfyUI and AUTOMATIC1111: names by their rules, strength by alpha, and the same image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, load_pipeline
from helpers import train
from orpo.models.lora_files import COMFYUI_FILE
from safetensors.torch import load_file


RANK, ALPHA = 4, 16.0


@pytest.fixture(scope="module")
def sdxl_lora(tiny_sdxl, faces, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "lora"
    train(tiny_sdxl, faces, folder, rank=RANK, lora_alpha=ALPHA, learning_rate=1e-2)
    return folder


@pytest.fixture(scope="module", params=["sd", "sd3", "flux", "z_image", "flux2", "qwen_image"])
def family_lora(request, faces, models, tmp_path_factory) -> tuple[str, str, Path]:
    """A family, its tiny model and a trained LoRA."""
    folder = tmp_path_factory.mktemp(request.param)
    model = models[request.param]
    flags = {"rank": RANK, "lora_alpha": ALPHA, "learning_rate": 1e-2, "beta_orpo": 0.1}
    FAMILIES[request.param].train(model, faces, folder / "lora", **flags)
    return request.param, model, folder / "lora"


def draw(model: str, lora: Path | None, weight_name: str | None = None, **options) -> np.ndarray:
    """One image (64, 64, 3) in 0 to 1."""
    pipeline = load_pipeline(model)
    if lora is not None:
        pipeline.load_lora_weights(str(lora), weight_name=weight_name)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
    return pipeline(prompt="a red face", generator=generator, **size, **options).images[0]


def unet_modules(unet_config: dict) -> list[str]:
    """The attention projections of a U-Net, from its configuration alone.

    The naming rules are those of ComfyUI's `unet_to_diffusers` (comfy/utils.py) and of kohya's sd-scripts
    (networks/lora.py): blocks, resnets and attentions are numbered, and every dot becomes an underscore.
    """
    names = []
    layers = unet_config["layers_per_block"]
    depth = unet_config["transformer_layers_per_block"]
    blocks = [
        (f"{side}_blocks_{i}", layers + (side == "up"))
        for side, types in (("down", unet_config["down_block_types"]), ("up", unet_config["up_block_types"]))
        for i, kind in enumerate(types)
        if "CrossAttn" in kind
    ]
    for block, attentions in [*blocks, ("mid_block", 1)]:
        for j in range(attentions):
            for k in range(depth):
                for attention in ("attn1", "attn2"):
                    for projection in ("to_q", "to_k", "to_v", "to_out_0"):
                        names.append(
                            f"lora_unet_{block}_attentions_{j}_transformer_blocks_{k}_{attention}_{projection}"
                        )
    return names


@pytest.mark.parametrize("which", ["sdxl", "sd"])
def test_unets_have_kohyas_names_and_alpha(which, request, models, sdxl_lora, faces, tmp_path):
    model, lora = models[which], sdxl_lora
    if which == "sd":
        lora = tmp_path / "lora"
        FAMILIES["sd"].train(model, faces, lora, rank=RANK, lora_alpha=ALPHA)
    weights = load_file(lora / COMFYUI_FILE)
    modules = unet_modules(load_pipeline(model).unet.config)
    assert set(weights) == {f"{m}.{s}" for m in modules for s in ("lora_down.weight", "lora_up.weight", "alpha")}
    for module in modules:
        assert weights[f"{module}.alpha"].item() == ALPHA
        assert weights[f"{module}.lora_down.weight"].shape[0] == weights[f"{module}.lora_up.weight"].shape[1] == RANK


def test_transformers_keep_the_names_that_comfyui_reads(family_lora):
    """ComfyUI maps `transformer.` and diffusers' name of the module to its own (comfy/lora.py), and reads alpha as the rank
    where no `.alpha` stands beside it."""
    name, model, lora = family_lora
    if name == "sd":
        pytest.skip("a U-Net")
    weights = load_file(lora / COMFYUI_FILE)
    linear = {n for n, m in load_pipeline(model).transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    modules = {n.removeprefix("transformer.").rsplit(".lora_", 1)[0] for n in weights}
    assert modules <= linear and len(modules) == len(weights) / 2
    assert {n.rsplit(".lora_", 1)[1] for n in weights} == {"A.weight", "B.weight"}


def test_the_converted_file_draws_the_same_image(family_lora, tiny_sdxl, sdxl_lora):
    name, model, lora = family_lora
    options = FAMILIES[name].call_options
    expected = draw(model, lora, "pytorch_lora_weights.safetensors", **options)
    assert np.abs(expected - draw(model, None, **options)).max() > 0.002
    np.testing.assert_allclose(draw(model, lora, COMFYUI_FILE, **options), expected, atol=1e-4)
    if name == "sd":
        expected = draw(tiny_sdxl, sdxl_lora, "pytorch_lora_weights.safetensors")
        np.testing.assert_allclose(draw(tiny_sdxl, sdxl_lora, COMFYUI_FILE), expected, atol=1e-4)


def test_a_folder_without_a_name_loads_the_diffusers_file(tiny_sdxl, sdxl_lora, monkeypatch):
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    expected = draw(tiny_sdxl, sdxl_lora, "pytorch_lora_weights.safetensors")
    np.testing.assert_array_equal(draw(tiny_sdxl, sdxl_lora), expected)
