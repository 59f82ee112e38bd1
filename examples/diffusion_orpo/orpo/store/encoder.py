"""The converter's actors with `--encode`: they put images through the VAE, and prompts through the text encoders.

Imported only where something is encoded, since torch and diffusers take memory that the converter's other tasks don't need.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load, save

from ..config import ModelConfig
from ..models.identity import encoding_identity
from ..models.registry import find_family
from ..pairs.bad_pair import BadPair
from ..pairs.buckets import assign
from ..pairs.image import open_image, upright_size
from ..pairs.pair import crop_image
from ..runtime.cores import num_cores
from ..runtime.libraries import LIBRARIES
from ..runtime.precision import DTYPES
from .manifest import Encoding
from .plan import EncodingJob


PROMPTS_KEPT = 64  # embeddings of SDXL are 0.3 MB each, of FLUX.1 4 MB; rows with the same prompt are close together


def plan_encoding(config: ModelConfig) -> EncodingJob:
    """Checks that the model can encode, and identifies its encodings.

    Raises:
        ValueError: the model can't be used.
    """
    family = find_family(config).load_class()
    family.check(config)
    precision = config.mixed_precision or "no"
    return EncodingJob(family, config, precision, encoding_identity(family, config, DTYPES[precision]))


def describe(job: EncodingJob, encoded: bytes) -> Encoding:
    """The manifest's entry for an encoding, given one sample's `encoded.safetensors`."""
    values = load(encoded)
    tensors = {name: (_name(value.dtype), tuple(value.shape)) for name, value in sorted(values.items())}
    shapes, moments = job.options.shapes, ()
    if len(shapes) > 1:
        channels, height, _ = values["moments_0"].shape
        own = shapes[assign(values["original_sizes"].numpy()[None], shapes).buckets[0]]
        downscale = own[0] // height
        moments = tuple((channels, height // downscale, width // downscale) for height, width in shapes)
    return Encoding(job.identity, LIBRARIES, tensors, moments)


class RowEncoder:
    """Turns the members of plain samples into those of encoded ones.

    Attributes:
        batch_rows: how many rows it takes at a time.
    """

    def __init__(self, job: EncodingJob) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(num_cores())  # Ray sets it to 1
        self.model = job.family.load(job.options, device, DTYPES[job.precision], denoiser=False)
        self.shapes = job.options.shapes
        self.batch_rows = max(1, job.options.vae_encode_batch_size // 2)
        self.embeds = lru_cache(PROMPTS_KEPT)(self._embeds)

    def encode(self, rows: list[tuple[str, dict[str, bytes]]]) -> Iterator[dict[str, bytes] | BadPair]:
        """Encodes a batch of rows.

        Args:
            rows: the name of each row, for errors, and its members: two images, prompt and labels.

        Yields:
            For each row, labels and prompt as they were and `encoded.safetensors`; or what is wrong with it.
        """
        crops = [self._crops(where, members) for where, members in rows]
        moments = self._moments(crops)
        for (where, members), crop, of_images in zip(rows, crops, moments):
            if isinstance(crop, BadPair):
                yield crop
                continue
            _, original_sizes, corners = crop
            tensors = {
                "moments_0": of_images[0],
                "moments_1": of_images[1],
                "original_sizes": torch.tensor(original_sizes),
                "crop_top_lefts": torch.tensor(corners),
            } | {
                f"embeds.{name}": value for name, value in self.embeds(members["original_prompt.txt"].decode()).items()
            }
            bad = [name for name, value in tensors.items() if not value.isfinite().all()]
            if bad:
                problem = f"{' and '.join(bad)} hold values that are not finite"
                yield BadPair("bad encoding", problem, where, "Is there a VAE for this precision?")
                continue
            texts = {name: content for name, content in members.items() if name.endswith(".txt")}
            yield texts | {"encoded.safetensors": save({name: value.contiguous() for name, value in tensors.items()})}

    def _crops(self, where: str, members: dict[str, bytes]) -> tuple | BadPair:
        """Pixels, original sizes and corners of the crops of both images."""
        images = [members[name] for name in sorted(members) if name.startswith("jpg_")]
        try:
            sizes = np.array([[upright_size(open_image(image, where)) for image in images]])
            shape = self.shapes[assign(sizes, self.shapes).buckets[0]]
            return tuple(zip(*(crop_image(image, f"{where}: jpg_{i}", shape) for i, image in enumerate(images))))
        except BadPair as bad:
            return bad

    def _moments(self, crops: list[tuple | BadPair]) -> list[torch.Tensor | None]:
        """Of each row the moments of both images; those of a shape are encoded together."""
        moments: list[torch.Tensor | None] = [None] * len(crops)
        rows_of: dict[torch.Size, list[int]] = {}
        for row, crop in enumerate(crops):
            if not isinstance(crop, BadPair):
                rows_of.setdefault(crop[0][0].shape, []).append(row)
        for rows in rows_of.values():
            pixels = torch.stack([image for row in rows for image in crops[row][0]]).permute(0, 3, 1, 2)
            for row, of_images in zip(rows, self.model.encode_images(pixels).cpu().unflatten(0, (-1, 2))):
                moments[row] = of_images
        return moments

    def _embeds(self, prompt: str) -> dict[str, torch.Tensor]:
        return {name: rows[0].cpu() for name, rows in self.model.encode_prompts([prompt]).items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
