"""The memory that docs/models.md states is what benchmarks/memory.py computes, and that counts right."""

import runpy
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from orpo.config import ModelConfig
from orpo.models.quantization import quantization_options, read_bnb_config
from peft import LoraConfig

from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer


ROOT = Path(__file__).parents[2]
memory = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
DOC = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_pages_table_is_what_is_computed(name):
    assert memory["table_row"](name, gradient_checkpointing=True) in DOC


@pytest.mark.parametrize("name", ["flux", "z_image", "flux2", "qwen_image"])
def test_the_pages_weights_of_the_largest_models_are_what_is_computed(name):
    """Their steps take longer to compute: `python benchmarks/memory.py` does it."""
    model, _ = memory["build"](name, 8)
    cells = [f"{memory['base_bytes'](model, quantize_base) / 2**30:.1f}" for quantize_base in (None, "8bit", "nf4")]
    row = f"| {name} | yes | {' | '.join(cells)} | {memory['lora_bytes'](model, True) / 2**30:.2f} |"
    (line,) = [line for line in DOC.splitlines() if line.startswith(row)]
    assert line.endswith(f" {memory['prompt_bytes'](name) / 2**20:.1f} |")


def test_models_are_as_large_as_the_published_ones():
    sizes = {}
    for name in memory["FAMILIES"]:
        model, _ = memory["build"](name, 8)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert sizes == {
        "sdxl": 2_567_463_684,
        "sd3": 2_028_328_000,
        "flux": 11_901_408_320,
        "z_image": 6_154_908_736,
        "flux2": 3_875_544_576,
        "qwen_image": 20_430_401_088,
    }


def test_live_bytes_of_a_step_that_can_be_counted_by_hand():
    """Weight of 8 x 8; x of 4 x 8 is there before. Forward: y and its square. Backward: their gradients, and the weight's."""
    weight = torch.zeros(8, 8, device="meta", requires_grad=True)
    x = torch.zeros(4, 8, device="meta")
    live = memory["LiveBytes"]()
    live.ignore(weight)
    live.ignore(x)
    with live:
        y = x @ weight
        assert live.now == 4 * 32
        z = y.tanh()  # keeps its result
        del y
        assert live.now == 4 * 32
        loss = z.sum()
        assert live.now == 4 * 33
        (gradient,) = torch.autograd.grad(loss, [weight])
        del z, loss
    assert live.now == gradient.nbytes == 4 * 64
    assert 4 * (33 + 32 + 64) <= live.peak <= 4 * (33 + 3 * 32 + 64 + 1)


def test_what_is_alive_after_the_forward_pass_is_what_is_saved_for_backward(demo_base):
    """Saved tensors are counted here by autograd's own hooks."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(demo_base, subfolder="unet")).to("meta")
    known = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    live = memory["LiveBytes"]()
    for parameter in unet.parameters():
        live.ignore(parameter)
    with torch.device("meta"):
        added = {"text_embeds": torch.zeros(2, 32), "time_ids": torch.zeros(2, 6)}
        inputs = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 24, 64)
    with live, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(*inputs, added_cond_kwargs=added).sample
    assert output.requires_grad and len(saved) > 100
    assert live.now == pytest.approx(sum(saved.values()), rel=0.02)


@pytest.mark.parametrize("quantize_base", ["8bit", "nf4"])
def test_quantized_weights_are_as_large_as_bitsandbytes_makes_them(demo_base, quantize_base, monkeypatch):
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map)
    options = {"subfolder": "unet", "dtype": torch.bfloat16}
    plain = UNet2DConditionModel.from_pretrained(demo_base, **options).requires_grad_(False)
    quantization = quantization_options(
        ModelConfig(bnb_quantization_config_path=read_bnb_config(quantize_base)), "unet", torch.bfloat16
    )
    config = quantization["quantization_config"].quant_mapping["unet"]
    quantized = UNet2DConditionModel.from_pretrained(demo_base, quantization_config=config, **options)
    size = 0
    for parameter in quantized.parameters():
        if parameter.dtype not in (torch.int8, torch.uint8):
            continue
        size += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        scales = [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
        size += sum(scale.nbytes for scale in scales + ([state.absmax, state.state2.absmax] if state else []))
    largest = max(2 * module.weight.numel() for module in plain.modules() if isinstance(module, torch.nn.Linear))
    linear = sum(2 * module.weight.numel() for module in plain.modules() if isinstance(module, torch.nn.Linear))
    others = memory["base_bytes"](plain, None) - linear
    assert memory["base_bytes"](plain, quantize_base) - largest - others == pytest.approx(size, rel=0.01)
    assert memory["base_bytes"](plain, None) == sum(parameter.nbytes for parameter in plain.parameters())


def test_lora_and_its_optimizer_are_as_large_as_they_are_in_training(demo_base):
    unet = UNet2DConditionModel.from_pretrained(demo_base, subfolder="unet", dtype=torch.float32)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=64, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    parameters = memory["lora_parameters"](unet)
    for use_8bit_adam, optimizer in ((True, AdamW8bit(parameters)), (False, torch.optim.AdamW(parameters))):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        moments = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.numel() > 1]
        codes = {
            tensor.data_ptr()
            for name in ("qmap1", "qmap2")
            for state in optimizer.state.values()
            for tensor in [state.get(name)]
            if tensor is not None
        }
        size = sum(tensor.nbytes for tensor in moments if tensor.data_ptr() not in codes)
        size += sum(2 * parameter.nbytes for parameter in parameters)
        assert memory["lora_bytes"](unet, use_8bit_adam) == pytest.approx(size, rel=0.01)
