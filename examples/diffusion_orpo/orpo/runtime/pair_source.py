"""A source of pairs as training needs it: a dataset (`data/dataset.py`) or shards (`store/stream.py`)."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from .shapes import Shape


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
