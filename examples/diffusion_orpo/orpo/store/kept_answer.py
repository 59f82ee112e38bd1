"""Keeps what reading a shard has found for the next run. A cache that can't be written, or is damaged, only costs time."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub.constants import HF_HOME

from ..runtime.redaction import without_secrets
from .opening import is_remote


T = TypeVar("T")


@dataclass(frozen=True)
class KeptAnswer:
    """The file of an answer: a list of two, the number of samples and what is known of them."""

    path: Path

    @classmethod
    def of(cls, url: str, question: str, cache_dir: str | None) -> "KeptAnswer":
        """For a shard: a file by its path, size and date, a URL without what is secret in it.

        Args:
            url: of the shard.
            question: names the folder.
            cache_dir: where the folder is; None for that of `datasets`.
        """
        folder = Path(cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        identity = [url if url.startswith("pipe:") else without_secrets(url)]
        if not is_remote(url):
            status = os.stat(url)
            identity = [os.path.realpath(url), status.st_size, status.st_mtime_ns]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
        return cls(folder / question / f"{digest}.json")

    def read(self, parse: Callable[[int, list], T]) -> T | None:
        """The answer; None where there is none that can be read.

        Args:
            parse: makes it of the two; a ValueError or a TypeError says that they are damaged.
        """
        with suppress(OSError, ValueError, TypeError):
            samples, known = json.loads(self.path.read_text())
            return parse(samples, known)
        return None

    def write(self, answer: list) -> None:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(answer))
            os.replace(partial, self.path)
