"""Which shards --dataset_path names: folders, paths with braces or wildcards, URLs with braces, commands."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path

import braceexpand

from .opening import is_remote


COMPRESSED = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")


def expand(pattern: str) -> list[str]:
    """The URLs that a pattern stands for; local ones must exist."""
    if Path(pattern).is_dir():
        return _files_of_folder(Path(pattern))
    urls = list(braceexpand.braceexpand(pattern))
    if is_remote(pattern):
        return urls
    found = [path for url in urls for path in ([url] if Path(url).is_file() else sorted(glob.glob(url)) or [url])]
    missing = [path for path in found if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"--dataset_path={pattern}: there is no {missing[0]} ({len(missing)} of {len(found)} missing)."
        )
    _refuse_compressed(pattern, found)
    return found


def _files_of_folder(folder: Path) -> list[str]:
    found = sorted(str(path) for path in folder.iterdir() if path.suffix == ".tar")
    if not found:
        _refuse_compressed(str(folder), [str(path) for path in folder.iterdir()])
        raise ValueError(f"--dataset_path={folder} is a folder without *.tar files.")
    splits = {re.sub(r"-?\d*\.tar$", "", Path(path).name) for path in found}
    if len(splits) > 1:
        raise ValueError(
            f"--dataset_path={folder} holds shards of several splits, {', '.join(sorted(splits))}: name one, as in"
            f" '{folder / min(splits)}-*.tar'."
        )
    return found


def _refuse_compressed(pattern: str, paths: Iterable[str]) -> None:
    compressed = [path for path in paths if any(Path(path).match(kind) for kind in COMPRESSED)]
    if compressed:
        raise ValueError(
            f"--dataset_path={pattern} has compressed shards ({compressed[0]}), and shards are read as plain tar archives:"
            " unpack them with `gunzip`, `bunzip2`, `unxz` or `unzstd`. That costs little space, as images are"
            " compressed already."
        )
