"""Single images with their prompts: a folder with a `metadata.jsonl` that names each image and its prompt.

    {"file_name": "00000-0.png", "prompt": "a red fox", "seed": 0}
    {"file_name": "00000-1.png", "prompt": "a red fox", "seed": 1}

Without one, every image has a caption file beside it: `fox.txt` (or `.caption`) for `fox.png`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..runtime.messages import printable
from .bad_pair import BadPair
from .folder_prompts import CAPTION_SUFFIXES, PROMPT_KEYS, is_text
from .image import open_image


METADATA = "metadata.jsonl"
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
    images, problems = _read_metadata(folder) if (folder / METADATA).exists() else _read_captions(folder)
    with ThreadPoolExecutor() as pool:
        problems += filter(None, pool.map(lambda image: _problem(folder, image.name), images))
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{folder}: {len(problems)} problems; nothing was changed. Fix or remove these files or lines.\n  {shown}{more}"
        )
    return images


def _read_metadata(folder: Path) -> tuple[list[ListedImage], list[str]]:
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {printable(str(error))}") from error
    images, problems, seen = [], [], set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                image = _parse(line, f"{METADATA}, line {number}")
                if image.name in seen:
                    raise BadPair(
                        "duplicate", f"{printable(image.name)} is listed twice", f"{METADATA}, line {number}"
                    )
                seen.add(image.name)
                images.append(image)
            except BadPair as bad:
                problems.append(bad.summary)
    return images, problems


def _read_captions(folder: Path) -> tuple[list[ListedImage], list[str]]:
    """Images with a caption file beside each, in the order of their names."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} can't be read: {error.strerror}") from error
    known = Image.registered_extensions()
    images, problems = [], []
    for name in (name for name in names if Path(name).suffix.lower() in known):
        captions = [Path(name).with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        captions = [caption for caption in captions if caption.name in names]
        try:
            (caption,) = captions
            images.append(ListedImage(name, (folder / caption).read_text(encoding="utf-8-sig").strip()))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{printable(captions[0].name)}: {printable(str(error))}")
        except ValueError:
            problems.append(f"{printable(name)}: {'two caption files' if captions else 'no caption file beside it'}")
    if not images and not any(Path(name).suffix.lower() in known for name in names):
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
    if not path.is_relative_to(root):
        raise ValueError(f"{printable(name)} is outside the folder")
    return path


def _parse(line: str, where: str) -> ListedImage:
    try:
        entry = json.loads(line)
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
