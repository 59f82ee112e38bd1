"""The flags of a script, read from its parser."""

import argparse

import pytest


def flags(script) -> dict[str, argparse.Action]:
    """All flags of a script, by name."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args: parsers.append(self) or exit())
        with pytest.raises(SystemExit):
            script.parse_args([])
    return {action.dest: action for action in parsers[0]._actions if action.dest != "help"}


def flag_table(script) -> str:
    """The flags of a script as a Markdown table: name, default, help."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, action in flags(script).items():
        default = "" if action.default in (None, False) or isinstance(action.default, list) else f"`{action.default}`"
        text = " ".join(action.help.split()).replace("|", "\\|")
        lines.append(f"| `--{name}` | {'required' if action.required else default} | {text} |")
    return "\n".join(lines)
