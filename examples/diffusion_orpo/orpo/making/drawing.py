"""Images of a model, each from a seed of its own, in a folder that knows how they were drawn.

An image is complete or absent, so that a run that was killed goes on where it was.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline

from ..models.registry import FAMILIES, Family
from ..system.durable import rename, sync
from ..system.messages import differences, printable


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Drawing:
    """What decides an image beside prompt and seed; each field is the flag of its name."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    lora_weights: str | None
    lora_scale: float
    prediction_type: str | None
    dtype: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None

    @classmethod
    def from_flags(cls, args: argparse.Namespace, family: Family, device: torch.device) -> "Drawing":
        """Takes the flags, and the defaults that depend on model and device.

        Raises:
            ValueError: the family can't draw at the resolution.
        """
        given = {field.name: getattr(args, field.name) for field in fields(cls)}
        given["resolution"] = args.resolution or family.defaults.get("resolution", 1024)
        given["dtype"] = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
        if given["resolution"] % family.resolution_step != 0:
            raise ValueError(f"--resolution must be a multiple of {family.resolution_step}; got {args.resolution}.")
        return cls(**given)

    @property
    def model_name(self) -> str:
        """Of the model, as the pairs name it."""
        lora = f" + {self.lora_weights}" if self.lora_weights else ""
        scale = f" x {self.lora_scale:g}" if lora and self.lora_scale != 1 else ""
        return f"{self.pretrained_model_name_or_path}{lora}{scale}"

    def settings(self, requests: list["Request"]) -> dict:
        """What a folder of images stores, to know later whether others are asked for."""
        images = hashlib.sha256(repr(requests).encode()).hexdigest()[:16]
        return asdict(self) | {"lora_file": _lora_digest(self.lora_weights), "images": f"{len(requests)} ({images})"}


@dataclass(frozen=True)
class Request:
    """An image to draw.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        name: of its file.
        group: which prompt or winner it belongs to, counted from 0.
    """

    prompt: str
    seed: int
    name: str
    group: int


def make_requests(prompts: list[str], images_per_prompt: int, seed: int) -> list[Request]:
    """All images to draw, prompt by prompt."""
    return [
        Request(prompt, seed + i * images_per_prompt + j, f"{i:05d}-{j}.png", i)
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def find_family(args: argparse.Namespace) -> Family:
    """The registered family of the base model.

    Raises:
        ValueError: there is no such model, or it is of another family.
    """
    name = args.pretrained_model_name_or_path
    try:
        index = DiffusionPipeline.load_config(name, revision=args.revision, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_model_name_or_path={name} can't be read: {printable(str(error))}") from error
    if index["_class_name"] not in FAMILIES:
        raise ValueError(
            f"--pretrained_model_name_or_path={name} is a {index['_class_name']}. Known are {', '.join(FAMILIES)}."
        )
    return FAMILIES[index["_class_name"]]


def _lora_digest(lora: str | None) -> str | None:
    """Of a LoRA in a folder or file, which may change under its name."""
    path = Path(lora or "")
    path = path / LORA_FILE if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if lora and path.is_file() else None


def open_folder(folder: Path, current: dict) -> None:
    """Makes a folder for images of these settings, or makes sure that it is one.

    Raises:
        ValueError: it holds images of other settings; says which.
    """
    path = folder / "settings.json"
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise ValueError(
                f"{folder} holds images, and no settings.json to say how they were drawn: name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(current | {"versions": versions}, indent=2) + "\n")
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.pop("versions")
    changes = differences(stored, json.loads(json.dumps(current)))
    if changes:
        raise ValueError(
            f"{folder} holds images that were drawn differently: {'; '.join(changes)}. Name another --output_dir, or"
            " remove this one."
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    rename(partial, path)


def load_pipeline(
    drawing: Drawing, family: Family, device: torch.device, cache_dir: str | None = None
) -> DiffusionPipeline:
    """Loads the pipeline that a user draws with, and the LoRA.

    Raises:
        ValueError: the LoRA can't be loaded, or doesn't fit the model.
    """
    model, dtype, modules = family.load_class(), DTYPES[drawing.dtype], {}
    sources = {"cache_dir": cache_dir}
    if drawing.pretrained_vae_model_name_or_path is not None:
        modules["vae"] = AutoencoderKL.from_pretrained(
            drawing.pretrained_vae_model_name_or_path, dtype=dtype, **sources
        )
    pipeline = model.pipeline_class.from_pretrained(
        drawing.pretrained_model_name_or_path,
        dtype=dtype,
        revision=drawing.revision,
        variant=drawing.variant,
        **sources,
        **model.pipeline_options,
        **modules,
    ).to(device)
    pipeline.watermark = None  # SDXL's: or what is installed would decide about the pixels
    pipeline.set_progress_bar_config(disable=True)
    if drawing.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=drawing.prediction_type)
    if hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()  # image by image: less memory, and the batch makes no difference
    if drawing.lora_weights is not None:
        try:
            pipeline.load_lora_weights(drawing.lora_weights, adapter_name="orpo", cache_dir=cache_dir)
            pipeline.set_adapters(["orpo"], [drawing.lora_scale])
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"--lora_weights={drawing.lora_weights} can't be used with {drawing.pretrained_model_name_or_path}:"
                f" {printable(str(error))}"
            ) from error
    return pipeline


def missing(folder: Path, requests: list[Request]) -> list[Request]:
    return [request for request in requests if not (folder / request.name).exists()]


def draw_images(
    drawing: Drawing, pipeline: DiffusionPipeline, folder: Path, requests: list[Request], batch_size: int
) -> None:
    """Draws what is missing in the folder, over all processes.

    Each image has a generator of its own, on the CPU: neither batch size nor device changes its noise. Batches are the
    same however often the run was stopped, so what is drawn is, too.
    """
    state = PartialState()
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    batches = [batch for batch in batches if missing(folder, batch)]
    options = {} if drawing.max_sequence_length is None else {"max_sequence_length": drawing.max_sequence_length}
    state.wait_for_everyone()  # all processes have seen the same images before one draws more
    with state.split_between_processes(batches) as mine:
        for batch in tqdm(mine, desc="Drawing", unit="batch", disable=not state.is_main_process):
            images = pipeline(
                [request.prompt for request in batch],
                height=drawing.resolution,
                width=drawing.resolution,
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
                **options,
            ).images
            absent = missing(folder, batch)
            for request, image in zip(batch, images):
                if request in absent:
                    _save(image, folder / request.name)
    state.wait_for_everyone()


def _save(image: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG")
    rename(partial, path)
