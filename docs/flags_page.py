"""Writes examples/diffusion_orpo/FLAGS.md from the scripts' own declarations: `make flags`."""

import argparse
import importlib
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock


EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion_orpo"
PAGE = EXAMPLE / "FLAGS.md"
TRAINING_SCRIPTS = sorted(
    (path.stem for path in EXAMPLE.glob("train_*.py")), key=lambda name: ("sdxl" not in name, name)
)
OTHER_SCRIPTS = sorted(path.stem for path in EXAMPLE.glob("*.py") if path.stem not in TRAINING_SCRIPTS)
RESUME = {"same": "must stay", "warn": "warns", None: ""}
HEAD = """# Flags

Written by `make flags` from the declarations in `orpo/*/flags.py`; `python SCRIPT --help` says the same.

A choice of flags for a first run is in the [README](README.md). "Resume" says what happens if a run that is continued with
`--resume_from_checkpoint` has another value than the run that it continues: it is refused, or it goes on with a warning.
"""


def main() -> None:
    PAGE.write_text(flags_page(), encoding="utf-8")


def flags_page() -> str:
    sys.path.insert(0, str(EXAMPLE))
    sections = [HEAD, "## Training\n\nScripts: " + ", ".join(f"`{short(name)}`" for name in TRAINING_SCRIPTS) + ".\n"]
    sections += training_tables({short(name): importlib.import_module(name).FLAGS for name in TRAINING_SCRIPTS})
    for name in OTHER_SCRIPTS:
        sections.append(f"## {name}.py\n\n{parser_table(parser_of(importlib.import_module(name)))}\n")
    return "\n".join(sections)


def short(script: str) -> str:
    return script.removeprefix("train_diffusion_orpo_")


def training_tables(scripts: dict[str, list]) -> list[str]:
    """A table for each group, of the flags of all scripts; where scripts differ in a default or a text, each has a row."""
    groups: dict[str, dict[tuple[str, str, str, str], list[str]]] = {}
    for script, declared in scripts.items():
        for group in declared:
            rows = groups.setdefault(group.title, {})
            for flag in group.flags:
                default = "required" if flag.required else shown(flag.start)
                rows.setdefault((flag.name, default, flag.help, RESUME[flag.resume]), []).append(script)
    return [f"### {title.capitalize()}\n\n{group_table(rows, len(scripts))}\n" for title, rows in groups.items()]


def group_table(rows: dict[tuple[str, str, str, str], list[str]], number_of_scripts: int) -> str:
    lines = ["| flag | default | meaning | resume |", "|---|---|---|---|"]
    order = list(dict.fromkeys(name for name, *_ in rows))
    for (name, default, text, resume), scripts in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        note = "" if len(scripts) == number_of_scripts else f" *({', '.join(scripts)})*"
        lines.append(f"| `--{name}` | {default} | {cell(text)}{note} | {resume} |")
    return "\n".join(lines)


def parser_of(script) -> argparse.ArgumentParser:
    """The parser that a script makes, caught when it is about to read the command line."""
    caught = []

    def catch(parser, *_):
        caught.append(parser)
        raise SystemExit

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch), suppress(SystemExit):
        script.parse_args([])
    return caught[0]


def parser_table(parser: argparse.ArgumentParser) -> str:
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest != "help":
            default = "required" if action.required else shown(action.default)
            name = f"--{action.dest}" if action.option_strings else action.dest
            lines.append(f"| `{name}` | {default} | {cell(action.help)} |")
    return "\n".join(lines)


def shown(default: object) -> str:
    return "" if default is None or default is False or isinstance(default, list) else f"`{default}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
