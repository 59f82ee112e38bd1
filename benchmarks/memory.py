"""GPU memory of training, computed for the real models on the meta device: nothing is allocated, nothing measured.

Frozen weights, LoRA, gradients and optimizer state are counted from the models' configurations. For the activations, one
step of one pair runs forward and backward on meta tensors, and the bytes of all tensors alive are followed through it:
their peak holds what is saved for backward, what checkpointing recomputes, and the operations' own results.

    python benchmarks/memory.py            # the table of docs/models.md
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


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples" / "diffusion_orpo")]
import published  # noqa: E402
from diffusion_orpo_loss import orpo_loss  # noqa: E402
from orpo.config import ModelConfig  # noqa: E402
from orpo.models.checks import find_modules  # noqa: E402
from orpo.models.registry import FLUX, FLUX2_KLEIN, QWEN_IMAGE, SD3, SDXL, Z_IMAGE  # noqa: E402


GIB = 2**30
IMAGES = 2  # one pair
FAMILIES = {"sdxl": SDXL, "sd3": SD3, "flux": FLUX, "z_image": Z_IMAGE, "flux2": FLUX2_KLEIN, "qwen_image": QWEN_IMAGE}
# Tokens of a prompt by the flags' defaults, with CLIP's where the denoiser sees both; and channels of their embeddings.
PROMPTS = {
    "sdxl": (77, 2048),
    "sd3": (154, 4096),
    "flux": (512, 4096),
    "z_image": (512, 2560),
    "flux2": (512, 7680),
    "qwen_image": (512, 3584),
}
POOLED = {"sdxl": 1280, "sd3": 2048, "flux": 768}


def inputs(name: str) -> dict:
    """What the denoiser is given for one pair at 1024 pixels."""
    prompt_embeds, timestep = half(IMAGES, *PROMPTS[name]), torch.zeros(IMAGES)
    if name == "sdxl":
        return {
            "sample": half(IMAGES, 4, 128, 128),
            "timestep": timestep.long(),
            "encoder_hidden_states": prompt_embeds,
            "added_cond_kwargs": {"text_embeds": half(IMAGES, POOLED[name]), "time_ids": torch.zeros(IMAGES, 6)},
        }
    if name == "z_image":
        return {"x": list(half(IMAGES, 16, 1, 128, 128)), "t": timestep, "cap_feats": list(prompt_embeds)}
    given = {"timestep": timestep, "encoder_hidden_states": prompt_embeds}
    if name == "sd3":
        return given | {"hidden_states": half(IMAGES, 16, 128, 128), "pooled_projections": half(IMAGES, POOLED[name])}
    given["hidden_states"] = half(IMAGES, 4096, 128 if name == "flux2" else 64)
    if name == "qwen_image":
        return given | {"encoder_hidden_states_mask": None, "img_shapes": [[(1, 64, 64)]] * IMAGES}
    axes = 4 if name == "flux2" else 3
    given |= {"img_ids": torch.zeros(4096, axes), "txt_ids": torch.zeros(512, axes), "guidance": None}
    return given | ({"guidance": timestep, "pooled_projections": half(IMAGES, POOLED[name])} if name == "flux" else {})


def prompt_bytes(name: str) -> int:
    """Of a cached prompt: its embeddings in half precision, and Qwen-Image's mask in eight bytes a token."""
    tokens, channels = PROMPTS[name]
    return 2 * (tokens * channels + POOLED.get(name, 0)) + (8 * tokens if name == "qwen_image" else 0)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def build(name: str, rank: int) -> tuple[torch.nn.Module, dict]:
    """The model on the meta device, frozen, in half precision, with a LoRA in float32; and inputs for one pair."""
    with torch.device("meta"):
        model, given = published.denoiser(name), inputs(name)
        model.to(torch.bfloat16).requires_grad_(False)
        layers = FAMILIES[name].defaults.get("lora_layers", ModelConfig.lora_layers).split(",")
        model.add_adapter(
            LoraConfig(r=rank, target_modules=[module for layer in layers for module in find_modules(model, layer)])
        )
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    return model.train(), given


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
        model_pred = model(**inputs, return_dict=False)[0]
        model_pred = torch.stack(model_pred) if isinstance(model_pred, list) else model_pred  # Z-Image's
        model_pred_w, model_pred_l = model_pred.float().chunk(2)
        loss = orpo_loss(model_pred_w, model_pred_l, torch.zeros_like(model_pred_w))
        torch.autograd.grad(loss, lora_parameters(model))
    return live.peak


def encoder_bytes(name: str) -> int:
    """Of VAE and text encoders in half precision, and of the VAE's work on one image: as latents and embeddings are cached."""
    with torch.device("meta"):
        modules = [published.vae(name), *published.text_encoders(name)]
        vae, image = modules[0].to(torch.bfloat16), half(1, 3, 1024, 1024)
    with torch.no_grad(), LiveBytes() as live, Autocast():
        vae.encode(image.unsqueeze(2) if name == "qwen_image" else image)
    return live.peak + sum(2 * parameter.numel() for module in modules for parameter in module.parameters())


def table_row(name: str, gradient_checkpointing: bool, rank: int = 8) -> str:
    """A row of the table: GiB of each part, and of all in training for each precision of the base."""
    model, inputs = build(name, rank)
    bases = [base_bytes(model, quantize_base) / GIB for quantize_base in (None, "8bit", "nf4")]
    lora = lora_bytes(model, use_8bit_adam=True) / GIB
    step = step_bytes(model, inputs, gradient_checkpointing) / GIB
    cells = [f"{base:.1f}" for base in bases] + [f"{lora:.2f}", f"{step:.1f}"]
    cells += [f"**{base + lora + step:.1f}**" for base in bases] + [f"{encoder_bytes(name) / GIB:.1f}"]
    cells.append(f"{prompt_bytes(name) / 2**20:.1f}")
    return f"| {name} | {'yes' if gradient_checkpointing else 'no'} | " + " | ".join(cells) + " |"


HEAD = (
    "| model | checkpointing | base, half | base, 8bit | base, nf4 | LoRA, gradients, 8-bit Adam | a step of one pair"
    " | sum, half | sum, 8bit | sum, nf4 | caching | a cached prompt, MiB |\n" + "|---" * 12 + "|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(FAMILIES), nargs="+", default=list(FAMILIES), help="Default: all.")
    parser.add_argument("--rank", type=int, default=8, help="Of the LoRA.")
    args = parser.parse_args()
    print(HEAD)
    for name in args.model:
        for gradient_checkpointing in (True, False):
            print(table_row(name, gradient_checkpointing, args.rank), flush=True)


if __name__ == "__main__":
    main()
