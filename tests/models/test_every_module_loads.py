"""A pipeline loads every module that was trained, whatever --lora_layers names, from both files, and predicts the same."""

import pytest
import torch
from families import FAMILIES, load_pipeline
from orpo.config import ModelConfig
from orpo.models.lora_files import COMFYUI_FILE
from orpo.models.sdxl import StableDiffusionXL
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file


MIXED = [  # of U-Nets: attention beside other modules, which diffusers' older names don't cover
    "to_k,to_q,to_v,to_out.0,proj_in,proj_out",
    "to_q,conv1,conv2,time_emb_proj,conv_shortcut",
    "to_k,downsamplers.0.conv,upsamplers.0.conv,conv_in,conv_out",
    "to_v,ff.net.0.proj,ff.net.2,time_embedding.linear_1,time_embedding.linear_2",
]


@pytest.fixture
def base(request, models):
    """A family's class, and the folder of a tiny model of it."""
    return StableDiffusionXL if request.param == "sdxl" else FAMILIES[request.param].cls, models[request.param]


def trained(cls, folder: str, layers: str, lora):
    """A model whose LoRA is random, with an alpha that is not the rank, and its two files."""
    options = ModelConfig(
        pretrained_model_name_or_path=folder,
        rank=2,
        lora_alpha=3,
        lora_layers=layers,
        resolution=64,
        max_sequence_length=20,
        guidance_scale=1.0,
    )
    model = cls.load(options, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    lora.mkdir()
    model.save_lora(lora)
    model.save_for_other_programs(lora)
    return model


def lora_modules(denoiser) -> set[str]:
    return {name for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def prediction(model, denoiser) -> torch.Tensor:
    prompts, generator = ["a red face", "a ball"], torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    latents = model.sample_latents(model.encode_images(pixels), [torch.Generator().manual_seed(i) for i in range(4)])
    batch = {"original_sizes": torch.tensor([[64, 64]] * 4), "crop_top_lefts": torch.zeros(4, 2, dtype=torch.long)}
    timesteps = torch.tensor([300, 700, 300, 700])
    return model.predict(denoiser.eval(), latents, timesteps, model.encode_prompts(prompts), batch)


def check_loads(model, folder: str, lora, file: str | None) -> None:
    """Loads a file of a folder; without a name, the one that diffusers takes by itself."""
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(lora, weight_name=file)
    loaded = getattr(pipeline, model.denoiser_name)
    assert lora_modules(loaded) == lora_modules(model.denoiser)
    expected = prediction(model, model.denoiser)
    torch.testing.assert_close(prediction(model, loaded), expected, rtol=1e-4, atol=1e-5)
    pipeline.disable_lora()
    assert (prediction(model, loaded) - expected).norm() > 0.05 * expected.norm()  # the LoRA does something


@pytest.mark.parametrize("base", ["sdxl", *FAMILIES], indirect=True)
def test_a_lora_on_every_layer_of_the_model_loads_whole(base, tmp_path):
    cls, folder = base
    denoiser = getattr(load_pipeline(folder), cls.denoiser_name)
    layers = [
        name for name, module in denoiser.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    model = trained(cls, folder, ",".join(layers), tmp_path / "lora")
    assert lora_modules(model.denoiser) == set(layers)
    for file in (None, COMFYUI_FILE):
        check_loads(model, folder, tmp_path / "lora", file)


@pytest.mark.parametrize("layers", MIXED)
@pytest.mark.parametrize("base", ["sdxl", "sd"], indirect=True)
def test_attention_beside_other_modules_loads_whole_from_both_files(base, layers, tmp_path):
    cls, folder = base
    model = trained(cls, folder, layers, tmp_path / "lora")
    for file in (None, COMFYUI_FILE):
        check_loads(model, folder, tmp_path / "lora", file)
    names = {name.rsplit(".", 2 if "lora_" in name else 1)[0] for name in load_file(tmp_path / "lora" / COMFYUI_FILE)}
    assert names == {f"lora_unet_{name.replace('.', '_')}" for name in lora_modules(model.denoiser)}  # kohya's rule


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


@pytest.mark.parametrize("base", ["sdxl", "sd"], indirect=True)
def test_unets_have_kohyas_names_and_alpha(base, tmp_path):
    cls, folder = base
    model = trained(cls, folder, "to_k,to_q,to_v,to_out.0", tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / COMFYUI_FILE)
    modules = unet_modules(model.denoiser.config)
    assert set(weights) == {f"{m}.{s}" for m in modules for s in ("lora_down.weight", "lora_up.weight", "alpha")}
    for module in modules:
        assert weights[f"{module}.alpha"].item() == 3
        assert weights[f"{module}.lora_down.weight"].shape[0] == weights[f"{module}.lora_up.weight"].shape[1] == 2


@pytest.mark.parametrize("base", [name for name in FAMILIES if name != "sd"], indirect=True)
def test_transformers_keep_the_names_that_comfyui_reads(base, tmp_path):
    """ComfyUI maps `transformer.` and diffusers' name of the module to its own (comfy/lora.py), and reads alpha as the rank
    where no `.alpha` stands beside it."""
    cls, folder = base
    model = trained(cls, folder, "to_q,to_k", tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / COMFYUI_FILE)
    modules = lora_modules(model.denoiser)
    assert set(weights) == {f"transformer.{name}.lora_{side}.weight" for name in modules for side in "AB"}
