"""Writes examples/diffusion_orpo/FLAGS.md from the declarations in orpo/config.py: `make flags`."""

import sys
from pathlib import Path


EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusion_orpo"
PAGE = EXAMPLE / "FLAGS.md"
RESUME = {"same": "must stay", "warn": "warns", None: ""}
HEAD = """# Flags

Written by `make flags` from `orpo/config.py`; `python SCRIPT --help` says the same.

A choice of flags for a first run is in the [README](README.md). "Resume" says what happens if a run that is continued with
`--resume_from_checkpoint` has another value than the run that it continues: it is refused, or it goes on with a warning.
"""


def main() -> None:
    PAGE.write_text(flags_page(), encoding="utf-8")


def flags_page() -> str:
    sys.path.insert(0, str(EXAMPLE))
    from orpo import config

    scripts = {
        "train": config.TrainingConfig,
        "check": config.CheckConfig,
        "convert": config.ConversionConfig,
        "make": config.MakingConfig,
        "evaluate": config.EvaluationConfig,
        "label": config.LabellingConfig,
    }
    groups: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for script, settings in scripts.items():
        for title, names in settings.groups().items():
            for name in names:
                place = next((known for known, rows in groups.items() if row(settings, name) in rows), title)
                groups.setdefault(place, {}).setdefault(row(settings, name), []).append(script)
    tables = [table(title, rows, len(scripts)) for title, rows in groups.items()]
    named = "; ".join(f"{script}: `{path.name}`" for script, path in zip(scripts, map(script_of, scripts)))
    return "\n".join([HEAD, f"Scripts: {named}.\n", *tables])


def script_of(name: str) -> Path:
    (path, *_) = sorted(EXAMPLE.glob(f"{name}_*.py"), key=lambda path: ("sdxl" in path.name, path.name))
    return path


def row(settings: type, name: str) -> tuple[str, str, str, str]:
    declared, default = settings.settings()[name], settings.default(name)
    shown = "" if default in (None, False, "", ()) or isinstance(default, tuple) else f"`{default}`"
    text = " ".join(declared.help.split()).replace("|", "\\|")
    return name, "required" if declared.required else shown, text, RESUME[declared.resume]


def table(title: str, rows: dict[tuple[str, ...], list[str]], number_of_scripts: int) -> str:
    lines = [f"## {title.capitalize()}\n", "| flag | default | meaning | scripts | resume |", "|---|---|---|---|---|"]
    for (name, default, text, resume), scripts in rows.items():
        lines.append(f"| `--{name}` | {default} | {text} | {', '.join(scripts)} | {resume} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
