"""Pairs as two folders, `chosen/` and `rejected/`, in which the images of a pair have the same name up to the suffix.

Their prompts are in one of three places:

- a caption file beside the image, `chosen/0a.txt` for `chosen/0a.png` (or `.caption`); its whole text is the prompt;
- `metadata.jsonl`, a line for each name: `{"file_name": "0a.png", "prompt": "a red fox"}` (or `caption`, or `text`);
  or `metadata.csv` with these columns;
- `prompts.txt`, a prompt a line, in the order of the names; they must sort alike as text and as numbers (01, 02, 10).
"""

import csv
import io
import json
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image as PILImage

from ..runtime.messages import printable
from .bad_pair import BadPair


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
CAPTION_SUFFIXES = (".txt", ".caption")
PROMPT_KEYS = ("prompt", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".arrow")  # a .json may be anything
SHOWN = 5  # problems in an error


@dataclass
class PairFolders:
    """What was found in the two folders.

    Attributes:
        folder: the one that holds both.
        sides: the two.
        names: of the pairs, in natural order: 2 before 10.
        images: of each side, name to file.
        prompts: name to prompt, of the pairs that have one.
        problems: everything that training refuses.
        skipped: files that are neither image nor caption, and prompts without an image, by kind.
    """

    folder: Path
    sides: dict[str, Path]
    names: list[str] = field(default_factory=list)
    images: dict[str, dict[str, Path]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    problems: list[BadPair] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def shown(self, path: Path) -> str:
        """Names a file in messages."""
        return printable(str(path.relative_to(self.folder)))

    def add_problem(self, kind: str, problem: str, where: str = "", advice: str = "") -> None:
        self.problems.append(BadPair(kind, problem, where, advice))

    def dataset(self, cache_dir: str | None) -> "Dataset":
        """The pairs as rows with the columns chosen, rejected, prompt; images as paths. datasets caches the listing."""
        rows = [
            {side: str(self.images[side][name].absolute()) for side in SIDES} | {"prompt": self.prompts.get(name, "")}
            for name in self.names
        ]
        # Other contents of the same names must be another dataset to datasets' cache of checked images.
        stamps = [[self.images[side][name].stat() for side in SIDES] for name in self.names]
        from datasets import Dataset, Features, Image, Value  # takes seconds, and labelling needs only the captions

        return Dataset.from_generator(
            _give_rows,
            features=Features(chosen=Image(), rejected=Image(), prompt=Value("string")),
            cache_dir=cache_dir,
            gen_kwargs={"rows": rows, "stamps": [[(s.st_size, s.st_mtime_ns) for s in pair] for pair in stamps]},
        )


def _give_rows(rows: list[dict], stamps: list) -> Iterator[dict]:
    yield from rows


def find_sides(folder: Path) -> dict[str, Path]:
    """The two folders, also as `Chosen` and `REJECTED`; none where one is missing, or is there twice."""
    sides = {}
    for side in SIDES:
        try:
            named = [path for path in folder.iterdir() if path.name.lower() == side and path.is_dir()]
        except OSError:
            return {}
        named = [path for path in named if path.name == side] or named
        if len(named) == 1:
            sides[side] = named[0]
    return sides if len(sides) == len(SIDES) else {}


def is_pair_folders(name: str) -> bool:
    """Whether a dataset's name is a folder with `chosen/` and `rejected/`, and not an imagefolder that has such folders."""
    folder = Path(name)
    if not find_sides(folder) or (folder / "metadata.parquet").exists():
        return False
    for file in ("metadata.jsonl", "metadata.csv"):
        try:
            with open(folder / file, encoding="utf-8", errors="replace") as opened:
                if "_file_name" in opened.readline():
                    return False
        except OSError:
            continue
    return True


def load_pair_folders(folder: Path, cache_dir: str | None) -> "Dataset":
    """Rows of `chosen`, `rejected`, `prompt` from the two folders.

    Raises:
        ValueError: an image has no partner, a prompt is missing, or something else is wrong; names files.
    """
    found = read_pair_folders(folder)
    if found.problems:
        shown = " ".join(map(str, found.problems[:SHOWN]))
        more = len(found.problems) - SHOWN
        more = f" {more} more problems are listed by check_preferences.py." if more > 0 else ""
        raise ValueError(f"{folder}: {shown}{more}")
    if found.skipped:
        listing = ", ".join(f"{number} {what}" for what, number in found.skipped.most_common())
        logger.warning(f"{folder}: skipped {listing}.")
    return found.dataset(cache_dir)


def read_pair_folders(folder: Path) -> PairFolders:
    """Lists images and prompts, and collects problems. No image is opened."""
    found = PairFolders(folder, find_sides(folder))
    captions = {side: _list_side(found, side) for side in SIDES}
    chosen, rejected = (found.images[side] for side in SIDES)
    for names, partners, other in ((chosen, rejected, "rejected"), (rejected, chosen, "chosen")):
        for name in sorted(names.keys() - partners.keys(), key=_natural):
            problem = f"it has no partner in {found.sides[other].name}/"
            found.add_problem("unpaired image", problem, found.shown(names[name]), "Add or remove it.")
    found.names = sorted(chosen.keys() & rejected.keys(), key=_natural)
    if not found.names:
        found.add_problem("no pairs", "No image in chosen/ has a partner of the same name in rejected/")
    read_prompts(found, captions)
    return found


def _list_side(found: PairFolders, side: str) -> dict[str, list[Path]]:
    """Sorts a folder's files into images and captions; returns the captions by name."""
    images, captions = {}, defaultdict(list)
    suffixes = PILImage.registered_extensions()
    for path in sorted(found.sides[side].iterdir()):
        suffix, where, name = path.suffix.lower(), found.shown(path), normal(path.stem)
        if path.name.startswith("."):
            continue
        if not is_text(path.name):
            found.add_problem("bad name", "its name is not UTF-8", where, "Rename it.")
        elif path.is_dir():
            found.add_problem("folder in a folder", "it is a folder", where, f"Put its images into {side}/ itself.")
        elif suffix in CAPTION_SUFFIXES:
            captions[name].append(path)
        elif suffix not in suffixes:
            found.skipped[f"{printable(suffix or path.name)} files"] += 1
        elif name in images:
            problem = f"{images[name].name} has the same name"
            found.add_problem("two images of one name", printable(problem), where, "Remove one.")
        else:
            images[name] = path
    found.images[side] = images
    # 000.jpg.txt is what some programs call the caption of 000.jpg.
    by_image = {normal(path.name): name for name, path in images.items()}
    return {by_image.get(name, name): paths for name, paths in captions.items()}


def layout_hint(folder: Path) -> str:
    """What may be wrong with a folder from which datasets read images, but no pairs."""
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if find_sides(path):
            return (
                f"{path} has {' and '.join(f'{side.name}/' for side in find_sides(path).values())}: name that folder."
            )
    metadata = [
        path for name in METADATA for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.exists()
    ]
    if not metadata:
        tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (*TABLE_SUFFIXES, ".json")]
        if tables:
            return f"If {printable(tables[0].name)} is the table of the pairs, name that file: {printable(str(tables[0]))}."
        return (
            "A folder of images needs a metadata.jsonl, with chosen_file_name, rejected_file_name and prompt in each line;"
            " or the sub-folders chosen/ and rejected/."
        )
    where = os.path.relpath(metadata[0], folder)
    return (
        f"{where} was found: its file names must be called chosen_file_name and rejected_file_name (or jpg_0_file_name and"
        " jpg_1_file_name), and it must lie in the folder of its images: for images in train/, in train/ too."
    )


def _natural(name: str) -> tuple:
    """Sorts 2 before 10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))), name


# Prompts of the pairs.


def read_prompts(found: PairFolders, captions: dict[str, dict[str, list[Path]]]) -> None:
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


def _read_captions(found: PairFolders, captions: dict[str, dict[str, list[Path]]]) -> None:
    for side in found.sides:
        for name, paths in captions[side].items():
            for path in paths:
                text = _read_text(found, path)
                if text is not None:
                    _add_prompt(found, name, text.strip(), found.shown(path))


def _read_metadata(found: PairFolders, file: str) -> None:
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


def _read_lines(found: PairFolders) -> None:
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


def _other_order(found: PairFolders) -> str | None:
    """The first place where `ls` or a program lists the images in another order than the natural one; None if it never does."""
    for side in found.sides:
        for key in (lambda path: path.name, lambda path: path.name.lower(), lambda path: path.stem):
            listed = [path.stem for path in sorted((found.images[side][name] for name in found.names), key=key)]
            if listed != found.names:
                place = next(i for i, (a, b) in enumerate(zip(found.names, listed)) if a != b)
                a, b = (printable(names[place], 50) for names in (found.names, listed))
                return f"line {place + 1} is for {a} where 2 comes before 10, and for {b} in the order of the alphabet"
    return None


def _add_prompt(found: PairFolders, name: str, prompt: str, where: str) -> None:
    if not any(name in images for images in found.images.values()):
        found.skipped["prompts without an image"] += 1
    elif not is_text(prompt):
        found.add_problem("unreadable prompt", f"its prompt is not UTF-8: {printable(prompt)}", where)
    elif found.prompts.setdefault(name, prompt) != prompt:
        problem = f"it gives {printable(name)} another prompt than was given before"
        found.add_problem("contradicting prompts", problem, where, "A pair has one prompt.")


def _read_text(found: PairFolders, path: Path) -> str | None:
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
