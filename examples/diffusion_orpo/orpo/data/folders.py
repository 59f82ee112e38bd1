"""Pairs as two folders, `chosen/` and `rejected/`, in which the images of a pair have the same name up to the suffix.

Their prompts stand in one of three places:

- a caption file beside the image, `chosen/0a.txt` for `chosen/0a.png` (or `.caption`); its whole text is the prompt;
- `metadata.jsonl`, a line for each name: `{"file_name": "0a.png", "prompt": "a red fox"}` (or `caption`, or `text`);
- `prompts.txt`, a prompt a line, in the order of the names, in which 2 comes before 10.
"""

import json
import logging
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ..system.messages import printable
from .columns import TRL_COLUMNS


logger = logging.getLogger(__name__)

SIDES = TRL_COLUMNS[:2]
CAPTION_SUFFIXES = (".txt", ".caption")
PROMPT_KEYS = ("prompt", "caption", "text")
SHOWN = 5  # problems in an error


@dataclass
class PairFolders:
    """What was found in the two folders.

    Attributes:
        folder: the one that holds both.
        names: of the pairs, in natural order: 2 before 10.
        images: of each side, name to file.
        prompts: name to prompt, of the pairs that have one.
        problems: (kind, message) of all that training refuses.
        passed_over: files that are neither image nor caption, and prompts without an image, by kind.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    images: dict[str, dict[str, Path]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def dataset(self, cache_dir: str | None) -> Dataset:
        """The pairs as rows with the columns chosen, rejected, prompt; images as paths. datasets caches the listing."""
        rows = [
            {side: str(self.images[side][name].absolute()) for side in SIDES} | {"prompt": self.prompts.get(name, "")}
            for name in self.names
        ]
        # Other contents of the same names must be another data set to datasets' cache of checked images.
        stamps = [[self.images[side][name].stat() for side in SIDES] for name in self.names]
        dataset = Dataset.from_generator(
            _give_rows,
            features=Features(chosen=Image(), rejected=Image(), prompt=Value("string")),
            cache_dir=cache_dir,
            gen_kwargs={"rows": rows, "stamps": [[(s.st_size, s.st_mtime_ns) for s in pair] for pair in stamps]},
        )
        dataset.info.builder_name = "imagefolder"  # paths may be followed, since they were listed and not read
        return dataset


def _give_rows(rows: list[dict], stamps: list):
    yield from rows


def is_pair_folders(name: str) -> bool:
    """Whether a data set's name is a folder with `chosen/` and `rejected/`, and not an imagefolder that has such folders."""
    folder = Path(name)
    if not all((folder / side).is_dir() for side in SIDES):
        return False
    if any((folder / f"metadata.{suffix}").exists() for suffix in ("csv", "parquet")):
        return False
    try:
        with open(folder / "metadata.jsonl", encoding="utf-8", errors="replace") as file:
            return "_file_name" not in file.readline()
    except FileNotFoundError:
        return True


def load_pair_folders(args) -> Dataset:
    """Rows of `chosen`, `rejected`, `prompt` from the two folders in `--dataset_name`.

    Raises:
        ValueError: an image has no partner, a prompt is missing, or anything else is not as it must be; names files.
    """
    name = args.dataset_name
    if args.dataset_config_name is not None or args.dataset_split_name not in (None, "train"):
        raise ValueError(
            f"{name} has chosen/ and rejected/, so it has neither splits nor configurations: leave out"
            " --dataset_split_name and --dataset_config_name, or name another folder."
        )
    found = read_pair_folders(Path(name))
    if found.problems:
        shown = " ".join(message for _, message in found.problems[:SHOWN])
        more = len(found.problems) - SHOWN
        more = f" {more} more problems are listed by check_preferences.py." if more > 0 else ""
        raise ValueError(f"--dataset_name={name}: {shown}{more}")
    if found.passed_over:
        listing = ", ".join(f"{number} {what}" for what, number in found.passed_over.most_common())
        logger.warning(f"{name}: passed over {listing}.")
    return found.dataset(args.cache_dir)


def read_pair_folders(folder: Path) -> PairFolders:
    """Lists images and prompts. What is wrong stands in `problems`; no image is opened."""
    found = PairFolders(folder)
    captions = {side: _list_side(found, side) for side in SIDES}
    chosen, rejected = (found.images[side] for side in SIDES)
    for side, names, partners in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        other = SIDES[side == "chosen"]
        for name in sorted(names.keys() - partners.keys(), key=_natural):
            found.problems.append(
                ("unpaired image", f"{_shown(found, names[name])} has no partner in {other}/: add or remove it.")
            )
    found.names = sorted(chosen.keys() & rejected.keys(), key=_natural)
    if not found.names:
        found.problems.append(("no pairs", "No image in chosen/ has a partner of the same name in rejected/."))
    _read_prompts(found, captions)
    return found


def _list_side(found: PairFolders, side: str) -> dict[str, list[Path]]:
    """Sorts the files of a folder into images, and what is returned: captions by name."""
    images, captions = {}, defaultdict(list)
    suffixes = PILImage.registered_extensions()
    for path in sorted((found.folder / side).iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            continue
        if not _is_text(path.name):
            found.problems.append(("bad name", f"{_shown(found, path)} has a name that is not UTF-8: rename it."))
        elif path.is_dir():
            message = f"{_shown(found, path)} is a folder: put its images into {side}/ itself."
            found.problems.append(("folder in a folder", message))
        elif suffix in CAPTION_SUFFIXES:
            captions[path.stem].append(path)
        elif suffix not in suffixes:
            found.passed_over[f"{printable(suffix or path.name)} files"] += 1
        elif path.stem in images:
            message = f"{_shown(found, images[path.stem])} and {path.name} have the same name: remove one."
            found.problems.append(("two images of one name", message))
        else:
            images[path.stem] = path
    found.images[side] = images
    return captions


def _read_prompts(found: PairFolders, captions: dict[str, dict[str, list[Path]]]) -> None:
    """Fills `prompts` from the one place that has them."""
    readers = {
        "metadata.jsonl": (found.folder / "metadata.jsonl").exists() and _read_metadata,
        "prompts.txt": (found.folder / "prompts.txt").exists() and _read_lines,
        "caption files": any(captions.values()) and (lambda found: _read_captions(found, captions)),
    }
    places = [place for place, reader in readers.items() if reader]
    if len(places) != 1:
        message = (
            f"{found.folder} has prompts in {' and in '.join(places)}: keep one of them."
            if places
            else f"{found.folder} has no prompts: put the prompt of chosen/NAME.png into chosen/NAME.txt, or write a"
            " prompts.txt or metadata.jsonl."
        )
        found.problems.append(("several places of prompts" if places else "no prompts", message))
        return
    problems = len(found.problems)
    readers[places[0]](found)
    missing = [name for name in found.names if name not in found.prompts]
    if len(found.problems) == problems:  # else they are missing for a reason that was told
        found.problems += [("no prompt", f"{printable(name)} has no prompt in {places[0]}.") for name in missing]


def _read_captions(found: PairFolders, captions: dict[str, dict[str, list[Path]]]) -> None:
    for side in SIDES:
        for name, paths in captions[side].items():
            for path in paths:
                text = _read_text(found, path)
                if text is not None:
                    _add_prompt(found, name, text.strip(), _shown(found, path))


def _read_metadata(found: PairFolders) -> None:
    path = found.folder / "metadata.jsonl"
    for number, line in enumerate((_read_text(found, path) or "").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file = Path(entry["file_name"]).name
            prompt = next(entry[key] for key in PROMPT_KEYS if key in entry)
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt is {printable(repr(prompt))}, not text")
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
            reason = printable(str(error)) or f"none of {', '.join(PROMPT_KEYS)}"
            message = f"metadata.jsonl, line {number}, gives no file_name and prompt ({reason})."
            found.problems.append(("bad prompts file", message))
            continue
        is_name = any(file in images for images in found.images.values())
        _add_prompt(found, file if is_name else Path(file).stem, prompt, f"metadata.jsonl, line {number}")


def _read_lines(found: PairFolders) -> None:
    text = _read_text(found, found.folder / "prompts.txt")
    if text is None:
        return
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if len(lines) != len(found.names):
        message = f"prompts.txt has {len(lines)} lines, and there are {len(found.names)} pairs: one line for each."
        found.problems.append(("bad prompts file", message))
        return
    for number, (name, line) in enumerate(zip(found.names, lines), start=1):
        _add_prompt(found, name, line.strip(), f"prompts.txt, line {number}")


def _add_prompt(found: PairFolders, name: str, prompt: str, where: str) -> None:
    if not any(name in images for images in found.images.values()):
        found.passed_over["prompts without an image"] += 1
    elif not _is_text(prompt):
        found.problems.append(("unreadable prompt", f"{where} has a prompt that is not UTF-8: {printable(prompt)}."))
    elif found.prompts.setdefault(name, prompt) != prompt:
        message = f"{where} gives {printable(name)} another prompt than was given before: a pair has one."
        found.problems.append(("contradicting prompts", message))


def _read_text(found: PairFolders, path: Path) -> str | None:
    """The text of a file without its byte order mark; None where it can't be read, which is a problem."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = printable(str(error))
        found.problems.append(("unreadable prompt", f"{_shown(found, path)} can't be read as UTF-8: {reason}."))
        return None


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON and file names may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(found: PairFolders, path: Path) -> str:
    return printable(str(path.relative_to(found.folder)))


def _natural(name: str) -> tuple:
    """Sorts 2 before 10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))), name
