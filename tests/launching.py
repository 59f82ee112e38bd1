"""The scripts as users start them: `accelerate launch` and torchrun, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path


EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion_orpo"
SCRIPT = EXAMPLE / "train_diffusion_orpo_sdxl_lora.py"
SHARDS_SCRIPT = EXAMPLE / "train_diffusion_orpo_sdxl_lora_wds.py"


def run(launcher: list[str], line: list[str], script: Path = SCRIPT, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launcher, str(script), *line]
    result = subprocess.run(
        command,
        env=os.environ | {"ACCELERATE_USE_CPU": "1"} | environment,
        capture_output=True,
        text=True,
    )
    result.output = result.stdout + result.stderr
    return result


def accelerate_launch(line: list[str], *options: str, **environment) -> subprocess.CompletedProcess:
    return run(["accelerate.commands.launch", "--cpu", "--num_processes=1", *options], line, **environment)


def two_processes(line: list[str], **environment) -> subprocess.CompletedProcess:
    result = run(["torch.distributed.run", "--standalone", "--nproc_per_node=2"], line, **environment)
    assert "on 2 processes" in result.output or result.returncode, result.output[-3000:]
    return result


def assert_ok(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.output[-4000:]
