"""Text files as people have them."""

from pathlib import Path


def read_text(path: Path) -> str:
    r"""The text of a UTF-8 file, without a byte order mark; every line ends with \n.

    Raises:
        ValueError: it is no such file; says what to do.
        OSError: it can't be read.
    """
    content = path.read_bytes()
    if (
        content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content
    ):  # letters of UTF-16 without a mark pass for UTF-8
        raise ValueError(f"{path} is UTF-16, or no text. Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
