"""diffusers' text-to-image LoRA script, which no package of diffusers ships: where it is, and how it is changed and run."""

import ast
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


SCRIPT = "text_to_image/train_text_to_image_lora.py"


def current_script() -> str:
    """Its source in a clone of diffusers, whose folder `examples` the environment variable DIFFUSERS_EXAMPLES names."""
    folder = os.environ.get("DIFFUSERS_EXAMPLES")
    if not folder:
        pytest.skip("DIFFUSERS_EXAMPLES does not name the folder `examples` of a clone of diffusers")
    return Path(folder, SCRIPT).read_text()


def packaged_script(folder: Path) -> str:
    """Its source of August 2023, as the package facechain has it. The package itself can't be installed any more."""
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "facechain==0.0.1.dev0"]
    pip = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    if pip.returncode:
        pytest.skip(f"pip can't download facechain: {pip.stderr[-500:]}")
    (wheel,) = Path(folder).glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest == "308a343692a6db0cfd9f3ccaeee06462c98d2052dd7cc350d0f11e270253082a"
    return zipfile.ZipFile(wheel).read("facechain/train_text_to_image_lora.py").decode()


def hunks(diff: str) -> list[tuple[list[str], list[str]]]:
    """What is replaced, and by what: a hunk ends where added lines do."""
    found, added = [([], [])], False
    for sign, line in ((line[:1], line[1:]) for line in diff.splitlines()):
        if added and sign != "+":
            found.append(([], []))
        added = sign == "+"
        old, new = found[-1]
        if sign != "+":
            old.append(line)
        if sign != "-":
            new.append(line)
    return found


def apply_diff(source: str, diff: str) -> str:
    """Changes the source. Each hunk must fit in one place, but may stand deeper or less deep there."""

    def indent(line: str) -> int:
        return len(line) - len(line.lstrip())

    lines = source.splitlines()
    for old, new in hunks(diff):
        wanted = [line.strip() for line in old]
        stripped = [line.strip() for line in lines]
        places = [i for i in range(len(lines)) if stripped[i : i + len(old)] == wanted]
        assert len(places) == 1, f"{len(places)} places for {old}"
        shift = indent(lines[places[0]]) - indent(old[0])
        lines[places[0] : places[0] + len(old)] = [" " * (indent(line) + shift) + line.strip() for line in new]
    return "\n".join(lines) + "\n"


def functions(source: str, names: set[str]) -> ast.Module:
    """The functions of these names, wherever in the source they are defined, as a module of their own."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in found} == names
    return ast.Module(found, type_ignores=[])


def training_step(source: str) -> ast.Module:
    """The body of the training loop: the one block `with accelerator.accumulate(unet)`."""
    (step,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.With) and ast.unparse(node.items[0]) == "accelerator.accumulate(unet)"
    ]
    return ast.Module([step], type_ignores=[])
