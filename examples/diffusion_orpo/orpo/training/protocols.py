"""The two seams of training: what it needs of a model family, and of a source of pairs.

`models/latent_diffusion.py` is the base of all families. A dataset (`pairs/dataset.py`) and shards (`store/stream.py`) are the
sources.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from ..runtime.shapes import Shape


class NoiseProcess(Protocol):
    """Adds noise, and defines the prediction target."""

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """A timestep for each generator (B,)."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents (N, C, h, w) of latents and noise in that shape, at timesteps (N,)."""

    def target(
        self, latents_w: torch.Tensor, latents_l: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The prediction target (B, C, h, w): one for both images of a pair, or one each."""

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Weight of each pair (B,), or None for equal ones."""


class ModelFamily(Protocol):
    """A frozen pipeline with a LoRA in its denoiser.

    Attributes:
        name, license, tags: for the model card.
        lora_file: name of the file that `save_lora` writes.
        device: of its modules.
        denoiser: the module that trains.
        noise_process: of its training.
    """

    name: str
    license: str
    lora_file: str
    device: torch.device

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def denoiser(self) -> Any: ...

    @property
    def noise_process(self) -> NoiseProcess: ...

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images uint8 (N, 3, H, W) to the moments of normalised latents (N, 2C, h, w)."""

    def sample_latents(self, moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Latents (N, C, h, w) in float32, each drawn by its own generator from its moments."""

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of B prompts, by name; every tensor has B rows."""

    def predict(
        self,
        denoiser: Callable[..., Any],
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        batch: dict[str, Any],
    ) -> torch.Tensor:
        """The prediction of the denoiser, which may be wrapped, for 2B noisy latents, winners first (2B, C, h, w)."""

    def base_identity(self) -> dict[str, str]:
        """Identifies the base of this run's LoRA: its modules by content, and the prediction type."""

    def generating(self, prompts: list[str]) -> AbstractContextManager[Callable[..., list[Image]]]:
        """In the block, everything needed to generate images of these prompts is loaded.

        The block gets a function of prompts, seeds, steps, guidance scale, and height and width, that generates an image of
        each prompt.
        """

    def save_lora(self, directory: Path) -> None:
        """Writes the LoRA in diffusers' format."""

    def load_lora(self, directory: Path) -> None:
        """Reads what `save_lora` wrote."""

    def start_from_initial_lora(self) -> None:
        """Reads the LoRA of --init_lora_weights."""

    def save_for_other_programs(self, directory: Path) -> None:
        """Writes the LoRA of `save_lora` once more, for programs that don't read diffusers' metadata."""

    def inference_snippet(self, lora: str, prompt: str, steps: int, guidance_scale: float) -> str:
        """Python code that generates an image with the LoRA."""


class Batches(Protocol):
    """Endless batches of one process, which know where they are.

    Attributes:
        problems: how many samples were skipped, by kind, for the progress bar.
    """

    problems: dict[str, int]

    def __iter__(self) -> Iterator[dict]:
        """Batches as `collate_pairs` makes them: the B winners before the B losers."""

    @property
    def position(self) -> dict:
        """For the checkpoint: a resumed run continues with the next pair."""


class PairSource(Protocol):
    """Pairs to train on, and others to validate on."""

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all processes."""

    @property
    def is_encoded(self) -> bool:
        """Whether batches hold latents and embeddings, so that a run needs neither VAE nor text encoders."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the pairs do."""

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that pairs are trained in, the most frequent first."""

    def pairs_of(self, epochs: int, batch_size: int, seed: int, position: dict | None) -> int:
        """Pairs that a run, at a position now, has seen after this many epochs, with what fills the last batches."""

    def training_batches(
        self, batch_size: int, seed: int, position: dict | None, rank: int, world_size: int
    ) -> Batches:
        """Endless batches for one process, starting at a position; None is the start."""

    def held_out_batches(self, batch_size: int, rank: int, world_size: int) -> Iterable[dict] | None:
        """One process's share of the held-out pairs, once; None where there are none."""
