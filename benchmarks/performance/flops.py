"""The arithmetic of a training step of real SDXL: floating-point operations of each module per pair, and its weights.

    python benchmarks/performance/flops.py

Counted on meta tensors: nothing is computed and no weights are needed. Matrix products and convolutions count, a
multiplication with its addition as two; all else (normalization, activations, softmax, the optimizer) does not.
"""

import argparse
from dataclasses import dataclass


import measuring  # isort: skip

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor


LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]
NAMES = {
    "forward": "U-Net, forward alone",
    "unet": "U-Net with LoRA, forward and backward",
    "unet_checkpointed": "the same with gradient checkpointing",
    "vae": "VAE, encoding both images",
    "text": "text encoders, once for both images",
}


@dataclass(frozen=True)
class Configs:
    """What decides the arithmetic of an SDXL: the configurations of its modules.

    Attributes:
        unet, vae: arguments of their classes.
        text, text_2: arguments of CLIPTextConfig.
    """

    unet: dict
    vae: dict
    text: dict
    text_2: dict


def sdxl_configs() -> Configs:
    """Those of stabilityai/stable-diffusion-xl-base-1.0."""
    unet = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "sample_size": 1024,
    }
    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    }
    text_2 = text | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    }
    return Configs(unet, vae, text, text_2)


def count(function) -> int:
    """Floating-point operations of a call."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def build_unet(configs: Configs, rank: int = 4) -> UNet2DConditionModel:
    """A U-Net with a LoRA, on meta."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**configs.unet).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LAYERS))
    unet.set_attn_processor(AttnProcessor())  # as matrix products, which the counter knows on every device
    return unet.train()


def unet_inputs(configs: Configs, images: int, resolution: int) -> tuple:
    side, width = resolution // 8, configs.text_2["projection_dim"]
    latents = torch.empty(images, 4, side, side, device="meta")
    text = torch.empty(images, 77, configs.unet["cross_attention_dim"], device="meta")
    added = {
        "text_embeds": torch.empty(images, width, device="meta"),
        "time_ids": torch.empty(images, 6, device="meta"),
    }
    return latents, torch.empty(images, device="meta"), text, None, None, None, None, added


def unet_flops(configs: Configs, resolution: int, checkpointing: bool = False, backward: bool = True) -> int:
    """Of the U-Net for both images of a pair, forward and backward, where the LoRA alone has gradients, or forward alone."""
    unet, inputs = build_unet(configs), unet_inputs(configs, 2, resolution)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def step() -> None:
        prediction = unet(*inputs, return_dict=False)[0]
        if backward:
            prediction.mean().backward()

    return count(step)


def vae_flops(configs: Configs, resolution: int) -> int:
    """Of encoding both images of a pair."""
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(**configs.vae)
        vae.set_attn_processor(AttnProcessor())
        return count(lambda: vae.encode(torch.empty(2, 3, resolution, resolution)))


def text_flops(configs: Configs) -> int:
    """Of encoding the prompt of a pair once, by both encoders."""
    total = 0
    for model_class, config in ((CLIPTextModel, configs.text), (CLIPTextModelWithProjection, configs.text_2)):
        with torch.device("meta"), torch.no_grad():
            encoder = model_class._from_config(CLIPTextConfig(**config), attn_implementation="eager")
            total += count(lambda: encoder(torch.zeros(1, 77, dtype=torch.long)))
    return total


def pair_flops(configs: Configs, resolution: int) -> dict[str, int]:
    """Of a pair, by module."""
    return {
        "forward": unet_flops(configs, resolution, backward=False),
        "unet": unet_flops(configs, resolution),
        "unet_checkpointed": unet_flops(configs, resolution, checkpointing=True),
        "vae": vae_flops(configs, resolution),
        "text": text_flops(configs),
    }


def bound(flops: dict[str, int], unet: str = "unet") -> float:
    """How many times as fast a step is without VAE and text encoders, where every operation takes the same time."""
    return (flops[unet] + flops["vae"] + flops["text"]) / flops[unet]


def weights(configs: Configs) -> dict[str, int]:
    """Parameters of each module."""
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**configs.unet),
            "vae": AutoencoderKL(**configs.vae),
            "text": torch.nn.ModuleList(
                [
                    CLIPTextModel(CLIPTextConfig(**configs.text)),
                    CLIPTextModelWithProjection(CLIPTextConfig(**configs.text_2)),
                ]
            ),
        }
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024, help="Pixels a side.")
    measuring.add_output(parser)
    args = parser.parse_args()
    configs = sdxl_configs()
    flops, parameters = pair_flops(configs, args.resolution), weights(configs)
    measuring.print_table(
        ["module", "TFLOP per pair", "weights in fp16"],
        [
            [
                title,
                f"{flops[name] / 1e12:.2f}",
                f"{parameters[name] * 2 / 2**30:.2f} GiB" if name in parameters else "",
            ]
            for name, title in NAMES.items()
        ],
    )
    print(f"bound: {bound(flops):.3f}, with checkpointing {bound(flops, 'unet_checkpointed'):.3f}")
    measuring.store(
        args.output_dir,
        "flops",
        {
            "resolution": args.resolution,
            "flops": flops,
            "weights": parameters,
            "bound": bound(flops),
            "bound_checkpointed": bound(flops, "unet_checkpointed"),
        },
    )


if __name__ == "__main__":
    main()
