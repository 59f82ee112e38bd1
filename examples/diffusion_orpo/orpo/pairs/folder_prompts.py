"""The prompts of pairs in `chosen/` and `rejected/`: from caption files, `metadata.jsonl`, `metadata.csv` or `prompts.txt`."""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.messages import printable


if TYPE_CHECKING:
    from .folders import PairFolders


CAPTION_SUFFIXES = (".txt", ".caption")
PROMPT_KEYS = ("prompt", "caption", "text")


def read_prompts(found: "PairFolders", captions: dict[str, dict[str, list[Path]]]) -> None:
    """Fills `prompts` from the one place that has them."""
    readers: dict[str, Callable[[], None]] = {}
    for name in ("metadata.jsonl", "metadata.csv"):
        if (found.folder / name).exists():
            readers[name] = lambda name=name: _read_metadata(found, name)
    if (found.folder / "prompts.txt").exists():
        readers["prompts.txt"] = lambda: _read_lines(found)
    if any(captions.values()):
        readers["caption files"] = lambda: _read_captions(found, captions)
    if not readers:
        advice = (
            "Put the prompt of chosen/NAME.png into chosen/NAME.txt, or write a prompts.txt, metadata.jsonl or"
            " metadata.csv."
        )
        found.add_problem("no prompts", "there are no prompts", str(found.folder), advice)
    elif len(readers) > 1:
        problem = f"there are prompts in {' and in '.join(readers)}"
        found.add_problem("several places of prompts", problem, str(found.folder), "Keep one of them.")
    else:
        (place, read), problems = *readers.items(), len(found.problems)
        read()
        missing = [name for name in found.names if name not in found.prompts]
        for name in missing if len(found.problems) == problems else ():  # otherwise the reason was reported already
            found.add_problem("no prompt", f"it has no prompt in {place}", printable(name))


def _read_captions(found: "PairFolders", captions: dict[str, dict[str, list[Path]]]) -> None:
    for side in found.sides:
        for name, paths in captions[side].items():
            for path in paths:
                text = _read_text(found, path)
                if text is not None:
                    _add_prompt(found, name, text.strip(), found.shown(path))


def _read_metadata(found: "PairFolders", file: str) -> None:
    for number, read_entry in entries(_read_text(found, found.folder / file) or "", file.endswith(".csv")):
        where = f"{file}, line {number}"
        try:
            entry = read_entry()
            image = Path(entry["file_name"]).name
            prompt = next(entry[key] for key in PROMPT_KEYS if key in entry)
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt is {printable(repr(prompt))}, not text")
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
            reason = printable(str(error)) or f"none of {', '.join(PROMPT_KEYS)}"
            found.add_problem("bad prompts file", f"it gives no file_name and prompt ({reason})", where)
            continue
        image = normal(image)
        is_name = any(image in images for images in found.images.values())
        _add_prompt(found, image if is_name else Path(image).stem, prompt, where)


def entries(text: str, is_csv: bool) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The entries of a metadata file: the line that each ends in, and what reads it."""
    if is_csv:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for entry in reader:
            yield reader.line_num, lambda entry=entry: entry
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, lambda line=line: json.loads(line)


def _read_lines(found: "PairFolders") -> None:
    text = _read_text(found, found.folder / "prompts.txt")
    if text is None:
        return
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if len(lines) != len(found.names):
        problem = f"it has {len(lines)} lines, and there are {len(found.names)} pairs"
        found.add_problem("bad prompts file", problem, "prompts.txt", "Write one line for each pair.")
        return
    if other := _other_order(found):
        problem = f"its lines can be read in two orders: {other}"
        advice = "Rename the images so that both orders agree (01, 02, 10), or write a metadata.jsonl."
        found.add_problem("prompts in two orders", problem, "prompts.txt", advice)
        return
    for number, (name, line) in enumerate(zip(found.names, lines), start=1):
        _add_prompt(found, name, line.strip(), f"prompts.txt, line {number}")


def _other_order(found: "PairFolders") -> str | None:
    """The first place where `ls` or a program lists the images in another order than the natural one; None if it never does."""
    for side in found.sides:
        for key in (lambda path: path.name, lambda path: path.name.lower(), lambda path: path.stem):
            listed = [path.stem for path in sorted((found.images[side][name] for name in found.names), key=key)]
            if listed != found.names:
                place = next(i for i, (a, b) in enumerate(zip(found.names, listed)) if a != b)
                a, b = (printable(names[place], 50) for names in (found.names, listed))
                return f"line {place + 1} is for {a} where 2 comes before 10, and for {b} in the order of the alphabet"
    return None


def _add_prompt(found: "PairFolders", name: str, prompt: str, where: str) -> None:
    if not any(name in images for images in found.images.values()):
        found.passed_over["prompts without an image"] += 1
    elif not is_text(prompt):
        found.add_problem("unreadable prompt", f"its prompt is not UTF-8: {printable(prompt)}", where)
    elif found.prompts.setdefault(name, prompt) != prompt:
        problem = f"it gives {printable(name)} another prompt than was given before"
        found.add_problem("contradicting prompts", problem, where, "A pair has one prompt.")


def _read_text(found: "PairFolders", path: Path) -> str | None:
    """The text of a file without its byte order mark; None where it can't be read, which is a problem."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:  # letters of UTF-16 without a mark pass for UTF-8
            raise ValueError("it holds zero bytes, as UTF-16 does")
        return text
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        problem = f"it can't be read as UTF-8: {printable(str(error))}"
        found.add_problem("unreadable prompt", problem, found.shown(path), "Save it as UTF-8.")
        return None


def normal(name: str) -> str:
    """A file's name in one Unicode form: macOS writes an accent as a character of its own, others don't."""
    return unicodedata.normalize("NFC", name)


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON and file names may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
