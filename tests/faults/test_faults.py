"""A seeded handful of each campaign in tests/faults: kills, signals, bad disks, companions. In processes of their own."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


SAMPLE = Path(__file__).parent / "sample.py"


def test_a_handful_of_every_fault_is_survived():
    result = subprocess.run([sys.executable, SAMPLE], capture_output=True, text=True, timeout=1200)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-6000:]
    survived = Counter()
    for line in map(json.loads, filter(lambda line: line.startswith("{"), result.stdout.splitlines())):
        survived[line["fault"]] += sum(line["survived"].values())
    assert (survived["kills"], survived["signals"]) == (12, 4)
    assert "the other ended after" in result.stdout and "a second run in the folder was refused" in result.stdout
    if "disks" not in survived:
        pytest.skip("full disks were left out: no right to mount one, neither as root nor in a user namespace")
    assert survived["disks"] == 3
