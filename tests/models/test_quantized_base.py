"""--bnb_quantization_config_path: the base in 8 or 4 bits, the LoRA as ever.

diffusers asks for a GPU before it quantizes; bitsandbytes itself runs on CPUs. The tests lift that one demand.
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from helpers import arguments, train
from orpo.models.sdxl import StableDiffusionXL

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from train_diffusion_orpo_sdxl_lora import parse_args


LAYERS = {"8bit": (Linear8bitLt, torch.int8), "nf4": (Linear4bit, torch.uint8)}


@pytest.fixture(autouse=True)
def quantizing_on_a_cpu(monkeypatch):
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map)


def load(model: str, **flags) -> StableDiffusionXL:
    args = parse_args(arguments(model, "unused", "unused", **flags))
    return StableDiffusionXL.load(args, torch.device("cpu"), torch.float32)


def predict(model: StableDiffusionXL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    batch = {"original_sizes": torch.full((2, 2), 64), "crop_top_lefts": torch.zeros(2, 2, dtype=torch.int64)}
    noisy_latents = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        embeds = model.encode_prompts(["a red ball"])
        return model.predict(model.denoiser.train(), noisy_latents, torch.tensor([300, 300]), embeds, batch)


@pytest.mark.parametrize("quantize_base", LAYERS)
def test_linear_layers_are_quantized_and_predict_nearly_the_same(demo_base, quantize_base):
    unet = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet")
    plain, quantized = load(demo_base), load(demo_base, bnb_quantization_config_path=quantize_base)
    layer_class, dtype = LAYERS[quantize_base]
    layers = [module for module in quantized.denoiser.modules() if isinstance(module, layer_class)]
    assert len(layers) == sum(type(module) is torch.nn.Linear for module in unet.modules())
    assert {layer.weight.dtype for layer in layers} == {dtype}
    lora = [parameter for parameter in quantized.denoiser.parameters() if parameter.requires_grad]
    assert lora and {parameter.dtype for parameter in lora} == {torch.float32}
    expected = predict(plain)
    error = (predict(quantized) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize(("quantize_base", "mixed_precision"), [("8bit", "no"), ("nf4", "bf16")])
def test_trains_resumes_bit_for_bit_and_loads_into_the_base_that_is_not_quantized(
    demo_base, faces, tmp_path, quantize_base, mixed_precision
):
    """As docs/small_gpus.md has it: with 8-bit Adam, gradient checkpointing and cached latents."""
    flags = {
        "bnb_quantization_config_path": quantize_base,
        "mixed_precision": mixed_precision,
        "optimizer": "AdamW8bit",
        "gradient_checkpointing": True,
        "cache_latents": True,
        "checkpointing_steps": 2,
        "learning_rate": 1e-2,
    }
    whole = train(demo_base, faces, tmp_path / "whole", max_train_steps=4, **flags)
    train(demo_base, faces, tmp_path / "resumed", max_train_steps=2, **flags)
    resumed = train(
        demo_base, faces, tmp_path / "resumed", max_train_steps=4, resume_from_checkpoint="latest", **flags
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    moved = [value.abs().sum() > 0 for name, value in whole.items() if "lora_B" in name]  # they start at 0
    assert moved and all(moved)

    pipeline = StableDiffusionXLPipeline.from_pretrained(demo_base, dtype=torch.float32)
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "whole")
    assert not torch.equal(draw(pipeline), plain)


def test_a_json_file_quantizes_as_it_says(demo_base, tmp_path):
    """--bnb_quantization_config_path; what `llm_int8_skip_modules` names stays as it is."""
    path = tmp_path / "bnb.json"
    path.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["to_q"]}')
    denoiser = load(demo_base, bnb_quantization_config_path=str(path)).denoiser
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, Linear4bit)}
    assert {layer.weight.quant_type for layer in layers.values()} == {"fp4"}
    assert any("to_k" in name for name in layers) and not any("to_q" in name for name in layers)


def draw(pipeline) -> torch.Tensor:
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline("a red ball", generator=torch.Generator().manual_seed(0), **options).images
