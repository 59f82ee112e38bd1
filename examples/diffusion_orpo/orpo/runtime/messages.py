"""Text from data and files in messages: one line, no control characters, not too long."""


def printable(text: str, limit: int = 200) -> str:
    """Text from the data as one line of a message: control characters and broken ones escaped, long text shortened."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"


def differences(saved: dict[str, str], current: dict[str, str]) -> list[str]:
    """The differences of two identities, each as "name was this and is now that"."""
    return [
        f"{name} was {saved.get(name)} and is now {current.get(name)}"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name)
    ]
