"""The example as it stands in diffusers: copied to examples/research_projects, linted and tested there.

The environment variable DIFFUSERS_EXAMPLES names the folder `examples` of a clone of diffusers. Without it, stand-ins for the
files that such a clone has do.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from single_file_script import EXAMPLE


STAND_INS = Path(__file__).parent / "diffusers_stand_ins"
PLACE = "examples/research_projects/diffusion_orpo_lora"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A diffusers with the example in it. Of a real clone, all but `examples` is linked, so that it stays as it is."""
    root = tmp_path_factory.mktemp("diffusers")
    examples = os.environ.get("DIFFUSERS_EXAMPLES")
    source = Path(examples).resolve().parent if examples else STAND_INS
    for path in source.iterdir():
        if path.name not in ("examples", ".git"):
            (root / path.name).symlink_to(path)
    shutil.copytree(EXAMPLE, root / PLACE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "test_examples_utils.py"):
        shutil.copy(source / "examples" / name, root / "examples" / name)
    return root


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_its_ruff_settings_pass(clone, command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config=pyproject.toml", PLACE]
    result = subprocess.run(ruff, cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_its_test_passes(clone, tiny_sdxl):
    environment = os.environ | {
        "TINY_SDXL": tiny_sdxl,
        "ACCELERATE_USE_CPU": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", PLACE]
    result = subprocess.run(pytest_there, cwd=clone, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "3 passed" in result.stdout
