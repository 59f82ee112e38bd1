"""The folder that people copy: it works alone, in part, and under diffusers' own lint settings."""

import json
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


# Runs scripts one after another in one process; prints of each its status, what it said, and which heavy libraries were loaded by then.
ASK = f"""
import contextlib, io, json, os, runpy, sys
answers = []
for script, line in json.loads(sys.argv[1]):
    sys.argv, sys.path[0], said, status = [script, *line.split()], os.path.dirname(script), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    answers.append([status, said.getvalue(), sorted(set({HEAVY!r}) & set(sys.modules))])
print(json.dumps(answers))
"""


def test_the_scripts_of_a_copy_answer_at_once(copy, tmp_path):
    """From any working directory, and without the libraries that take seconds to load."""
    asked = json.dumps([(str(copy / script), line) for script, line, _, _ in AT_THE_DOOR])
    result = run("-c", ASK, asked, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for (script, line, status, said), (found, text, heavy) in zip(AT_THE_DOOR, json.loads(result.stdout), strict=True):
        assert (found, said in text, heavy) == (status, True, []), (script, line, text)


def test_a_copy_with_the_packages_of_one_task_trains(copy, tiny_sdxl, faces, tmp_path):
    """Training SDXL from a dataset needs neither the other scripts nor the packages for shards, labelling, reports and generation;
    and no scorer is loaded unless one was asked for."""
    for path in copy.glob("*.py"):
        if path.name != SDXL:
            path.unlink()
    used = {"pairs", "models", "runtime", "training", "scoring"}
    for package in (copy / "orpo").iterdir():
        if package.is_dir() and package.name not in used:
            shutil.rmtree(package)
    shutil.rmtree(copy / "orpo" / "scoring")
    line = arguments(tiny_sdxl, faces, tmp_path / "lora", run_validation=True, num_validation_pairs=4)
    line += ["--validation_prompts", "a red ball", "--validation_inference_steps=1"]
    result = run(copy / SDXL, *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [text for text in NOISE.values() if text in result.stderr] == []  # what libraries say at a normal start
    assert max(value.abs().max() for name, value in lora_weights(tmp_path / "lora").items() if "lora_B" in name) > 0


def test_a_copy_passes_diffusers_lint(copy, tmp_path):
    clone = tmp_path / "clone"
    (clone / "examples" / "research_projects").mkdir(parents=True)
    (clone / "pyproject.toml").write_text(DIFFUSERS_LINT)
    shutil.copytree(copy, clone / "examples" / "research_projects" / "diffusion_orpo")
    for command in (["check"], ["format", "--check"]):
        result = run("-m", "ruff", *command, "--no-cache", ".", cwd=clone)
        assert result.returncode == 0, result.stdout
