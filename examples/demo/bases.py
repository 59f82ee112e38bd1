"""The demo's trained base models. All but those of `OWN_VAE` share one VAE, which is stored once, with SDXL's."""

import shutil
from pathlib import Path


HERE = Path(__file__).resolve().parent
SHARED_VAE = HERE / "base" / "vae"
OWN_VAE = ("sdxl", "flux2", "qwen_image")


def base_folder(family: str) -> Path:
    """Where the demo keeps a family's base model; the shared VAE's weights are missing there."""
    return HERE / ("base" if family == "sdxl" else f"base_{family}")


def assemble_base(family: str, folder: Path) -> str:
    """Copies a family's base model with the VAE to a folder, which then is a whole pipeline; returns it."""
    shutil.copytree(base_folder(family), folder, dirs_exist_ok=True)
    if family in OWN_VAE:
        return str(folder)
    for weights in SHARED_VAE.glob("*.safetensors"):
        shutil.copy(weights, Path(folder) / "vae")
    return str(folder)
