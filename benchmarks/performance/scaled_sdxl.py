"""SDXL scaled down so that a training step of a pair takes about two seconds on one core, in the proportions of the real one.

    python benchmarks/performance/scaled_sdxl.py

The U-Net keeps SDXL's layout of blocks (1, 2 and 10 transformer layers, heads of equal width) at a fifth of its width, and
256 pixels stand for 1024. That alone would change what VAE and text encoders cost beside the U-Net: attention grows with
the square of the latents, and prompts keep their 77 tokens. So the VAE's width (its blocks keep their proportions 1, 2, 4, 4) and
the text encoders' layers are searched: the values that come nearest to the real ratios of operations.
`tests/benchmarks/test_performance.py` holds the result to that.
Smaller ones than this will not do: at 128 pixels, or at an eighth of the width, the U-Net's matrices are so small that a core makes
half as many operations a second in them as in the VAE, and the ratio of times is no longer the ratio of operations.
"""

import argparse
from pathlib import Path


import measuring  # isort: skip

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from flops import Configs, pair_flops, sdxl_configs, text_flops, unet_flops, vae_flops
from tiny_sdxl import build_tokenizer


RESOLUTION = 256
WORDS = ["a", "photograph", "of", "number"]
# Found by --search.
VAE_WIDTH = 26
TEXT_LAYERS = (1, 2)


def scaled_configs(vae_width: int = VAE_WIDTH, text_layers: tuple[int, int] = TEXT_LAYERS) -> Configs:
    """The configurations of the scaled model."""
    real = sdxl_configs()
    text = real.text | {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": text_layers[0],
        "num_attention_heads": 2,
        "projection_dim": 128,
    }
    text_2 = real.text_2 | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": text_layers[1],
        "num_attention_heads": 4,
        "projection_dim": 256,
    }
    unet = real.unet | {
        "sample_size": RESOLUTION // 8,
        "block_out_channels": (64, 128, 256),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": text["hidden_size"] + text_2["hidden_size"],
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 64 + text_2["projection_dim"],
    }
    vae = real.vae | {
        "block_out_channels": (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        "norm_num_groups": vae_width // 2,
        "sample_size": RESOLUTION,
        "force_upcast": False,
    }
    return Configs(unet, vae, text, text_2)


def ratios(flops: dict[str, int]) -> dict[str, float]:
    """What VAE and text encoders cost beside the U-Net."""
    return {name: flops[name] / flops["unet"] for name in ("vae", "text")}


def search() -> tuple[int, tuple[int, int]]:
    """The VAE's width and the text encoders' layers whose ratios come nearest to the real ones."""
    wanted = ratios(pair_flops(sdxl_configs(), 1024))
    unet = unet_flops(scaled_configs(), RESOLUTION)
    layers = [(1, 1), (1, 2), (1, 3), (2, 4)]
    return (
        min(
            range(20, 33, 2),
            key=lambda width: abs(vae_flops(scaled_configs(width), RESOLUTION) / unet - wanted["vae"]),
        ),
        min(layers, key=lambda n: abs(text_flops(scaled_configs(text_layers=n)) / unet - wanted["text"])),
    )


def build(seed: int = 0) -> StableDiffusionXLPipeline:
    """The pipeline, with random weights."""
    torch.manual_seed(seed)
    configs = scaled_configs()
    tokenizers = [build_tokenizer(WORDS), build_tokenizer(WORDS)]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 77
    special = {
        "vocab_size": len(tokenizers[0]),
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "pad_token_id": tokenizers[0].pad_token_id,
    }
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**configs.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**configs.text | special)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**configs.text_2 | special)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=UNet2DConditionModel(**configs.unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def save(folder: str | Path) -> str:
    """Writes the pipeline to a folder, where the training scripts find it."""
    build().save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--search", action="store_true", help="Search for the VAE's width and the layers again, and print them."
    )
    measuring.add_output(parser)
    args = parser.parse_args()
    if args.search:
        print("found:", search(), "in use:", (VAE_WIDTH, TEXT_LAYERS))
    real, scaled = pair_flops(sdxl_configs(), 1024), pair_flops(scaled_configs(), RESOLUTION)
    rows = [[name, f"{real[name] / 1e12:.2f} T", f"{scaled[name] / 1e9:.2f} G"] for name in real]
    rows += [
        [f"{name} / unet", f"{ratios(real)[name]:.4f}", f"{ratios(scaled)[name]:.4f}"] for name in ("vae", "text")
    ]
    measuring.print_table(["operations per pair", "SDXL, 1024 pixels", f"scaled, {RESOLUTION} pixels"], rows)
    measuring.store(args.output_dir, "scaled_sdxl", {"resolution": RESOLUTION, "real": real, "scaled": scaled})


if __name__ == "__main__":
    main()
