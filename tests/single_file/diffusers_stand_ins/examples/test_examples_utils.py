"""Stands in for diffusers' examples/test_examples_utils.py: what its example tests start scripts with."""

import subprocess
import tempfile
from pathlib import Path

from accelerate.utils import write_basic_config


def run_command(command: list[str]) -> None:
    """Runs a command; where it fails, its output is the error."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}:\n{result.stdout}")


class ExamplesTestsAccelerate:
    """Starts scripts with `self._launch_args`, under accelerate's basic configuration."""

    @classmethod
    def setup_class(cls) -> None:
        cls._folder = tempfile.TemporaryDirectory()
        config = Path(cls._folder.name) / "config.yml"
        write_basic_config(save_location=config)
        cls._launch_args = ["accelerate", "launch", "--config_file", str(config)]

    @classmethod
    def teardown_class(cls) -> None:
        cls._folder.cleanup()
