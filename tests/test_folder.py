"""The folder that people copy: it works alone, in part, and under diffusers' own lint settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import arguments, lora_weights
from orpo.runtime.start import NOISE


EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion_orpo"
SCRIPTS = sorted(path.name for path in EXAMPLE.glob("*.py"))
SDXL = "train_diffusion_orpo_sdxl_lora.py"
HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "peft", "ray")

# As in diffusers' pyproject.toml, where the folder would lie below examples/.
DIFFUSERS_LINT = """
[tool.ruff]
line-length = 119
[tool.ruff.lint]
ignore = ["C901", "E501", "E721", "E741", "F402", "F823"]
select = ["C", "E", "F", "I", "W"]
[tool.ruff.lint.per-file-ignores]
"__init__.py" = ["E402", "F401", "F403", "F811"]
[tool.ruff.lint.isort]
lines-after-imports = 2
known-first-party = ["diffusers"]
"""


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    """Runs Python in another folder, where nothing of this repository is on the path but the installed loss."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment | {"ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    folder = tmp_path / "somewhere else" / "diffusion_orpo"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


MISSING = "./no/such/folder"
WRONG_PATHS = {
    SDXL: f"--pretrained_model_name_or_path={MISSING} --dataset_name=a",
    "train_diffusion_orpo_lora.py": f"--pretrained_model_name_or_path=a --dataset_name={MISSING}",
    "evaluate_lora.py": f"--pretrained_model_name_or_path=a --lora_weights={MISSING}",
    "convert_to_webdataset.py": f"--dataset_name={MISSING} --output_dir=a",
}
AT_THE_DOOR = [
    *((script, "--help", 0, "usage:") for script in SCRIPTS),
    *((script, "--no_such_flag=1", 2, "error:") for script in SCRIPTS),
    *((script, line, 2, f"={MISSING} does not exist") for script, line in WRONG_PATHS.items()),
]


@pytest.mark.parametrize(("script", "line", "status", "said"), AT_THE_DOOR)
def test_each_script_of_a_copy_answers_at_once(script, line, status, said, copy, tmp_path):
    """From any working directory, and without the libraries that take seconds to load."""
    show = (
        f"import os, runpy, sys\nsys.argv = [sys.argv[1], *{line.split()!r}]\nsys.path[0] = os.path.dirname(sys.argv[0])\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n"
        f"    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    result = run("-c", show, copy / script, cwd=tmp_path)
    assert result.returncode == status and said in result.stdout + result.stderr, result.stderr
    assert result.stderr.strip().splitlines()[-1] == "[]"


def test_a_copy_with_the_rooms_of_one_task_trains(copy, tiny_sdxl, faces, tmp_path):
    """Whoever trains SDXL from a data set needs neither the other scripts nor the rooms for shards, converter, checks and
    evaluation; and nothing is loaded that judges images, unless a scorer was asked for."""
    for path in copy.glob("*.py"):
        if path.name != SDXL:
            path.unlink()
    used = {"data", "models", "runtime", "training", "scoring"}
    for room in (copy / "orpo").iterdir():
        if room.is_dir() and room.name not in used:
            shutil.rmtree(room)
    shutil.rmtree(copy / "orpo" / "scoring")
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", run_validation=True, num_validation_pairs=4)
    line += ["--validation_prompts", "a red ball", "--validation_inference_steps=1"]
    result = run(copy / SDXL, *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [text for text in NOISE.values() if text in result.stderr] == []  # what libraries say at a normal start
    assert max(value.abs().max() for name, value in lora_weights(tmp_path / "lora").items() if "up" in name) > 0


def test_a_copy_passes_diffusers_lint(copy, tmp_path):
    clone = tmp_path / "clone"
    (clone / "examples" / "research_projects").mkdir(parents=True)
    (clone / "pyproject.toml").write_text(DIFFUSERS_LINT)
    shutil.copytree(copy, clone / "examples" / "research_projects" / "diffusion_orpo")
    for command in (["check"], ["format", "--check"]):
        result = run("-m", "ruff", *command, "--no-cache", ".", cwd=clone)
        assert result.returncode == 0, result.stdout
