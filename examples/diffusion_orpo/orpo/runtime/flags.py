"""A flag is declared once: its help, range, how a resumed run treats a change, and whether a model card shows it.

Rooms declare their flags in groups, in modules that import nothing heavy; a script puts groups together:

    FLAGS = assemble([DATA_SET, *SDXL.flags, IMAGES, *TRAINING], SDXL.defaults)
    args = parse(make_parser(__doc__, FLAGS), FLAGS, input_args)
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Flag:
    """One flag of a command line.

    Attributes:
        name: without the dashes.
        help: what it does, for --help and FLAGS.md.
        type: of its value; bool for a switch, which is off unless it is given.
        default: a value, or a function of the other flags that makes one.
        range: the lowest value, and the highest where there is one.
        choices: all possible values.
        nargs: as in argparse; with "?" the flag alone means True.
        required: whether it must be given.
        resume: what a resumed run does if the flag has changed: "same" refuses, "warn" warns, None ignores it.
        card: whether the model card shows it.
        aliases: other names, with dashes.
        is_source: whether it names a folder or something on the Hub; a value that looks like a path must then exist.
    """

    name: str
    help: str
    type: Callable = str
    default: object = None
    range: tuple[float, ...] = ()
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    required: bool = False
    resume: str | None = None
    card: bool = False
    aliases: tuple[str, ...] = ()
    is_source: bool = False

    @property
    def start(self) -> object:
        """The default before the other flags are known."""
        if self.type is bool:
            return False
        return None if callable(self.default) else self.default

    def add_to(self, parser) -> None:
        names = (f"--{self.name}", *self.aliases)
        if self.type is bool:
            parser.add_argument(*names, dest=self.name, action="store_true", help=self.help)
            return
        parser.add_argument(
            *names,
            dest=self.name,
            type=os.path.expanduser if self.is_source else self.type,  # a shell leaves --name=~/folder as it is
            default=self.start,
            choices=self.choices,
            nargs=self.nargs,
            const=True if self.nargs == "?" else None,
            required=self.required,
            help=self.help,
        )

    def problem(self, value: object) -> str | None:
        """Why the flag can't have this value, or None where it can. NaN lies in no range."""
        if self.is_source and looks_like_a_path(value) and not Path(value).exists():
            home = " A shell doesn't replace ~ there: write the path in full." if value.startswith("~") else ""
            return f"--{self.name}={value} does not exist.{home}"
        if value is None or not self.range:
            return None
        lowest, *highest = self.range
        if lowest <= value <= (highest[0] if highest else sys.float_info.max):
            return None
        limits = f"between {lowest} and {highest[0]}" if highest else f"at least {lowest}, and finite"
        return f"--{self.name} must be {limits}; got {value}."


def looks_like_a_path(source: object) -> bool:
    """Whether a source can't be a name on the Hub, which has one slash at most."""
    if not isinstance(source, str) or "://" in source:
        return False
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or "\\" in source


def truth(text: str) -> bool:
    """The type of a flag that is on unless it is given as false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


@dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together in --help."""

    title: str
    flags: tuple[Flag, ...]


def assemble(groups: Iterable[FlagGroup], defaults: dict[str, object] | None = None) -> list[FlagGroup]:
    """Joins groups of the same title, which several rooms may add to.

    Args:
        groups: in the order of --help.
        defaults: those that differ from the declared ones, by flag; flags that are not in the groups are ignored.

    Raises:
        ValueError: a flag is declared twice.
    """
    by_title: dict[str, list[Flag]] = {}
    for group in groups:
        by_title.setdefault(group.title, []).extend(group.flags)
    names = [flag.name for flags in by_title.values() for flag in flags]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"Declared twice: {', '.join(sorted(twice))}.")
    changes = {name: {"default": value} for name, value in (defaults or {}).items()}
    return [
        FlagGroup(title, tuple(replace(flag, **changes.get(flag.name, {})) for flag in flags))
        for title, flags in by_title.items()
    ]


def optional(group: FlagGroup) -> FlagGroup:
    """The group with nothing required, for scripts where another flag may take its place."""
    return FlagGroup(group.title, tuple(replace(flag, required=False) for flag in group.flags))


def pick(groups: Iterable[FlagGroup], names: Iterable[str]) -> tuple[Flag, ...]:
    """The declarations of these flags, for a script that shares a few with another one."""
    found = {flag.name: flag for flag in all_flags(groups)}
    return tuple(found[name] for name in names)


def all_flags(groups: Iterable[FlagGroup]) -> list[Flag]:
    return [flag for group in groups for flag in group.flags]


def make_parser(description: str | None, groups: Iterable[FlagGroup]) -> argparse.ArgumentParser:
    """A parser of the groups' flags, whose --help shows the description as it is written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in groups:
        shown = parser.add_argument_group(group.title)
        for flag in group.flags:
            flag.add_to(shown)
    return parser


def parse(
    parser: argparse.ArgumentParser, groups: Iterable[FlagGroup], input_args: list[str] | None = None
) -> argparse.Namespace:
    """Reads a command line, fills in the defaults that depend on other flags, and stops where one is out of range."""
    args = parser.parse_args(input_args)
    for flag in all_flags(groups):
        problem = flag.problem(getattr(args, flag.name))
        if problem:
            parser.error(problem)
        if callable(flag.default) and getattr(args, flag.name) is None:
            setattr(args, flag.name, flag.default(args))
    return args


def values(groups: Iterable[FlagGroup], settings: dict[str, object], **wanted: object) -> dict[str, object]:
    """The settings of flags with certain attributes: `values(FLAGS, vars(args), resume="same")`."""
    return {
        flag.name: settings[flag.name]
        for flag in all_flags(groups)
        if all(getattr(flag, name) == value for name, value in wanted.items())
    }
