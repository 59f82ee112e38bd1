"""The flags as a whole: each says what it does, and each is tried by a test."""

import argparse
import re
from pathlib import Path

import train_diffusion_orpo_sdxl_lora as script


def flags(monkeypatch) -> dict[str, argparse.Action]:
    """All flags of the script, by name."""
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args: parsers.append(self) or 1 / 0)
    try:
        script.parse_args([])
    except ZeroDivisionError:
        pass
    return {action.dest: action for action in parsers[0]._actions if action.dest != "help"}


def test_every_flag_has_a_help_text(monkeypatch):
    assert [name for name, action in flags(monkeypatch).items() if not action.help] == []


def test_every_flag_is_set_by_some_test(monkeypatch):
    sources = "".join(
        path.read_text() for path in Path(__file__).parent.glob("*.py") if path.name != "test_arguments.py"
    )
    set_by_tests = set(re.findall(r"""\b(\w+)(?==|": |="|'\])""", sources))
    assert sorted(set(flags(monkeypatch)) - set_by_tests) == []
