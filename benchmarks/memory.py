"""GPU memory of training, computed for the real models on the meta device: nothing is allocated, nothing measured.

Frozen weights, LoRA, gradients and optimizer state are counted from the models' configurations. For the activations, one
step of one pair runs forward and backward on meta tensors, and the bytes of all tensors alive are followed through it:
their peak holds what is saved for backward, what checkpointing recomputes, and the operations' own results.

    python benchmarks/memory.py            # the table of docs/small_gpus.md
    python benchmarks/memory.py --model sdxl
"""

import argparse
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "diffusion_orpo"))
from diffusion_orpo_loss import orpo_loss  # noqa: E402
from orpo.models.registry import FLUX, SD3, SDXL  # noqa: E402


GIB = 2**30
IMAGES = 2  # one pair


def sdxl_unet() -> tuple[torch.nn.Module, dict, str]:
    """stabilityai/stable-diffusion-xl-base-1.0 at 1024 pixels."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    inputs = {
        "sample": half(IMAGES, 4, 128, 128),
        "timestep": torch.zeros(IMAGES, dtype=torch.int64),
        "encoder_hidden_states": half(IMAGES, 77, 2048),
        "added_cond_kwargs": {"text_embeds": half(IMAGES, 1280), "time_ids": torch.zeros(IMAGES, 6)},
    }
    return unet, inputs, SDXL.lora_layers


def sd3_transformer() -> tuple[torch.nn.Module, dict, str]:
    """stabilityai/stable-diffusion-3-medium at 1024 pixels, T5 reading 77 tokens."""
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    inputs = {
        "hidden_states": half(IMAGES, 16, 128, 128),
        "timestep": torch.zeros(IMAGES),
        "encoder_hidden_states": half(IMAGES, 154, 4096),
        "pooled_projections": half(IMAGES, 2048),
    }
    return transformer, inputs, SD3.lora_layers


def flux_transformer() -> tuple[torch.nn.Module, dict, str]:
    """black-forest-labs/FLUX.1-dev at 1024 pixels, T5 reading 512 tokens."""
    inputs = {
        "hidden_states": half(IMAGES, 4096, 64),
        "timestep": torch.zeros(IMAGES),
        "guidance": torch.zeros(IMAGES),
        "encoder_hidden_states": half(IMAGES, 512, 4096),
        "pooled_projections": half(IMAGES, 768),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
    }
    return FluxTransformer2DModel(guidance_embeds=True), inputs, FLUX.lora_layers


MODELS = {"sdxl": sdxl_unet, "sd3": sd3_transformer, "flux": flux_transformer}


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def build(name: str, rank: int) -> tuple[torch.nn.Module, dict]:
    """The model on the meta device, frozen, in half precision, with a LoRA in float32; and inputs for one pair."""
    with torch.device("meta"):
        model, inputs, lora_layers = MODELS[name]()
        model.to(torch.bfloat16).requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, target_modules=lora_layers.split(",")))
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    return model.train(), inputs


def lora_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_bytes(model: torch.nn.Module, quantize_base: str | None) -> int:
    """Of the frozen weights. Quantized, only the weights of linear layers shrink; the largest is there in half precision, too.

    8bit: a byte each, and a float32 for each row. nf4 with double quantization: half a byte each, a byte for each block of
    64, and a float32 for each 256 of those.
    """
    total, largest = 0, 0
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        count = parameter.numel()
        if quantize_base is None or id(parameter) not in linear:
            total += 2 * count
            continue
        largest = max(largest, 2 * count)
        total += count + 4 * len(parameter) if quantize_base == "8bit" else count / 2 + count / 64 * (1 + 4 / 256)
    return int(total) + largest


def lora_bytes(model: torch.nn.Module, use_8bit_adam: bool) -> int:
    """Of LoRA, gradients and Adam's two moments. In 8 bits, a float32 for each 256; small tensors stay in 32 bits."""
    total = 0
    for parameter in lora_parameters(model):
        count = parameter.numel()
        eight_bit = use_8bit_adam and count >= 4096
        total += 4 * count + 4 * count + 2 * (count + count / 64 if eight_bit else 4 * count)
    return int(total)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def ignore(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage neither now nor later: it was there before."""
        self.known.add(tensor.untyped_storage())

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage.nbytes())
        return tensor

    def remove(self, count: int) -> None:
        self.now -= count


class Autocast(TorchFunctionMode):
    """What autocast does on CUDA, for meta tensors, which it passes over; and attention that never makes its matrix."""

    half = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul}
    single = {F.layer_norm, F.group_norm, F.softmax, torch.pow, torch.Tensor.pow}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            tensors = args[:3] or [kwargs[name] for name in ("query", "key", "value")]
            query, key, value = (tensor.to(torch.bfloat16) for tensor in tensors)
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        dtype = torch.bfloat16 if func in self.half else torch.float32 if func in self.single else None
        if dtype is not None:

            def cast(value):
                floating = isinstance(value, torch.Tensor) and value.is_floating_point()
                return value.to(dtype) if floating else value

            args, kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        return func(*args, **kwargs)


def step_bytes(model: torch.nn.Module, inputs: dict, gradient_checkpointing: bool) -> int:
    """Peak of the bytes alive in one step besides weights and optimizer state. Gradients made before the peak are in it."""
    if gradient_checkpointing:  # recomputes under the same casts, as it would under autocast
        model.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), Autocast()))
        )
    else:
        model.disable_gradient_checkpointing()
    live = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.ignore(tensor)
    with live, Autocast():
        model_pred_w, model_pred_l = model(**inputs, return_dict=False)[0].float().chunk(2)
        loss = orpo_loss(model_pred_w, model_pred_l, torch.zeros_like(model_pred_w))
        torch.autograd.grad(loss, lora_parameters(model))
    return live.peak


def encoder_bytes(name: str) -> int:
    """Of VAE and text encoders in half precision, and of the VAE's work on one image: as latents and embeddings are cached."""
    clip_l = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    clip_g = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4 if name == "sdxl" else 16,
    }
    with torch.device("meta"):
        encoders = [AutoencoderKL(**vae), CLIPTextModel(CLIPTextConfig(**clip_l, num_hidden_layers=12))]
        if name != "flux":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**clip_g, num_hidden_layers=32)))
        if name != "sdxl":
            encoders.append(T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")))
        vae, image = encoders[0].to(torch.bfloat16), half(1, 3, 1024, 1024)
    with torch.no_grad(), LiveBytes() as live, Autocast():
        vae.encode(image)
    return live.peak + sum(2 * parameter.numel() for encoder in encoders for parameter in encoder.parameters())


def table_row(name: str, gradient_checkpointing: bool, rank: int = 8) -> str:
    """A row of the table: GiB of each part, and of all in training for each precision of the base."""
    model, inputs = build(name, rank)
    bases = [base_bytes(model, quantize_base) / GIB for quantize_base in (None, "8bit", "nf4")]
    lora = lora_bytes(model, use_8bit_adam=True) / GIB
    step = step_bytes(model, inputs, gradient_checkpointing) / GIB
    cells = [f"{base:.1f}" for base in bases] + [f"{lora:.2f}", f"{step:.1f}"]
    cells += [f"**{base + lora + step:.1f}**" for base in bases] + [f"{encoder_bytes(name) / GIB:.1f}"]
    return f"| {name} | {'yes' if gradient_checkpointing else 'no'} | " + " | ".join(cells) + " |"


HEAD = (
    "| model | checkpointing | base, half | base, 8bit | base, nf4 | LoRA, gradients, 8-bit Adam | a step of one pair"
    " | sum, half | sum, 8bit | sum, nf4 | caching |\n" + "|---" * 11 + "|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS), help="Default: all.")
    parser.add_argument("--rank", type=int, default=8, help="Of the LoRA.")
    args = parser.parse_args()
    print(HEAD)
    for name in args.model:
        for gradient_checkpointing in (True, False):
            print(table_row(name, gradient_checkpointing, args.rank), flush=True)


if __name__ == "__main__":
    main()
