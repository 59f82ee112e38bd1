"""Images of base and LoRA from the same prompts and seeds, in folders that know how they were drawn.

An image is complete or absent, so an evaluation that was stopped goes on where it was.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """One image to draw."""

    prompt: str
    seed: int
    name: str


def make_requests(prompts: list[str], images_per_prompt: int, seed: int) -> list[Request]:
    """All images of an evaluation, prompt by prompt, each from a seed of its own."""
    return [
        Request(prompt, seed + i * images_per_prompt + j, f"{i:05d}-{j}.png")
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def base_settings(args, prompts: list[str]) -> dict:
    """What the base model's images depend on."""
    scheduler = DDPMScheduler.load_config(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
    )
    if args.prediction_type is not None:
        scheduler = {**scheduler, "prediction_type": args.prediction_type}
    names = (
        "pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dtype resolution"
        " num_inference_steps guidance_scale num_images_per_prompt seed"
    ).split()
    return {
        **{name: getattr(args, name) for name in names},
        "scheduler": {name: value for name, value in scheduler.items() if name != "_diffusers_version"},
        "prompts": prompts,
    }


def lora_settings(args) -> dict:
    """What tells the LoRA's images from the base's.

    Raises:
        ValueError: there is no LoRA.
    """
    try:
        state_dict, _, metadata = StableDiffusionXLPipeline.lora_state_dict(
            args.lora_weights, return_lora_metadata=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--lora_weights={args.lora_weights} can't be loaded: {error}") from error
    checksum = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())  # holds rank and alpha
    for name, value in sorted(state_dict.items()):
        checksum.update(name.encode() + value.float().numpy().tobytes())
    return {"lora_sha256": checksum.hexdigest(), "lora_scale": args.lora_scale}


def open_folder(folder: Path, settings: dict) -> dict[str, str]:
    """Makes a folder for images of these settings, or makes sure that it is one.

    Returns:
        The versions of the libraries that began to fill it; others may draw slightly different images.

    Raises:
        ValueError: it holds images of other settings; names them.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise ValueError(f"{folder} holds images, and no settings.json to say of what. Choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        write_atomically(path, json.dumps(settings | {"versions": versions}, indent=2) + "\n")
        return versions
    stored = json.loads(path.read_text(encoding="utf-8"))
    versions = stored.pop("versions")
    changes = [
        f"{name}: {_short(stored.get(name))} there, {_short(settings.get(name))} now"
        for name in sorted(settings.keys() | stored.keys())
        if settings.get(name) != stored.get(name)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds images of other settings ({'; '.join(changes)}). Choose another folder, or remove it."
        )
    return versions


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_pipeline(args, device: torch.device) -> StableDiffusionXLPipeline:
    """Loads the pipeline that a user draws with, and the LoRA, switched off.

    Raises:
        ValueError: the LoRA doesn't fit the model.
    """
    dtype, modules = DTYPES[args.dtype], {}
    if args.pretrained_vae_model_name_or_path is not None:
        modules["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        dtype=dtype,
        revision=args.revision,
        variant=args.variant,
        add_watermarker=False,  # or what is installed would decide about the pixels
        **modules,
    ).to(device)
    if args.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # image by image: less memory, and the batch makes no difference
    try:
        pipeline.load_lora_weights(args.lora_weights, adapter_name="orpo")
        pipeline.set_adapters(["orpo"], [args.lora_scale])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--lora_weights={args.lora_weights} does not fit {args.pretrained_model_name_or_path}: {error}"
        ) from error
    pipeline.disable_lora()
    return pipeline


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def draw_images(args, pipeline: StableDiffusionXLPipeline, folder: Path, requests: list[Request], name: str) -> None:
    """Draws what is missing in the folder, over all processes.

    Each image has a generator of its own, on the CPU: neither batch size nor device changes its noise. Batches are the
    same however often the evaluation was stopped, so what is drawn is, too, bit for bit.

    Args:
        args: the flags.
        pipeline: the LoRA switched on or off.
        folder: for the images.
        requests: all images that should be there.
        name: for the progress bar.
    """
    state = PartialState()
    batches = [requests[i : i + args.batch_size] for i in range(0, len(requests), args.batch_size)]
    batches = [batch for batch in batches if missing(folder, batch)]
    state.wait_for_everyone()  # all processes have seen the same images before one draws more
    with state.split_between_processes(batches) as mine:
        for batch in tqdm(mine, desc=name, unit="batch", disable=not state.is_main_process):
            images = pipeline(
                [request.prompt for request in batch],
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            ).images
            absent = missing(folder, batch)
            for request, image in zip(batch, images):
                if request in absent:
                    save_image(image, folder / request.name)
    state.wait_for_everyone()


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG")
    os.replace(partial, path)


def read_image(path: Path) -> Image.Image:
    """Reads a drawn image.

    Raises:
        ValueError: it's broken.
    """
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error}). Remove it and start again: it is drawn anew.") from error
