"""What is in each shard: samples, ties, sizes of images, checksum. The manifest beside the shards says so, or reading them.

Labels and sizes must be known before training: ties are not part of an epoch, sizes decide which pairs make up a batch, and
all processes must agree. A shard that no manifest lists is therefore read once, and what was found is kept for the next run.
"""

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm
from webdataset.gopen import Pipe

from ..pairs.bad_pair import BadPair
from ..pairs.image import open_image, upright_size
from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .locate import expand, is_remote, open_url, shard_name
from .sample import (
    ENCODED,
    IMAGES,
    LABEL,
    PROMPT,
    Encoding,
    is_tie,
    member_names,
    missing_members,
    what_is_missing,
)
from .tar import Hashed, open_shard, walk_samples


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VERSION = 1
MAX_SHARD_SAMPLES = 10**7  # far more than a shard holds; the manifest's number decides how much memory is taken
UNKNOWN = (1, 1)  # size of an image that can't be read: training meets it, names it and counts it


@dataclass(frozen=True)
class Source:
    """A run of rows of a dataset: `rows` of them from `first_row` on, counted from 0."""

    file: str
    first_row: int
    rows: int


@dataclass(frozen=True)
class BadRow:
    """A row that could not become a pair, and why."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar file of pairs.

    Attributes:
        name: of the file, in the manifest's folder.
        samples: in it.
        bytes, sha256: of the file.
        ties: places of the ties among the samples.
        sizes: of the samples' images, as `pack_sizes` makes it.
        split: that the pairs are of; empty where nobody said so.
        labels: good rows by who is preferred, `jpg_0`, `jpg_1` or `tie`; ties count here even where they were dropped;
            and `low_agreement`, where some were, which always are.
        source: the rows that it was made from, in order.
        bad_rows: those among them that `labels` does not count.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    ties: list[int]
    sizes: list[str]
    split: str = ""
    labels: dict[str, int] = field(default_factory=dict)
    source: list[Source] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)

    @classmethod
    def from_dict(cls, entry: dict) -> "Shard":
        """
        Raises:
            KeyError, TypeError, ValueError: the entry is malformed.
        """
        name, samples, ties = entry["name"], entry["samples"], entry["ties"]
        said = printable(repr(name))
        if shard_name(name) != name:
            raise ValueError(f"{said} is not the name of a shard")
        if type(samples) is not int or not 0 <= samples <= MAX_SHARD_SAMPLES or type(entry["bytes"]) is not int:
            raise ValueError(f"{said} has {printable(repr(samples))} samples, {printable(repr(entry['bytes']))} bytes")
        if not all(type(n) is int and 0 <= n < samples for n in ties) or ties != sorted(set(ties)):
            raise ValueError(f"{said} has ties at {printable(repr(ties))}")
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"{said} has the checksum {printable(repr(entry['sha256']))}")
        unpack_sizes(samples, entry["sizes"])
        source = [Source(**run) for run in entry.get("source", [])]
        return cls(**entry | {"source": source, "bad_rows": [BadRow(**row) for row in entry.get("bad_rows", [])]})


def pack_sizes(sizes: list[tuple[int, ...]]) -> list[str]:
    """Heights and widths of jpg_0 and jpg_1 of samples, upright, as "3 * 512 768 512 512" for three in a row."""
    return [f"{len(list(run))} * {' '.join(map(str, size))}" for size, run in groupby(sizes)]


def unpack_sizes(samples: int, runs: list[str]) -> np.ndarray:
    """The sizes that were packed (samples, 4).

    Raises:
        ValueError: they are not sizes, or not of so many samples.
    """
    sizes, counts = [], []
    for run in runs:
        match = re.fullmatch(r"(\d{1,9}) \* (\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,9})", run)
        numbers = [int(number) for number in match.groups()] if match else [0]
        if 0 in numbers:
            raise ValueError(f"{run!r} is not a number of samples and their images' sizes")
        counts.append(numbers[0])
        sizes.append(numbers[1:])
    if sum(counts) != samples:  # before memory is taken for them
        raise ValueError(f"sizes of {sum(counts)} samples, not of {samples}")
    return np.repeat(np.array(sizes, dtype=np.int64).reshape(-1, 4), counts, axis=0)


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder.

    Attributes:
        shards: ordered by split and name.
        plans: the fingerprint of each split's plan, so that no two plans get mixed.
        encodings: of those splits that hold encoded samples.
    """

    shards: list[Shard] = field(default_factory=list)
    plans: dict[str, str] = field(default_factory=dict)
    encodings: dict[str, Encoding] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Manifest":
        """
        Raises:
            ValueError: it is not a manifest, or of another version.
        """
        try:
            entries = json.loads(content)
            if entries["version"] != VERSION:
                raise ValueError(f"its version is {entries['version']!r} instead of {VERSION}")
            encodings = {split: Encoding.from_dict(entry) for split, entry in entries.get("encodings", {}).items()}
            return cls([Shard.from_dict(entry) for entry in entries["shards"]], entries.get("plans", {}), encodings)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{where} is not a manifest of shards ({printable(repr(error))}): convert the data again, or remove the"
                " manifest."
            ) from error

    def to_json(self) -> str:
        entries = {"version": VERSION, **asdict(self)}
        if not self.encodings:
            del entries["encodings"]
        return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"

    @cached_property
    def by_name(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.shards}

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def with_split(self, split: str, plan: str, shards: list[Shard], encoding: Encoding | None = None) -> "Manifest":
        """The same with these shards in place of those that the split had."""
        others = [shard for shard in self.shards if shard.split != split]
        ordered = sorted(others + shards, key=lambda shard: (shard.split, shard.name))
        encodings = {name: value for name, value in self.encodings.items() if name != split}
        encodings |= {split: encoding} if encoding else {}
        return Manifest(ordered, dict(sorted((self.plans | {split: plan}).items())), dict(sorted(encodings.items())))


@dataclass(frozen=True)
class Shards:
    """Shards in the order in which they were named.

    Attributes:
        urls: paths, `s3://`, `https://`, or `pipe:` commands.
        counts: samples in each.
        ties: places of the ties in each; empty where there are none.
        encoding: of all samples; None where they hold images.
        sizes: of each shard's samples the heights and widths of both images (samples, 4).
        contents: identifies the content of each.
    """

    urls: tuple[str, ...]
    counts: np.ndarray
    ties: tuple[np.ndarray, ...] = ()
    encoding: Encoding | None = None
    sizes: tuple[np.ndarray, ...] = ()
    contents: tuple[str, ...] = ()

    def pairs(self) -> list[np.ndarray]:
        """The places of the samples that are not ties, for each shard."""
        ties = self.ties or [()] * len(self.counts)
        return [np.setdiff1d(np.arange(count), of_shard) for count, of_shard in zip(self.counts, ties)]

    @property
    def num_ties(self) -> int:
        return sum(map(len, self.ties))

    def where(self, shard: int, ordinal: int, members: dict | None) -> str:
        """Names a sample in messages: by its key, or by its place if it can't be read."""
        return f"{without_secrets(self.urls[shard])}, {printable(str(members['__key__'])) if members else f'sample {ordinal}'}"


def find_shards(patterns: list[str], cache_dir: str | None = None) -> Shards:
    """Lists the shards and what is in them, by the manifest beside them; without one, by reading every shard once.

    Args:
        patterns: folders, paths with braces or wildcards, `s3://` and `https://` URLs with braces, `pipe:` commands.
        cache_dir: keeps the results of reading shards; None for the folder of `datasets`.

    Raises:
        ValueError: there are no shards, one is named twice or is not in the manifest, or shards of several kinds are
            mixed.
        OSError: a URL can't be read, or a command fails.
    """
    urls = tuple(url for pattern in patterns for url in expand(pattern))
    manifests = {of_folder: _read_beside(of_folder) for of_folder in dict.fromkeys(map(_manifest_url, urls))}
    listed = [manifests[_manifest_url(url)] for url in urls]
    _refuse_unlisted(urls, listed)
    _refuse_repeated(urls, [_address(url) for url in urls])
    unknown = listed.count(None)
    if unknown:
        logger.warning(
            f"No manifest says what is in {unknown} shards: each is read once, and the answer is kept. Shards that"
            " convert_to_webdataset.py makes have such a manifest."
        )
    shards = [
        scan(url, cache_dir) if manifest is None else manifest.by_name[shard_name(url)]
        for url, manifest in tqdm(list(zip(urls, listed)), desc="Reading shards", disable=not unknown)
    ]
    _refuse_repeated(urls, [shard.sha256 if shard.samples else None for shard in shards])
    counts = np.array([shard.samples for shard in shards])
    if counts.sum() == 0:
        raise ValueError(f"The {len(urls)} shards of {' '.join(map(without_secrets, patterns))} hold no samples.")
    encodings = [manifest and manifest.encodings.get(shard.split) for manifest, shard in zip(listed, shards)]
    first = encodings[0]
    for url, encoding in zip(urls, encodings):
        if encoding is not first and (first is None or not first.goes_with(encoding)):
            raise ValueError(
                f"{without_secrets(urls[0])} and {without_secrets(url)} hold different things: images, or encodings"
                " of different models or settings. Train from one kind."
            )
    return Shards(
        urls,
        counts,
        tuple(np.array(shard.ties, dtype=int) for shard in shards),
        first,
        tuple(unpack_sizes(shard.samples, shard.sizes) for shard in shards),
        tuple(map(_content, urls, shards)),
    )


def _content(url: str, shard: Shard) -> str:
    """Changes with what a shard holds: its checksum; and its size, where the file is another one than its manifest says."""
    size = shard.bytes if is_remote(url) else os.path.getsize(url)
    return shard.sha256 if size == shard.bytes else f"{shard.sha256}, of which {size} bytes"


def _address(url: str) -> str:
    """The same for two ways of naming the same file."""
    if re.match("https?:", url):
        return without_secrets(url)
    return url if is_remote(url) else os.path.realpath(url)


def _refuse_repeated(urls: tuple[str, ...], names: list[str | None]) -> None:
    """Stops if a shard, or a copy of it, is named twice: its pairs would count twice.

    Raises:
        ValueError: names both.
    """
    seen: dict[str, str] = {}
    for url, name in zip(urls, names):
        if name in seen:
            raise ValueError(
                f"--dataset_path names the same shard twice: {without_secrets(seen[name])} and"
                f" {without_secrets(url)}. Its pairs would count twice in every epoch: leave one out."
            )
        if name is not None:
            seen[name] = url


def _refuse_unlisted(urls: tuple[str, ...], listed: list[Manifest | None]) -> None:
    for url, manifest in zip(urls, listed):
        if manifest is not None and shard_name(url) not in manifest.by_name:
            raise ValueError(
                f"{without_secrets(url)} is not in {without_secrets(_manifest_url(url))}: convert the data again, or check"
                " the pattern."
            )


def _manifest_url(url: str) -> str:
    """Where the manifest is, if there is one: beside the shard, addressed in the same way."""
    before, _, after = url.rpartition(shard_name(url))
    return f"{before}{MANIFEST}{after}"


def _read_beside(manifest_url: str) -> Manifest | None:
    """The manifest; None if there is none.

    Raises:
        ValueError: it is not a manifest of shards.
    """
    try:
        with open_url(manifest_url) as stream:
            content = stream.read()
            if isinstance(stream, Pipe):
                stream.wait_for_child()
    except OSError as error:
        logger.warning(f"No manifest can be read ({error}).")
        return None
    return Manifest.parse(content, without_secrets(manifest_url))


def scan(url: str, cache_dir: str | None = None) -> Shard:
    """Reads a shard to its end, and says what a manifest would; or finds what an earlier run has found.

    Args:
        url: of the shard.
        cache_dir: where answers are kept; None for the folder of `datasets`.

    Raises:
        ValueError: it can't be read to its end, or not one sample has the members that are needed.
        OSError: the URL can't be read.
    """
    kept = _kept_answer(url, cache_dir)
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Shard.from_dict(json.loads(kept.read_text()))
    needed, hashed = (PROMPT, *IMAGES, LABEL), Hashed()
    ties, sizes, complete, first = [], [], 0, {}
    with open_shard(url, hashed) as tar:
        for ordinal, members in walk_samples(tar, 0, MAX_SHARD_SAMPLES):
            first = first or members
            complete += not missing_members(member_names(members), needed)
            ties += [ordinal] if is_tie(members) else []
            sizes.append(tuple(side for name in ("jpg_0.", "jpg_1.") for side in _size(members, name)))
    if sizes and not complete:
        problem, _, advice = what_is_missing(first, needed)
        if ENCODED in first:
            advice = "Encoded shards need the manifest that convert_to_webdataset.py has written beside them."
        raise ValueError(
            f"--dataset_path={without_secrets(url)}: none of its {len(sizes)} samples is complete. The first,"
            f" {printable(first['__key__'])}, {problem}. {advice}"
        )
    shard = Shard(shard_name(url), len(sizes), hashed.bytes, hashed.digest.hexdigest(), ties, pack_sizes(sizes))
    with suppress(OSError):  # a cache that can't be written only costs time
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(shard)))
        os.replace(partial, kept)
    return shard


def _size(members: dict, name: str) -> tuple[int, int]:
    encoded = next((content for member, content in members.items() if member.startswith(name)), None)
    try:
        return upright_size(open_image(encoded, name)) if encoded else UNKNOWN
    except BadPair:
        return UNKNOWN


def _kept_answer(url: str, cache_dir: str | None) -> Path:
    """The file for what was found in a shard: by a file's path, size and date, or a URL without what is secret in it."""
    folder = Path(cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
    identity = [url if url.startswith("pipe:") else without_secrets(url)]
    if not is_remote(url):
        status = os.stat(url)
        identity = [os.path.realpath(url), status.st_size, status.st_mtime_ns]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    return folder / "shard-contents" / f"{digest}.json"
