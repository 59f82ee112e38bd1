"""A seeded handful of the campaigns, in processes of their own: jobs are forked from one without threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def survived(*line: str) -> dict[str, int]:
    """Of each campaign, how many faults."""
    command = [sys.executable, Path(__file__).with_name("campaign.py"), *line]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    reports = map(json.loads, result.stdout.splitlines())
    return {name: count for report in reports for name, count in report.get("survived", {}).items()}


def test_a_few_kills_and_a_signal_are_survived():
    assert survived("kills=3", "signals=1", "--first") == {"kills": 3, "signals": 1}


@pytest.mark.campaign
def test_a_handful_of_every_fault_is_survived():
    found = survived("kills=12", "elastic=4", "signals=4", "companions=1")
    assert found == {"kills": 12, "elastic": 4, "signals": 4, "companions": 3}


@pytest.mark.campaign
def test_bad_disks_are_survived():
    options = [] if os.geteuid() == 0 else ["--map-root-user"]
    if subprocess.run(["unshare", *options, "--mount", "true"]).returncode:
        pytest.skip("no right to mount a full disk, neither as root nor in a user namespace")
    assert survived("disks=3", "--first") == {"disks": 3}
