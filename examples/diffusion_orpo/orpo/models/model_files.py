"""Whether the files of a model in a folder are all there and whole, read from their first bytes."""

import json
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from ..runtime.messages import printable


LFS_POINTER = b"version https://git-lfs"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
VARIANT = re.compile(r"(?:\.([\w-]+?)(?:-\d+-of-\d+)?|-\d+-of-\d+\.([\w-]+))\.(?:safetensors|bin)")
# A tokenizer is complete with any one of these.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("tekken.json",),
)


def has_variant(folder: Path, variant: str) -> bool:
    """Whether weights in a component's folder have a variant in their names, such as fp16."""
    return variant in _variants(folder)


def check_folder(flag: str, folder: Path, component: str, variant: str | None = None) -> None:
    """Checks the files of one component of a pipeline, or those of a VAE on its own.

    Args:
        flag: that names the model, for messages.
        folder: the component's.
        component: its name, such as `text_encoder_2`, `tokenizer` or `scheduler`.
        variant: of the weights, or None.

    Raises:
        ValueError: a file is missing, is cut off, or is a Git LFS pointer.
    """
    where = f"{flag}: the {component} in {printable(str(folder))}"
    if not folder.is_dir():
        raise ValueError(f"{where} is missing. Download the whole model.")
    for file in sorted(folder.glob("*.json")):
        _check_json(where, file)
    if component == "scheduler":
        needed: tuple[tuple[str, ...], ...] = (("scheduler_config.json",),)
    elif component.startswith("tokenizer"):
        needed = VOCABULARIES
    else:
        needed = (("config.json",),)
    if not any(all((folder / name).is_file() for name in names) for names in needed):
        names = " or ".join(" with ".join(each) for each in needed)
        raise ValueError(f"{where} has no {names}. Download the whole model.")
    for file in (folder / name for names in needed for name in names):
        _check_whole(where, file)
    if needed == (("config.json",),):
        for file in _weights(where, folder, variant):
            _check_whole(where, file)


def _variants(folder: Path) -> list[str]:
    matches = (VARIANT.search(file.name) for file in folder.glob("*"))
    return sorted({match[1] or match[2] for match in matches if match is not None})


def _weights(where: str, folder: Path, variant: str | None) -> list[Path]:
    """The files of weights that diffusers or transformers would load."""
    for plain in WEIGHTS:
        stem, suffix = plain.rsplit(".", 1)
        middle = f".{variant}" if variant else ""
        if (folder / f"{stem}{middle}.{suffix}").is_file():
            return [folder / f"{stem}{middle}.{suffix}"]
        index = folder / f"{plain}.index{middle}.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in parts if not (folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"{where} lacks {printable(', '.join(missing))}, which {index.name} names. Download the whole model."
                )
            return [folder / name for name in parts]
    others = _variants(folder)
    if variant is None and others:
        raise ValueError(f"{where} has only {' and '.join(others)} files: give --variant={others[0]}.")
    if variant is not None:
        raise ValueError(f"{where} has no {variant} files: leave out --variant={variant}, or download them.")
    raise ValueError(f"{where} has no weights, such as {WEIGHTS[0]}. Download the whole model.")


def _check_json(where: str, file: Path) -> None:
    _check_whole(where, file)
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {file.name} is not JSON ({error}). Download it again.") from error


def _check_whole(where: str, file: Path) -> None:
    if not file.is_file():
        return
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(
                f"{where}: {file.name} is a Git LFS pointer, not the file itself. Run `git lfs pull` there, or download the"
                " model with `hf download`."
            )
        size, expected = file.stat().st_size, None
        if file.suffix == ".safetensors":
            opened.seek(0)
            expected = _safetensors_size(opened.read(8), opened, size)
    cut_off = size == 0 or (expected is not None and size < expected)
    cut_off = cut_off or (start.startswith(b"PK") and not zipfile.is_zipfile(file))  # as torch.save writes
    if cut_off:
        of = f" of {expected}" if expected else ""
        raise ValueError(f"{where}: {file.name} is cut off after {size}{of} bytes. Download it again.")


def _safetensors_size(length: bytes, opened: BinaryIO, size: int) -> int:
    """The bytes that a file's header says it has, or at least those of the header itself."""
    header = 8 + int.from_bytes(length, "little")
    if len(length) < 8 or header > size:
        return max(header, 9)
    tensors = json.loads(opened.read(header - 8))
    ends = (tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
    return header + max(ends, default=0)
