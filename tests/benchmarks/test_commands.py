"""Every command of `benchmarks/` that a page names runs, as a process of its own, in its shortest form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SHORT = {
    "alignment/cost.py": "--rounds 2 --output_file {tmp}/cost.json",
    "alignment/report.py": "--output_dir {tmp}",
    "alignment/run_all.py": "--work {tmp} --rehearse --tasks prompt",
    "loader.py": "--runs 1",
    "memory.py": "--model sdxl",
    "performance/flops.py": "--resolution 64 --output_dir {tmp}",
    "performance/reference_forward.py": "--rounds 2 --resolution 64 --output_dir {tmp}",
    "performance/scaled_sdxl.py": "--output_dir {tmp}",
    "performance/step.py": "--rounds 2 --resolution 64 --output_dir {tmp}",
}
PAGES = [page for page in ROOT.rglob("*.md") if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)]
NAMED = {name for page in PAGES for name in re.findall(r"python benchmarks/([\w/]+\.py)", page.read_text())}


def test_every_command_on_a_page_has_a_short_form_and_the_other_way_round():
    assert {name for name in NAMED if not name.startswith("emoji/")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_the_command_runs(name, tmp_path):
    """With nothing on the import path but what the script puts there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SHORT[name].format(tmp=tmp_path).split()]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()
