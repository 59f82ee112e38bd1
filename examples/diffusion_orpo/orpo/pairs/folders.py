"""Pairs as two folders, `chosen/` and `rejected/`, in which the images of a pair have the same name up to the suffix.

Their prompts are in one of three places:

- a caption file beside the image, `chosen/0a.txt` for `chosen/0a.png` (or `.caption`); its whole text is the prompt;
- `metadata.jsonl`, a line for each name: `{"file_name": "0a.png", "prompt": "a red fox"}` (or `caption`, or `text`);
  or `metadata.csv` with these columns;
- `prompts.txt`, a prompt a line, in the order of the names; they must sort alike as text and as numbers (01, 02, 10).
"""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ..runtime.messages import printable
from .bad_pair import BadPair
from .files import METADATA, TABLE_SUFFIXES
from .folder_prompts import CAPTION_SUFFIXES, is_text, normal, read_prompts


logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
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
        passed_over: files that are neither image nor caption, and prompts without an image, by kind.
    """

    folder: Path
    sides: dict[str, Path]
    names: list[str] = field(default_factory=list)
    images: dict[str, dict[str, Path]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    problems: list[BadPair] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def shown(self, path: Path) -> str:
        """Names a file in messages."""
        return printable(str(path.relative_to(self.folder)))

    def add_problem(self, kind: str, problem: str, where: str = "", advice: str = "") -> None:
        self.problems.append(BadPair(kind, problem, where, advice))

    def dataset(self, cache_dir: str | None) -> Dataset:
        """The pairs as rows with the columns chosen, rejected, prompt; images as paths. datasets caches the listing."""
        rows = [
            {side: str(self.images[side][name].absolute()) for side in SIDES} | {"prompt": self.prompts.get(name, "")}
            for name in self.names
        ]
        # Other contents of the same names must be another data set to datasets' cache of checked images.
        stamps = [[self.images[side][name].stat() for side in SIDES] for name in self.names]
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
    """Whether a data set's name is a folder with `chosen/` and `rejected/`, and not an imagefolder that has such folders."""
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


def load_pair_folders(folder: Path, cache_dir: str | None) -> Dataset:
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
    if found.passed_over:
        listing = ", ".join(f"{number} {what}" for what, number in found.passed_over.most_common())
        logger.warning(f"{folder}: passed over {listing}.")
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
            found.passed_over[f"{printable(suffix or path.name)} files"] += 1
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
