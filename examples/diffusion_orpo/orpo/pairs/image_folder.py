"""Single images with their prompts: a folder with a `metadata.jsonl` that names each image and its prompt.

    {"file_name": "00000-0.png", "prompt": "a red fox", "seed": 0}
    {"file_name": "00000-1.png", "prompt": "a red fox", "seed": 1}

or a `metadata.csv` with these columns. Without either, every image has a caption file beside it: `fox.txt` (or `.caption`, or
`fox.png.txt`) for `fox.png`. Images may lie in sub-folders.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..runtime.messages import printable
from ..runtime.text import read_text
from .bad_pair import BadPair
from .folders import CAPTION_SUFFIXES, PROMPT_KEYS, entries, is_text, normal
from .image import is_inside, open_image


METADATA = "metadata.jsonl"
LISTINGS = (METADATA, "metadata.csv")
SHOWN = 20  # problems in an error


@dataclass(frozen=True)
class ListedImage:
    """An image of the folder.

    Attributes:
        name: its path, relative to the folder.
        prompt: what it shows.
        details: everything else in its line.
    """

    name: str
    prompt: str
    details: dict = field(default_factory=dict, compare=False)


def read_listing(folder: Path) -> list[ListedImage]:
    """Reads the prompts, and opens every image.

    Raises:
        ValueError: there are no prompts, or a prompt or an image is bad. Lists all problems.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    listings = [folder / name for name in LISTINGS if (folder / name).exists()]
    if len(listings) > 1:
        raise ValueError(f"{folder} has {' and '.join(LISTINGS)}: keep one of them.")
    images, problems = _read_metadata(listings[0]) if listings else _read_captions(folder)
    with ThreadPoolExecutor() as pool:
        problems += filter(None, pool.map(lambda image: _problem(folder, image.name), images))
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{folder}: {len(problems)} problems; nothing was changed. Fix or remove these files or lines.\n  {shown}{more}"
        )
    return images


def _read_metadata(path: Path) -> tuple[list[ListedImage], list[str]]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {printable(str(error))}") from error
    images, problems, seen = [], [], set()
    for number, read_entry in entries(text, is_csv=path.suffix == ".csv"):
        where = f"{path.name}, line {number}"
        try:
            image = _parse(read_entry, where)
            if image.name in seen:
                raise BadPair("duplicate", f"{printable(image.name)} is listed twice", where)
            seen.add(image.name)
            images.append(image)
        except BadPair as bad:
            problems.append(bad.summary)
    return images, problems


def _read_captions(folder: Path) -> tuple[list[ListedImage], list[str]]:
    """Images with a caption file beside each, in the order of their names."""
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise ValueError(f"{folder} can't be read: {error.strerror}") from error
    names = [path.relative_to(folder) for path in files]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    known = Image.registered_extensions()
    captions: dict[str, list[Path]] = {}
    for name in names:
        if name.suffix.lower() in CAPTION_SUFFIXES:
            captions.setdefault(normal(str(name.with_suffix(""))), []).append(name)
    images, problems = [], []
    for name in (name for name in names if name.suffix.lower() in known):
        own = captions.get(normal(str(name.with_suffix(""))), []) + captions.get(normal(str(name)), [])
        if len(own) != 1:
            problems.append(f"{printable(str(name))}: {'two caption files' if own else 'no caption file beside it'}")
            continue
        try:
            images.append(ListedImage(name.as_posix(), read_text(folder / own[0]).strip()))
        except (OSError, ValueError) as error:
            problems.append(f"{printable(str(own[0]))}: {printable(str(error))}")
    if not images and not problems:
        if (folder / "images" / METADATA).exists():
            raise ValueError(
                f"{folder} holds the output of make_preferences.py: its images are in {folder / 'images'}."
            )
        raise ValueError(
            f"{folder} has neither images with caption files nor a {METADATA}, a line for each image: "
            '{"file_name": "0.png", "prompt": "a red fox"}. make_preferences.py writes one.'
        )
    return images, problems


def image_path(folder: Path, name: str) -> Path:
    """The file of an image.

    Raises:
        ValueError: it is not in the folder, be it by `..` or by a link.
    """
    root = folder.resolve()
    path = (root / name).resolve()
    if not is_inside(str(path), str(root)):
        raise ValueError(f"{printable(name)} is outside the folder: copy it there instead of linking to it")
    return path


def _parse(read_entry: Callable[[], dict], where: str) -> ListedImage:
    try:
        entry = read_entry()
    except ValueError as error:
        raise BadPair("bad line", f"not JSON ({printable(str(error))})", where) from error
    if not isinstance(entry, dict):
        raise BadPair("bad line", "not a JSON object", where)
    name = entry.pop("file_name", None)
    if not isinstance(name, str) or not name or not is_text(name):
        raise BadPair("bad line", f"file_name is {printable(repr(name))}, not the name of a file", where)
    prompts = {key: entry.pop(key) for key in PROMPT_KEYS if key in entry}
    if len(prompts) != 1:
        found = f"several prompts ({', '.join(prompts)})" if prompts else "no prompt"
        raise BadPair("bad prompt", f"{found}; one of {', '.join(PROMPT_KEYS)} is needed", where)
    ((key, prompt),) = prompts.items()
    if not isinstance(prompt, str) or not is_text(prompt):
        raise BadPair("bad prompt", f"{key} is {printable(repr(prompt))}, not text", where)
    return ListedImage(name, prompt, entry)


def _problem(folder: Path, name: str) -> str | None:
    try:
        open_image(image_path(folder, name).read_bytes(), printable(name))
    except OSError as error:
        return f"{printable(name)}: {printable(error.strerror or str(error))}"
    except ValueError as error:
        return printable(str(error))
    return None
