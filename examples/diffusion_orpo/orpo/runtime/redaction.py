"""URLs and commands as logs, trackers and messages may show them: where they lead, without the credentials they carry."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


def without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment; or the program of a `pipe:` command and the shard that it reads.

    Parts are dropped by position, not by appearance: a command can carry a token in any form.

    Args:
        url: of a shard or manifest, or any other text, which stays as it is.
    """
    if url.startswith("pipe:"):
        program = re.match(r"pipe:\s*([\w./-]+)(?=\s|$)", url)  # not an assignment of a variable
        shard = re.findall(r"[\w.-]+\.(?:tar|json)\b", url)
        return " ".join([f"pipe:{program[1] if program else ''}", "...", *shard[-1:]])
    if re.match(r"[a-z0-9+.-]+://", url, re.IGNORECASE):
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return url


def argument_without_secrets(argument: str) -> str:
    """The same for a word of a command line: `--flag=value`, or a value alone."""
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{flag}{equals}{without_secrets(value)}"


def flags_without_secrets(settings: dict[str, object]) -> dict[str, int | float | str]:
    """A run's settings as a tracker may record them."""
    flags = {}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            value = str([without_secrets(str(item)) for item in value])
        flags[name] = value if isinstance(value, (int, float)) else without_secrets(str(value))
    return flags


@contextmanager
def command_line_without_secrets() -> Iterator[None]:
    """In the block, `sys.argv` is redacted: wandb records it."""
    command_line = sys.argv
    sys.argv = command_line[:1] + [argument_without_secrets(argument) for argument in command_line[1:]]
    try:
        yield
    finally:
        sys.argv = command_line
