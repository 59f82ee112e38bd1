#!/usr/bin/env python
# coding=utf-8
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# /// script
# dependencies = [
#     "diffusers>=0.40",
#     "torch>=2.4",
#     "accelerate>=1.2",
#     "bitsandbytes>=0.50",
#     "datasets>=4.3",
#     "huggingface_hub>=1.23",
#     "peft>=0.18",
#     "tensorboard",
#     "transformers>=5.6.2",
#     "wandb",
# ]
# ///
"""Aligns Stable Diffusion XL with human preferences: trains a LoRA with ORPO, without a reference model.

From top to bottom: the loss, the pairs, encoding, drawing, saving, the flags, and `main` with the training step. The
equations are those of ORPO, arXiv 2403.07691.
"""

import argparse
import logging
import math
import re
import shutil
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed
from datasets import get_dataset_split_names, load_dataset
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import check_min_version
from diffusers.utils.hub_utils import populate_model_card


# Will error if the minimal version of diffusers is not installed. Remove at your own risks.
check_min_version("0.40.0.dev0")

logger = get_logger(__name__)

VALIDATION_PROMPTS = [
    "close-up portrait of an old fisherman laughing, window light, 85mm photograph",
    "a fox reading a newspaper in a cafe, watercolor on rough paper",
    "a quiet harbor at dawn, fog over wooden boats, wide angle, highly detailed",
    "a red teapot left of a stack of three blue books on a marble table",
]


def log_odds(error: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)), equation 3, where log p = -error. Written so that it is exact for small and large errors."""
    error = error.clamp(min=1e-9)  # at 0 the odds are infinite
    return -(error + torch.log(-torch.expm1(-error)))


def orpo_loss(
    error_w: torch.Tensor, error_l: torch.Tensor, beta: float | None, loser_share: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair, and the log of its odds ratio, which is above 0 where the model prefers the winner.

    Args:
        error_w, error_l: mean squared error of the winner and of the loser of each pair, float32, shape (B,).
        beta: weight of the odds ratio, called lambda in the paper; 0 is plain fine-tuning on the winners.
        loser_share: in place of beta, the loser's share of the gradient where errors are equal, at every noise level.
    """
    if loser_share is not None:  # both terms on the scale of the logarithm, where -log(error) is the log odds
        log_w, log_l = (error.clamp(min=1e-9).log() for error in (error_w, error_l))
        return log_w - 2 * loser_share / (1 - 2 * loser_share) * F.logsigmoid(log_l - log_w), log_l - log_w
    log_odds_ratio = log_odds(error_w) - log_odds(error_l)  # the log of equation 4
    return error_w - beta * F.logsigmoid(log_odds_ratio), log_odds_ratio  # equations 6 and 7


def load_pairs(args) -> tuple[datasets.Dataset, list[tuple[int, bool]]]:
    """Opens the dataset and drops ties: they say nothing about what people prefer.

    Returns:
        The dataset, with the columns `jpg_0`, `jpg_1` and `caption`; and, for each pair, its row and whether `jpg_0`
        is the preferred image.

    Raises:
        ValueError: columns are missing, a label or a caption is not one, or no pairs are left.
    """
    split = args.dataset_split_name
    if split is None:
        splits = get_dataset_split_names(args.dataset_name, args.dataset_config_name)
        split = splits[0] if len(splits) == 1 else "train"
    dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    columns = set(dataset.column_names)
    if {"jpg_0", "jpg_1", "label_0", "caption"} <= columns:
        labels = dataset["label_0"]
    elif {"chosen", "rejected", "prompt"} <= columns:
        dataset = dataset.select_columns(["chosen", "rejected", "prompt"])
        dataset = dataset.rename_columns({"chosen": "jpg_0", "rejected": "jpg_1", "prompt": "caption"})
        labels = [1.0] * len(dataset)
    else:
        raise ValueError(
            f"{args.dataset_name} has the columns {', '.join(sorted(columns))}. Needed are jpg_0, jpg_1, label_0 and"
            " caption, or chosen, rejected and prompt."
        )
    pairs = []
    for row, (label, caption) in enumerate(zip(labels, dataset["caption"])):
        label = parse_label(label, row)
        if not isinstance(caption, str):
            raise ValueError(f"Row {row}: the caption is {caption!r}, not text. Remove this row.")
        if label != 0.5:
            pairs.append((row, label == 1.0))
    logger.info(f"{args.dataset_name}, {split}: {len(pairs)} pairs, {len(dataset) - len(pairs)} ties dropped")
    pairs = pairs[: args.max_train_samples]
    if not pairs:
        raise ValueError(f"No pairs are left of the {len(dataset)} rows of {args.dataset_name}, {split}.")
    for column in ("jpg_0", "jpg_1"):  # images, or the bytes of image files
        dataset = dataset.cast_column(column, datasets.Image())
    return dataset, pairs


def parse_label(label, row: int) -> float:
    """1.0 if `jpg_0` is preferred, 0.0 if `jpg_1` is, 0.5 for a tie; from a number, or from text that holds one."""
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if value not in (0.0, 0.5, 1.0):
        raise ValueError(f"Row {row}: label_0 is {label!r}, not 1 (jpg_0 is preferred), 0 (jpg_1 is) or 0.5 (a tie).")
    return value


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparency shows white, and 16-bit grey becomes 8-bit: Pillow's own conversion shows hidden colours and clips."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class PairDataset(torch.utils.data.Dataset):
    """Pairs by (epoch, index). Everything random about a pair depends on (seed, epoch, index), and on nothing else."""

    def __init__(self, dataset, pairs, args, latent_shape: tuple[int, int, int], num_train_timesteps: int):
        self.dataset, self.pairs, self.args = dataset, pairs, args
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed = int(np.random.SeedSequence((self.args.seed, epoch, index)).generate_state(1, np.uint64)[0])
        row, is_first_preferred = self.pairs[index]
        try:
            example = self.dataset[row]
        except Exception as error:
            raise ValueError(f"Row {row} can't be read: {error}. Remove or replace it.") from error
        images = [example["jpg_0"], example["jpg_1"]]
        winner, loser = images if is_first_preferred else images[::-1]

        flip, *crop = np.random.default_rng(seed).random(3)
        pixel_values, time_ids = zip(*(self.transform(image, flip, crop) for image in (winner, loser)))
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.stack(pixel_values),  # (2, 3, resolution, resolution), the winner first
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),  # (2, 6); bfloat16 would round 1023 to 1024
            "prompt": example["caption"],
            "timestep": torch.randint(self.num_train_timesteps, (1,), generator=generator),
            "vae_noise": torch.stack([torch.randn(self.latent_shape, generator=generator) for _ in range(2)]),
            "noise": torch.randn(self.latent_shape, generator=generator),
        }

    def transform(self, image: Image.Image, flip: float, crop: list[float]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Resizes the shorter side, keeping the aspect ratio, and crops.

        Args:
            image: in any mode.
            flip, crop: whether to mirror and where to crop; from 0 to 1, and the same for both images of a pair.

        Returns:
            Pixels, uint8 (3, resolution, resolution); and the image's `time_ids`: original height and width, top and
            left of the crop, height and width of the result.
        """
        image = to_rgb(image)
        resolution, original_size = self.args.resolution, (image.height, image.width)
        height, width = (max(resolution, round(side * resolution / min(image.size))) for side in original_size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.args.random_flip and flip < 0.5:
            image = ImageOps.mirror(image)
        y, x = crop if self.args.random_crop else (0.5, 0.5)
        top, left = round(y * (height - resolution)), round(x * (width - resolution))
        image = image.crop((left, top, left + resolution, top + resolution))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, (*original_size, top, left, resolution, resolution)


def endless_batches(num_pairs: int, batch_size: int, seed: int, start: int, rank: int, world_size: int) -> Iterator:
    """Batches of keys (epoch, index) for one process, without end.

    Seed and epoch decide the order of an epoch. Epochs are laid end to end, and the processes take their batches from
    there in turn: no batch is ever short, and a resumed run only has to skip the first `start` pairs.
    """
    permutations = ((epoch, np.random.default_rng((seed, epoch)).permutation(num_pairs)) for epoch in count())
    keys = islice(((epoch, int(index)) for epoch, permutation in permutations for index in permutation), start, None)
    while True:
        batches = [list(islice(keys, batch_size)) for _ in range(world_size)]
        yield batches[rank]


def collate_fn(examples: list[dict]) -> dict:
    """Makes a batch of B pairs: in `pixel_values`, `time_ids` and `vae_noise` B winners, and then B losers."""
    batch = {
        name: torch.stack([example[name] for example in examples], dim=1).flatten(0, 1)
        for name in ("pixel_values", "time_ids", "vae_noise")
    }
    batch["prompts"] = [example["prompt"] for example in examples]
    batch["timesteps"] = torch.cat([example["timestep"] for example in examples])
    batch["noise"] = torch.stack([example["noise"] for example in examples])
    return batch


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor, vae_noise: torch.Tensor) -> torch.Tensor:
    """Latents (N, 4, H/8, W/8), in float32, of uint8 images (N, 3, H, W), sampled with the noise given."""
    moments = vae.encode((pixel_values.float() / 127.5 - 1).to(vae.dtype)).latent_dist.parameters
    posterior = DiagonalGaussianDistribution(moments.float())
    return (posterior.mean + posterior.std * vae_noise) * vae.config.scaling_factor


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusionXLPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both encoders' penultimate hidden states (B, 77, 2048), and the second one's pooled output (B, 1280)."""
    hidden_states = []
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    for tokenizer, text_encoder in zip(tokenizers, (pipeline.text_encoder, pipeline.text_encoder_2)):
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        tokens = tokenizer(prompts, return_tensors="pt", **options).input_ids
        output = text_encoder(tokens.to(pipeline.device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
    return torch.cat(hidden_states, dim=-1), output.text_embeds


@torch.no_grad()
def log_validation(pipeline: StableDiffusionXLPipeline, args, accelerator, name: str, step: int) -> list[Image.Image]:
    """Draws the validation prompts with the modules that train, each time from the same seeds, and logs the images."""
    pipeline.unet.eval()
    images = []
    for prompt in args.validation_prompts:
        for i in range(args.num_validation_images):
            options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": 25}
            generator = torch.Generator().manual_seed(args.seed + i)
            latents = pipeline(prompt, generator=generator, output_type="latent", **options).images
            vae = pipeline.vae  # may be float32 beside a U-Net in half precision, which the pipeline does not expect
            image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            images += pipeline.image_processor.postprocess(image.float())
    pipeline.unet.train()
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.stack(images)}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: images}, step=step)
    return images


def save_lora(unet: torch.nn.Module, folder: Path) -> None:
    layers = get_peft_model_state_dict(unet)
    metadata = _collate_lora_metadata({"unet": unet})  # rank and alpha
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)


def load_lora(unet: torch.nn.Module, folder: Path) -> None:
    state_dict = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
    state_dict = {name.removeprefix("unet."): value for name, value in state_dict.items()}
    set_peft_model_state_dict(unet, state_dict)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def list_checkpoints(args) -> list[Path]:
    return sorted(filter(is_checkpoint, Path(args.output_dir).glob("*")), key=step_of)


def find_checkpoint(args) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        ValueError: there is no such checkpoint, or the output folder holds later ones, which this run would mix with.
    """
    name, existing = args.resume_from_checkpoint, list_checkpoints(args)
    if name is None or name == "latest":
        checkpoint = existing[-1] if existing and name else None
    else:
        checkpoint = next(filter(is_checkpoint, (Path(args.output_dir, name), Path(name))), None)
        if checkpoint is None:
            raise ValueError(
                f"--resume_from_checkpoint={name} is not a checkpoint, in {args.output_dir} or as a path."
            )
    if existing and step_of(existing[-1]) > step_of(checkpoint):
        raise ValueError(
            f"{args.output_dir} holds {existing[-1].name} of an earlier run. Continue it with"
            " --resume_from_checkpoint=latest, or choose another --output_dir."
        )
    return checkpoint


def save_checkpoint(accelerator: Accelerator, args, global_step: int) -> None:
    """Writes `checkpoint-N` aside, and renames it: it is complete or absent. Every process must call this."""
    partial = Path(args.output_dir, f".checkpoint-{global_step}.partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(Path(args.output_dir, f"checkpoint-{global_step}"))
        if args.checkpoints_total_limit:
            for outdated in list_checkpoints(args)[: -args.checkpoints_total_limit]:
                shutil.rmtree(outdated)


def save_model_card(args, repo_id: str, images: list[Image.Image]) -> None:
    """Writes README.md and the validation images into the output folder."""
    gallery = ""
    for i, image in enumerate(images):
        image.save(Path(args.output_dir, f"image_{i}.png"))
        gallery += f"![{args.validation_prompts[i // args.num_validation_images]}](./image_{i}.png)\n"
    model, dataset = args.pretrained_model_name_or_path, args.dataset_name
    strength = f"loser share {args.loser_share}" if args.beta_orpo is None else f"beta {args.beta_orpo}"
    on_hub = {"base_model": model, "datasets": dataset}
    data = ModelCardData(license="openrail++", **{k: name for k, name in on_hub.items() if not Path(name).exists()})
    card = f"""---
{data.to_yaml()}
---
# SDXL LoRA aligned with ORPO: {repo_id}

A LoRA for {model}, trained on the preference pairs of {dataset} with ORPO (odds ratio preference optimization,
[arXiv 2403.07691](https://arxiv.org/abs/2403.07691)) for diffusion models, without a reference model:
{strength}, rank {args.rank}, learning rate {args.learning_rate}, seed {args.seed},
VAE {args.pretrained_vae_model_name_or_path or "of the model"}.

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{model}", dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{repo_id}")
image = pipeline("{args.validation_prompts[0]}").images[0]
```

{gallery}"""
    tags = ["text-to-image", "diffusers-training", "diffusers", "lora", "orpo", "stable-diffusion-xl"]
    populate_model_card(ModelCard(card), tags=tags).save(Path(args.output_dir, "README.md"))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="ORPO training script for Stable Diffusion XL with LoRA.")
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Path or identifier of an SDXL pipeline.")
    add("--pretrained_vae_model_name_or_path", help="VAE to use instead of the model's own.")
    add("--revision", help="Revision of the pretrained model.")
    add("--variant", help="Variant of the pretrained model's files, e.g. fp16.")
    add("--cache_dir", help="Folder for downloaded models and datasets.")
    add("--dataset_name", required=True, help="Dataset on the Hub, or a local folder that datasets can read.")
    add("--dataset_config_name", help="Configuration of the dataset, if it has several.")
    add("--dataset_split_name", help="Split to train on. Default: the only one, else train.")
    add("--max_train_samples", type=int, help="Train on at most this many pairs, the first ones.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that decode images.")
    add("--resolution", type=int, default=1024, help="Images are resized by their shorter side and cropped to this.")
    add("--random_crop", action="store_true", help="Crop at random, both images of a pair alike. Default: the centre.")
    add("--random_flip", action="store_true", help="Mirror half of the pairs, both images alike.")
    add(
        "--loser_share",
        type=float,
        help="Strength, above 0 and below 0.5. Default: 0.375, unless --beta_orpo is given.",
    )
    add(
        "--beta_orpo",
        type=float,
        help="Strength as in the paper, the weight of the odds ratio; 0 is plain fine-tuning.",
    )
    add("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    add("--seed", type=int, default=0, help="A seed for reproducible training.")
    add("--train_batch_size", type=int, default=4, help="Pairs per device and forward pass.")
    add("--num_train_epochs", type=int, default=1, help="Passes over the pairs.")
    add("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forward passes whose gradients make one step.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, at the cost of a slower backward pass.")
    add("--learning_rate", type=float, default=1e-4, help="Learning rate after warm-up.")
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the pairs per optimizer step.")
    add("--lr_scheduler", default="constant", help="linear, cosine, constant, constant_with_warmup and so on.")
    add("--lr_warmup_steps", type=int, default=0, help="Optimizer steps of warm-up; `constant` has none.")
    add("--use_8bit_adam", action="store_true", help="Use 8-bit Adam from bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="The beta1 parameter of AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="The beta2 parameter of AdamW.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Weight decay of AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="Epsilon of AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="Max gradient norm; 0 is no limit.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in the accelerate configuration.")
    add("--allow_tf32", action="store_true", help="Use TF32 for float32 matrix products, on Ampere GPUs and later.")
    add("--run_validation", action="store_true", help="Draw images during training and after it.")
    add("--validation_steps", type=int, default=200, help="Optimizer steps between validations.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, help="Prompts to draw.")
    add("--num_validation_images", type=int, default=1, help="Images per validation prompt.")
    add("--output_dir", default="diffusion-orpo-lora-sdxl", help="Folder of checkpoints, logs and the trained LoRA.")
    add("--checkpointing_steps", type=int, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep this many of the newest checkpoints. Default: all.")
    add("--resume_from_checkpoint", help='Folder of a checkpoint, or "latest".')
    add("--report_to", default="tensorboard", help='"tensorboard", "wandb", "comet_ml", "all" or "none".')
    add("--logging_dir", default="logs", help="TensorBoard's folder inside --output_dir.")
    add("--push_to_hub", action="store_true", help="Upload LoRA, model card and images after training.")
    add("--hub_token", help="Token for the upload. Default, and safer: the one of `hf auth login`.")
    add("--hub_model_id", help="Repository to upload to. Default: the name of --output_dir.")
    args = parser.parse_args(input_args)
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(f"--hub_token would be visible to {args.report_to}. Use `hf auth login` instead.")
    if args.resolution % 8 != 0:
        parser.error(f"--resolution must be a multiple of 8; got {args.resolution}.")
    if args.beta_orpo is None:
        args.loser_share = 0.375 if args.loser_share is None else args.loser_share
        if not 0 < args.loser_share < 0.5:
            parser.error(f"--loser_share must lie above 0 and below 0.5; got {args.loser_share}.")
    elif args.loser_share is not None:
        parser.error("--loser_share and --beta_orpo set the same strength: give one of them.")
    return args


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        step_scheduler_with_optimizer=False,  # it is stepped below, once, however many processes there are
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ImportError(f"--report_to={args.report_to} is not installed.")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed)  # for the LoRA's first weights; pairs have seeds of their own
    checkpoint = find_checkpoint(args)
    repo_id = args.output_dir  # where the LoRA will be loaded from
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if args.push_to_hub:
            name = args.hub_model_id or output_dir.resolve().name
            repo_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    with accelerator.main_process_first():  # the others find the data in the cache
        dataset, pairs = load_pairs(args)

    # Frozen weights are in half precision, whether the flag or accelerate's configuration says so.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    model, vae_path = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    vae_options = {"cache_dir": args.cache_dir}  # revision and variant are those of the model
    if vae_path is None:
        vae_path, vae_options = model, {"subfolder": "vae", **options}
    force_upcast = AutoencoderKL.load_config(vae_path, **vae_options).get("force_upcast", True)
    vae_dtype = torch.float32 if force_upcast else weight_dtype  # SDXL's own VAE overflows in half precision
    vae = AutoencoderKL.from_pretrained(vae_path, dtype=vae_dtype, **vae_options)
    vae.enable_slicing()  # encodes image by image, which bounds its memory
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, vae=vae, dtype=weight_dtype, **options)
    pipeline.to(accelerator.device).set_progress_bar_config(disable=True)
    scheduler_options = {"revision": args.revision, "cache_dir": args.cache_dir}
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler", **scheduler_options)
    for module in (vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet):
        module.requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    lora_config = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=layers)
    pipeline.unet.add_adapter(lora_config)
    cast_training_params(pipeline.unet, dtype=torch.float32)  # the LoRA trains in float32 under any precision
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()

    rank, world_size = accelerator.process_index, accelerator.num_processes
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * world_size
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(pairs) / pairs_per_step)
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from error
    lora_parameters = [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(
        lora_parameters,
        lr=args.learning_rate * (pairs_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(pipeline.unet, optimizer, lr_scheduler)

    # Of the U-Net, checkpoints hold the LoRA alone.
    def save_model_hook(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            save_lora(pipeline.unet, folder)

    def load_model_hook(models, folder):
        models.clear()
        load_lora(pipeline.unet, folder)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    global_step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # a checkpoint lies between two accumulation windows
        global_step = step_of(checkpoint)
        logger.info(f"Resuming from {checkpoint}")

    start, size = global_step * pairs_per_step, args.resolution // pipeline.vae_scale_factor
    latent_shape = (vae.config.latent_channels, size, size)
    dataloader = torch.utils.data.DataLoader(
        PairDataset(dataset, pairs, args, latent_shape, noise_scheduler.config.num_train_timesteps),
        batch_sampler=endless_batches(len(pairs), args.train_batch_size, args.seed, start, rank, world_size),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    config = {name: value for name, value in vars(args).items() if name not in ("hub_token", "validation_prompts")}
    accelerator.init_trackers("diffusion-orpo-lora-sdxl", config=config)
    logger.info(f"{max_train_steps} steps of {pairs_per_step} pairs on {world_size} processes")

    is_quiet = not accelerator.is_local_main_process
    progress_bar = tqdm(total=max_train_steps, initial=global_step, desc="Steps", disable=is_quiet)
    batches = iter(dataloader)
    unet.train()
    while global_step < max_train_steps:
        window = []
        for _ in range(args.gradient_accumulation_steps):
            batch = send_to_device(next(batches), accelerator.device)
            with accelerator.accumulate(unet):
                # Encode. B pairs are 2B images: the winners, and then the losers.
                latents = encode_images(vae, batch["pixel_values"], batch["vae_noise"])
                prompt_embeds, pooled_prompt_embeds = encode_prompts(pipeline, batch["prompts"])

                # Add noise: the same, at the same timestep, to both images of a pair.
                noise, timesteps = batch["noise"].repeat(2, 1, 1, 1), batch["timesteps"].repeat(2)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

                # Predict, for winners and losers in one call.
                added_conditions = {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": batch["time_ids"]}
                prompt_embeds, noisy_latents = prompt_embeds.repeat(2, 1, 1), noisy_latents.to(weight_dtype)
                model_pred = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added_conditions).sample

                # The error of each image stands for its negative log-likelihood: log p = -error.
                target = noise
                if noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                error_w, error_l = (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3)).chunk(2)

                # Fit the winners, and raise their odds over the losers': equations 6 and 7.
                losses, log_odds_ratio = orpo_loss(error_w, error_l, args.beta_orpo, args.loser_share)
                accelerator.backward(losses.mean())

                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
                metrics = torch.stack([losses, error_w, -error_l, log_odds_ratio, (error_w < error_l).float()])
                window.append(metrics.detach().mean(dim=1))

        logs = {"lr": lr_scheduler.get_last_lr()[0]}
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        global_step += 1

        # Means over the whole step, on all processes: one transfer from the device for each optimizer step.
        means = torch.cat([torch.stack(window).mean(dim=0), grad_norm.reshape(1)])
        names = ("loss", "nll_loss", "logps/rejected", "log_odds_chosen", "rewards/accuracies", "grad_norm")
        logs |= dict(zip(names, accelerator.reduce(means, "mean").tolist()))
        accelerator.log(logs, step=global_step)
        progress_bar.update()
        progress_bar.set_postfix(loss=logs["loss"], accuracy=logs["rewards/accuracies"])

        if global_step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args, global_step)
        if args.run_validation and global_step % args.validation_steps == 0 and global_step < max_train_steps:
            if accelerator.is_main_process:
                log_validation(pipeline, args, accelerator, "validation", global_step)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        images = log_validation(pipeline, args, accelerator, "test", global_step) if args.run_validation else []
        save_model_card(args, repo_id, images)
        save_lora(pipeline.unet, output_dir)
        if args.push_to_hub:
            names = ["pytorch_lora_weights.safetensors", "README.md", "image_*.png"]
            options = {"token": args.hub_token, "commit_message": "End of training"}
            upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=names, **options)
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    main(args)
