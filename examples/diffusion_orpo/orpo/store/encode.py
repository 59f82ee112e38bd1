"""Encodes pairs: latents in place of images, embeddings in place of the prompt. For the converter, and for --cache_latents.

Both write the same samples into the same archives. The cache is a folder of shards, each of them named by the pairs in it, so
an encoding that was stopped goes on, and one of more pairs begins with those that are there. Mean and log variance of the
latents' distribution are kept, so that each epoch samples new latents, as it does without a cache.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load, load_file, save
from tqdm.auto import tqdm

from ..pairs.bad_pair import BadPair
from ..pairs.buckets import assign
from ..pairs.dataset import PreferenceData
from ..pairs.image import DECODER, open_image, upright_size
from ..pairs.pair import TRANSFORM, PairTransform, crop_image, sample_seed
from ..pairs.table import PreferencePairs
from ..runtime.cores import num_cores
from ..runtime.durable import rename, written_whole
from ..runtime.libraries import LIBRARIES
from ..runtime.processes import on_main_process, wait_for_reading
from ..runtime.shapes import Shape
from .sample import ENCODED, Encoding, read_encoded
from .tar import add_sample, read_at


PROMPTS_KEPT = 64  # embeddings of SDXL are 0.3 MB each, of FLUX.1 4 MB; rows with the same prompt are close together
IMAGES_KEPT = 64  # moments of SDXL are 0.5 MB each; pairs of the same images, as of ranked ones, are close together
PAIRS_PER_SHARD = 256  # of the cache: the most work that a process loses when it is stopped
EMPTY_PROMPT = "empty_prompt.safetensors"


class EncoderModel(Protocol):
    """The VAE and text encoders of a model."""

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images uint8 (B, 3, H, W) to moments (B, 2C, h, w)."""

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings by name, each with a row for each prompt."""


@dataclass(frozen=True)
class EncodingJob:
    """How pairs are encoded.

    Attributes:
        load_model: loads VAE and text encoders; called where something is encoded.
        identity: everything that an encoding depends on.
        shapes: that images are cropped to.
        vae_batch_size: images that the VAE encodes at once.
        mirrored: whether images are encoded mirrored, too.
    """

    load_model: Callable[[], EncoderModel]
    identity: dict[str, str]
    shapes: tuple[Shape, ...]
    vae_batch_size: int
    mirrored: bool = False


Item = tuple[bytes, Shape, bool]  # an image's digest, its shape, and whether it is mirrored


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is trained on.

    Attributes:
        moments: (2C, h, w); pixels uint8 (H, W, 3) before it is encoded.
        original_size, corner: height and width of the file's image, and top and left of the crop.
    """

    moments: torch.Tensor
    original_size: tuple[int, int]
    corner: tuple[int, int]


class PairEncoder:
    """Turns the members of plain samples into those of encoded ones.

    Attributes:
        job: what it does.
        batch_rows: how many rows it takes at a time.
    """

    def __init__(self, job: EncodingJob) -> None:
        self.job, self.batch_rows = job, max(1, job.vae_batch_size // 2)
        self.embeds = lru_cache(PROMPTS_KEPT)(self._embeds)
        self._kept: dict[Item, EncodedImage] = {}
        self._pool = ThreadPoolExecutor(num_cores(), "decoder")

    @cached_property
    def model(self) -> EncoderModel:
        return self.job.load_model()

    def start_shard(self) -> None:
        """Forgets the images of other shards: those that are encoded together decide the last digits."""
        self._kept = {}

    def encode(self, rows: list[tuple[str, dict[str, bytes]]]) -> Iterator[dict[str, bytes] | BadPair]:
        """Encodes a batch of rows.

        Args:
            rows: the name of each row, for errors, and its members: two images, prompt and labels.

        Yields:
            For each row, labels and prompt as they were and `encoded.safetensors`; or what is wrong with it.
        """
        crops = list(self._pool.map(self._crop_pair, rows))
        images = self._encode_images(
            {item: image for of_row in crops if not isinstance(of_row, BadPair) for _, item, image in of_row}
        )
        for (where, members), of_row in zip(rows, crops):
            if isinstance(of_row, BadPair):
                yield of_row
                continue
            found = {name: images[item] for name, item, _ in of_row}
            pair = [found["moments_0"], found["moments_1"]]
            tensors = {name: image.moments for name, image in found.items()} | {
                "original_sizes": torch.tensor([image.original_size for image in pair]),
                "crop_top_lefts": torch.tensor([image.corner for image in pair]),
            }
            prompt = self.embeds(members["original_prompt.txt"].decode())
            tensors |= {f"embeds.{name}": value for name, value in prompt.items()}
            bad = [name for name, value in tensors.items() if not value.isfinite().all()]
            if bad:
                problem = f"{' and '.join(bad)} hold values that are not finite"
                yield BadPair("bad encoding", problem, where, "Is there a VAE for this precision?")
                continue
            texts = {name: content for name, content in members.items() if name.endswith(".txt")}
            yield texts | {ENCODED: save({name: value.contiguous() for name, value in tensors.items()})}

    def _crop_pair(self, row: tuple[str, dict[str, bytes]]) -> list[tuple[str, Item, EncodedImage]] | BadPair:
        """The name of each of a row's encodings, what it is of, and the crop, or the encoding where that is known."""
        where, members = row
        images = [members[name] for name in sorted(members) if name.startswith("jpg_")]
        try:
            sizes = np.array([[upright_size(open_image(image, where)) for image in images]])
            shape = self.job.shapes[assign(sizes, self.job.shapes).buckets[0]]
            found = []
            for mirrored in (False, True) if self.job.mirrored else (False,):
                for number, image in enumerate(images):
                    item = hashlib.blake2b(image, digest_size=16).digest(), shape, mirrored
                    known = self._kept.get(item)
                    crop = known or EncodedImage(*crop_image(image, f"{where}: jpg_{number}", shape, mirrored))
                    found.append((f"{'mirrored' if mirrored else 'moments'}_{number}", item, crop))
            return found
        except BadPair as bad:
            return bad

    def _encode_images(self, crops: dict[Item, EncodedImage]) -> dict[Item, EncodedImage]:
        """The encodings; those of a shape are made together."""
        found = {item: image for item, image in crops.items() if item in self._kept}
        new: dict[Shape, list[Item]] = {}
        for item in [item for item in crops if item not in found]:
            new.setdefault(item[1], []).append(item)
        for items in new.values():
            pixels = torch.stack([crops[item].moments for item in items]).permute(0, 3, 1, 2)
            for item, moments in zip(items, self.model.encode_images(pixels).cpu()):
                found[item] = replace(crops[item], moments=moments)
        self._kept = dict(list((self._kept | found).items())[-IMAGES_KEPT:])
        return found

    def _embeds(self, prompt: str) -> dict[str, torch.Tensor]:
        return {name: rows[0].cpu() for name, rows in self.model.encode_prompts([prompt]).items()}


def describe(job: EncodingJob, encoded: bytes) -> Encoding:
    """What all samples of an encoding hold, given `encoded.safetensors` of one."""
    values = load(encoded)
    tensors = {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in sorted(values.items())
    }
    moments = ()
    if len(job.shapes) > 1:
        channels, height, _ = values["moments_0"].shape
        own = job.shapes[assign(values["original_sizes"].numpy()[None], job.shapes).buckets[0]]
        downscale = own[0] // height
        moments = tuple((channels, height // downscale, width // downscale) for height, width in job.shapes)
    return Encoding(job.identity, LIBRARIES, tensors, moments)


def cache_encodings(
    data: PreferenceData,
    accelerator: Accelerator,
    identify: Callable[[], dict[str, str]],
    load_model: Callable[[], EncoderModel],
    vae_batch_size: int,
    cache_dir: str | None,
) -> PreferenceData:
    """Encodes all pairs of a dataset, or finds them in the cache. Every process must call it.

    Args:
        data: the pairs.
        accelerator: of the run.
        identify: returns everything that encodings depend on, besides the pairs.
        load_model: loads the encoders. It is called only if something must be encoded, and the model is freed before this
            returns.
        vae_batch_size: images that the VAE encodes at once.
        cache_dir: of datasets; None for the default.

    Returns:
        The same pairs, in batches that hold `moments` and `embeds`.

    Raises:
        BadPair: an encoding is not finite.
        OSError: the cache can't be written.
    """
    transform = data.transform
    job = EncodingJob(
        load_model,
        on_main_process(accelerator, identify),
        transform.shapes,
        vae_batch_size,
        transform.random_flip,
    )
    key = [job.identity, job.mirrored, TRANSFORM, DECODER, LIBRARIES]
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "encodings", _hash(json.dumps(key).encode()))
    on_main_process(accelerator, lambda: root.mkdir(parents=True, exist_ok=True))
    chunks = _chunks([data.train] if data.held_out is None else [data.train, data.held_out])
    paths = [root / f"{_name_of(chunk)}.tar" for chunk in chunks]
    own = list(dict(zip(paths, chunks)).items())[accelerator.process_index :: accelerator.num_processes]
    encoder, is_shown = PairEncoder(job), accelerator.is_local_main_process
    with tqdm(total=sum(len(chunk) for _, chunk in own), desc="Encoding pairs", disable=not is_shown) as bar:
        for path, chunk in own:
            if not path.exists():
                _write_shard(path, chunk, encoder)
            bar.update(len(chunk))
    empty_prompt = root / EMPTY_PROMPT if transform.proportion_empty_prompts > 0 else None
    if empty_prompt and accelerator.is_main_process and not empty_prompt.exists():
        with written_whole(empty_prompt) as partial:
            partial.write_bytes(save({name: value.contiguous() for name, value in encoder.embeds("").items()}))
    del encoder
    wait_for_reading(accelerator)
    encodings = CachedEncodings(
        describe(job, read_at(str(paths[0]), 0)[ENCODED]),
        load_file(empty_prompt) if empty_prompt else None,
        np.array([rows.numbers[index] for chunk in chunks for rows, index, _ in chunk]),
        tuple(map(str, paths)),
    )
    return replace(data, encodings=encodings)


Place = tuple[PreferencePairs, int, str]  # the rows, a pair's index in them, and its prompt


def _chunks(splits: list[PreferencePairs]) -> list[list[Place]]:
    """All pairs in the order of the table, whichever are held out, in parts that are a shard each."""
    pairs = [(rows, index, prompt) for rows in splits for index, prompt in enumerate(rows.prompts())]
    pairs.sort(key=lambda place: place[0].numbers[place[1]])
    return [pairs[i : i + PAIRS_PER_SHARD] for i in range(0, len(pairs), PAIRS_PER_SHARD)]


def _name_of(chunk: list[Place]) -> str:
    """Changes with the pairs' images, shapes and prompts."""
    pairs = [[rows.digests[index].tobytes().hex(), int(rows.buckets[index]), prompt] for rows, index, prompt in chunk]
    return _hash(json.dumps(pairs).encode())


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _write_shard(path: Path, chunk: list[Place], encoder: PairEncoder) -> None:
    """Writes the encodings of some pairs, the winner first; another process may do the same."""
    own = path.with_suffix(f".{os.getpid()}")
    encoder.start_shard()
    with written_whole(own) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(0, len(chunk), encoder.batch_rows):
            batch = chunk[start : start + encoder.batch_rows]
            for ordinal, members in enumerate(encoder.encode([_as_sample(*place) for place in batch]), start):
                if isinstance(members, BadPair):
                    raise members
                add_sample(tar, f"{ordinal:04d}", members)
    rename(own, path)


def _as_sample(rows: PreferencePairs, index: int, prompt: str) -> tuple[str, dict[str, bytes]]:
    pair = rows[index]
    members = {"jpg_0.jpg": pair.winner, "jpg_1.jpg": pair.loser, "label_0.txt": b"1"}
    return rows.where(index), members | {"original_prompt.txt": prompt.encode()}


@dataclass(frozen=True)
class CachedEncodings:
    """All pairs of a dataset, encoded.

    Attributes:
        encoding: what each of them holds.
        empty_prompt: its embeddings, where prompts may be empty.
        numbers: of the pairs, rising.
        paths: of the shards, which hold `PAIRS_PER_SHARD` of them each.
    """

    encoding: Encoding
    empty_prompt: dict[str, torch.Tensor] | None
    numbers: np.ndarray
    paths: tuple[str, ...]

    def find(self, number: int) -> tuple[str, int]:
        """The shard of a pair, and its place in it."""
        shard, ordinal = divmod(int(np.searchsorted(self.numbers, number)), PAIRS_PER_SHARD)
        return self.paths[shard], ordinal

    def samples(self, pairs: PreferencePairs, transform: PairTransform, seed: int) -> "EncodedPairs":
        """The same pairs as `TransformedPairs`, under the same keys, with the same random choices."""
        return EncodedPairs(self, pairs, transform, seed)


@dataclass(frozen=True)
class EncodedPairs(torch.utils.data.Dataset):
    """Pairs by (epoch, index), from the cache."""

    encodings: CachedEncodings
    pairs: PreferencePairs
    transform: PairTransform
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed, bucket = sample_seed(self.seed, epoch, index), int(self.pairs.buckets[index])
        path, ordinal = self.encodings.find(self.pairs.numbers[index])
        members = read_at(path, ordinal)
        try:
            if members is None:
                raise BadPair("unreadable", "the shard ends before it")
            return read_encoded(
                self.encodings.encoding, members, bucket, self.transform, seed, self.encodings.empty_prompt
            )
        except BadPair as bad:
            raise ValueError(
                f"{path}, sample {ordinal}: {bad.problem}. Delete the file: it is encoded again."
            ) from bad
