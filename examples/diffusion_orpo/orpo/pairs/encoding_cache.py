"""Latents and prompt embeddings of a whole data set, made once and kept in datasets' cache.

Each image is encoded once, however many pairs it appears in (once per shape, with aspect-ratio buckets), and so is each
prompt. The cache keeps the mean and log variance of the latents' distribution, so that each epoch samples new latents, as it
does without a cache.

The work is split into chunks that are cached separately: processes share them, and an interrupted run continues where
it stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from datasets import (
    Dataset,
    Features,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from safetensors.torch import load, save
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..runtime.libraries import LIBRARIES
from ..runtime.processes import on_main_process, wait_for_reading
from ..runtime.shapes import Shape
from ..runtime.signals import shield_worker
from .dataset import PreferenceData
from .image import DECODER
from .pair import TRANSFORM, PairTransform, crop_image, sample_seed
from .table import PreferencePairs


CHUNK = 512  # images or prompts: the most work that a process loses when it is stopped
WRITTEN_AT_ONCE = 16
FEATURES = Features(encoded=Value("large_binary"))  # the tensors of an image or of a prompt, as a safetensors file


class EncoderModel(Protocol):
    """The VAE and text encoders of a model."""

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images uint8 (B, 3, H, W) to moments (B, 2C, h, w)."""

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings by name, each with a row for each prompt."""


def cache_encodings(
    data: PreferenceData,
    accelerator: Accelerator,
    identify: Callable[[], dict[str, str]],
    load_model: Callable[[], EncoderModel],
    vae_batch_size: int,
    cache_dir: str | None,
) -> PreferenceData:
    """Encodes all images and prompts of a data set, or finds them in the cache. Every process must call it.

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
        OSError: the cache can't be written.
    """
    splits = [data.train] if data.held_out is None else [data.train, data.held_out]
    images = find_images(splits)
    prompts = list(dict.fromkeys(prompt for pairs in splits for prompt in pairs.prompts()))
    if data.transform.proportion_empty_prompts > 0 and "" not in prompts:
        prompts.append("")

    cache = ChunkCache(accelerator, cache_dir, [on_main_process(accelerator, identify), TRANSFORM, DECODER, LIBRARIES])
    encoder = Encoder(load_model, data.transform.shapes, vae_batch_size, data.num_workers)
    encodings = Encodings(
        images={
            flipped: cache.rows(
                "mirrored images" if flipped else "images",
                list(images),
                lambda chunk: encoder.encode_images([(images[item], item[1]) for item in chunk], flipped),
            )
            for flipped in ((False, True) if data.transform.random_flip else (False,))
        },
        image_rows={item: row for row, item in enumerate(images)},
        prompts=cache.rows("prompts", prompts, encoder.encode_prompts),
        prompt_rows={prompt: row for row, prompt in enumerate(prompts)},
    )
    return replace(data, encodings=encodings)


# Where an image was first found: the rows, the pair's index in them, and "winner" or "loser".
Place = tuple[PreferencePairs, int, str]
Item = tuple[bytes, int]  # an image's digest and its bucket: beside another image it may get another shape


def find_images(splits: list[PreferencePairs]) -> dict[Item, Place]:
    """All different images in the shapes that they are trained in, bucket by bucket."""
    images: dict[Item, Place] = {}
    for pairs in splits:
        for index, (digests, bucket) in enumerate(zip(pairs.digests.tolist(), pairs.buckets.tolist())):
            for side, digest in zip(("winner", "loser"), digests):
                images.setdefault((digest, bucket), (pairs, index, side))
    return dict(sorted(images.items(), key=lambda image: image[0][1]))


@dataclass
class Encoder:
    """Encodes images and prompts; the modules are loaded when they are first needed."""

    load_model: Callable[[], EncoderModel]
    shapes: tuple[Shape, ...]
    vae_batch_size: int
    num_workers: int

    @cached_property
    def model(self) -> EncoderModel:
        return self.load_model()

    def encode_images(self, places: list[tuple[Place, int]], flipped: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Encodes images, given with the number of their shape; those of a shape follow one another."""
        of_shapes = [list(group) for _, group in groupby(range(len(places)), key=lambda i: places[i][1])]
        size = self.vae_batch_size
        crops = DataLoader(
            CentreCrops(places, self.shapes, flipped),
            batch_sampler=[group[i : i + size] for group in of_shapes for i in range(0, len(group), size)],
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            generator=torch.Generator(),
        )
        for pixels, original_sizes, corners in crops:
            moments = self.model.encode_images(pixels.permute(0, 3, 1, 2)).cpu()
            for i in range(len(moments)):
                yield {"moments": moments[i], "original_sizes": original_sizes[i], "crop_top_lefts": corners[i]}

    def encode_prompts(self, prompts: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        for i in range(0, len(prompts), WRITTEN_AT_ONCE):
            batch = prompts[i : i + WRITTEN_AT_ONCE]
            embeds = {name: rows.cpu() for name, rows in self.model.encode_prompts(batch).items()}
            for j in range(len(batch)):
                yield {name: rows[j] for name, rows in embeds.items()}


@dataclass(frozen=True)
class CentreCrops(torch.utils.data.Dataset):
    """Images as they go into the VAE, with original size and crop."""

    places: list[tuple[Place, int]]
    shapes: tuple[Shape, ...]
    flipped: bool

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (pairs, index, side), bucket = self.places[i]
        encoded, where = getattr(pairs[index], side), f"{pairs.where(index)}, {side}"
        pixels, original_size, corner = crop_image(encoded, where, self.shapes[bucket], self.flipped)
        return pixels, torch.tensor(original_size), torch.tensor(corner)


@contextmanager
def one_bar_for_all() -> Iterator[None]:
    """Keeps datasets from drawing a progress bar for each chunk."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


@dataclass(frozen=True)
class ChunkCache:
    """Rows of tensors, made in chunks; in datasets' cache, their key is everything that they depend on.

    Attributes:
        accelerator: of the run; its processes share the work.
        cache_dir: of datasets; None for the default.
        key: everything that a row depends on, besides the item that it is made from.
    """

    accelerator: Accelerator
    cache_dir: str | None
    key: list

    def rows(self, name: str, items: list, encode: Callable[[list], Iterator[dict[str, torch.Tensor]]]) -> Dataset:
        """One row per item, made by `encode` where the cache has none."""
        chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
        own = chunks[self.accelerator.process_index :: self.accelerator.num_processes]
        is_shown = self.accelerator.is_local_main_process
        with one_bar_for_all(), tqdm(total=sum(map(len, own)), desc=f"Encoding {name}", disable=not is_shown) as bar:
            for chunk in own:
                self._chunk(name, chunk, encode)
                bar.update(len(chunk))
            wait_for_reading(self.accelerator)
            return concatenate_datasets([self._chunk(name, chunk, encode) for chunk in chunks])

    def _chunk(self, name: str, chunk: list, encode: Callable) -> Dataset:
        def generate() -> Iterator[dict[str, bytes]]:
            for tensors in encode(chunk):
                yield {"encoded": save({name: tensor.contiguous() for name, tensor in tensors.items()})}

        try:
            return Dataset.from_generator(
                generate,
                features=FEATURES,
                cache_dir=self.cache_dir,
                fingerprint=Hasher.hash([name, *self.key, chunk]),
                writer_batch_size=WRITTEN_AT_ONCE,
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error


@dataclass(frozen=True)
class Encodings:
    """All images and prompts of a data set, encoded.

    Attributes:
        images: their encodings, by whether they are mirrored.
        image_rows: row of each image in each shape that it has.
        prompts: their encodings.
        prompt_rows: row of each prompt.
    """

    images: dict[bool, Dataset]
    image_rows: dict[Item, int]
    prompts: Dataset
    prompt_rows: dict[str, int]

    def samples(self, pairs: PreferencePairs, transform: PairTransform, seed: int) -> "EncodedPairs":
        """The same pairs as `TransformedPairs`, under the same keys, with the same random choices."""
        buckets = zip(pairs.digests.tolist(), pairs.buckets.tolist())
        image_rows = np.array([[self.image_rows[digest, bucket] for digest in pair] for pair, bucket in buckets])
        prompt_rows = np.array([self.prompt_rows[prompt] for prompt in pairs.prompts()])
        empty_prompt_row = self.prompt_rows.get("")
        return EncodedPairs(self.images, image_rows, self.prompts, prompt_rows, empty_prompt_row, transform, seed)


@dataclass(frozen=True)
class EncodedPairs(torch.utils.data.Dataset):
    """Pairs by (epoch, index), from the cache."""

    images: dict[bool, Dataset]
    image_rows: np.ndarray
    prompts: Dataset
    prompt_rows: np.ndarray
    empty_prompt_row: int | None
    transform: PairTransform
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed = sample_seed(self.seed, epoch, index)
        flipped, _, is_empty = self.transform.draw(seed)
        images = [load(self.images[flipped][row]["encoded"]) for row in self.image_rows[index].tolist()]
        prompt_row = self.empty_prompt_row if is_empty else int(self.prompt_rows[index])
        sample = {name: torch.stack([image[name] for image in images]) for name in images[0]}
        return sample | {"embeds": load(self.prompts[prompt_row]["encoded"]), "seed": seed}
