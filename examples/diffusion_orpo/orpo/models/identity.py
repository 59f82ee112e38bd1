"""The identity of an encoding: VAE, text encoders, resolution and precision.

Two encodings of the same identity are the same numbers, up to the libraries and the device that made them.
"""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from ..config import ModelConfig
from ..runtime.checksums import sha256
from ..runtime.shapes import name_of
from .checks import is_absent, read_index
from .pipeline import FamilyPipeline
from .vae import vae_source


# Of the moments: what else than files decides them. "normalised" once they are those of latents as the denoiser sees them.
MOMENTS = "normalised"


def encoding_identity(family: type[FamilyPipeline], options: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    """Everything that a run's moments and prompt embeddings depend on, read from files only: no model is loaded.

    Args:
        family: the class of the model family, such as `StableDiffusionXL`.
        options: of the model.
        dtype: of the text encoders, and of a VAE that does not ask for float32.

    Returns:
        For each module its `module_identity`, and the flags that matter.
    """
    source, arguments = vae_source(options)
    identity = {
        "family": family.slug,
        "resolution": " ".join(map(name_of, options.shapes))
        if options.aspect_ratio_buckets
        else str(options.resolution),
        "precision": str(dtype).removeprefix("torch."),
        "moments": MOMENTS,
        "vae": module_identity(source, **arguments),
    }
    arguments = {"variant": options.variant, **options.source_options}
    index = read_index(options, family.pipeline_class.__name__)
    for encoder in family.text_encoder_names:
        for name in (encoder, encoder.replace("text_encoder", "tokenizer")):
            identity[name] = (
                "none"
                if name in family.optional_modules and is_absent(index, name)
                else module_identity(options.pretrained_model_name_or_path, **arguments, subfolder=name)
            )
    if options.max_sequence_length is not None:
        identity["max_sequence_length"] = str(options.max_sequence_length)
    return identity


def base_identity(family: type[FamilyPipeline], options: ModelConfig, predicts: str) -> dict[str, str]:
    """Identifies the base of a LoRA: all modules by content, and the prediction type.

    A local model's files are read in whole, at about 1.3 GB/s of one core: 5 to 10 seconds for SDXL in fp16.

    Args:
        family: the class of the model family, such as `StableDiffusionXL`.
        options: of the model.
        predicts: "epsilon" or "v_prediction", or the name of the noise process.
    """
    encoding = encoding_identity(family, options, torch.float32)
    modules = {name: value for name, value in encoding.items() if name not in ("resolution", "precision", "moments")}
    arguments = {"variant": options.variant, **options.source_options}
    denoiser = module_identity(options.pretrained_model_name_or_path, **arguments, subfolder=family.denoiser_name)
    return modules | {family.denoiser_name: denoiser, "prediction": predicts}


def module_identity(
    source: str,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> str:
    """Identifies a module's weights: by a checksum of its files in a local folder, else by the commit on the Hub.

    Args:
        source: folder, or name on the Hub.
        subfolder: of the module in it.
        revision, variant, cache_dir: as for `from_pretrained`.
    """
    suffix = f" ({variant})" if variant else ""
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        return f"sha256:{digest.hexdigest()}{suffix}"
    is_tokenizer = (subfolder or "").startswith("tokenizer")
    config = hf_hub_download(
        source,
        "tokenizer_config.json" if is_tokenizer else "config.json",
        subfolder=subfolder,
        revision=revision,
        cache_dir=cache_dir,
    )
    commit = Path(config).parents[1 if subfolder else 0].name  # the Hub's cache has a folder for each commit
    return f"{source}@{commit}{suffix}"
