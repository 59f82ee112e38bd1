"""What the tests of the model families share: tiny models of them with random weights, and runs of their scripts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from helpers import arguments, lora_weights
from orpo.cli import parse_training_flags
from orpo.models import registry
from orpo.models.flux import Flux
from orpo.models.flux2 import Flux2Klein
from orpo.models.latent_diffusion import LatentDiffusion
from orpo.models.qwen_image import QwenImage
from orpo.models.sd import StableDiffusion
from orpo.models.sd3 import StableDiffusion3
from orpo.models.z_image import ZImage

import train_diffusion_orpo_lora
from diffusers import AutoencoderKL, DiffusionPipeline
from faces import ALL_KINDS
from tiny_flux import build_tiny_flux
from tiny_flux2 import build_tiny_flux2, to_flux2_vae
from tiny_qwen import PROMPT_LENGTH
from tiny_qwen_image import build_tiny_qwen_image, build_tiny_qwen_vae
from tiny_sd import build_tiny_sd
from tiny_sd3 import build_tiny_sd3
from tiny_sdxl import build_tiny_sdxl
from tiny_t5 import T5_LENGTH
from tiny_z_image import build_tiny_z_image


DEMO_BASE = Path(__file__).parent.parent / "examples" / "demo" / "base"
WORDS = sorted({word.strip(",") for kind in ALL_KINDS for word in kind.prompt.split()})
T5_FLAGS = {"max_sequence_length": 12}
QWEN_FLAGS = {"max_sequence_length": 20}
QWEN_IMAGE_OPTIONS = QWEN_FLAGS | {"negative_prompt": " "}
T5_BASE, QWEN_BASE = {"max_sequence_length": T5_LENGTH}, {"max_sequence_length": PROMPT_LENGTH}


@dataclass(frozen=True)
class Family:
    """One family under test.

    Attributes:
        cls: of the example.
        build: makes a tiny pipeline of it.
        flags: that a run on the tiny pipeline needs.
        call_options: that make its pipeline read prompts as these flags do.
        base_flags: that a run on the demo's base needs.
    """

    cls: type[LatentDiffusion]
    build: object
    flags: dict
    call_options: dict
    base_flags: dict

    def guidance(self, scale: float) -> dict:
        """What makes its pipeline draw with classifier-free guidance."""
        return (
            {"true_cfg_scale": scale, "negative_prompt": " "} if self.cls is QwenImage else {"guidance_scale": scale}
        )

    def parse_args(self, model: str, **flags):
        family = registry.FAMILIES[self.cls.pipeline_class.__name__]
        line = arguments(model, "unused", "unused", **self.flags | flags)
        return parse_training_flags(None, (family,), line)

    def load(self, model: str, dtype=torch.float32, **flags) -> LatentDiffusion:
        return self.cls.load(self.parse_args(model, **flags), torch.device("cpu"), dtype)

    def train(self, model: str, data: str | None, output_dir, **flags) -> dict[str, torch.Tensor]:
        """Runs the script in this process, on a dataset, or, without `data`, on `dataset_path`; returns the LoRA."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train_diffusion_orpo_lora.main(arguments(model, data, output_dir, **self.flags | flags))
        return lora_weights(output_dir)


FAMILIES = {
    "sd": Family(StableDiffusion, build_tiny_sd, {}, {}, {}),
    "sd3": Family(StableDiffusion3, build_tiny_sd3, T5_FLAGS, T5_FLAGS, T5_BASE),
    "flux": Family(Flux, build_tiny_flux, T5_FLAGS, T5_FLAGS, T5_BASE),
    "z_image": Family(ZImage, build_tiny_z_image, QWEN_FLAGS, QWEN_FLAGS, QWEN_BASE),
    "flux2": Family(Flux2Klein, build_tiny_flux2, QWEN_FLAGS, QWEN_FLAGS, QWEN_BASE),
    "qwen_image": Family(
        QwenImage,
        build_tiny_qwen_image,
        QWEN_FLAGS,
        QWEN_IMAGE_OPTIONS,
        QWEN_BASE,
    ),
}
SMALL = {
    "sd": {"channels": (16, 32)},
    "sd3": {"num_layers": 2, "num_heads": 2},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_heads": 2},
    "z_image": {"num_layers": 1, "num_heads": 2},
    "flux2": {"num_layers": 1, "num_single_layers": 1, "num_heads": 2},
    "qwen_image": {"num_layers": 1, "num_heads": 2},
}


def save_tiny(name: str, folder: Path, **options) -> str:
    """A pipeline of random weights, on the demo's VAE where it fits, with a shift or statistics that are not 0 and 1."""
    vae = AutoencoderKL.from_pretrained(DEMO_BASE / "vae")
    torch.manual_seed(3)
    if name == "qwen_image":
        vae = build_tiny_qwen_vae()
        vae.decoder.conv_out.weight.data *= 4  # so that images differ visibly
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 1.0, 2.0])
    elif name == "flux2":
        vae = to_flux2_vae(vae)
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    elif name != "sd":
        vae.register_to_config(shift_factor=0.3)
    FAMILIES[name].build(WORDS, vae, **SMALL[name] | options).save_pretrained(folder)
    return str(folder)


class TinyModels:
    """The folders of all families' tiny pipelines, each made at its first use, by whichever process comes first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> str:
        folder = self.folder / name
        self.folder.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                if name == "sdxl":
                    build_tiny_sdxl(["red", "ball", "face"], channels=(16, 32)).save_pretrained(partial)
                else:
                    save_tiny(name, partial)
                partial.rename(folder)
        return str(folder)


def load_pipeline(folder: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
