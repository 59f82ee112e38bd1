"""WebDataset shards: where they are, how many pairs each holds, and what is in them.

A sample has the members `original_prompt.txt`, `jpg_0.*`, `jpg_1.*`, `label_0.txt` and, if it likes, `label_1.txt`. In shards
that are encoded, `encoded.safetensors` takes the place of the images: see `encoded_samples.py`.
"""

import glob
import json
import logging
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import braceexpand
import numpy as np
from tqdm.auto import tqdm
from webdataset.gopen import Pipe, gopen
from webdataset.utils import enforce_security

from ..data.columns import parse_label
from ..data.pair import PreferencePair
from ..system.messages import printable
from ..system.redaction import without_secrets
from .manifest import MANIFEST, Encoding, read_encodings
from .tar import walk_samples


logger = logging.getLogger(__name__)

BUFFER_BYTES = 1 << 20
MAX_SHARD_SAMPLES = 10**7  # far more than a shard holds; what a manifest says decides how much memory is taken


class BadSample(ValueError):
    """A sample that can't be trained on.

    Attributes:
        kind: what is wrong, for counting.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class BrokenShard(ValueError):
    """A shard that is no tar archive, or breaks off."""


@dataclass(frozen=True)
class Shards:
    """Shards in the order of their listing.

    Attributes:
        urls: paths, `s3://`, `https://`, or `pipe:` commands.
        counts: samples in each.
        encoding: of all samples; None where they hold images.
    """

    urls: tuple[str, ...]
    counts: np.ndarray
    encoding: Encoding | None = None

    def where(self, shard: int, ordinal: int, members: dict | None) -> str:
        """Names a sample in messages: by its key, or by its place where it can't be read."""
        return f"{without_secrets(self.urls[shard])}, {printable(str(members['__key__'])) if members else f'sample {ordinal}'}"


def find_shards(patterns: list[str], num_samples: int | None = None) -> Shards:
    """Lists the shards, and their sizes by the manifest beside them; without one, by reading every shard once.

    Args:
        patterns: folders, paths with braces or wildcards, `s3://` and `https://` URLs with braces, `pipe:` commands.
        num_samples: what the caller believes there are.

    Raises:
        ValueError: nothing is there, a shard is not in the manifest, or there are not `num_samples`.
        OSError: a URL can't be read, or a command fails.
    """
    urls = tuple(url for pattern in patterns for url in _expand(pattern))
    manifests = {manifest_url: _listing(manifest_url) for manifest_url in dict.fromkeys(map(_manifest_url, urls))}
    counts, encodings = [], []
    for url in tqdm(urls, desc="Counting samples", disable=(None, {}) not in manifests.values()):
        (sizes, encoded), name = manifests[_manifest_url(url)], shard_name(url)
        if sizes is not None and name not in sizes:
            raise ValueError(
                f"{without_secrets(url)} is not in {without_secrets(_manifest_url(url))}: convert the data again, or check"
                " the pattern."
            )
        counts.append(_count_samples(url) if sizes is None else sizes[name])
        encodings.append(encoded.get(name))
    if sum(counts) == 0:
        raise ValueError(f"The {len(urls)} shards of {' '.join(map(without_secrets, patterns))} hold no samples.")
    if num_samples is not None and num_samples != sum(counts):
        raise ValueError(f"--num_train_examples={num_samples}, but the shards hold {sum(counts)}.")
    odd = next((i for i, encoding in enumerate(encodings) if not _same_encoding(encoding, encodings[0])), None)
    if odd is not None:
        raise ValueError(
            f"{without_secrets(urls[0])} and {without_secrets(urls[odd])} hold different things: images, or what other"
            " encoders made of them. Train from one kind."
        )
    return Shards(urls, np.array(counts), encodings[0])


def _same_encoding(a: Encoding | None, b: Encoding | None) -> bool:
    """Whether samples of both may stand in one batch. Libraries may differ."""
    return a is b or (a is not None and b is not None and (a.identity, a.tensors) == (b.identity, b.tensors))


def read_samples(url: str, first: int, last: int, count: int | None = None) -> Iterator[tuple[int, dict]]:
    """Reads samples `first` to `last` - 1 of a shard, as far as it can be read.

    Args:
        url: of the shard.
        first, last: places in it.
        count: samples that it should hold, if that is known.

    Yields:
        The sample's place in the shard, and its members, as `walk_samples` gives them.

    Raises:
        OSError: the URL can't be read, or the command fails.
        ValueError: the shard goes on after `count` samples.
    """
    try:
        for ordinal, members in _walk(url, first, last + 1 if last == count else last):
            if ordinal == count:
                raise ValueError(
                    f"{without_secrets(url)} holds more than the {count} samples that its manifest says: they do not"
                    f" belong together. Convert the data again, or remove {MANIFEST}."
                )
            if ordinal >= first:
                yield ordinal, members
    except BrokenShard as error:
        logger.warning(str(error))


def to_pair(members: dict[str, bytes]) -> PreferencePair | None:
    """Reads a sample's label and puts the winner first; None for a tie.

    Raises:
        BadSample: a member is missing or no plain file, or label or prompt can't be read.
    """
    label, prompt = read_label(members, ("jpg_0.*", "jpg_1.*"))
    if label == 0.5:
        return None
    images = [next(data for name, data in members.items() if name.startswith(f"{i}.")) for i in ("jpg_0", "jpg_1")]
    winner, loser = images if label == 1 else images[::-1]
    return PreferencePair(winner, loser, prompt)


def read_label(members: dict[str, bytes], others: tuple[str, ...]) -> tuple[float, str]:
    """Reads a sample's label and prompt.

    Args:
        members: as `walk_samples` gives them.
        others: names of the members that the sample must have, too; `jpg_0.*` stands for any format.

    Raises:
        BadSample: a member is missing or no plain file, or label or prompt can't be read.
    """
    if "__error__" in members:
        raise BadSample("bad member", members["__error__"])
    texts = {name: members.get(f"{name}.txt") for name in ("original_prompt", "label_0")}
    there = [any(name.startswith(other.rstrip("*")) for name in members) for other in others]
    if not all(there) or None in texts.values():
        found = sorted(name for name in members if not name.startswith("__"))
        raise BadSample("missing member", f"has only {printable(', '.join(found)) or 'other members'}")
    try:
        label = parse_label(texts["label_0"].decode(), "label_0.txt")
        other = parse_label(members["label_1.txt"].decode(), "label_1.txt") if "label_1.txt" in members else 1 - label
        prompt = texts["original_prompt"].decode()
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", str(error)) from error
    except ValueError as error:
        raise BadSample("bad label", str(error)) from error
    if label + other != 1:
        raise BadSample("bad label", f"label_0 {label} and label_1 {other} contradict each other")
    return label, prompt


def _expand(pattern: str) -> list[str]:
    """The URLs that a pattern stands for; local ones must exist."""
    if Path(pattern).is_dir():
        found = sorted(str(path) for path in Path(pattern).glob("*.tar"))
        if not found:
            raise ValueError(f"--dataset_path={pattern} is a folder without *.tar files.")
        splits = {re.sub(r"-?\d*\.tar$", "", Path(path).name) for path in found}
        if len(splits) > 1:
            raise ValueError(
                f"--dataset_path={pattern} holds shards of several splits, {', '.join(sorted(splits))}: name one, as in"
                f" '{Path(pattern) / min(splits)}-*.tar'."
            )
        return found
    urls = list(braceexpand.braceexpand(pattern))
    if _is_remote(pattern):
        return urls
    found = [path for url in urls for path in sorted(glob.glob(url)) or [url]]
    missing = [path for path in found if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"--dataset_path={pattern}: there is no {missing[0]} ({len(missing)} of {len(found)} missing)."
        )
    return found


def _is_remote(url: str) -> bool:
    return re.match(r"[a-z0-9]+:", url) is not None


def shard_name(url: str) -> str:
    """`00000.tar` of a path, a URL, or a command that names it."""
    found = re.findall(r"[^/\s'\"=]+\.tar\b", url)
    if not found:
        raise ValueError(f"--dataset_path={without_secrets(url)} names no *.tar shard.")
    return found[-1]


def _manifest_url(url: str) -> str:
    """Where the manifest lies if there is one: beside the shard, in the same words."""
    before, _, after = url.rpartition(shard_name(url))
    return f"{before}{MANIFEST}{after}"


def _listing(manifest_url: str) -> tuple[dict[str, int] | None, dict[str, Encoding]]:
    """Samples of each shard in the manifest, by the shard's name, None where there is no manifest; and the encodings of
    those that are encoded."""
    try:
        with _open(manifest_url) as stream:
            content = stream.read()
            if isinstance(stream, Pipe):
                stream.wait_for_child()
    except OSError as error:
        logger.warning(f"No manifest can be had ({error}): every shard is read once to count its samples.")
        return None, {}
    try:
        entries = json.loads(content)
        sizes = {shard["name"]: shard["samples"] for shard in entries["shards"]}
        for name, samples in sizes.items():
            if type(samples) is not int or not 0 <= samples <= MAX_SHARD_SAMPLES:
                raise ValueError(f"{printable(repr(name))} has {printable(repr(samples))} samples")
        encodings = read_encodings(entries)
        splits = {shard["name"]: shard.get("split") for shard in entries["shards"]}
        return sizes, {name: encodings[split] for name, split in splits.items() if split in encodings}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{without_secrets(manifest_url)} is no manifest of shards ({error!r}): convert the data again."
        ) from error


def _count_samples(url: str) -> int:
    return sum(1 for _ in _walk(url, first=sys.maxsize, last=sys.maxsize))


def _walk(url: str, first: int, last: int) -> Iterator[tuple[int, dict]]:
    """Place and members of the samples before `last`; the members of those before `first` are passed over unread."""
    broken, at_end = None, True
    with _open(url) as stream:
        try:
            at_end = yield from walk_samples(stream, "r|" if isinstance(stream, Pipe) else "r:", first, last)
        except (tarfile.TarError, EOFError) as error:
            broken = error
        if at_end and isinstance(stream, Pipe):  # a command that failed also ends its output early
            while stream.read(BUFFER_BYTES):
                pass
            stream.wait_for_child()
    if broken:
        raise BrokenShard(
            f"{without_secrets(url)} can't be read to its end: {printable(str(broken))}. Convert it again, or leave it out."
        )


@contextmanager
def _open(url: str) -> Iterator[BinaryIO | Pipe]:
    """Opens a URL for reading. A command is ended with the block."""
    if not _is_remote(url):
        with open(url, "rb") as file:
            yield file
        return
    if url.startswith("pipe:") and enforce_security:
        raise ValueError(f"WDS_SECURE is set in the environment: refusing to run {without_secrets(url)}")
    pipe = _start(url)
    try:
        yield pipe
    except OSError:  # webdataset's message is the whole command, which may carry a token
        raise OSError(f"{without_secrets(url)} can't be read: exit {pipe.status}. Try the command by hand.") from None
    finally:
        pipe.proc.kill()
        pipe.proc.wait()
        pipe.stream.close()


def _start(url: str) -> Pipe:
    if url.startswith("s3:"):
        if "@" in urlsplit(url).netloc:
            raise ValueError(
                f"--dataset_path={without_secrets(url)} came with credentials: put them into AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY instead."
            )
        command = ["aws", "s3", "cp", "--only-show-errors", url, "-"]
        return Pipe(command, mode="rb", bufsize=BUFFER_BYTES)
    try:
        pipe = gopen(url, "rb", bufsize=BUFFER_BYTES)
        if not isinstance(pipe, Pipe):
            raise ValueError("file: and the like")
        return pipe
    except ValueError:  # webdataset's own has the whole URL in it
        raise ValueError(
            f"--dataset_path={without_secrets(url)}: no URL that can be read. Name a path, or use `pipe:`."
        ) from None
