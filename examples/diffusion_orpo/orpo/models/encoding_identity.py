"""What decides an encoding: which VAE, which text encoders, at which resolution and precision.

Two encodings of the same identity are the same numbers, up to the libraries and the device that made them.
"""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from ..system.checksums import sha256


def encoding_identity(family: type, args, dtype: torch.dtype) -> dict[str, str]:
    """What decides the moments and prompt embeddings of a run, read from files alone: no model is loaded.

    Args:
        family: the model family, such as `StableDiffusionXL`.
        args: the flags.
        dtype: of the text encoders, and of a VAE that does not ask for float32.

    Returns:
        For each module its `module_identity`, and the flags that matter.
    """
    source, options = vae_source(args)
    identity = {
        "family": family.slug,
        "resolution": str(args.resolution),
        "precision": str(dtype).removeprefix("torch."),
        "vae": module_identity(source, **options),
    }
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    for encoder in family.text_encoder_names:
        for name in (encoder, encoder.replace("text_encoder", "tokenizer")):
            identity[name] = module_identity(args.pretrained_model_name_or_path, **options, subfolder=name)
    if "max_sequence_length" in args:
        identity["max_sequence_length"] = str(args.max_sequence_length)
    return identity


def base_identity(family: type, args, dtype: torch.dtype, predicts: str) -> dict[str, str]:
    """What a LoRA is trained for: all modules by content, and what the denoiser predicts. Reads all files of a local model.

    Args:
        family: the model family, such as `StableDiffusionXL`.
        args: the flags.
        dtype: of the frozen weights.
        predicts: "epsilon" or "v_prediction", or the name of the noise process.
    """
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    denoiser = module_identity(args.pretrained_model_name_or_path, **options, subfolder=family.denoiser_name)
    return encoding_identity(family, args, dtype) | {family.denoiser_name: denoiser, "prediction": predicts}


def vae_source(args) -> tuple[str, dict]:
    """Where the VAE of the flags is, and the options to load it from there with."""
    if args.pretrained_vae_model_name_or_path is not None:
        return args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir}
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "subfolder": "vae"}
    return args.pretrained_model_name_or_path, options


def module_identity(
    source: str,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> str:
    """Tells a module's weights from others: for a local folder the checksum of its files, else the commit on the Hub.

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
