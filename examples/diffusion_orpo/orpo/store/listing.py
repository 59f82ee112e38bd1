"""Lists shards, how many samples each holds, and which of these are ties: from the manifest, or by reading each shard."""

import json
import logging
import os
import re
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm
from webdataset.gopen import Pipe

from ..runtime.messages import printable
from ..runtime.redaction import without_secrets
from .encoded_sample import MEMBER
from .manifest import MANIFEST, Encoding, read_encodings
from .opening import is_remote, open_url, shard_name
from .patterns import expand
from .sample import IMAGES, LABEL, PROMPT
from .sizes import find_sizes, unpack_sizes
from .ties import find_ties


logger = logging.getLogger(__name__)

MAX_SHARD_SAMPLES = 10**7  # far more than a shard holds; the manifest's number decides how much memory is taken


@dataclass(frozen=True)
class Shards:
    """Shards in the order of their listing.

    Attributes:
        urls: paths, `s3://`, `https://`, or `pipe:` commands.
        counts: samples in each.
        ties: places of the ties in each; empty where there are none.
        encoding: of all samples; None where they hold images.
        sizes: of each shard's samples the heights and widths of both images (samples, 4); empty where they don't matter.
    """

    urls: tuple[str, ...]
    counts: np.ndarray
    ties: tuple[np.ndarray, ...] = ()
    encoding: Encoding | None = None
    sizes: tuple[np.ndarray, ...] = ()

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


def first_pairs(
    pairs: list[np.ndarray], num_held_out: int, max_pairs: int | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits the pairs of shards, given by their places in each, into the first ones, held out, and those to train on.

    Args:
        pairs: from `Shards.pairs`.
        num_held_out: how many to hold out.
        max_pairs: how many to train on, at most; None for all.
    """
    starts = np.cumsum([0, *map(len, pairs)])
    begins = [max(0, num_held_out - start) for start in starts]
    ends = [None if max_pairs is None else max(0, num_held_out + max_pairs - start) for start in starts]
    held_out = [of_shard[:begin] for of_shard, begin in zip(pairs, begins)]
    return held_out, [of_shard[begin:end] for of_shard, begin, end in zip(pairs, begins, ends)]


@dataclass(frozen=True)
class Listed:
    """A manifest's entry for a shard.

    Attributes:
        samples: in it.
        ties: places of the ties; None where the manifest does not say.
        sha256: of the file, where the manifest says so.
        encoding: of its samples; None where they hold images.
        sizes: of the samples' images; None where the manifest does not say.
    """

    samples: int
    ties: list[int] | None = None
    sha256: str | None = None
    encoding: Encoding | None = None
    sizes: np.ndarray | None = None


def find_shards(patterns: list[str], cache_dir: str | None = None, with_sizes: bool = False) -> Shards:
    """Lists the shards and what is in them, by the manifest beside them; without one, by reading every shard once.

    Args:
        patterns: folders, paths with braces or wildcards, `s3://` and `https://` URLs with braces, `pipe:` commands.
        cache_dir: keeps the results of reading shards; None for the folder of `datasets`.
        with_sizes: whether the sizes of images are asked for.

    Raises:
        ValueError: there are no shards, one is named twice or is not in the manifest, or shards of several kinds are
            mixed.
        OSError: a URL can't be read, or a command fails.
    """
    urls = tuple(url for pattern in patterns for url in expand(pattern))
    listed = _listed(urls)
    _refuse_repeated(urls, listed)
    counts, ties = _counts_and_ties(urls, listed, cache_dir)
    if sum(counts) == 0:
        raise ValueError(f"The {len(urls)} shards of {' '.join(map(without_secrets, patterns))} hold no samples.")
    encodings = [entry and entry.encoding for entry in listed]
    odd = next((i for i, encoding in enumerate(encodings) if not _same_encoding(encoding, encodings[0])), None)
    if odd is not None:
        raise ValueError(
            f"{without_secrets(urls[0])} and {without_secrets(urls[odd])} hold different things: images, or encodings"
            " of different models or settings. Train from one kind."
        )
    sizes = _sizes(urls, listed, counts, cache_dir) if with_sizes else ()
    return Shards(urls, np.array(counts), tuple(ties), encodings[0], sizes)


def _counts_and_ties(urls: tuple[str, ...], listed: list[Listed | None], cache_dir: str | None) -> tuple[list, list]:
    """Samples and ties of each shard. A shard is read unless a manifest gives both."""
    unknown = sum(entry is None or entry.ties is None for entry in listed)
    if unknown:
        logger.warning(
            f"No manifest says which samples of {unknown} shards are ties: each is read once, and the answer is kept."
            " Shards that convert_to_webdataset.py makes have such a manifest."
        )
    counts, ties = [], []
    for url, entry in tqdm(list(zip(urls, listed)), desc="Looking for ties", disable=not unknown):
        if entry is None or entry.ties is None:
            contents = (MEMBER,) if entry and entry.encoding else IMAGES
            count, found = find_ties(url, entry and entry.samples, (PROMPT, *contents, LABEL), cache_dir)
        else:
            count, found = entry.samples, np.array(entry.ties, dtype=int)
        counts.append(count)
        ties.append(found)
    return counts, ties


def _sizes(
    urls: tuple[str, ...], listed: list[Listed | None], counts: list[int], cache_dir: str | None
) -> tuple[np.ndarray, ...]:
    """Sizes of each shard's images. A shard of which no manifest tells them is read."""
    unknown = sum(entry is None or entry.sizes is None for entry in listed)
    if unknown and listed[0] and listed[0].encoding:
        raise ValueError(
            "--aspect_ratio_buckets, --max_crop: these encoded shards don't say how large their images were. Encode them"
            " again: convert_to_webdataset.py --encode."
        )
    if unknown:
        logger.warning(
            f"No manifest says how large the images of {unknown} shards are: each is read once, and the answer is kept."
        )
    sizes = []
    for url, entry, count in tqdm(list(zip(urls, listed, counts)), desc="Measuring images", disable=not unknown):
        sizes.append(find_sizes(url, count, cache_dir) if entry is None or entry.sizes is None else entry.sizes)
    return tuple(sizes)


def _same_encoding(a: Encoding | None, b: Encoding | None) -> bool:
    """Whether samples of both may be in one batch. Libraries may differ."""
    if a is None or b is None:
        return a is b
    # Of a square's shape there is one, which is among `tensors`; of buckets' shapes, any sample's.
    return (a.identity, a.moments, a.tensors_of(0)) == (b.identity, b.moments, b.tensors_of(0))


def _refuse_repeated(urls: tuple[str, ...], listed: list[Listed | None]) -> None:
    """Stops if a shard, or a copy of it, is named twice: its pairs would count twice.

    Raises:
        ValueError: names both.
    """
    seen: dict[str, str] = {}
    for url, entry in zip(urls, listed):
        names = [
            without_secrets(url) if re.match("https?:", url) else url if is_remote(url) else os.path.realpath(url)
        ]
        names += [entry.sha256] if entry and entry.sha256 and entry.samples else []
        for name in names:
            if name in seen:
                raise ValueError(
                    f"--dataset_path names the same shard twice: {without_secrets(seen[name])} and"
                    f" {without_secrets(url)}. Its pairs would count twice in every epoch: leave one out."
                )
            seen[name] = url


def _listed(urls: tuple[str, ...]) -> list[Listed | None]:
    """The entry of each shard in the manifest beside it; None where there is no manifest.

    Raises:
        ValueError: a manifest is malformed, or does not list a shard that is beside it.
    """
    manifests = {manifest_url: read_listing(manifest_url) for manifest_url in dict.fromkeys(map(_manifest_url, urls))}
    listed = []
    for url in urls:
        manifest_url = _manifest_url(url)
        shards = manifests[manifest_url]
        if shards is not None and shard_name(url) not in shards:
            raise ValueError(
                f"{without_secrets(url)} is not in {without_secrets(manifest_url)}: convert the data again, or check the"
                " pattern."
            )
        listed.append(shards and shards[shard_name(url)])
    return listed


def _manifest_url(url: str) -> str:
    """Where the manifest is, if there is one: beside the shard, addressed in the same way."""
    before, _, after = url.rpartition(shard_name(url))
    return f"{before}{MANIFEST}{after}"


def read_listing(manifest_url: str) -> dict[str, Listed] | None:
    """The entries of a manifest, from this converter or another one, by the shard's name; None if there is none.

    Raises:
        ValueError: it is not a manifest of shards.
    """
    try:
        with open_url(manifest_url) as stream:
            content = stream.read()
            if isinstance(stream, Pipe):
                stream.wait_for_child()
    except OSError as error:
        logger.warning(f"No manifest can be read ({error}): every shard is read once to count its samples.")
        return None
    try:
        entries = json.loads(content)
        encodings = read_encodings(entries)
        return {shard["name"]: _read_entry(shard, encodings) for shard in entries["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{without_secrets(manifest_url)} is not a manifest of shards ({printable(repr(error))}): convert the data"
            " again."
        ) from error


def _read_entry(shard: dict, encodings: dict[str, Encoding]) -> Listed:
    name, samples, ties = printable(repr(shard["name"])), shard["samples"], shard.get("ties")
    if type(samples) is not int or not 0 <= samples <= MAX_SHARD_SAMPLES:
        raise ValueError(f"{name} has {printable(repr(samples))} samples")
    if ties is None and "labels" in shard and samples == shard["labels"]["jpg_0"] + shard["labels"]["jpg_1"]:
        ties = []
    if ties is not None and not (all(type(n) is int and 0 <= n < samples for n in ties) and ties == sorted(set(ties))):
        raise ValueError(f"{name} has ties at {printable(repr(ties))}")
    digest = shard.get("sha256")
    if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{name} has the checksum {printable(repr(digest))}")
    sizes = None if shard.get("sizes") is None else unpack_sizes(samples, shard["sizes"])
    return Listed(samples, ties, digest, encodings.get(shard.get("split")), sizes)
